"""The data of a stage, opened once and handed to all that read them."""

import functools
import os
import zlib
from collections.abc import MutableMapping
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.config import DataConfig, ModelConfig
from alignvlm_jax.data import chat_format, chat_template, index, tokenizers
from alignvlm_jax.data.index import Index
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError


class StageData:
    """What a stage has open: its tokenizer, and of the splits that it reads shards and indexes,
    each from the first time that somebody asks for it.

    Attributes:
      tokenizer: of all text.
      tokenizer_path: its file or folder, as the config names it.
    """

    def __init__(self, tokenizer: Tokenizer, tokenizer_path: Path):
        self.tokenizer = tokenizer
        self.tokenizer_path = tokenizer_path
        self._sources: dict[tuple[str, str], RecordSource] = {}
        self._indexes: dict[tuple[str, str], Index] = {}

    @classmethod
    def open(
        cls,
        data: DataConfig,
        model: ModelConfig,
        known: MutableMapping[Path, Tokenizer] | None = None,
    ) -> "StageData":
        """Returns the data of a stage with their tokenizer, and nothing else opened yet.

        Args:
          data: where they are.
          model: what the tokenizer has to fit.
          known: tokenizers of other stages by path; one that is read joins them.

        Raises:
          UserError: see `load_tokenizer`.
        """
        return cls(load_tokenizer(data, model, known), tokenizer_path(data))

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer; see the function of this name."""
        return tokenizer_files(self.tokenizer)

    def records(self, folder: str | os.PathLike, split: str) -> RecordSource:
        """Returns the records of a split; UserError as of `RecordSource`."""
        key = os.fspath(folder), split
        if key not in self._sources:
            self._sources[key] = RecordSource(folder, split)
        return self._sources[key]

    def index(self, folder: str | os.PathLike, split: str) -> Index:
        """Returns the index of a split; UserError as of `index.load`."""
        key = os.fspath(folder), split
        if key not in self._indexes:
            self._indexes[key] = index.load(folder, split)
        return self._indexes[key]


def tokenizer_path(data: DataConfig) -> Path:
    """Returns the file or folder of the tokenizer: `data.tokenizer`, or `data.dir`."""
    return storage.path(data.tokenizer or data.dir)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the files of a tokenizer by name, with a chat_format.json
    also where that follows from the special tokens: who reads them elsewhere need not know the
    rule.

    Raises:
      UserError: one is missing or damaged, or there is no chat format.
    """
    text = chat_format.to_json(chat_template.format_of(tokenizer))
    return tokenizers.files(tokenizer) | {tokenizers.CHAT_FORMAT: text.encode()}


def tokenizer_contents(data: DataConfig) -> str:
    """Returns what tells one tokenizer from another, its chat format included, in words.

    Raises:
      UserError: it is missing.
    """
    path, content = tokenizers.read(tokenizer_path(data))
    content += chat_template.told_apart_by(tokenizers.load(path)).encode()
    return f"{len(content):,} bytes, checksum {zlib.crc32(content):08x}"


def load_tokenizer(
    data: DataConfig, model: ModelConfig, known: MutableMapping[Path, Tokenizer] | None = None
) -> Tokenizer:
    """Returns the tokenizer of `tokenizer_path`; one that is `known` by that path is not read.

    Raises:
      UserError: it is missing or no tokenizer, has more tokens than `model.llm.vocab_size`, or
        takes the model's image token for text.
    """
    path = tokenizer_path(data)
    known = {} if known is None else known
    if path not in known:
        known[path] = tokenizers.load(path)
    # Of every model anew: stages that share a tokenizer may differ in their vocabulary.
    check_fits(known[path], path, model)
    return known[path]


def check_fits(tokenizer: Tokenizer, path: Path, model: ModelConfig) -> None:
    """Raises UserError where a tokenizer, which is that of `path`, has more tokens than
    `model.llm.vocab_size`, or takes the model's image token for text."""
    if tokenizer.vocab_size > model.llm.vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, config.model.llm.vocab_size is "
            f"{model.llm.vocab_size}; make it at least {tokenizer.vocab_size}"
        )
    # A tokenizer without an <image> of its own agrees with whatever id the config names.
    image_id = model.image_token_id
    own_image_id = tokenizer.special_tokens.get("<image>", image_id)
    if image_id != own_image_id:
        raise UserError(
            f"tokenizer {path} marks image tokens by token {own_image_id}, "
            f"config.model.image_token_id is {image_id}; make them equal"
        )
    if tokenizer.is_text(image_id):
        raise UserError(
            f"config.model.image_token_id {image_id} is {tokenizer.piece(image_id)!r} in "
            f"tokenizer {path}; take one that no text makes, as {tokenizer.vocab_size}"
        )
