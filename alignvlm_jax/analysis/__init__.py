"""Analyses of a trained model by name.

Adding one is a file here and a line in `REGISTRY` (`base.Analysis` says what it defines): `inspect`
runs it, and reports show it.
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
"""By what `--analysis` calls them, in the order of a report."""


def every() -> list[Analysis]:
    """Returns all analyses, of those that have kinds one of each kind."""
    return [kind for one in REGISTRY.values() for kind in (one.kinds() or {one.name: one}).values()]
