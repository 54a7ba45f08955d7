"""The contract of a connector: what it takes and gives, and what else the framework asks of it.

A connector is one file here, with a class that derives from `Connector`, and one line in the
registry. It says itself which options it has, how many visual tokens it makes of a tile, which
configs it refuses, what of it starts from the language model's parameters, and whether its patches
can be read; each has a default. Its FLOPs are counted from the program (`plan.flops`), its
parameters' sharding follows from their logical axes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from alignvlm_jax.shapes import Array, Bool, Float, Int

VOCABULARY_SUBSET = ("pruning", "kept_words")
"""Collection and name of the vocabulary entries that patches may have, bool [V]: the only variable
of a connector that is no parameter, of who prunes a trained model, and absent by default."""


class PatchLabels(NamedTuple):
    """The tokens that each patch shows, and their fractions of it. Patch-token supervision: README,
    "Two ideas beyond the paper"."""

    ids: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class ConnectorOutput(NamedTuple):
    """Visual tokens in the LLM's embedding space: `Connector.num_tokens` of each tile, tile after
    tile.

    `patch_nll` is the cross-entropy of each patch's distribution over the vocabulary against its
    labels, in nats; zeros where no labels were given or the connector has no such distribution.
    """

    tokens: Float[Array, "tokens D"]
    patch_nll: Float[Array, "N"]


class Connector(nn.Module):
    """Maps patch features to visual tokens. Most connectors define `encode`; one that reads the
    LLM's text table or the patch labels defines `__call__`. A patch is computed by itself, or with
    those of its tile: the tiles of a batch are not to see each other.

    Attributes:
      config: of the whole model.
      dtype: of the computation.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Options of its own, which a connector declares by a frozen dataclass of this name; here
        none."""

    @property
    def options(self) -> Any:
        """The connector's `Options` in this model."""
        return self.config.connector

    def __call__(
        self,
        features: Float[Array, "N E"],
        text_table: Float[Array, "V D"],
        labels: PatchLabels | None,
    ) -> ConnectorOutput:
        """Returns the visual tokens, and the cross-entropy against the labels, of which `encode`
        knows nothing."""
        del text_table, labels
        return ConnectorOutput(self.encode(features), self.no_loss(features))

    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "tokens D"]:
        """Returns the visual tokens of the patches, those of a tile's patches after those of the
        tile before."""
        raise NotImplementedError

    def probabilities(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns each patch's distribution over the LLM's vocabulary, whole: for a few pages, to
        look at. Optional; over the entries of `vocabulary_subset` alone, where there is one."""
        raise NotImplementedError

    def vocabulary_subset(self) -> Bool[Array, "V"] | None:
        """Returns the vocabulary entries that patches may have, where a trained model is pruned to
        some."""
        return self.get_variable(*VOCABULARY_SUBSET)

    @staticmethod
    def no_loss(features: Float[Array, "N E"]) -> Float[Array, "N"]:
        """Returns the cross-entropy of patches against no labels."""
        return jnp.zeros(features.shape[0], jnp.float32)

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Any) -> int:
        """Returns how many visual tokens a tile makes; by default one for each patch."""
        return vision.num_patches

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Any) -> None:
        """Raises UserError where the options do not fit the model; what their types say is checked
        already."""

    @staticmethod
    def init_from_llm(llm: dict[str, Any], options: Any) -> dict[str, Any]:
        """Returns those of the connector's parameters that start as a function of the LLM's, in a
        tree as the connector has it; by default none. Called on fresh parameters, and again on an
        LLM that was loaded, by `vlm.from_llm`."""
        return {}

    @classmethod
    def has_probabilities(cls, options: Any) -> bool:
        """Returns whether patches have a distribution over the LLM's vocabulary."""
        return cls.probabilities is not Connector.probabilities
