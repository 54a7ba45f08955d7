"""Chat requests and errors as OpenAI's API has them (`/v1/chat/completions`)."""

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.errors import UserError, counted, nearest, one_line
from alignvlm_jax.inference.decoding import GREEDY, MAX_SEED, Decoding

IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
"""Fields that change nothing of an answer."""
ONLY = {
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of which some values alone are served; a null stands for the default."""
READ = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
)
MAX_STOPS = 4
MAX_MESSAGE = 500
"""Characters of an error that a client is told."""
ROLES = ("system", "developer", "user", "assistant")
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape of half a character, as JSON writes those beyond the first 65,536 in two halves."""


class ApiError(Exception):
    """An error that the client is told.

    Attributes:
      status: of HTTP.
      code: what programs tell errors apart by.
      param: the field of the request that is wrong, None where it is none.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """Returns the error as OpenAI's API says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        # They quote the request, which may name a field of a megabyte.
        message = _shortened(str(self))
        param = self.param and _shortened(self.param)
        error = {"message": message, "type": kind, "param": param, "code": self.code}
        return {"error": error}


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"


@dataclasses.dataclass(frozen=True)
class File:
    """A file within a request.

    Attributes:
      media_type: as its data URI says, "" for none.
      content: its bytes.
      name: how messages call it.
    """

    media_type: str
    content: bytes
    name: str


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a chat.

    Attributes:
      role: of ROLES; "developer" is "system".
      text: all of its text.
      files: images and PDFs, each with the number of characters of the text before it.
    """

    role: str
    text: str
    files: tuple[tuple[int, File], ...] = ()


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request that can be served, but for its files, which are not yet opened.

    Attributes:
      messages: the chat: maybe a system message, then user and assistant by turns, the last one of
        the user.
      decoding: how tokens are chosen; greedily where the request says nothing.
      max_tokens: of the answer; None for the default.
      stop: texts before which the answer ends.
      is_stream: whether the answer is sent as it is made.
      has_usage: whether a stream ends with the numbers of tokens.
    """

    messages: tuple[Message, ...]
    decoding: Decoding
    max_tokens: int | None
    stop: tuple[str, ...]
    is_stream: bool
    has_usage: bool


def read(body: bytes | bytearray, model: str) -> ChatRequest:
    """Returns a request.

    Args:
      body: JSON.
      model: the name of the model that is served.

    Raises:
      ApiError: what is wrong with it.
    """
    fields = _object(_json(body), "the body")
    # Nothing is ignored that could change an answer: a client that asks for three answers or for
    # JSON would take the one text that it gets for what it asked for.
    known = {*READ, *ONLY, *IGNORED}
    for name, value in fields.items():
        if name not in known:
            raise _wrong(f"unknown field {name!r}{nearest(name, known)}", name)
        if name in ONLY and value is not None and value not in ONLY[name]:
            served = " or ".join(map(json.dumps, ONLY[name]))
            raise _wrong(f"{name} must be {served}", name)
    # Clients send null for what they leave to the server.
    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("model") != model:
        raise ApiError(
            404, f"there is no model {given.get('model')!r}; served is {model!r}",
            "model_not_found", "model",
        )  # fmt: skip
    options = _object(given.get("stream_options", {}), "stream_options")
    return ChatRequest(
        messages=_messages(given.get("messages")),
        decoding=_decoding(given),
        max_tokens=_max_tokens(given),
        stop=_stop(given.get("stop", [])),
        is_stream=_typed(given, "stream", bool, False),
        has_usage=_typed(options, "include_usage", bool, False),
    )


def _json(body: bytes | bytearray) -> Any:
    try:
        # Not json's own decoding, which lets half characters through.
        text = body.decode("utf-8-sig")
        value = json.loads(text)
        # Nor those that are escaped: no tokenizer takes them, and no response can hold them.
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise _wrong("the body has half a character, a surrogate without its other half") from err
    # RecursionError: brackets within brackets, by the thousand.
    except (ValueError, RecursionError) as err:
        raise _wrong(f"the body is no JSON: {one_line(err)}") from err
    return value


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{name} must be an object", name if name in READ else None)
    return value


def _typed(fields: Mapping[str, Any], name: str, kind: type | tuple, default: Any) -> Any:
    value = fields.get(name, default)
    # True is an int, and no number of anything.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        named = kind.__name__ if isinstance(kind, type) else "number"
        raise _wrong(f"{name} must be a {named}, and is {str(value)[:50]!r}", name)
    return value


def _decoding(fields: Mapping[str, Any]) -> Decoding:
    numbers = {}
    for name in ("temperature", "top_p", "repetition_penalty"):
        try:
            numbers[name] = float(_typed(fields, name, (int, float), getattr(GREEDY, name)))
        except OverflowError as err:  # a whole number of hundreds of digits
            raise _wrong(f"{name} is too large", name) from err
    # Of OpenAI's seeds, which may be negative and of 64 bits, the lower 32 count.
    seed = _typed(fields, "seed", int, 0) & MAX_SEED
    try:
        return Decoding(**numbers, seed=seed)
    except UserError as err:
        raise _wrong(str(err), str(err).partition(" ")[0]) from err


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if name in fields:
            number = _typed(fields, name, int, None)
            if number < 1:
                raise _wrong(f"{name} is {number}; it must be 1 or more", name)
            return number
    return None


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise _wrong(f"stop must be a text or up to {MAX_STOPS} texts, none of them empty", "stop")
    return tuple(stops)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages must be a list of at least one message", "messages")
    messages = tuple(_message(one, number) for number, one in enumerate(value))
    turns = messages[1:] if messages[0].role == "system" else messages
    # Chat templates know no other order, and a prompt must end where the model answers.
    roles = [message.role for message in turns]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
        raise _wrong(
            "messages must be those of user and assistant by turns, the last one of the user, "
            f"after at most one of the system; they are of: {', '.join(m.role for m in messages)}",
            "messages",
        )
    return messages


def _message(value: Any, number: int) -> Message:
    place = f"messages[{number}]"
    if not isinstance(value, dict):
        raise _wrong(f"{place} must be an object", "messages")
    role = value.get("role")
    if role not in ROLES:
        raise _wrong(f"{place}.role is {role!r}{nearest(str(role), ROLES)}", "messages")
    role = "system" if role == "developer" else role
    content = value.get("content")
    # One form for both: most clients send a text alone where there is no image.
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _wrong(f"{place}.content must be a text or a list of parts", "messages")
    text = ""
    files = []
    for part in content:
        found = _part(part, f"{place}.content")
        if isinstance(found, str):
            text += found
        elif role != "user":
            raise _wrong(f"{place} has a file, and only a user's message may", "messages")
        else:
            files.append((len(text), found))
    if role == "user" and not text.strip():
        raise _wrong(f"{place} has no text", "messages")
    return Message(role, text, tuple(files))


def _part(part: Any, place: str) -> str | File:
    """The text of a part of a message, or its file."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image_url", "file"):
        inner = part.get(kind)
        name = "url" if kind == "image_url" else "file_data"
        if isinstance(inner, dict) and isinstance(inner.get(name), str):
            return _file(inner[name], f"{place}: {kind}")
    raise _wrong(
        f"{place} has a part that is none of text, image_url with a url, or file with file_data",
        "messages",
    )


def _file(uri: str, name: str) -> File:
    # Not urllib's data: handler, which decodes what is no base64 and says nothing. And no URL is
    # opened: a server that fetches what a client names reads the network that it stands in.
    head, comma, data = uri.partition(",")
    if not head.startswith("data:") or not comma:
        raise _wrong(
            f"{name} must be a data URI, data:TYPE;base64,...: nothing is fetched from the network",
            "messages",
        )
    media_type, *options = head.removeprefix("data:").split(";")
    if "base64" not in options:
        raise _wrong(f"{name} must be encoded as base64", "messages")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as err:
        raise _wrong(f"{name} is no base64: {one_line(err)}", "messages") from err
    return File(media_type, content, name)


def _wrong(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, "invalid_value", param)


def too_large(what: str, number: int, most: int) -> ApiError:
    """Returns the error of a request with more than it may have of something."""
    return ApiError(413, f"{counted(number, what)}; at most {most:,}", "request_too_large")
