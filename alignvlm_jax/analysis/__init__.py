"""Analyses of a trained model, by name.

A new analysis is a module in this folder that defines ANALYSIS (`base.Analysis` says what that is),
and a line in `REGISTRY`: `inspect` runs it, and reports show it.
"""

import dataclasses
import importlib
import typing
from argparse import ArgumentParser
from collections.abc import Callable, Mapping

from alignvlm_jax.analysis import flags

if typing.TYPE_CHECKING:
    from alignvlm_jax.analysis.base import Analysis


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `inspect` knows of an analysis before its module is imported, and with it jax.

    Attributes:
      help: what it measures, for --help.
      add_flags: adds its flags to a parser, beside `--analysis`, `--checkpoint` and `--data`.
      kinds: its other kinds, by their name for `--kind`.
    """

    help: str
    add_flags: Callable[[ArgumentParser], None]
    kinds: Mapping[str, "Entry"] = dataclasses.field(default_factory=dict)


REGISTRY: dict[str, Entry] = {
    "noise": Entry(
        "scores and movement of visual tokens under Gaussian noise on the vision features",
        flags.add_noise_on_features,
        {
            "pixels": Entry(
                "scores and movement of visual tokens under Gaussian noise on the page's pixels",
                flags.add_noise_on_pixels,
            ),
            "layout": Entry(
                "scores where the content of pages is moved",
                flags.add_moved_content,
            ),
        },
    ),
    "vocabulary": Entry(
        "which words ALIGN's patches use, and the scores with these alone",
        flags.add_vocabulary,
    ),
    "words": Entry(
        "the scores where each patch keeps a few words, its likeliest or random ones",
        flags.add_words,
    ),
    "pca": Entry(
        "how well the words that ALIGN's patches use cover the space of text embeddings",
        flags.add_pca,
    ),
    "layers": Entry(
        "after which of the LLM's layers the text states lie that visual tokens are nearest to",
        flags.add_layers,
    ),
    "separation": Entry(
        "how far apart the visual tokens of different letters are, beside those of equal ones",
        flags.add_separation,
    ),
    "cost": Entry(
        "parameters, FLOPs, memory and time of connectors beside the checkpoint's encoder and LLM",
        flags.add_cost,
    ),
}
"""The analyses by their name on the command line (`--analysis`), in the order of a report."""


def entry(name: str, kind: str | None) -> Entry:
    """Returns the entry of a kind of an analysis; a kind that it does not have is its first."""
    return REGISTRY[name].kinds.get(kind or "", REGISTRY[name])


def load(name: str, kind: str | None = None) -> "Analysis":
    """Returns an analysis, or a kind of it."""
    one = importlib.import_module(f"{__name__}.{name}").ANALYSIS
    return one.kinds().get(kind, one)


def every() -> "list[Analysis]":
    """Returns all analyses; an analysis that has kinds comes once for each kind."""
    ones = [load(name) for name in REGISTRY]
    return [kind for one in ones for kind in (one.kinds() or {one.name: one}).values()]
