"""SentencePiece tokenizers: those of published models, and that of the tiny LLM.

The tiny LLM's has one token a character, and a few phrases.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from alignvlm_jax.data.tokenizers.base import Tokenizer, fingerprint, readable
from alignvlm_jax.errors import UserError

# Control symbols never match text: a question that spells "<image>" cannot make an image token.
CHAT_TOKENS = ("<image>", "<user>", "<assistant>", "<end>")
# User-defined symbols do match text: they keep the questions short.
PHRASES = ("\n", "Read the page.", "What is the ", "How much is the ", " of ")
PRINTABLE = "".join(chr(code) for code in range(33, 127))


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece model, whose special tokens are its control symbols."""

    def __init__(self, model: bytes, name: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as err:
            raise UserError(f"{name} is no SentencePiece model") from err
        self.name = name
        self.fingerprint = fingerprint(model)
        self.vocab_size = self._model.vocab_size()
        controls = filter(self._model.is_control, range(self.vocab_size))
        self.special_tokens = {self._model.id_to_piece(i): i for i in controls}
        # -1 stands for none; any token serves.
        self._pad_id = max(self._model.pad_id(), 0)

    @classmethod
    def train(cls, path: str | Path, corpus_lines: Iterable[str]) -> "SentencePieceTokenizer":
        """Trains the tiny LLM's tokenizer on lines of text, writes it to `path` and returns it.

        Printable ASCII is always in its vocabulary.
        """
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus_lines),
            model_writer=model,
            model_type="char",
            vocab_size=4 + len(CHAT_TOKENS) + len(PHRASES) + len(PRINTABLE) + 1,
            # The size is an upper bound: a corpus of few characters is no error.
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(CHAT_TOKENS),
            user_defined_symbols=[phrase.replace(" ", "▁") for phrase in PHRASES],
            required_chars=PRINTABLE,
            character_coverage=1.0,
            # Text is kept as it is, so that offsets count its own characters.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
        tokenizer = cls(model.getvalue(), str(path))
        beside = f"{path}.tmp"
        Path(beside).write_bytes(model.getvalue())
        os.replace(beside, path)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text.

        A character that the model lacks, and has no bytes for, is the unknown token.
        """
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, start, end) for every token of a text."""
        # "offset_mapping" counts characters, "proto" counts bytes.
        encoded = self._model.encode(text, return_type="offset_mapping")
        return [
            (token, *span) for token, span in zip(encoded["ids"], encoded["offsets"], strict=True)
        ]

    def piece(self, token: int) -> str:
        """Returns a token as legible text."""
        return (
            readable(self._model.id_to_piece(int(token)).replace("▁", " "))
            if token < self.vocab_size
            else f"#{token}"
        )

    @property
    def pad_id(self) -> int:
        """The token that fills up packed sequences: the model's own, or else 0."""
        return self._pad_id

    @property
    def space_id(self) -> int:
        """The token of a single space; raises UserError if there is none."""
        # Not encode(" "), in front of which some models add another space.
        token = self._model.piece_to_id("▁")
        if token == self._model.unk_id():
            raise UserError(f"tokenizer {self.name} has no token for a single space")
        return token
