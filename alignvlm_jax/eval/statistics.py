"""What scores of many questions are made of, so that parts of a benchmark can be added up."""

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Statistics:
    """By score: a sum over questions, and the sum of their weights. Of two parts of a benchmark, as two hosts have
    them, the sum is that of the whole.

    A question usually adds its score and 1. F1 adds counts (`scores.fields`), VCR one for each covered text.
    """

    sums: Mapping[str, float]
    weights: Mapping[str, float]

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(_added(self.sums, other.sums), _added(self.weights, other.weights))

    def score(self, name: str) -> float | None:
        """Returns a score, None where no question counts."""
        return self.sums[name] / self.weights[name] if self.weights.get(name) else None


def total(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Statistics:
    """Returns the statistics of questions, each given by its (sum, weight) of every score; none have an empty one."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + weight
    return Statistics(sums, weights)


def _added(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: ours.get(name, 0.0) + theirs.get(name, 0.0) for name in sorted({*ours, *theirs})}
