"""Tokenizers in Llama 3's `tokenizer.model` format: byte-pair ranks for the tiktoken library."""

import base64
import binascii
from collections.abc import Iterable

import tiktoken

from alignvlm_jax.data.tokenizers.base import Tokenizer, fingerprint, readable
from alignvlm_jax.errors import UserError

# The pattern and the special tokens are those published with the Llama 3 models.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL_TOKENS = 256
NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
SPECIAL_TOKENS = (
    *NAMED,
    *(f"<|reserved_special_token_{i + 2}|>" for i in range(NUM_SPECIAL_TOKENS - len(NAMED))),
)


class TiktokenTokenizer(Tokenizer):
    """The tokenizer of a list of byte-pair ranks.

    The ids after the ranks are the 256 special tokens of Llama 3, which the file does not hold.
    """

    def __init__(self, content: bytes, name: str):
        try:
            lines = (line.split() for line in content.splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as err:
            raise UserError(f"{name} is no list of byte-pair ranks ({err})") from err
        # The ids of special tokens follow the last rank: a truncated list would shift all of them.
        # The least that a list can have are the 256 bytes.
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
            raise UserError(
                f"{name} is no whole list of byte-pair ranks: it has {len(ranks)}, not numbered "
                "in a row"
            )
        self.name = name
        self.fingerprint = fingerprint(content)
        self.special_tokens = {special: len(ranks) + i for i, special in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + NUM_SPECIAL_TOKENS
        self._model = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        return self._model.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""
        return self._model.decode([int(i) for i in ids if self.is_text(i)])

    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, start, end) for every token of a text."""
        ids = self.encode(text)
        # Tokens are bytes: this list has, for each byte of the text, the index of its character.
        character = [i for i, letter in enumerate(text) for _ in letter.encode()]
        spans = []
        end = 0
        for token in ids:
            start = end
            end = end + len(self._model.decode_single_token_bytes(token))
            spans.append((token, character[start], character[end - 1] + 1))
        return spans

    def piece(self, token: int) -> str:
        """Returns a token as legible text."""
        if token >= self.vocab_size:
            return f"#{token}"
        return readable(self._model.decode([int(token)]))
