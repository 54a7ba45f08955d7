"""The contract of a connector: its inputs and outputs, and what else the framework needs to know.

A connector is one file here, with a class that derives from `Connector`, and one line in the
registry. The class declares its options, how many visual tokens it makes of a tile, which configs
it refuses, which of its parameters start from the language model's, and whether its patches have a
distribution over the vocabulary; each of these has a default. FLOPs are counted from the program
(`plan.flops`), and the sharding of parameters follows from their logical axes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from alignvlm_jax.config import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.shapes import Array, Bool, Float, Int

VOCABULARY_SUBSET = ("pruning", "kept_words")
"""Collection and name of the variable that holds the vocabulary entries that patches may have, bool
[V].

It is no parameter. It exists in pruned models alone (`vlm.pruning`)."""

KEPT_ENTRIES = ("pruning", "kept_entries")
"""Collection and name of the variable that holds the vocabulary entries that each patch of a tile
keeps in the place of its likeliest, int [P, k]; -1 is none. It is no parameter either
(`vlm.keeping`)."""


class PatchLabels(NamedTuple):
    """The tokens that each patch shows, and their fractions of it: the labels of patch-token
    supervision (docs/training.md, "Patch labels")."""

    ids: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class ConnectorOutput(NamedTuple):
    """A connector's output.

    Attributes:
      tokens: visual tokens in the LLM's embedding space, `Connector.num_tokens` of each tile, tile
        after tile.
      patch_nll: cross-entropy of each patch's distribution over the vocabulary against its labels,
        in nats; zeros without labels, or where the connector has no such distribution.
    """

    tokens: Float[Array, "M D"]
    patch_nll: Float[Array, "N"]


class Connector(nn.Module):
    """A module that maps patch features to visual tokens.

    Most connectors define `encode`; one that reads the LLM's text table or the patch labels defines
    `__call__`. A visual token depends on the patches of its own tile alone: tiles of a batch, which
    belong to different examples, must not see each other.

    Attributes:
      config: the whole model's.
      dtype: dtype of the computation.
    """

    config: ModelConfig
    dtype: DTypeLike

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
        """Returns the visual tokens that `encode` makes, and a patch loss of zeros: without a
        distribution over the vocabulary, labels have no effect."""
        del text_table, labels
        return ConnectorOutput(self.encode(features), self.no_loss(features))

    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns the visual tokens of the patches, tile after tile."""
        raise NotImplementedError

    def probabilities(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns each patch's distribution over the LLM's vocabulary, in full: for a few pages, to
        look at.

        Optional. In a pruned model it is over the entries of `vocabulary_subset` alone.
        """
        raise NotImplementedError

    def patch_nll(
        self, features: Float[Array, "N E"], labels: PatchLabels, num_sampled: int = 0
    ) -> Float[Array, "N"]:
        """Returns the patch loss of `ConnectorOutput` alone, without the visual tokens.

        Optional. Only a connector that defines it can be trained without the LLM.

        Args:
          features: of the patches.
          labels: what they show.
          num_sampled: vocabulary entries by which it is estimated; 0: all, and it is exact.
        """
        raise NotImplementedError

    def vocabulary_subset(self) -> Bool[Array, "V"] | None:
        """Returns the vocabulary entries that patches of a pruned model may have; None where the
        model is not pruned."""
        # Without the collection, that is in a model that is not pruned, Flax gives None.
        return self.get_variable(*VOCABULARY_SUBSET)

    def kept_entries(self, num_patches: int) -> Int[Array, "N k"] | None:
        """Returns the vocabulary entries that each patch keeps, of patches of whole tiles; None
        where none are given."""
        kept_Pk = self.get_variable(*KEPT_ENTRIES)
        return None if kept_Pk is None else jnp.tile(kept_Pk, (num_patches // len(kept_Pk), 1))

    @staticmethod
    def no_loss(features: Float[Array, "N E"]) -> Float[Array, "N"]:
        """Returns the patch loss where there are no labels: zeros."""
        return jnp.zeros(features.shape[0], jnp.float32)

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Any) -> int:
        """Returns the number of visual tokens of a tile; by default one for each patch."""
        return vision.num_patches

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Any) -> None:
        """Raises UserError where the options do not fit the model; their types are checked before
        this."""

    @staticmethod
    def init_from_llm(llm: dict[str, Any], options: Any) -> dict[str, Any]:
        """Returns the connector's parameters that start as a function of the LLM's, as a subtree of
        its own parameters; by default none.

        `vlm.llm_derived` calls it on the LLM as initialised, and again on an LLM that was loaded.
        """
        return {}

    @classmethod
    def has_probabilities(cls, options: Any) -> bool:
        """Returns whether patches have a distribution over the LLM's vocabulary; by default,
        whether the class defines `probabilities`."""
        return cls.probabilities is not Connector.probabilities

    @classmethod
    def has_patch_tokens(cls) -> bool:
        """Returns whether the n-th visual token of a tile is that of its n-th patch: it is known
        what it shows, and one can be left out."""
        # Not by numbers: a resampler may have as many latents as there are patches.
        return cls.num_tokens is Connector.num_tokens

    @classmethod
    def has_patch_loss(cls) -> bool:
        """Returns whether the connector learns from patch labels."""
        return cls.patch_nll is not Connector.patch_nll


def check_top_k(top_k: int, num_entries: int, vocabulary: str) -> None:
    """Raises UserError where a distribution has fewer entries than an option `top_k`.

    Args:
      top_k: the option; 0 stands for all.
      num_entries: what a patch has a distribution over.
      vocabulary: their name in the message.
    """
    if top_k > num_entries:
        raise UserError(
            f"config.model.connector.top_k is {top_k}, and {vocabulary} has {num_entries:,} "
            f"entries: at most {num_entries}, or 0 for all"
        )
