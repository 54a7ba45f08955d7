"""Tokenizers in the `tokenizer.json` format of Hugging Face."""

import functools
from collections.abc import Iterable
from typing import Any

import tokenizers

from alignvlm_jax.data.tokenizers.base import Tokenizer, fingerprint, readable
from alignvlm_jax.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, whose special tokens are those that it marks as such."""

    def __init__(self, content: bytes, name: str):
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as err:  # the library raises bare Exception
            raise UserError(f"{name} is no tokenizer.json ({' '.join(str(err).split())})") from err
        self.name = name
        self.fingerprint = fingerprint(content)
        # A file may hold settings of its training, which would cut or pad every text.
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        # The largest id, not the number of entries: ids may have gaps.
        self.vocab_size = max([*self._model.get_vocab().values()]) + 1
        self._set_up()

    def _set_up(self) -> None:
        """What no pickle keeps."""
        # Else a question that spells a special token would hold one.
        self._model.encode_special_tokens = True
        # Of each text in turn `prepare` counts the tokens for one task, and then for another.
        self._ids = functools.lru_cache(maxsize=128)(self._encode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up()

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        return list(self._ids(text))

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""
        return self._model.decode(
            [int(i) for i in ids if self.is_text(i)], skip_special_tokens=False
        )

    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, start, end) for every token of a text."""
        encoded = self._model.encode(text, add_special_tokens=False)
        return [(token, *span) for token, span in zip(encoded.ids, encoded.offsets, strict=True)]

    def piece(self, token: int) -> str:
        """Returns a token as legible text."""
        if token >= self.vocab_size:
            return f"#{token}"
        return readable(self._model.decode([int(token)], skip_special_tokens=False))
