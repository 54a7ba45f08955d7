"""Chat formats by model family: what stands around questions and answers, and which tokens the
model has to say."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A family's template: `start IMAGE`, or `start user IMAGE` for the first turn, then for each
    turn `user QUESTION assistant ANSWER end after`. Special tokens stand in these strings by their
    names.

    Attributes:
      start: before the first turn.
      user: before a question.
      assistant: between question and answer.
      end: the special token that ends an answer, which the model has to say.
      after: after the end of an answer.
      stops: special tokens at which generation stops; `end` is one of them.
      image_in_turn: whether images stand inside the first turn, before its question, or before all
        turns.
      is_stripped: whether the family's template strips white space off questions and answers.
    """

    start: str
    user: str
    assistant: str
    end: str
    after: str = ""
    stops: tuple[str, ...] = ()
    image_in_turn: bool = True
    is_stripped: bool = False

    def names(self) -> set[str]:
        """Returns the special tokens that the format cannot do without."""
        return {*re.findall(MARK, self.start + self.user + self.assistant), self.end}


MARK = r"<[^<> ]+>"

FAMILIES = {
    "marks": ChatFormat(
        start="<s>",
        user="<user>",
        assistant="<assistant>",
        end="<end>",
        stops=("<end>",),
        image_in_turn=False,
    ),
    "llama3": ChatFormat(
        start="<|begin_of_text|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        stops=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        is_stripped=True,
    ),
    # With the system prompt that the template of SmolLM2 puts where a conversation has none.
    "chatml": ChatFormat(
        start="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    # Without the template's spaces: its tokenizers put one before every stretch of text.
    "llama2": ChatFormat(
        start="<s>",
        user="[INST]",
        assistant="[/INST]",
        end="</s>",
        stops=("</s>",),
        is_stripped=True,
    ),
}
"""By the special tokens that they need; the first that fits a tokenizer is taken."""


@functools.lru_cache(maxsize=8)
def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """Returns the format of the family whose special tokens a tokenizer has.

    Raises:
      UserError: there is none.
    """
    for family in FAMILIES.values():
        if family.names() <= tokenizer.special_tokens.keys():
            return family
    needed = "; ".join(
        f"{name}: {' '.join(sorted(family.names()))}" for name, family in FAMILIES.items()
    )
    raise UserError(
        f"tokenizer {tokenizer.name} has the special tokens of no chat format that is known "
        f"({needed})"
    )


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens at which generation stops."""
    stops = format_of(tokenizer).stops
    return tuple(
        tokenizer.special_tokens[name] for name in stops if name in tokenizer.special_tokens
    )


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the token that begins every text, where the family has one: a chat then starts with
    it and nothing else. The mark that opens a turn (`chatml`) begins no text."""
    start = format_of(tokenizer).start
    return [tokenizer.special_tokens[start]] if start in tokenizer.special_tokens else []


def encode_chat(
    tokenizer: Tokenizer,
    turns: Iterable[tuple[str, str]],
    num_image_tokens: int,
    image_id: int,
    max_length: int | None = None,
    cuts_answers: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes (question, answer) turns with the image tokens, each of them the token `image_id`.
    Turns that would not fit `max_length` are left out whole; with `cuts_answers`, the first whose
    answer begins within it is cut there instead, and has no end.

    Returns:
      int32 tokens, and bools of the same length that are true on the answers' tokens and the end of
      each: what the model has to say itself. The mask is built with the tokens, never by searching
      the text.
    """
    chat_format = format_of(tokenizer)
    tokens = [*_encode_marked(tokenizer, chat_format.start)]
    image_tokens = [image_id] * num_image_tokens
    waiting = image_tokens if chat_format.image_in_turn else []
    if not waiting:
        tokens += image_tokens
    is_answer = [False] * len(tokens)
    end = [tokenizer.special_tokens[chat_format.end]]
    after = _encode_marked(tokenizer, chat_format.after)
    for question, answer in turns:
        prompt = _encode_question(tokenizer, question, waiting)
        reply = tokenizer.encode(answer.strip() if chat_format.is_stripped else answer) + end
        room = math.inf if max_length is None else max_length - len(tokens) - len(prompt)
        if len(reply) <= room or (cuts_answers and room > 0):
            tokens += [*prompt, *reply, *after]
            is_answer += [False] * len(prompt) + [True] * len(reply) + [False] * len(after)
            waiting = []
    # What follows the last answer may be cut off: nothing comes after it. An answer that is cut is
    # the last.
    return np.array(tokens[:max_length], np.int32), np.array(is_answer[:max_length], bool)


def encode_prompt(
    tokenizer: Tokenizer, question: str, num_image_tokens: int, image_id: int
) -> np.ndarray:
    """Returns int32 tokens that end where the answer is to begin."""
    chat_format = format_of(tokenizer)
    head = [*_encode_marked(tokenizer, chat_format.start)]
    image_tokens = [image_id] * num_image_tokens
    if chat_format.image_in_turn:
        return np.array(head + _encode_question(tokenizer, question, image_tokens), np.int32)
    return np.array(head + image_tokens + _encode_question(tokenizer, question, []), np.int32)


def _encode_question(tokenizer: Tokenizer, question: str, image_tokens: list[int]) -> list[int]:
    chat_format = format_of(tokenizer)
    if chat_format.is_stripped:
        question = question.strip()
    before, after = (
        _encode_marked(tokenizer, text) for text in (chat_format.user, chat_format.assistant)
    )
    return [*before, *image_tokens, *tokenizer.encode(question), *after]


@functools.lru_cache(maxsize=64)  # They stand around every question.
def _encode_marked(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encodes a text of our own, in which special tokens stand by their names."""
    ids: list[int] = []
    for part in re.split(f"({MARK})", text):
        if part in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[part])
        elif part:
            ids += tokenizer.encode(part)
    return tuple(ids)
