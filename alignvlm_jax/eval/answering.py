"""Prompts to answers, a batch at a time."""

from collections.abc import Mapping, Sequence

from alignvlm_jax.data import pipeline
from alignvlm_jax.data.rows import Row
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.infer.sampler import Sampler
from alignvlm_jax.parallel import distributed


def answer(
    sampler: Sampler, variables: Mapping, tokenizer: Tokenizer, prompts: Sequence[Row], size: int, max_new_tokens: int
) -> list[str]:
    """Returns what the model says to prompts of one shape, in batches of `size` rows. A short one repeats its last row,
    which ends when its twin does, so that every batch has one shape and none takes longer for it. Of several processes
    each needs all prompts, hands in its share of the rows, and gets all answers."""
    said: list[str] = []
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        full = batch + batch[-1:] * (size - len(batch))
        tokens_BT = sampler.generate(variables, pipeline.stack(distributed.own_rows(full)), max_new_tokens)
        said += [tokenizer.decode(tokens_T) for tokens_T in tokens_BT[: len(batch)]]
    return said


def batch_size(count: int, most: int, ways: int) -> int:
    """Returns the rows of a batch for `count` prompts, `most` or a few more: each of `ways` devices that rows are
    spread over needs as many."""
    return -(-min(count, max(most, ways)) // ways) * ways
