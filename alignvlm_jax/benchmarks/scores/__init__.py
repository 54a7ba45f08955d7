"""Scores of a prediction against the accepted answers of a question, between 0 and 1, and the
character errors of a transcription.

Each family of scores is a module. TEDS is not among them, because no benchmark here has tables as
HTML for answers.
"""

from alignvlm_jax.benchmarks.scores.text import anls, character_errors, exact_match, normalize

__all__ = ["SCORER_VERSION", "anls", "character_errors", "exact_match", "normalize"]

SCORER_VERSION = "anls-keep-0.5/1"
"""Version of `anls` and `exact_match`, which stands in the header of the predictions on a split.

Raise it when the score of any answer changes.
"""
