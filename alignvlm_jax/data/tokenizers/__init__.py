"""Tokenizers by what their file holds, and what stands beside it."""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax import storage
from alignvlm_jax.data import filesystem
from alignvlm_jax.data.filesystem import Entry
from alignvlm_jax.data.tokenizers.base import ChatFiles, Tokenizer
from alignvlm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.data.tokenizers.tiktoken import TiktokenTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import faults

NAMES = ("tokenizer.json", "tokenizer.model")
FIRST = (
    "run `prepare` or `convert` first, or name the folder where it lies now: by --tokenizer, "
    "--data, or of `train` --config.data.tokenizer"
)
CHAT_FORMAT = "chat_format.json"
TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CONVERTED = "tokenizer"
"""Folder of a tokenizer in what `convert` writes."""
KEPT = (*NAMES, CHAT_FORMAT, TEMPLATE, SETTINGS, SPECIAL_TOKENS, "generation_config.json")
"""Files that belong to a tokenizer, of a folder that may hold others."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read(path: str | os.PathLike) -> tuple[Path, bytes]:
    """Returns the path and the content of a tokenizer's file.

    Args:
      path: the file, or a folder with one (a tokenizer.json goes before a tokenizer.model).

    Raises:
      UserError: the file is missing.
    """
    if filesystem.is_remote(path):
        return _read_remote(os.fspath(path))
    named = path = Path(path)
    if path.is_dir() or not (path.is_file() or path.suffix in (".json", ".model")):
        path = next((path / name for name in NAMES if (path / name).exists()), path / NAMES[-1])
    try:
        return path, path.read_bytes()
    except OSError as err:
        missing = "" if path.parent.exists() else f"there is no folder {path.parent}: "
        # The folder of a checkpoint is easily named in the place of its tokenizer's.
        beside = of_converted(named)
        hint = f"did you mean {beside}?" if beside else FIRST
        raise UserError(f"{missing}cannot read tokenizer {path} ({err.strerror}); {hint}") from err


def of_converted(folder: Path) -> Path | None:
    """Returns the folder of the tokenizer in what `convert` wrote, wherever that was moved; None
    where there is none."""
    beside = folder / CONVERTED
    return beside if beside.is_dir() else None


def load(path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer in a file, or in the file of a folder (as `read` finds it).

    It is cached for the process.

    Raises:
      UserError: the file is missing or no tokenizer.
    """
    path, content = read(path)
    return _make(str(path), content, chat_files(path))


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the contents of a tokenizer's file and of those beside it that belong to it, by name.

    Args:
      tokenizer: of `load`.

    Raises:
      UserError: a file beside it cannot be read.
    """
    folder = filesystem.parent(tokenizer.name) or "."
    # The other one of NAMES, if there is one, is not what this tokenizer is made of.
    beside = {name: _read_beside(folder, name) for name in KEPT if name not in NAMES}
    suffix = Path(tokenizer.name).suffix
    name = next((name for name in NAMES if suffix == Path(name).suffix), NAMES[-1])
    return {name: tokenizer.content} | {name: found for name, found in beside.items() if found}


def of_files(found: Mapping[str, bytes], name: str) -> Tokenizer:
    """Returns the tokenizer of what `files` gave, with a chat_format.json among it.

    Args:
      found: contents by name.
      name: where they are from, for messages.
    """
    main = next(one for one in NAMES if one in found)
    where = f"{name}/{CHAT_FORMAT}"
    chat_format = ChatFiles(where, chat_format=found[CHAT_FORMAT].decode())
    return _make(f"{name}/{main}", found[main], chat_format)


def chat_files(path: Path) -> ChatFiles:
    """Returns what stands beside a tokenizer's file.

    Raises:
      UserError: a file is damaged, or holds several templates and none of them is the default.
    """
    folder = filesystem.parent(os.fspath(path)) or "."

    def text(name: str) -> str:
        try:
            return _read_beside(folder, name).decode()
        except UnicodeDecodeError as err:
            raise UserError(f"{filesystem.join(folder, name)} is damaged: {err}") from err

    if own := text(CHAT_FORMAT):
        return ChatFiles(filesystem.join(folder, CHAT_FORMAT), chat_format=own)
    if _is_from_before(folder):
        return ChatFiles(is_from_before=True)
    settings = _object(filesystem.join(folder, SETTINGS), text(SETTINGS))
    name = TEMPLATE if text(TEMPLATE) else SETTINGS
    where = filesystem.join(folder, name)
    template = text(TEMPLATE) or _default_template(where, settings.get("chat_template"))
    if not template:
        return ChatFiles()
    named_tokens = _object(filesystem.join(folder, SPECIAL_TOKENS), text(SPECIAL_TOKENS)) | settings
    return ChatFiles(where, template=template, named_tokens=tuple(_named_tokens(named_tokens)))


def named_tokens(found: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the special tokens that a tokenizer's files, of `files`, give names (bos_token,
    eos_token, ...), by these names."""
    settings: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS, SETTINGS):
        settings |= _object(name, found.get(name, b"").decode())
    return dict(_named_tokens(settings))


def template(found: Mapping[str, bytes]) -> str:
    """Returns the chat template among a tokenizer's files, of `files`; "" where there is none."""
    settings = _object(SETTINGS, found.get(SETTINGS, b"").decode())
    own = found.get(TEMPLATE, b"").decode()
    return own or _default_template(SETTINGS, settings.get("chat_template"))


def _is_from_before(folder: str) -> bool:
    """Whether a folder without a chat_format.json is one of ours."""
    if _read_beside(folder, "prepare.json"):
        return True
    # `convert` writes WORKDIR/tokenizer, and a workdir's config.json is a list of stages: that of a
    # published model is an object.
    folder = folder if filesystem.is_remote(folder) else os.path.abspath(folder)
    if filesystem.name(folder) != CONVERTED:
        return False
    return _read_beside(filesystem.parent(folder), "config.json").lstrip()[:1] == b"["


def _read_beside(folder: str, name: str) -> bytes:
    """A small file of a folder; nothing where there is none."""
    path = filesystem.join(folder, name)
    if filesystem.is_remote(folder):
        entry = filesystem.listing(folder).get(name)
        return b"" if entry is None else _content(path, entry)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as err:
        raise UserError(f"cannot read {path} ({err.strerror})") from err


def _object(path: str, text: str) -> dict[str, Any]:
    """A JSON object; an empty one of no text."""
    try:
        value = json.loads(text) if text else {}
    except ValueError as err:
        raise UserError(f"{path} is damaged: {err}") from err
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return value


def _default_template(where: str, found: Any) -> str:
    """The one template of tokenizer_config.json, or that named `default` of several."""
    if found is None or isinstance(found, str):
        return found or ""
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{where} is damaged: chat_template is neither a text nor named texts")
    by_name = {one.get("name"): one.get("template") for one in found}
    if "default" not in by_name:
        raise UserError(
            f"{where} holds the chat templates {', '.join(map(repr, by_name))} and none that is "
            "named 'default'; name one of them so"
        )
    return by_name["default"]


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in NAMED_TOKENS:
        token = settings.get(name)
        # Either its text, or an object with the text and how it is matched.
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            yield name, token


@functools.lru_cache(maxsize=8)
def _make(name: str, content: bytes, files: ChatFiles) -> Tokenizer:
    # The cache's key has the content: a file that was written anew is read anew.
    tokenizer = _of_content(name, content)
    tokenizer.content = content
    tokenizer.chat_files = files
    return tokenizer


def _of_content(name: str, content: bytes) -> Tokenizer:
    if content.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(content, name)
    # Ranks are lines of printable base64; a SentencePiece model is binary from its second byte on.
    first_line = content.partition(b"\n")[0]
    if first_line.isascii() and first_line.endswith(b" 0"):
        return TiktokenTokenizer(content, name)
    return SentencePieceTokenizer(content, name)


def _read_remote(path: str) -> tuple[Path, bytes]:
    """Returns what `read` does, for a file or folder in a bucket."""
    # By its ending: a bucket has no folders that could be asked.
    is_file = path.endswith((".json", ".model"))
    folder, wanted = (
        (filesystem.parent(path), (filesystem.name(path),)) if is_file else (path, NAMES)
    )
    entries = filesystem.listing(folder)
    found = next((name for name in wanted if name in entries), None)
    if not found:
        raise UserError(
            f"cannot read tokenizer {filesystem.join(folder, wanted[-1])} (there is none); {FIRST}"
        )
    path = filesystem.join(folder, found)
    return storage.path(path), _content(path, entries[found])


@functools.lru_cache(maxsize=32)
def _content(path: str, entry: Entry) -> bytes:
    """Returns the content of a file in a bucket, cached for its version."""
    try:
        return filesystem.read_whole(path, entry.size)
    except OSError as err:
        raise faults.as_error(f"cannot read tokenizer {path} ({err})", err) from err
