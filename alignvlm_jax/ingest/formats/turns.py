"""Turns out of the texts and messages of a data set: who says what, and where images stand."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.ingest.formats.base import Reject

IMAGE_MARK = re.compile(r"<image>|<\|image\|>")
"""What stands for an image in a text: LLaVA's mark and mPLUG-DocOwl's."""

OTHER_MARK = re.compile(
    r"<img>[^<]+</img>|<(?:image|img)[ _-]?\d+>|<\|image_\d+\|>|<Image>|<image_placeholder>"
    r"|!\[[^\]]*\]\([^)]+\)"
)
"""Ways of others to write an image, by a number or its path."""

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
"""The two sides of a conversation, by LLaVA's names and OpenAI's."""


class Conversation(NamedTuple):
    """The messages of a record.

    Attributes:
      turns: questions with their answers; of a last question that nobody answered there are none.
      system: the text of a system message in front; "" where there is none.
      images: paths of images that stand in the messages themselves, in their order.
    """

    turns: tuple[Turn, ...]
    system: str
    images: tuple[str, ...]


def place_images(turns: Sequence[Turn], num_images: int) -> tuple[Turn, ...]:
    """Returns turns whose marks of images have become `Turn.image_offsets`.

    Texts without a mark, and those whose marks all open the first question, leave the images before
    it.

    Raises:
      Reject: there are marks, and not as many as images.
    """
    in_questions = sum(len(IMAGE_MARK.findall(turn.question)) for turn in turns)
    if in_questions not in (0, num_images):
        raise Reject(f"{_count(in_questions, 'image mark')} for {_count(num_images, 'image')}")
    # As other sets write an image: without it, the model would learn to answer blindly.
    shown = [found[0] for turn in turns if (found := OTHER_MARK.search(turn.question))]
    if shown and not num_images:
        raise Reject(f"an image in a question, as it is not read ({shown[0]:.50})")
    in_answers = sum(len(IMAGE_MARK.findall(text)) for turn in turns for text in turn.answers)
    # With its images all asked about, an answer may well speak of a mark.
    if in_answers and num_images and not in_questions:
        raise Reject(f"{_count(in_answers, 'image mark')} in an answer, where no image can stand")
    placed = [_placed(turn) for turn in turns]
    # What LLaVA's sets and most others have: images before the text, which needs no places.
    if all(turn.image_offsets == () for turn in placed[1:]) and not any(
        at for turn in placed[:1] for at in turn.image_offsets
    ):
        placed = [dataclasses.replace(turn, image_offsets=()) for turn in placed]
    return tuple(placed)


def _placed(turn: Turn) -> Turn:
    """A turn without its marks, and the places where they stood."""
    # The marks go and the text between them stays, of which lengths say where each stood; what the
    # ends lose in white space moves them along.
    pieces = IMAGE_MARK.split(turn.question)
    text = "".join(pieces)
    lead = len(text) - len(text.lstrip())
    stripped = text.strip()
    offsets = []
    end = 0
    for piece in pieces[:-1]:
        end += len(piece)
        offsets.append(min(max(end - lead, 0), len(stripped)))
    return Turn(stripped, turn.answers, turn.id, tuple(offsets))


def of_pairs(pairs: Sequence[Any], user: str = "user", answerer: str = "assistant") -> tuple:
    """Returns the turns of objects that hold a question and its answer each, as FineVision's
    `texts` do, marks of images still in them.

    Raises:
      Reject: one is no object, or lacks a text.
    """
    turns = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            raise Reject(f"text {number} is no pair of {user} and {answerer}")
        question = checks.text_of(pair.get(user), f"{user} of text {number}")
        turns.append(Turn(question, checks.answers_of(pair.get(answerer))))
    return tuple(turns)


def of_messages(messages: Any, role: str, content: str) -> Conversation:
    """Returns a conversation out of its messages, marks of images still in them.

    Args:
      messages: objects, each with who speaks and what is said.
      role: key of who speaks: one of ROLES, or "system" in front.
      content: key of what is said: a text, or a list of parts as OpenAI has them.

    Raises:
      Reject: the messages are no list of objects, or their roles do not alternate.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Reject("no list of messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise Reject("no list of messages")
    images: list[str] = []
    texts = []
    system = ""
    for place, message in enumerate(messages):
        speaker = message.get(role)
        text = _text(message.get(content), images)
        # As OpenAI marks what is not to be taught.
        if message.get("weight") in (0, "0"):
            raise Reject(f"a message has weight 0, which is not read (message {place})")
        if place == 0 and speaker == "system":
            system = text.strip()
            continue
        # By place, not by what came last: a second answer in a row would pass for a question.
        expected = ("user", "assistant")[len(texts) % 2]
        if not isinstance(speaker, str) or ROLES.get(speaker) != expected:
            names = " or ".join(name for name, side in ROLES.items() if side == expected)
            raise Reject(
                f"messages do not alternate (message {place} is of {speaker!r:.50}, and {names} "
                f"is due{_hint(message, role, content)})"
            )
        texts.append(text)
    if IMAGE_MARK.search(system):
        raise Reject("an image mark in a system message, where no image can stand")
    turns = [
        Turn(question, (answer.strip(),) if answer.strip() else ())
        for question, answer in itertools.zip_longest(texts[::2], texts[1::2], fillvalue="")
    ]
    return Conversation(tuple(turns), system, tuple(images))


def _text(content: Any, images: list[str]) -> str:
    """The text of a message, with a mark for each image part; paths of images go to `images`."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return checks.text_of(content, "a message")
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            found.append(checks.text_of(part.get("text"), "a message"))
        elif kind in ("image", "image_url"):
            found.append("<image>")
            path = part.get(kind)
            path = path.get("url") if isinstance(path, Mapping) else path
            if path is not None:
                images.append(checks.text_of(path, "an image of a message"))
        else:
            raise Reject(f"a message has a part of a kind that is not read ({kind!r:.50})")
    return "".join(found)


def _hint(message: Mapping[str, Any], role: str, content: str) -> str:
    """What the keys of a message say, where they are those of the other format."""
    if role == "from" and {"role", "content"} <= message.keys():
        return "; --format=docdownstream reads role and content"
    if role == "role" and {"from", "value"} <= message.keys():
        return "; --format=llava reads from and value"
    return ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
