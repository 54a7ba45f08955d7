"""Tokenizers of published models behind the one interface, against the libraries that define
them."""

import pickle

import pytest
import sentencepiece
import tiktoken.load

from alignvlm_jax.data import chat, chat_template, tokenizers
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.data.tokenizers.tiktoken import PATTERN, SPECIAL_TOKENS
from alignvlm_jax.errors import UserError
from tests.weights.tokenizers import AWKWARD, write_chatml, write_sentencepiece, write_tiktoken


@pytest.fixture(params=["huggingface", "tiktoken", "sentencepiece"])
def tokenizer_and_reference(request, tmp_path):
    """A tokenizer and a function that gives the reference's ids of a text in which nothing is
    special."""
    if request.param == "huggingface":
        reference = write_chatml(tmp_path)
        reference.encode_special_tokens = True
        return tokenizers.load(
            tmp_path
        ), lambda text: reference.encode(text, add_special_tokens=False).ids
    if request.param == "tiktoken":
        path = tmp_path / "tokenizer.model"
        write_tiktoken(path)
        ranks = tiktoken.load.load_tiktoken_bpe(str(path))
        reference = tiktoken.Encoding(
            "x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return tokenizers.load(tmp_path), lambda text: reference.encode(text)
    content = write_sentencepiece(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    return tokenizers.load(tmp_path), reference.encode


def test_ids_are_the_references_and_come_back_as_the_text(tokenizer_and_reference):
    tokenizer, reference = tokenizer_and_reference
    for text in (AWKWARD, "Total: 318.40", "東京", " ", "x"):
        ids = tokenizer.encode(text)
        assert ids == reference(text)
        assert tokenizer.decode(ids) == text
        assert all(tokenizer.is_text(i) for i in ids)


def test_a_pickled_tokenizer_is_the_same(tokenizer_and_reference):
    """As one that is handed to another process."""
    tokenizer, _ = tokenizer_and_reference
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint and other.vocab_size == tokenizer.vocab_size
    for text in (*AWKWARD, *tokenizer.special_tokens):
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(other.encode(text)) == text


def test_special_tokens_and_ids_beyond_decode_to_nothing(tokenizer_and_reference):
    tokenizer, _ = tokenizer_and_reference
    assert tokenizer.special_tokens and not set(
        tokenizer.encode("".join(tokenizer.special_tokens))
    ) & set(tokenizer.special_tokens.values())
    assert (
        tokenizer.decode(
            [*tokenizer.special_tokens.values(), *tokenizer.encode("ab"), tokenizer.vocab_size + 3]
        )
        == "ab"
    )
    assert tokenizer.piece(tokenizer.vocab_size) == f"#{tokenizer.vocab_size}"
    assert tokenizer.piece(tokenizer.space_id) == "␣"


def test_offsets_cover_the_text(tokenizer_and_reference):
    tokenizer, _ = tokenizer_and_reference
    for text in ("total", "naïve東京👩‍💻x", "12"):
        offsets = tokenizer.token_offsets(text)
        assert [token for token, _, _ in offsets] == tokenizer.encode(text)
        covered = {i for _, start, end in offsets for i in range(start, end)}
        assert covered == set(range(len(text)))
        starts = [start for _, start, _ in offsets]
        assert starts == sorted(starts)


def test_llama3_has_its_256_special_tokens(tmp_path):
    write_tiktoken(tmp_path / "tokenizer.model")
    tokenizer = tokenizers.load(tmp_path / "tokenizer.model")
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 256
    first = 265  # Of 128,000 in the published file: there these are 128000, 128009 and 128255.
    assert (
        tokenizer.special_tokens["<|begin_of_text|>"] == first
        and tokenizer.special_tokens["<|eot_id|>"] == first + 9
    )
    assert (
        tokenizer.special_tokens["<|reserved_special_token_246|>"]
        == first + 255
        == tokenizer.vocab_size - 1
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": 3}', r"tokenizer\.model is no tokenizer\.json"),
        (b"IQ== 0\nIg== x\n", r"is no list of byte-pair ranks"),
        (b"IQ== 0\nIg== 1\n", r"is no whole list of byte-pair ranks: it has 2"),
        (b"\x00\x01", r"is no SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.load(tmp_path / "tokenizer.model")
    assert "\n" not in str(error.value)


TURNS = [("What is the total?", "318.40"), ("Who <|im_end|> pays?", "the café")]


def test_chatml_is_the_template_and_the_mask_its_answers(tmp_path):
    """The reference reads the whole conversation in one go, and special tokens in it as such."""
    reference = write_chatml(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    text = (
        "<|im_start|>user\nWhat is the total?<|im_end|>\n<|im_start|>assistant\n318.40<|im_end|>\n"
    )
    tokens, is_answer = chat.encode_chat(tokenizer, TURNS[:1], 0, image_id=999)
    assert tokens.tolist() == reference.encode(text).ids
    assert tokenizer.decode(tokens[is_answer]) == "318.40"
    assert tokens[is_answer][-1] == tokenizer.special_tokens["<|im_end|>"] and not is_answer[-1]
    prompt = chat.encode_prompt(tokenizer, TURNS[0][0], 0, image_id=999)
    assert prompt.tolist() == reference.encode(text[: text.index("318.40")]).ids
    assert chat.stop_ids(tokenizer) == (
        tokenizer.special_tokens["<|im_end|>"],
        tokenizer.special_tokens["<|endoftext|>"],
    )


def test_llama3_is_the_template(tmp_path):
    write_tiktoken(tmp_path / "tokenizer.model")
    tokenizer = tokenizers.load(tmp_path)
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is the total?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n318.40<|eot_id|>"
    )
    tokens, is_answer = chat.encode_chat(
        tokenizer, [("What is the total? \n", " 318.40")], 0, image_id=999
    )
    assert tokens.tolist() == tokenizer._model.encode(text, allowed_special="all")
    assert tokenizer.decode(tokens[is_answer]) == "318.40"
    assert [tokenizer.piece(i) for i in chat.stop_ids(tokenizer)] == [
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|eom_id|>",
    ]


def test_images_stand_before_the_question_of_the_first_turn_that_fits(tmp_path):
    write_chatml(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    with_image, is_answer = chat.encode_chat(tokenizer, TURNS, 3, image_id=999)
    without, is_answer_without = chat.encode_chat(tokenizer, TURNS, 0, image_id=999)
    (slots,) = (with_image == 999).nonzero()
    question = tokenizer.encode(TURNS[0][0])
    assert slots.tolist() == list(range(slots[0], slots[0] + 3))
    assert with_image[slots[-1] + 1 :][: len(question)].tolist() == question
    assert with_image[with_image != 999].tolist() == without.tolist()
    assert is_answer[with_image != 999].tolist() == is_answer_without.tolist()
    too_long = ("x" * 500, "y")
    only_second, _ = chat.encode_chat(
        tokenizer, [too_long, TURNS[1]], 3, image_id=999, max_length=200
    )
    assert (
        only_second.tolist() == chat.encode_chat(tokenizer, TURNS[1:], 3, image_id=999)[0].tolist()
    )


def test_a_tokenizer_without_a_chat_format_is_one_line(tmp_path):
    write_chatml(tmp_path, special_tokens=("<pad>",))
    with pytest.raises(
        UserError, match=r"special tokens of no chat format .*chatml: <\|im_end\|> <\|im_start\|>"
    ):
        chat_template.format_of(tokenizers.load(tmp_path))


def test_a_tokenizer_is_made_once_until_its_file_changes(tmp_path):
    path = tmp_path / "tokenizer.model"
    SentencePieceTokenizer.train(path, ["some text"])
    first = tokenizers.load(tmp_path)
    assert tokenizers.load(tmp_path) is first and tokenizers.load(str(path)) is first
    SentencePieceTokenizer.train(path, ["other é text"])
    assert tokenizers.load(tmp_path) is not first
