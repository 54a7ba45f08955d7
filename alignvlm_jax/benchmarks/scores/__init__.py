"""Scores of one answer against the accepted ones, a file a family. Every score is between 0 and 1.
TEDS is not among them: no benchmark here asks for a table as HTML."""

from alignvlm_jax.benchmarks.scores.text import anls, exact_match, normalize

__all__ = ["SCORER_VERSION", "anls", "exact_match", "normalize"]

SCORER_VERSION = "anls-keep-0.5/1"
"""Of the two above; stands in the header of the predictions on a split: raise it when a score of
any answer changes."""
