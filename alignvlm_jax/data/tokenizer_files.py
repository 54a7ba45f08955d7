"""Tokenizers by what their file holds."""

from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from alignvlm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from alignvlm_jax.data.tiktoken_tokenizer import TiktokenTokenizer
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError

NAMES = ("tokenizer.json", "tokenizer.model")


def read(path: str | Path) -> tuple[Path, bytes]:
    """Returns a tokenizer's file, or the one in a folder (a tokenizer.json before a tokenizer.model), and its bytes.

    Raises:
      UserError: it is missing.
    """
    path = storage.path(path)
    if path.is_dir() or not (path.is_file() or path.suffix in (".json", ".model")):
        path = next((path / name for name in NAMES if (path / name).exists()), path / NAMES[-1])
    try:
        return path, path.read_bytes()
    except OSError as err:
        raise UserError(f"cannot read tokenizer {path} ({err.strerror}); run `prepare` or `convert` first") from err


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer's file, or the one in a folder, by what it holds.

    Raises:
      UserError: it is missing or no tokenizer.
    """
    path, content = read(path)
    if content.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(content, str(path))
    # Ranks are lines of printable base64; a SentencePiece model is binary from its second byte on.
    first_line = content.partition(b"\n")[0]
    if first_line.isascii() and first_line.endswith(b" 0"):
        return TiktokenTokenizer(content, str(path))
    return SentencePieceTokenizer(content, str(path))
