"""What a sequence teaches of a record: its questions, its text, or both."""

import itertools
from collections.abc import Callable

import numpy as np

from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.record import Record

TRANSCRIBE_QUESTION = "Read the page."


def transcription(record: Record) -> str:
    """Returns the words of a record, those of a line of the page on one line; "" where the record
    does not know them."""
    return "\n".join(" ".join(word.text for word in line) for page in record.lines for line in page)


def _transcribe(record: Record, rng: np.random.Generator) -> list[ChatTurn]:
    # Of a record without words nothing is taught: an empty answer would say that its page is blank.
    text = transcription(record)
    return [ChatTurn(TRANSCRIBE_QUESTION, text)] if text else []


def _answer(record: Record, rng: np.random.Generator) -> list[ChatTurn]:
    if record.has_order:
        # Up to the first that nobody answered: what follows may refer to it.
        turns = list(itertools.takewhile(lambda turn: turn.answers, record.turns))
    else:
        # In another order each time, so that none always has the same ones before it.
        turns = [record.turns[i] for i in rng.permutation(len(record.turns))]
    return [
        ChatTurn(turn.question, turn.answers[0], turn.image_offsets)
        for turn in turns
        if turn.answers
    ]


def _answer_and_transcribe(record: Record, rng: np.random.Generator) -> list[ChatTurn]:
    """Both, in either order: more to learn from each page.

    What comes second can look back at what came first. Turns that keep their order come first: a
    transcription that does not fit would take all of them with it.
    """
    answers = _answer(record, rng)
    text = _transcribe(record, rng)
    is_first = rng.random() < 0.5
    return answers + text if is_first or record.has_order else text + answers


TASKS: dict[str, Callable[[Record, np.random.Generator], list[ChatTurn]]] = {
    "transcribe": _transcribe,
    "answer": _answer,
    "answer_and_transcribe": _answer_and_transcribe,
}
"""What a sequence teaches of a record, by the names of `data.tasks`: turns, possibly none."""
