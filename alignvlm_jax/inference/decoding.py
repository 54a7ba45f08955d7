"""How the tokens of an answer are chosen from their logits: greedily, or at random."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.errors import UserError
from alignvlm_jax.shapes import Array, Bool, Float, Int

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen; by default the likeliest of each step.

    The same prompt with the same values has the same answer, whatever is answered beside it.

    Attributes:
      temperature: logits are divided by it before a token is drawn; 0 takes the likeliest.
      top_p: tokens are drawn from the likeliest that have this probability together (nucleus
        sampling, arXiv 1904.09751); 1: from all.
      repetition_penalty: by which logits of tokens that the prompt or the answer has already are
        divided, or multiplied where they are below 0 (CTRL, arXiv 1909.05858); 1: none.
      seed: of what is drawn, 0 to 2**32 - 1.

    Raises:
      UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED:,}"),
        ):
            if not is_right:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as it is, for which nothing has to be kept."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Decoding()
DTYPES = {
    "temperature": np.float32,
    "top_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.uint32,
}
"""Arrays of a batch of prompts, [B], by which its tokens are chosen; a batch without them is
answered greedily, by a smaller program."""


def arrays(rows: Sequence[Decoding]) -> dict[str, np.ndarray]:
    """Returns the arrays DTYPES of a batch's rows."""
    return {
        name: np.array([getattr(row, name) for row in rows], dtype)
        for name, dtype in DTYPES.items()
    }


def tokens_of_prompts(
    tokens_BT: Int[Array, "B T"], is_prompt_BT: Bool[Array, "B T"], vocab_size: int
) -> Bool[Array, "B V"]:
    """Returns which tokens each prompt has; those beyond the vocabulary, as that of an image may
    be, are left out."""
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    seen_BV = jnp.zeros((len(tokens_BT), vocab_size), bool)
    # Padding is a token of the vocabulary, and must not count: it goes where nothing is kept.
    return seen_BV.at[rows_B1, jnp.where(is_prompt_BT, tokens_BT, vocab_size)].set(
        True, mode="drop"
    )


def choose(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    decoding: Mapping[str, Array],
    step_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
      logits_BV: float32.
      seen_BV: the tokens that prompt and answer have so far.
      decoding: the arrays DTYPES.
      step_B: the number of tokens that each answer has: each step draws anew.
    """
    is_greedy_B = (decoding["temperature"] == 0) & (decoding["repetition_penalty"] == 1)
    # One program for all batches of a server, in which those without a draw sort no vocabulary.
    return jax.lax.cond(
        is_greedy_B.all(),
        lambda: logits_BV.argmax(-1).astype(jnp.int32),
        lambda: _draw(logits_BV, seen_BV, decoding, step_B),
    )


def _draw(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    decoding: Mapping[str, Array],
    step_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    temperature_B1 = decoding["temperature"][:, None]
    penalty_B1 = decoding["repetition_penalty"][:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    # After the penalty, which holds for rows without a temperature as well.
    likeliest_B = logits_BV.argmax(-1).astype(jnp.int32)
    # Rows with temperature 0 compute what nobody looks at: divided by 0 it would be no number.
    scaled_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    least_B1 = _least_of_nucleus(scaled_BV, decoding["top_p"])
    nucleus_BV = jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)
    # Of the seed and the step alone, so that other rows of the batch change nothing.
    keys_B = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
        decoding["seed"], step_B
    )
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, nucleus_BV).astype(jnp.int32)
    return jnp.where(temperature_B1[:, 0] > 0, drawn_B, likeliest_B)


def _least_of_nucleus(
    logits_BV: Float[Array, "B V"], top_p_B: Float[Array, "B"]
) -> Float[Array, "B 1"]:
    """The smallest logit of the likeliest tokens that have the probability `top_p` together."""
    # A whole sort, where top_k would need a bound that is static: any count may be in the nucleus.
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # What the tokens before one have together. Of the first nothing: it is always in.
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    count_B1 = (before_BV < top_p_B[:, None]).sum(-1, keepdims=True)
    # A top_p so small that it is 0 in float32 has none: the index of the first would be -1, which
    # is the last.
    count_B1 = jnp.maximum(count_B1, 1)
    return jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
