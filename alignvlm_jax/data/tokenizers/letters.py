"""Text as the tokens of its letters, one by one, as patches of a page show it."""

import functools

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


def spell(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a text letter by letter, of which the tokenizer makes the same text.

    A space and what follows it are one token where there is such a one, as in the labels of patches
    (`DataConfig.label_unit`): a text is then spelled by the tokens of the patches that show it.
    """
    ids: list[int] = []
    at = 0
    while at < len(text):
        following = text[at + 1 : at + 2]
        spaced = with_space(following, tokenizer) if text[at] == " " and following else ()
        ids += spaced or of_character(text[at], tokenizer)
        at += 2 if spaced else 1
    return ids


def check(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer that makes another text of spelled ones: some put a space
    before whatever begins a text."""
    found = tokenizer.decode(spell(SAMPLE, tokenizer))
    if found != SAMPLE:
        raise UserError(
            f"tokenizer {tokenizer.name} makes {found!r} of the letters of {SAMPLE!r}; "
            "config.data.answer_unit must be 'token' with it"
        )
