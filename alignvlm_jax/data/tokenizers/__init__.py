"""Tokenizers, loaded from files whose kind is told by their content."""

import functools
import os
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.data import filesystem
from alignvlm_jax.data.filesystem import Entry
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.data.tokenizers.tiktoken import TiktokenTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import faults

NAMES = ("tokenizer.json", "tokenizer.model")
FIRST = "run `prepare` or `convert` first"


def read(path: str | os.PathLike) -> tuple[Path, bytes]:
    """Returns the path and the content of a tokenizer's file.

    Args:
      path: the file, or a folder with one (a tokenizer.json goes before a tokenizer.model).

    Raises:
      UserError: the file is missing.
    """
    if filesystem.is_remote(path):
        return _read_remote(os.fspath(path))
    path = Path(path)
    if path.is_dir() or not (path.is_file() or path.suffix in (".json", ".model")):
        path = next((path / name for name in NAMES if (path / name).exists()), path / NAMES[-1])
    try:
        return path, path.read_bytes()
    except OSError as err:
        raise UserError(f"cannot read tokenizer {path} ({err.strerror}); {FIRST}") from err


def load(path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer in a file, or in the file of a folder (as `read` finds it).

    It is cached for the process.

    Raises:
      UserError: the file is missing or no tokenizer.
    """
    path, content = read(path)
    return _make(str(path), content)


@functools.lru_cache(maxsize=8)
def _make(name: str, content: bytes) -> Tokenizer:
    """Returns the tokenizer that the content of a file describes."""
    # By content, not by name: Llama 3's ranks and SentencePiece models are both tokenizer.model.
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


@functools.lru_cache(maxsize=8)
def _content(path: str, entry: Entry) -> bytes:
    """Returns the content of a file in a bucket, cached for its version."""
    try:
        return filesystem.read_whole(path, entry.size)
    except OSError as err:
        raise faults.as_error(f"cannot read tokenizer {path} ({err})", err) from err
