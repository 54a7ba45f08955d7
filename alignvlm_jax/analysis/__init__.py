"""Analyses of a trained model, by name.

A new analysis is a module in this folder and a line in `REGISTRY` (`base.Analysis` says what it
defines): `inspect` runs it, and reports show it.
"""

from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.analysis.cost import ConnectorCosts
from alignvlm_jax.analysis.noise import FEATURES
from alignvlm_jax.analysis.pca import PCA
from alignvlm_jax.analysis.vocabulary import Vocabulary

REGISTRY: dict[str, Analysis] = {
    "noise": FEATURES,
    "vocabulary": Vocabulary(),
    "pca": PCA(),
    "cost": ConnectorCosts(),
}
"""The analyses by their name on the command line (`--analysis`), in the order of a report."""


def every() -> list[Analysis]:
    """Returns all analyses; an analysis that has kinds comes once for each kind."""
    return [kind for one in REGISTRY.values() for kind in (one.kinds() or {one.name: one}).values()]
