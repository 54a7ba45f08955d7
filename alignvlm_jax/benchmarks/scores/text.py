"""Scores of answers that are texts.

They are ANLS, exact match, covered texts (VCR), facts (TabFact), and the F1 of form fields.
"""

import difflib
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


def normalize(text: str) -> str:
    """Returns a text in lower case, with single spaces inside and none at the ends."""
    return " ".join(text.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Returns the normalised Levenshtein similarity of a prediction to the closest answer.

    Its mean over questions is the ANLS (Biten et al. 2019). The similarity is 1 - edits / length of
    the longer string, and zero below 0.5. Implementations differ in quirks that move published
    numbers; this one agrees with the package `anls-star`:
      - a similarity of exactly 0.5 is kept ("ab" for "ac" scores 0.5; the package `anls` says 0);
      - lengths are those after normalisation (`lmms-eval` divides by raw lengths: added spaces
        help);
      - `lower`, not `casefold`; accents and punctuation count;
      - two empty strings are equal, and score 1.

    Raises:
      ValueError: `answers` is empty.
    """
    normal = normalize(prediction)
    # rapidfuzz divides by the length of the longer string, and takes two empty ones for equal.
    best = max(Levenshtein.normalized_similarity(normal, normalize(answer)) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction equals one of the answers after `normalize`, else 0.0."""
    return float(normalize(prediction) in map(normalize, answers))


def character_errors(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """Returns the edit distance of a prediction to the closest answer, and that one's length, in
    characters, with single spaces for all white space; case counts.

    The character error rate of questions is the sum of the first over that of the second, which may
    exceed 1.

    Raises:
      ValueError: `answers` is empty.
    """
    told = " ".join(prediction.split())
    references = [" ".join(answer.split()) for answer in answers]
    pairs = [(Levenshtein.distance(told, reference), len(reference)) for reference in references]
    # Closest in relation to its length; an empty answer has none, and every edit is too much.
    return min(pairs, key=lambda pair: pair[0] / max(pair[1], 1))


# "sorry" in upper or lower case, "I can't" only as it is spelled here.
REFUSAL = re.compile("I can't|I cannot|(?i:sorry)")
# Words, and single marks of punctuation.
TOKEN = re.compile(r"\w+|[^\w\s]")


def covered_exact_match(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Returns the number of covered texts that a prediction restores, and the number of them.

    The covered texts of the image are `answers` (VCR, arXiv 2406.06462). Each is compared with the
    run of as many tokens of the prediction that resembles it most. Quirks:
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
    """Returns the sum of the Jaccard indices of the covered texts, and the number of them.

    The Jaccard index of a text is that of two sets of tokens, its own and those of the run that
    resembles it most, as in `covered_exact_match`.

    Raises:
      ValueError: `answers` is empty.
    """
    # `or 1`: a covered text without any token has an empty union, and scores 0.
    pairs = [(set(run), set(wanted)) for run, wanted in _best_runs(prediction, answers)]
    return sum(len(run & wanted) / (len(run | wanted) or 1) for run, wanted in pairs), float(
        len(pairs)
    )


def _best_runs(prediction: str, answers: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Returns, for each covered text, the tokens of the closest run of the prediction and its own.

    The closest run is empty if no run shares a token with the text.

    Raises:
      ValueError: `answers` is empty.
    """
    if not answers:
        raise ValueError("no answers")
    tokens = [] if REFUSAL.search(prediction) else TOKEN.findall(prediction)
    return [(_best_run(tokens, answer), TOKEN.findall(answer)) for answer in answers]


def _best_run(tokens: list[str], answer: str) -> list[str]:
    """Returns the run of tokens, as long as the answer, that resembles it most."""
    wanted = TOKEN.findall(answer)
    runs = [tokens[at : at + len(wanted)] for at in range(len(tokens) - len(wanted) + 1)]
    # SequenceMatcher takes time that is quadratic in the text: most runs are ruled out before.
    runs = [run for run in runs if not set(wanted).isdisjoint(run)]
    return max(
        runs,
        key=lambda run: difflib.SequenceMatcher(None, " ".join(run), answer).ratio(),
        default=[],
    )


# What data sets and models write for the two verdicts on a statement.
TRUE = {"true", "yes", "entailed", "1"}
FALSE = {"false", "no", "refuted", "0"}


def fact_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction and one of the answers give a statement the same verdict.

    Data sets write a positive verdict as true, yes or 1. Quirks: words around the verdict do not
    matter (DUE compares strings: "Yes." for "yes" is wrong there), and a prediction with both
    verdicts, or neither, is wrong. TableVQA-Bench searches for the letters "true" and "false"
    instead, and finds them in "untrue" as well.

    Raises:
      ValueError: `answers` is empty.
    """
    predicted = verdict(prediction)
    return max(float(predicted is not None and predicted == verdict(answer)) for answer in answers)


def verdict(text: str) -> bool | None:
    """Returns whether a text calls a statement true; None if it says both or neither."""
    words = set(re.findall(r"\w+", text.lower()))
    is_true = bool(words & TRUE)
    is_false = bool(words & FALSE)
    return is_true if is_true != is_false else None


EMPTY = ("", "NONE")
"""The answers, in upper case, that mean that a document does not have the field."""


def field_f1(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Returns the counts that one field of a document adds to F1, as the evaluator of DUE has it.

    The counts are (2 x hits, values predicted + values wanted). The F1 of many fields is the sum of
    the first over the sum of the second; it is not the mean of the fields' own.

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
    # One value predicted and one wanted at most: F1 = 2 hits / (predicted + wanted), in sums.
    predicted, *wanted = (text.strip().upper() for text in (prediction, *answers))
    is_predicted = predicted not in EMPTY
    is_wanted = any(value not in EMPTY for value in wanted)
    is_hit = is_predicted and predicted in wanted
    return 2.0 * is_hit, float(is_predicted + is_wanted)
