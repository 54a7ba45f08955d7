"""Analyses of a trained model by name.

Adding one is a file here and a line in `REGISTRY` (`base.Analysis` says what it defines): `inspect`
runs it, and reports show it.
"""

from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.analysis.cost import ConnectorCosts
from alignvlm_jax.analysis.noise import NoiseOnFeatures
from alignvlm_jax.analysis.pca import PCA
from alignvlm_jax.analysis.vocabulary import Vocabulary

REGISTRY: dict[str, Analysis] = {
    "noise": NoiseOnFeatures(),
    "vocabulary": Vocabulary(),
    "pca": PCA(),
    "cost": ConnectorCosts(),
}
"""In the order of a report."""


def every() -> list[Analysis]:
    """Returns all analyses, those that have kinds as one of each kind."""
    return [kind for one in REGISTRY.values() for kind in (one.kinds() or {one.name: one}).values()]
