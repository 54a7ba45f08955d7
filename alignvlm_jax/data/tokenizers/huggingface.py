"""A `tokenizer.json` of Hugging Face."""

from collections.abc import Iterable

import tokenizers

from alignvlm_jax.data.tokenizers.base import Tokenizer, fingerprint, readable
from alignvlm_jax.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; its added tokens that are marked special are the special tokens."""

    def __init__(self, content: bytes, name: str):
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as err:  # The library raises Exception itself.
            raise UserError(f"{name} is no tokenizer.json ({' '.join(str(err).split())})") from err
        self.name = name
        self.fingerprint = fingerprint(content)
        # Else a question that spells a special token would hold one.
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max([*self._model.get_vocab().values()]) + 1

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._model.decode(
            [int(i) for i in ids if self.is_text(i)], skip_special_tokens=False
        )

    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """See Tokenizer."""
        encoded = self._model.encode(text, add_special_tokens=False)
        return [(token, *span) for token, span in zip(encoded.ids, encoded.offsets, strict=True)]

    def piece(self, token: int) -> str:
        """See Tokenizer."""
        if token >= self.vocab_size:
            return f"#{token}"
        return readable(self._model.decode([int(token)], skip_special_tokens=False))
