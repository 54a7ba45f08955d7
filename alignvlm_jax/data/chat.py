"""Chats as tokens: what stands around questions and answers, and which tokens the model has to
say."""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data.chat_format import MARK, STRIPS
from alignvlm_jax.data.chat_template import format_of
from alignvlm_jax.data.tokenizers import letters
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError

MAX_SHOWN = 80
"""Characters of a text that a message shows."""


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


class ChatTurn(NamedTuple):
    """A question as text, its answer, and the characters of the question before which images
    stand, as `record.Turn` has them."""

    question: str
    answer: str
    image_offsets: tuple[int, ...] = ()


def encode_chat(
    tokenizer: Tokenizer,
    turns: Iterable[tuple[str, str] | ChatTurn],
    num_image_tokens: int | Sequence[int],
    image_id: int,
    max_length: int | None = None,
    *,
    cuts_answers: bool = False,
    has_order: bool = False,
    system: str = "",
    text_unit: str = "token",
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes turns with the image tokens, each of them the token `image_id`. Turns that would not
    fit `max_length` are left out whole; with `cuts_answers`, the first whose answer begins within
    it is cut there instead, and has no end.

    Args:
      tokenizer: of the text.
      turns: the chat.
      num_image_tokens: of all images, which stand first; or of each, for turns with offsets, which
        have all of them: one that is left out takes its images with it.
      image_id: the token that holds the place of an image token.
      max_length: largest number of tokens.
      cuts_answers: as above.
      has_order: whether nothing may follow a turn that is left out: it could refer to it.
      system: what the model is told first; "" leaves what the format says itself.
      text_unit: see `DataConfig.text_unit`; a turn is about images where one stands in its
        question or in a turn before.

    Returns:
      int32 tokens, and bools of the same length that are true on the answers' tokens and the end of
      each: what the model has to say itself. The mask is built with the tokens, never by searching
      the text.
    """
    encoder = _Encoder(tokenizer, num_image_tokens, image_id, system, text_unit)
    kept: list[_Turn] = []
    for one in turns:
        # What was the last turn so far is one before the last if this one fits.
        before = [*kept[:-1], *(encoder.earlier(turn) for turn in kept[-1:])]
        turn = encoder.turn(ChatTurn(*one), before)
        length = sum(len(one.prompt) + len(one.reply) for one in before) + len(turn.prompt)
        room = math.inf if max_length is None else max_length - length
        if len(turn.reply) <= room or (cuts_answers and room > 0):
            kept = [*before, turn]
        elif has_order:
            break
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


def count_tokens(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str] | ChatTurn],
    *,
    has_order: bool = False,
    system: str = "",
) -> int:
    """Returns how many tokens a chat of some turns has at most, in whatever order they come, unless
    it is a conversation; without images."""
    chat_format = format_of(tokenizer)
    strips = [STRIPS[chat_format.around(is_last)[1]] for is_last in (True, False)]
    orders = [turns]
    # Where the white space of the last answer is another's, it matters which turn is the last: a
    # packed sequence has no room for what was not counted. And where the format has no place for
    # a system turn, it stands in the text of the first question.
    is_sensitive = any(strips[0](turn[1]) != strips[1](turn[1]) for turn in turns)
    if is_sensitive and not has_order:
        orders = [[*turns[:i], *turns[i + 1 :], turns[i]] for i in range(len(turns))]
    if system and not has_order:
        orders += [[turns[i], *turns[:i], *turns[i + 1 :]] for i in range(1, len(turns))]
    lengths = [len(encode_chat(tokenizer, order, 0, 0, system=system)[0]) for order in orders]
    if system and chat_format.system_before is not None:
        # A copy of the tokenizer whose format was written before has no place for it.
        for (question, answer, *_), *others in orders:
            first = (f"{system}\n\n{question}", answer)
            lengths.append(len(encode_chat(tokenizer, [first, *others], 0, 0)[0]))
    return max(lengths)


def encode_prompt(
    tokenizer: Tokenizer,
    question: str | ChatTurn,
    num_image_tokens: int | Sequence[int],
    image_id: int,
    before: Sequence[tuple[str, str] | ChatTurn] = (),
    system: str = "",
    text_unit: str = "token",
) -> np.ndarray:
    """Returns int32 tokens that end where the answer is to begin; `before` are the turns of the
    conversation that the question goes on, the others are as in `encode_chat`."""
    encoder = _Encoder(tokenizer, num_image_tokens, image_id, system, text_unit)
    turns: list[_Turn] = []
    for one in before:
        turns.append(encoder.turn(ChatTurn(*one), turns, is_last=False))
    last = ChatTurn(question, "") if isinstance(question, str) else question
    tokens = [token for turn in turns for token in (*turn.prompt, *turn.reply)]
    return np.array([*tokens, *encoder.turn(last, turns).prompt], np.int32)


class _Turn(NamedTuple):
    prompt: list[int]
    reply: list[int]  # What the model has to say.
    texts: ChatTurn
    images: list[tuple[int, int]]  # (offset in the question, image tokens) of each image
    is_first: bool
    sees_image: bool  # Whether an image token stands in its prompt or in a turn before.


class _Encoder:
    """Encodes the turns of one chat.

    Where a format is joined, a question and our strings around it are one text, which becomes the
    tokens of transformers' `apply_chat_template`; images stand between these tokens and change none
    of them. So the length of a chat does not depend on where its images are, and is counted
    without them. But questions and answers that are spelled are texts of their own, and longer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_image_tokens: int | Sequence[int],
        image_id: int,
        system: str,
        text_unit: str,
    ):
        self._tokenizer = tokenizer
        self._format = format_of(tokenizer)
        self._image_id = image_id
        self._spells = text_unit == "letter"
        is_first = isinstance(num_image_tokens, int)
        self._first = [image_id] * num_image_tokens if is_first else []
        self._of_images = [] if is_first else list(num_image_tokens)
        self._start, self._told = self._format.begin(system)

    def turn(self, texts: ChatTurn, before: Sequence[_Turn], *, is_last: bool = True) -> _Turn:
        """Encodes a turn that follows others, of which the chat's images go on.

        Raises:
          UserError: a text has half a character, as Python gives bytes that are no UTF-8.
        """
        for text in (self._told, texts.question, texts.answer):
            try:
                text.encode()
            except UnicodeEncodeError as err:
                raise UserError(
                    f"{text[:MAX_SHOWN]!r} has half a character at {err.start}: it is no UTF-8"
                ) from err
        shown = sum(len(turn.images) for turn in before)
        counts = self._of_images[shown : shown + len(texts.image_offsets)]
        # Where all images come first, none stands in a turn.
        images = list(zip(texts.image_offsets, counts, strict=bool(self._of_images)))
        # Never those that follow: where the model is to answer, nobody knows whether any will.
        sees_image = bool(self._first) or any(count for _, count in images)
        sees_image = sees_image or any(turn.sees_image for turn in before)
        return self._turn(
            texts, images, is_first=not before, sees_image=sees_image, is_last=is_last
        )

    def _turn(
        self,
        texts: ChatTurn,
        images: list[tuple[int, int]],
        *,
        is_first: bool,
        sees_image: bool,
        is_last: bool,
    ) -> _Turn:
        chat_format = self._format
        question = STRIPS[chat_format.question_strip](texts.question)
        # Offsets count from what is not stripped; a format without a place for it has the system
        # turn in the first question.
        told = self._told if is_first else ""
        moved = len(told) - (texts.question.index(question) if question else 0)
        most = len(told) + len(question)
        places = [(min(max(at + moved, len(told)), most), count) for at, count in images]
        opening = self._start if is_first else chat_format.after
        assistant, strip = chat_format.around(is_last)
        encode = self._joined if chat_format.is_joined else self._apart
        first = self._first if is_first else []
        is_spelled = self._spells and sees_image
        text = letters.Text(told, question, "", is_spelled)
        prompt, last_text = encode(opening, text, assistant, first, places)
        reply = self._reply(last_text, STRIPS[strip](texts.answer), is_spelled)
        end = self._tokenizer.special_tokens[chat_format.end]
        return _Turn(prompt, [*reply, end], texts, images, is_first, sees_image)

    def _reply(self, last_text: str, answer: str, is_spelled: bool) -> list[int]:
        """The tokens of an answer and of what the model says around it, without its end."""
        before = self._format.before_answer
        after = self._format.after_answer
        if not is_spelled:
            return _encode_after(self._tokenizer, last_text, f"{before}{answer}{after}")
        return [
            *self._tokenizer.encode(before),
            *letters.spell(answer, self._tokenizer),
            *self._tokenizer.encode(after),
        ]

    def earlier(self, turn: _Turn) -> _Turn:
        """The same turn with others after it."""
        if self._format.earlier_assistant is None:
            return turn
        return self._turn(
            turn.texts,
            turn.images,
            is_first=turn.is_first,
            sees_image=turn.sees_image,
            is_last=False,
        )

    def nothing(self) -> list[int]:
        """A chat without a turn."""
        image = [] if self._format.image_in_turn else self._first
        return [*self._ours(self._start), *image]

    def after(self) -> list[int]:
        """What follows the last turn."""
        return self._ours(self._format.after)

    def _ours(self, text: str) -> list[int]:
        if self._format.is_joined:
            return _ids(self._tokenizer, _stretches(self._tokenizer, text))
        return [*_encode_marked(self._tokenizer, text)]

    def _apart(
        self,
        opening: str,
        question: letters.Text,
        assistant: str,
        first: list[int],
        places: list[tuple[int, int]],
    ) -> tuple[list[int], str]:
        """The tokens of a prompt, and its text after the last special token that an answer is to be
        joined to."""
        user = [*self._ours(self._format.user), *first]
        if not self._format.image_in_turn:
            user = [*first, *self._ours(self._format.user)]
        ids = self._with_images(question, places) if places else question.encode(self._tokenizer)
        return [*self._ours(opening), *user, *ids, *self._ours(assistant)], ""

    def _joined(
        self,
        opening: str,
        question: letters.Text,
        assistant: str,
        first: list[int],
        places: list[tuple[int, int]],
    ) -> tuple[list[int], str]:
        """Returns what `_apart` does, of a format that is joined."""
        head = _stretches(self._tokenizer, opening + self._format.user)
        tail = _stretches(self._tokenizer, assistant)
        before = head[-1] if head and isinstance(head[-1], str) else ""
        after = tail[0] if tail and isinstance(tail[0], str) else ""
        head = head[:-1] if before else head
        tail = tail[1:] if after else tail
        text = question._replace(before=before + question.before, after=after)
        # Before the first token that has a character of the question.
        moved = [(0, len(first)), *((offset, count) for offset, count in places)]
        ids = self._with_images(text, [(len(before) + at, count) for at, count in moved])
        prompt = [*_ids(self._tokenizer, head), *ids]
        last = tail[-1] if tail else str(text)
        return [*prompt, *_ids(self._tokenizer, tail)], last if isinstance(last, str) else ""

    def _with_images(self, text: letters.Text, places: list[tuple[int, int]]) -> list[int]:
        """The tokens of a text with `count` image tokens at each character, before the token that
        has it."""
        spans = text.token_offsets(self._tokenizer)
        ids = [token for token, _, _ in spans]
        # From the end, so that places before stay where they are.
        for at, count in reversed(places):
            place = sum(end <= at for _, _, end in spans) if at else 0
            ids[place:place] = [self._image_id] * count
        return ids


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
