"""ANLS and exact match: an answer as a string."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


def normalize(text: str) -> str:
    """Lower case, no space at the ends, single spaces inside."""
    return " ".join(text.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (ANLS) of one prediction: that to the closest answer.

    The similarity is 1 - edits / length of the longer string, and zero below 0.5. Implementations differ in
    quirks that move published numbers; this one agrees with the package `anls-star`:
      - a similarity of exactly 0.5 is kept ("ab" for "ac" scores 0.5; the package `anls` says 0);
      - lengths are those after normalisation (`lmms-eval` divides by raw lengths: added spaces help);
      - `lower`, not `casefold`; accents and punctuation count;
      - two empty strings are equal, and score 1.

    Raises:
      ValueError: `answers` is empty.
    """
    normal = normalize(prediction)
    best = max(Levenshtein.normalized_similarity(normal, normalize(answer)) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals one of the answers after the normalisation of `anls`, else 0.0."""
    return float(normalize(prediction) in map(normalize, answers))
