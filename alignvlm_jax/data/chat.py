"""Chats as tokens: which format a tokenizer's model has, what stands around questions and answers,
and which tokens the model has to say."""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data import chat_template
from alignvlm_jax.data.chat_template import STRIPS, ChatFormat
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError

# "<user>" or "<|im_end|>": no space and no bracket within.
MARK = r"<[^<> ]+>"

CHATML = ChatFormat(
    start="",
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    stops=("<|im_end|>", "<|endoftext|>"),
)
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
        question_strip="strip",
        answer_strip="strip",
    ),
    # With the system prompt that the template of SmolLM2 puts where a conversation has none.
    "smollm": ChatFormat(
        start="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n",
        user=CHATML.user,
        assistant=CHATML.assistant,
        end=CHATML.end,
        after=CHATML.after,
        stops=CHATML.stops,
    ),
    "chatml": CHATML,
    # Without the template's spaces: its tokenizers put one before every stretch of text.
    "llama2": ChatFormat(
        start="<s>",
        user="[INST]",
        assistant="[/INST]",
        end="</s>",
        stops=("</s>",),
        question_strip="strip",
        answer_strip="strip",
    ),
}
"""The formats of tokenizers that come without a chat template, by the special tokens that they
need; the first that fits is taken."""
OWN = {"smollm": {"<repo_name>", "<gh_stars>", "<jupyter_start>"}}
"""Special tokens by which a family's own tokenizer is told from others with its chat marks."""


@functools.lru_cache(maxsize=8)
def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """Returns the format of a tokenizer's model: that of the chat_format.json beside it, else that
    of its chat template, else that of the family whose special tokens it has.

    Raises:
      UserError: there is none, or the template is none of a ChatFormat.
    """
    files = tokenizer.chat_files
    if files.chat_format:
        return _checked(tokenizer, chat_template.from_json(files.name, files.chat_format))
    if files.template:
        return _checked(tokenizer, chat_template.read(files, tokenizer.special_tokens))
    found = of_special_tokens(tokenizer, is_from_before=files.is_from_before)
    if found is not None:
        return found
    needed = "; ".join(
        f"{name}: {' '.join(sorted(_names(family)))}" for name, family in FAMILIES.items()
    )
    raise UserError(
        f"tokenizer {tokenizer.name} has the special tokens of no chat format that is known "
        f"({needed}), and no chat template beside it"
    )


def of_special_tokens(tokenizer: Tokenizer, *, is_from_before: bool) -> ChatFormat | None:
    """Returns the first of FAMILIES whose special tokens a tokenizer has; None where there is none.

    Args:
      is_from_before: as before there were chat_format.json files, when all of ChatML had SmolLM's
        system prompt. What was counted and trained so stays so.
    """
    for name, family in FAMILIES.items():
        own = set() if is_from_before else OWN.get(name, set())
        if _names(family) | own <= tokenizer.special_tokens.keys():
            return family
    return None


def format_file(tokenizer: Tokenizer) -> str:
    """Returns the chat_format.json that must stand beside a tokenizer where its folder is one of
    ours; empty where its special tokens alone have always said the same.

    Raises:
      UserError: as `format_of`.
    """
    chat_format = format_of(tokenizer)
    if chat_format == of_special_tokens(tokenizer, is_from_before=True):
        return ""
    return chat_template.to_json(chat_format)


def _checked(tokenizer: Tokenizer, chat_format: ChatFormat) -> ChatFormat:
    if chat_format.end not in tokenizer.special_tokens:
        raise UserError(
            f"{tokenizer.chat_files.name}: an answer ends by {chat_format.end!r}, which is no "
            f"special token of tokenizer {tokenizer.name}"
        )
    return chat_format


def _names(chat_format: ChatFormat) -> set[str]:
    """The special tokens that a format of FAMILIES cannot do without."""
    ours = chat_format.start + chat_format.user + chat_format.assistant
    return {*re.findall(MARK, ours), chat_format.end}


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens at which generation stops."""
    stops = format_of(tokenizer).stops
    return tuple(
        tokenizer.special_tokens[name] for name in stops if name in tokenizer.special_tokens
    )


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the token that begins every text, where the family has one: a chat then starts with
    it. The mark that opens a turn (`chatml`) begins no text: it opens the answer's as well."""
    chat_format = format_of(tokenizer)
    first = _stretches(tokenizer, chat_format.start + chat_format.user)[:1]
    later = _stretches(tokenizer, chat_format.assistant)
    return [one for one in first if isinstance(one, int) and one not in later]


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
    encoder = _Encoder(tokenizer, [image_id] * num_image_tokens)
    kept: list[_Turn] = []
    for question, answer in turns:
        # What was the last turn so far is one before the last if this one fits.
        before = [*kept[:-1], *(encoder.earlier(turn) for turn in kept[-1:])]
        turn = encoder.turn(question, answer, is_first=not kept)
        length = sum(len(one.prompt) + len(one.reply) for one in before) + len(turn.prompt)
        room = math.inf if max_length is None else max_length - length
        if len(turn.reply) <= room or (cuts_answers and room > 0):
            kept = [*before, turn]
    tokens: list[int] = [] if kept else encoder.nothing()
    is_answer = [False] * len(tokens)
    for turn in kept:
        tokens += [*turn.prompt, *turn.reply]
        is_answer += [False] * len(turn.prompt) + [True] * len(turn.reply)
    after = encoder.after() if kept else []
    # What follows the last answer may be cut off: nothing comes after it. An answer that is cut is
    # the last.
    tokens += after
    is_answer += [False] * len(after)
    return np.array(tokens[:max_length], np.int32), np.array(is_answer[:max_length], bool)


def count_tokens(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> int:
    """Returns how many tokens a chat of some turns has at most, in whatever order they come;
    without images."""
    chat_format = format_of(tokenizer)
    strips = [STRIPS[chat_format.around(is_last)[1]] for is_last in (True, False)]
    orders = [turns]
    # Where the white space of the last answer is another's, it matters which turn is the last: a
    # packed sequence has no room for what was not counted.
    if any(strips[0](answer) != strips[1](answer) for _, answer in turns):
        orders = [[*turns[:i], *turns[i + 1 :], turns[i]] for i in range(len(turns))]
    return max(len(encode_chat(tokenizer, order, 0, 0)[0]) for order in orders)


def encode_prompt(
    tokenizer: Tokenizer, question: str, num_image_tokens: int, image_id: int
) -> np.ndarray:
    """Returns int32 tokens that end where the answer is to begin."""
    encoder = _Encoder(tokenizer, [image_id] * num_image_tokens)
    return np.array(encoder.turn(question, "", is_first=True).prompt, np.int32)


class _Turn(NamedTuple):
    prompt: list[int]
    reply: list[int]  # What the model has to say.
    question: str
    answer: str
    is_first: bool


class _Encoder:
    """Encodes the turns of one chat.

    Where a format is joined, a question and our strings around it are one text, which becomes the
    tokens of transformers' `apply_chat_template`; images stand between these tokens and change none
    of them. So the length of a chat does not depend on where its images are, and is counted
    without them.
    """

    def __init__(self, tokenizer: Tokenizer, image: list[int]):
        self._tokenizer = tokenizer
        self._format = format_of(tokenizer)
        self._image = image

    def turn(self, question: str, answer: str, *, is_first: bool, is_last: bool = True) -> _Turn:
        chat_format = self._format
        question = STRIPS[chat_format.question_strip](question)
        opening = chat_format.start if is_first else chat_format.after
        assistant, strip = chat_format.around(is_last)
        image = self._image if is_first else []
        encode = self._joined if chat_format.is_joined else self._apart
        prompt, last_text = encode(opening, question, assistant, image)
        text = f"{chat_format.before_answer}{STRIPS[strip](answer)}{chat_format.after_answer}"
        reply = _encode_after(self._tokenizer, last_text, text)
        end = self._tokenizer.special_tokens[chat_format.end]
        return _Turn(prompt, [*reply, end], question, answer, is_first)

    def earlier(self, turn: _Turn) -> _Turn:
        """The same turn with others after it."""
        if self._format.earlier_assistant is None:
            return turn
        return self.turn(turn.question, turn.answer, is_first=turn.is_first, is_last=False)

    def nothing(self) -> list[int]:
        """A chat without a turn."""
        image = [] if self._format.image_in_turn else self._image
        return [*self._ours(self._format.start), *image]

    def after(self) -> list[int]:
        """What follows the last turn."""
        return self._ours(self._format.after)

    def _ours(self, text: str) -> list[int]:
        if self._format.is_joined:
            return _ids(self._tokenizer, _stretches(self._tokenizer, text))
        return [*_encode_marked(self._tokenizer, text)]

    def _apart(
        self, opening: str, question: str, assistant: str, image: list[int]
    ) -> tuple[list[int], str]:
        """The tokens of a prompt, and its text after the last special token that an answer is to be
        joined to."""
        user = [*self._ours(self._format.user), *image]
        if not self._format.image_in_turn:
            user = [*image, *self._ours(self._format.user)]
        question_ids = self._tokenizer.encode(question)
        return [*self._ours(opening), *user, *question_ids, *self._ours(assistant)], ""

    def _joined(
        self, opening: str, question: str, assistant: str, image: list[int]
    ) -> tuple[list[int], str]:
        """Returns what `_apart` does, of a format that is joined."""
        head = _stretches(self._tokenizer, opening + self._format.user)
        tail = _stretches(self._tokenizer, assistant)
        before = head[-1] if head and isinstance(head[-1], str) else ""
        after = tail[0] if tail and isinstance(tail[0], str) else ""
        head = head[:-1] if before else head
        tail = tail[1:] if after else tail
        text = f"{before}{question}{after}"
        spans = self._tokenizer.token_offsets(text)
        # Before the first token that has a character of the question.
        place = sum(end <= len(before) for _, _, end in spans) if before else 0
        ids = [token for token, _, _ in spans]
        prompt = [*_ids(self._tokenizer, head), *ids[:place], *image, *ids[place:]]
        last = tail[-1] if tail else text
        return [*prompt, *_ids(self._tokenizer, tail)], last if isinstance(last, str) else ""


def _encode_after(tokenizer: Tokenizer, prefix: str, text: str) -> list[int]:
    """The tokens of `text` where `prefix` stands right before it."""
    if not prefix:
        return tokenizer.encode(text)
    before = tokenizer.encode(prefix)
    whole = tokenizer.encode(prefix + text)
    # An answer that begins with white space may make a token together with ours before it. But the
    # model is given a prompt that ends here, and must be taught to go on from its tokens.
    return whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(text)


@functools.lru_cache(maxsize=64)  # They stand around every question.
def _stretches(tokenizer: Tokenizer, text: str) -> tuple[int | str, ...]:
    """A text of our own as special tokens, which stand in it by their names, and the text between
    them."""
    # The longest first: one name may begin another, and the first alternative that matches is
    # taken.
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return tuple(tokenizer.special_tokens.get(part, part) for part in parts if part)


def _ids(tokenizer: Tokenizer, stretches: Iterable[int | str]) -> list[int]:
    return [
        token
        for one in stretches
        for token in ([one] if isinstance(one, int) else tokenizer.encode(one))
    ]


@functools.lru_cache(maxsize=64)
def _encode_marked(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encodes a text of our own, in which special tokens stand by names like <this>."""
    parts = [part for part in re.split(f"({MARK})", text) if part]
    return tuple(_ids(tokenizer, (tokenizer.special_tokens.get(part, part) for part in parts)))
