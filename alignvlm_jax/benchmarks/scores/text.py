"""Answers as text: ANLS, exact match, covered texts (VCR), facts (TabFact), and the F1 of form
fields."""

import difflib
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


def normalize(text: str) -> str:
    """Lower case, no space at the ends, single spaces inside."""
    return " ".join(text.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (ANLS) of one prediction: that to the closest
    answer.

    The similarity is 1 - edits / length of the longer string, and zero below 0.5. Implementations
    differ in quirks that move published numbers; this one agrees with the package `anls-star`:
      - a similarity of exactly 0.5 is kept ("ab" for "ac" scores 0.5; the package `anls` says 0);
      - lengths are those after normalisation (`lmms-eval` divides by raw lengths: added spaces
        help);
      - `lower`, not `casefold`; accents and punctuation count;
      - two empty strings are equal, and score 1.

    Raises:
      ValueError: `answers` is empty.
    """
    normal = normalize(prediction)
    best = max(Levenshtein.normalized_similarity(normal, normalize(answer)) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals one of the answers after the normalisation of `anls`, else
    0.0."""
    return float(normalize(prediction) in map(normalize, answers))


REFUSAL = re.compile("I can't|I cannot|(?i:sorry)")
TOKEN = re.compile(r"\w+|[^\w\s]")


def covered_exact_match(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """How many of the covered texts, which `answers` are, the prediction restores, and how many
    there are (VCR, arXiv 2406.06462).

    Each is sought on its own, in the run of as many tokens of the prediction that resembles it
    most. Quirks:
      - what is said around it does not matter, nor which of the covered texts comes first;
      - only runs that share a token with the text are looked at; of equally good ones the first
        counts;
      - case, accents and punctuation count;
      - a prediction that apologises ("sorry", "I cannot") scores 0.
    The reference splits by a model of spaCy, which takes "don't" for two tokens where words and
    marks are three here: exact matches are the same, Jaccard can differ.

    Raises:
      ValueError: `answers` is empty.
    """
    pairs = _best_runs(prediction, answers)
    return float(sum(run == wanted for run, wanted in pairs)), float(len(pairs))


def covered_jaccard(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """As `covered_exact_match`, with the fraction of tokens in common (intersection over union, as
    sets) of each text."""
    pairs = [(set(run), set(wanted)) for run, wanted in _best_runs(prediction, answers)]
    return sum(len(run & wanted) / (len(run | wanted) or 1) for run, wanted in pairs), float(
        len(pairs)
    )


def _best_runs(prediction: str, answers: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """For each covered text the run of the prediction that is closest to it, none where there is
    none, and its own tokens."""
    if not answers:
        raise ValueError("no answers")
    tokens = [] if REFUSAL.search(prediction) else TOKEN.findall(prediction)
    return [(_best_run(tokens, answer), TOKEN.findall(answer)) for answer in answers]


def _best_run(tokens: list[str], answer: str) -> list[str]:
    wanted = TOKEN.findall(answer)
    runs = [tokens[at : at + len(wanted)] for at in range(len(tokens) - len(wanted) + 1)]
    runs = [run for run in runs if not set(wanted).isdisjoint(run)]
    return max(
        runs,
        key=lambda run: difflib.SequenceMatcher(None, " ".join(run), answer).ratio(),
        default=[],
    )


TRUE = {"true", "yes", "entailed", "1"}
FALSE = {"false", "no", "refuted", "0"}


def fact_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction says of a statement what one of the answers says: data sets write
    true, yes or 1.

    Quirks: words around the verdict do not matter (DUE compares strings: "Yes." for "yes" is wrong
    there), and who says both, or neither, is wrong. TableVQA-Bench looks for the letters "true" and
    "false" instead: in "untrue" as well.

    Raises:
      ValueError: `answers` is empty.
    """
    predicted = verdict(prediction)
    return max(float(predicted is not None and predicted == verdict(answer)) for answer in answers)


def verdict(text: str) -> bool | None:
    """Returns what a text says of a statement, None where that is not clear."""
    words = set(re.findall(r"\w+", text.lower()))
    is_true = bool(words & TRUE)
    is_false = bool(words & FALSE)
    return is_true if is_true != is_false else None


EMPTY = ("", "NONE")
"""How a document without the field is answered."""


def field_f1(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """What one field of a document adds to F1, as the evaluator of DUE counts: (2 x hits, values
    predicted + values wanted). The F1 of many fields is the ratio of the sums of both; it is not
    the mean of theirs.

    `answers` are spellings of one value. Quirks:
      - case does not matter, anything else does: "$1,200.00" for "1200.00" is wrong;
      - empty values and "None" are no values: (0, 0) where nothing is wanted and nothing predicted;
      - a wrong value is two mistakes, one predicted and one missed, a missing one is one: saying
        nothing is safer;
      - white space at the ends is stripped, which DUE leaves to whoever writes its files.

    Raises:
      ValueError: `answers` is empty; a field that is not in the document has the answer "None".
    """
    if not answers:
        raise ValueError("no answers")
    predicted, *wanted = (text.strip().upper() for text in (prediction, *answers))
    is_predicted = predicted not in EMPTY
    is_wanted = any(value not in EMPTY for value in wanted)
    is_hit = is_predicted and predicted in wanted
    return 2.0 * is_hit, float(is_predicted + is_wanted)
