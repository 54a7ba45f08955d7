"""Sums of the scores of questions, which add up over the parts of a benchmark."""

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the questions of a benchmark, from which its scores follow.

    The statistics of two parts of a benchmark, as two hosts have them, add up to those of the
    whole. A question usually adds its score and a weight of 1; F1 adds counts
    (`scores.text.field_f1`), VCR a weight of 1 for each covered text. A score of several parts, as
    the splits of a benchmark are, has an entry `NAME/PART` for each.

    Attributes:
      sums: sum over questions, by name of the score.
      weights: sum of the questions' weights, by name of the score.
    """

    sums: Mapping[str, float]
    weights: Mapping[str, float]

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(_added(self.sums, other.sums), _added(self.weights, other.weights))

    def score(self, name: str) -> float | None:
        """Returns the score of this name: the mean over its parts if it has any; None if no
        question counts for it."""
        if self.weights.get(name):
            return self.sums[name] / self.weights[name]
        # Each part counts alike, however many questions it has.
        found = [self.score(part) for part in self.parts(name)]
        return sum(found) / len(found) if found else None

    def parts(self, name: str) -> list[str]:
        """Returns the names `NAME/PART` of the parts of a score that questions count for."""
        return [
            part for part, weight in self.weights.items() if part.startswith(f"{name}/") and weight
        ]


def total(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Statistics:
    """Returns the statistics of questions, each given as (sum, weight) by name of the score."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + weight
    return Statistics(sums, weights)


def _added(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums of the values of two mappings, by key; a missing value counts as 0."""
    return {name: ours.get(name, 0.0) + theirs.get(name, 0.0) for name in sorted({*ours, *theirs})}
