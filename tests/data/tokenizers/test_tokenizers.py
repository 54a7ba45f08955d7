import shutil

import pytest

from alignvlm_jax.data import tokenizers
from alignvlm_jax.data.tokenizers.sentencepiece import (
    CHAT_TOKENS,
    PHRASES,
    PRINTABLE,
    SentencePieceTokenizer,
)
from alignvlm_jax.errors import UserError


def test_text_survives_the_round_trip(tokenizer):
    for text in (
        PRINTABLE,
        "  two  spaces \n\n and lines\n",
        "What is the total of Ames?",
        "<image><end>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_stay_in_the_tiny_vocabulary(tokenizer):
    assert tokenizer.vocab_size <= 128
    assert (
        tokenizer.pad_id,
        tokenizer.special_tokens["<s>"],
        tokenizer.special_tokens["<image>"],
    ) == (0, 2, 4)


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_are_one_token(tokenizer, phrase):
    assert len(tokenizer.encode(phrase)) == 1
    assert len(tokenizer.encode(f"a{phrase}b")) == 3


@pytest.mark.parametrize("mark", CHAT_TOKENS)
def test_text_cannot_spell_a_chat_mark(tokenizer, mark):
    special = {
        tokenizer.special_tokens["<image>"],
        tokenizer.special_tokens["<user>"],
        tokenizer.special_tokens["<assistant>"],
        tokenizer.special_tokens["<end>"],
    }
    assert len(special) == 4
    assert not special & set(tokenizer.encode(f"x {mark} y"))


def test_chat_marks_and_padding_decode_to_nothing(tokenizer):
    ids = [
        tokenizer.special_tokens["<s>"],
        tokenizer.special_tokens["<image>"],
        *tokenizer.encode("ab c"),
        tokenizer.special_tokens["<end>"],
        tokenizer.pad_id,
    ]
    assert tokenizer.decode(ids) == "ab c"


@pytest.mark.parametrize("text", ["Total: 12.50", "What is the é of ▁x?", "a b\nc"])
def test_offsets_tile_the_text(tokenizer, text):
    spans = tokenizer.token_offsets(text)
    assert [token for token, _, _ in spans] == tokenizer.encode(text)
    assert [start for _, start, _ in spans] == [0] + [end for _, _, end in spans[:-1]]
    assert spans[-1][2] == len(text)
    for token, start, end in spans:
        if text[start:end].isascii():
            assert tokenizer.decode([token]) == text[start:end]


def test_training_is_deterministic(tmp_path):
    models = []
    for name in ("a", "b"):
        SentencePieceTokenizer.train(tmp_path / name, ["some words", "and more words"])
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1]


def test_bad_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="prepare"):
        tokenizers.load(tmp_path / "missing.model")
    (tmp_path / "garbage.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"garbage\.model"):
        tokenizers.load(tmp_path / "garbage.model")


def test_the_folder_of_a_checkpoint_leads_to_its_tokenizer(tmp_path, tokenizer):
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(tokenizer.name, tmp_path / "tokenizer" / "tokenizer.model")
    with pytest.raises(UserError, match=rf"; did you mean {tmp_path}/tokenizer\?$"):
        tokenizers.load(tmp_path)
    tokenizers.load(tmp_path / "tokenizer")
