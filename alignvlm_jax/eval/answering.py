"""Prompts to answers, a batch at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data import pipeline
from alignvlm_jax.data.rows import Row
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.infer.sampler import Sampler
from alignvlm_jax.parallel import exchange


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one shape. Each is built when its turn comes, and only by the processes that feed its row: a page is
    decoded on one host, not on all.

    Attributes:
      count: how many there are.
      build: returns the prompt of a number from 0; UserError where it cannot be built.
      stand_in: returns what is asked in the place of such a one; without it the error is raised.
    """

    count: int
    build: Callable[[int], Row]
    stand_in: Callable[[], Row] | None = None


class Answer(NamedTuple):
    """What the model says, or "" and why it could not be asked."""

    text: str
    problem: str | None = None


def answer(
    sampler: Sampler, variables: Mapping, tokenizer: Tokenizer, prompts: Prompts, size: int, max_new_tokens: int
) -> list[Answer]:
    """Returns the answers to all prompts, in batches of `size` rows. A short one repeats its last row, which ends when
    its twin does, so that every batch has one shape and none takes longer for it. Of several processes all call this,
    and each gets all answers."""
    local_rows, answers = sampler.rows_of_process(size), []
    for start in range(0, prompts.count, size):
        rows, problems = _build(prompts, np.minimum(start + local_rows, prompts.count - 1).tolist())
        # Where the tensor axis crosses hosts several of them report the same one.
        problems = {int(number): why for told in exchange.gather(problems) for number, why in told.items()}
        tokens_BT = sampler.generate(variables, pipeline.stack(rows), max_new_tokens)
        for number, tokens_T in enumerate(tokens_BT[: prompts.count - start], start):
            text = "" if number in problems else tokenizer.decode(tokens_T)
            answers.append(Answer(text, problems.get(number)))
    return answers


def _build(prompts: Prompts, numbers: Sequence[int]) -> tuple[list[Row], dict[int, str]]:
    """The prompts of these numbers, one of them repeated maybe, and why some could not be built."""
    built: dict[int, Row] = {}
    problems: dict[int, str] = {}
    for number in dict.fromkeys(numbers):
        try:
            built[number] = prompts.build(number)
        except UserError as err:
            if prompts.stand_in is None:
                raise
            built[number] = prompts.stand_in()
            problems[number] = str(err)
    return [built[number] for number in numbers], problems


def batch_size(count: int, most: int, ways: int) -> int:
    """Returns the rows of a batch for `count` prompts, `most` or a few more: each of `ways` devices that rows are
    spread over needs as many."""
    return -(-min(count, max(most, ways)) // ways) * ways
