"""VCR: the covered texts of an image, found in one answer."""

import difflib
import re
from collections.abc import Sequence

REFUSAL = re.compile("I can't|I cannot|(?i:sorry)")
TOKEN = re.compile(r"\w+|[^\w\s]")


def covered_exact_match(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """How many of the covered texts, which `answers` are, the prediction restores, and how many there are (VCR,
    arXiv 2406.06462).

    Each is sought on its own, in the run of as many tokens of the prediction that resembles it most. Quirks:
      - what is said around it does not matter, nor which of the covered texts comes first;
      - only runs that share a token with the text are looked at; of equally good ones the first counts;
      - case, accents and punctuation count;
      - a prediction that apologises ("sorry", "I cannot") scores 0.
    The reference splits by a model of spaCy, which takes "don't" for two tokens where words and marks are three here:
    exact matches are the same, Jaccard can differ.

    Raises:
      ValueError: `answers` is empty.
    """
    pairs = _best_runs(prediction, answers)
    return float(sum(run == wanted for run, wanted in pairs)), float(len(pairs))


def covered_jaccard(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """As `covered_exact_match`, with the share of tokens in common (intersection over union, as sets) of each text."""
    pairs = [(set(run), set(wanted)) for run, wanted in _best_runs(prediction, answers)]
    return sum(len(run & wanted) / (len(run | wanted) or 1) for run, wanted in pairs), float(len(pairs))


def _best_runs(prediction: str, answers: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """For each covered text the run of the prediction that is closest to it, none where there is none, and its own
    tokens."""
    if not answers:
        raise ValueError("no answers")
    tokens = [] if REFUSAL.search(prediction) else TOKEN.findall(prediction)
    return [(_best_run(tokens, answer), TOKEN.findall(answer)) for answer in answers]


def _best_run(tokens: list[str], answer: str) -> list[str]:
    wanted = TOKEN.findall(answer)
    runs = [tokens[at : at + len(wanted)] for at in range(len(tokens) - len(wanted) + 1)]
    runs = [run for run in runs if not set(wanted).isdisjoint(run)]
    return max(runs, key=lambda run: difflib.SequenceMatcher(None, " ".join(run), answer).ratio(), default=[])
