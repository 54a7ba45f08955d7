"""The interface of tokenizers."""

import abc
import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from alignvlm_jax.errors import UserError


class ChatFiles(NamedTuple):
    """What stands beside a tokenizer's file and says how its model writes a chat.

    Attributes:
      name: of the file that says it, for messages; empty where there is none.
      chat_format: the content of a chat_format.json, which goes before all else.
      template: a chat template in Jinja.
      named_tokens: the names that templates have for tokens (bos_token, eos_token), with the
        tokens.
      is_from_before: whether `prepare` or `convert` wrote the folder when they left no
        chat_format.json yet: its format followed from the special tokens alone.
    """

    name: str = ""
    chat_format: str = ""
    template: str = ""
    named_tokens: tuple[tuple[str, str], ...] = ()
    is_from_before: bool = False


class Tokenizer(abc.ABC):
    """A tokenizer: converts text to token ids and back.

    Text that spells a special token stays text, so that a question cannot inject one.

    Attributes:
      name: of its file, for messages.
      vocab_size: its ids are below this.
      special_tokens: those that text never makes, by name: of the chat, beginning and end of text.
      fingerprint: a checksum of its file; see `fingerprint`.
      content: its file's, which a checkpoint takes along.
      chat_files: what stands beside its file.
    """

    name: str
    vocab_size: int
    special_tokens: Mapping[str, int]
    fingerprint: str
    content: bytes
    chat_files: ChatFiles = ChatFiles()

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without any special token."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids, without special tokens and ids beyond the vocabulary."""

    @abc.abstractmethod
    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, start, end) for every token of a text, with offsets in characters.

        Tokens may overlap, if each is a part of the bytes of a character.
        """

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """Returns a token as legible text, with white space as in `readable`.

        An id beyond the vocabulary is shown as its number.
        """

    @property
    def pad_id(self) -> int:
        """Fills sequences; segment ids tell it from text, so that any token serves."""
        return 0

    @property
    def space_id(self) -> int:
        """The token of a single space, which labels patches without text.

        Raises:
          UserError: a space is not a single token.
        """
        ids = self.encode(" ")
        if len(ids) != 1:
            raise UserError(
                f"tokenizer {self.name} has no token for a single space, but {len(ids)} for it"
            )
        return ids[0]

    def special(self, name: str) -> int:
        """Returns the id of a special token; raises UserError if there is none of this name."""
        if name not in self.special_tokens:
            raise UserError(f"tokenizer {self.name} has no special token {name}")
        return self.special_tokens[name]

    def is_text(self, token: int) -> bool:
        """Whether a token is in the vocabulary and not special."""
        return 0 <= token < self.vocab_size and token not in self.special_tokens.values()


def fingerprint(content: bytes) -> str:
    """Returns a checksum of a tokenizer's file: what indexes and predictions say they are of."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def readable(text: str) -> str:
    """Returns a text with its spaces, line breaks and tabs as visible symbols."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
