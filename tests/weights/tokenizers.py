"""Tokenizers trained on the spot, with the special tokens of the model families."""

import base64
import io
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The total of invoice 4821 is 318.40 dollars.",
    "Été à Zürich, naïve café",
    "def f(x):\n\treturn x + 1\n",
] * 9
AWKWARD = "  a  1234567 if x:\n\t\treturn 'é'  Zürich 東京 👩‍💻 <|im_end|> </s> \n\n end "
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_chatml(
    folder: Path, special_tokens: tuple[str, ...] = CHATML, vocab_size: int = 290
) -> Tokenizer:
    """Writes the tokenizer.json of a byte-level BPE; returns the library's own tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(name, special=True, normalized=False) for name in special_tokens
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_sentencepiece(folder: Path) -> bytes:
    """Writes the tokenizer.model of a SentencePiece BPE that puts a space before every text; returns
    its content."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return model.getvalue()


def write_tiktoken(path: Path) -> None:
    """Writes ranks as Llama 3's tokenizer.model has them: all bytes, and a few pairs and words."""
    tokens = [bytes([i]) for i in range(256)] + [
        b" t",
        b"he",
        b" the",
        b"\xc3\xa9",
        b"in",
        b" a",
        b"\n\n",
        b"us",
        b"er",
    ]
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
