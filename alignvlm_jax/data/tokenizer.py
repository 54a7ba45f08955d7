"""The tiny LLM's tokenizer: SentencePiece, one token a character, plus chat marks and a few frequent phrases."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from alignvlm_jax.errors import UserError

# Control symbols never match text: a question that spells "<image>" cannot make an image slot.
CHAT_MARKS = ("<image>", "<user>", "<assistant>", "<end>")
# User-defined symbols do match text: they keep the questions short.
PHRASES = ("\n", "Read the page.", "What is the ", "How much is the ", " of ")
PRINTABLE = "".join(chr(code) for code in range(33, 127))


class Tokenizer:
    """Text to token ids and back. The text is taken as it is: no normalisation, every space is a token."""

    def __init__(self, model: bytes, name: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as err:
            raise UserError(f"{name} is no SentencePiece model; run `prepare` again") from err
        self.vocab_size: int = self._model.vocab_size()
        self.pad_id: int = self._model.pad_id()
        self.bos_id: int = self._model.bos_id()
        self.image_id, self.user_id, self.assistant_id, self.end_id = map(self._model.piece_to_id, CHAT_MARKS)
        self.space_id: int = self._model.piece_to_id("▁")
        if self._model.unk_id() in (self.image_id, self.user_id, self.assistant_id, self.end_id, self.space_id):
            raise UserError(f"{name} lacks one of the tokens {', '.join(CHAT_MARKS)} or the space; run `prepare` again")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a model file.

        Raises:
          UserError: it is missing or no tokenizer.
        """
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as err:
            raise UserError(f"cannot read tokenizer {path} ({err.strerror}); run `prepare` first") from err

    @classmethod
    def train(cls, path: str | Path, corpus_lines: Iterable[str]) -> "Tokenizer":
        """Trains a tokenizer, writes it to `path` and returns it. Printable ASCII is always covered."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus_lines),
            model_writer=model,
            model_type="char",
            vocab_size=4 + len(CHAT_MARKS) + len(PHRASES) + len(PRINTABLE) + 1,
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(CHAT_MARKS),
            user_defined_symbols=[phrase.replace(" ", "▁") for phrase in PHRASES],
            required_chars=PRINTABLE,
            character_coverage=1.0,
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
        """Returns the ids of `text`, without `<s>`; a character that is not printable ASCII is the unknown token."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; chat marks, padding and ids beyond the vocabulary (a model may have more) give
        nothing."""
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, start, end) for every token, in characters of `text`."""
        # "offset_mapping" counts characters, "proto" counts bytes.
        encoded = self._model.encode(text, return_type="offset_mapping")
        return [(token, *span) for token, span in zip(encoded["ids"], encoded["offsets"], strict=True)]

    def piece(self, token: int) -> str:
        """Returns a token readably: a space as an open box, a line break as a return sign; an id beyond the vocabulary,
        which a model may have, as its number."""
        if token >= self.vocab_size:
            return f"#{token}"
        return self._model.id_to_piece(int(token)).replace("▁", "␣").replace("\n", "⏎")
