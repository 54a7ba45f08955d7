"""Text as the tokens of its letters, one by one, as patches of a page show it."""

import functools
from typing import NamedTuple

from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError

SAMPLE = "Ab, c"


@functools.lru_cache(maxsize=4096)
def of_character(character: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens of a character: one, or those of its bytes."""
    return tuple(token for token, _, _ in tokenizer.token_offsets(character))


def with_space(character: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token of a character with a space before it, as tokenizers begin a word; empty
    where none is both."""
    spaced = of_character(f" {character}", tokenizer)
    return spaced if len(spaced) == 1 else ()


def token_offsets(text: str, tokenizer: Tokenizer) -> list[tuple[int, int, int]]:
    """Returns the tokens of a text letter by letter, of which the tokenizer makes the same text,
    each with the characters of the text, from and up to, that it is of.

    A space and what follows it are one token where there is such a one, as in the labels of patches
    (`DataConfig.label_unit`): a text is then spelled by the tokens of the patches that show it.
    """
    spans: list[tuple[int, int, int]] = []
    at = 0
    while at < len(text):
        following = text[at + 1 : at + 2]
        # Two spaces may be a token, too, which no patch shows.
        is_word = text[at] == " " and following.strip()
        spaced = with_space(following, tokenizer) if is_word else ()
        end = at + (2 if spaced else 1)
        spans += [(token, at, end) for token in spaced or of_character(text[at], tokenizer)]
        at = end
    return spans


def spell(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of `token_offsets` alone."""
    return [token for token, _, _ in token_offsets(text, tokenizer)]


class Text(NamedTuple):
    """A question and what stands around it in the same text.

    Attributes:
      before: what the format puts there, and what the model is told first.
      is_spelled: whether the question, and it alone, is spelled letter by letter.
    """

    before: str
    question: str
    after: str
    is_spelled: bool

    def __str__(self) -> str:
        return f"{self.before}{self.question}{self.after}"

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the tokens of the whole text."""
        if not self.is_spelled:
            return tokenizer.encode(str(self))
        return [token for token, _, _ in self.token_offsets(tokenizer)]

    def token_offsets(self, tokenizer: Tokenizer) -> list[tuple[int, int, int]]:
        """Returns the tokens of the whole text, as `Tokenizer.token_offsets`."""
        if not self.is_spelled:
            return tokenizer.token_offsets(str(self))
        parts = (
            tokenizer.token_offsets(self.before),
            token_offsets(self.question, tokenizer),
            tokenizer.token_offsets(self.after),
        )
        starts = (0, len(self.before), len(self.before) + len(self.question))
        return [
            (token, begin + start, end + start)
            for start, part in zip(starts, parts, strict=True)
            for token, begin, end in part
        ]


def check(tokenizer: Tokenizer, field: str) -> None:
    """Raises UserError for a tokenizer that makes another text of spelled ones: some put a space
    before whatever begins a text. `field` is that of `config.data` which asks for letters."""
    found = tokenizer.decode(spell(SAMPLE, tokenizer))
    if found != SAMPLE:
        raise UserError(
            f"tokenizer {tokenizer.name} makes {found!r} of the letters of {SAMPLE!r}; "
            f"config.data.{field} must be 'token' with it"
        )
