"""The interface of tokenizers."""

import abc
from collections.abc import Iterable, Mapping

from alignvlm_jax.errors import UserError


class Tokenizer(abc.ABC):
    """A tokenizer: converts text to token ids and back.

    Text that spells a special token stays text, so that a question cannot inject one.

    Attributes:
      name: name of its file, for messages.
      vocab_size: the number above all of its ids.
      special_tokens: ids by name of the tokens that text never becomes, such as those of a chat and
        those that begin and end a text.
    """

    name: str
    vocab_size: int
    special_tokens: Mapping[str, int]

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
        """The token that fills up packed sequences.

        Segment ids tell padding from text, so that any token serves.
        """
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


def readable(text: str) -> str:
    """Returns a text with its spaces, line breaks and tabs as visible symbols."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
