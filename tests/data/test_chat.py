import numpy as np
import pytest

from alignvlm_jax.data import chat, chat_format
from alignvlm_jax.data.tokenizers.base import ChatFiles

TURNS = [("What is the total?", "12.50"), ("What is the city?", "Ames\nIowa")]


def test_mask_covers_exactly_the_answers(tokenizer):
    tokens, is_answer = chat.encode_chat(tokenizer, TURNS, 5, 4)
    said = np.split(
        tokens[is_answer],
        np.flatnonzero(tokens[is_answer] == tokenizer.special_tokens["<end>"]) + 1,
    )
    assert [tokenizer.decode(part) for part in said] == ["12.50", "Ames\nIowa", ""]
    assert (is_answer & (tokens == tokenizer.special_tokens["<end>"])).sum() == 2
    given = tokenizer.decode(tokens[~is_answer])
    assert given == "What is the total?What is the city?"


def test_layout_of_a_chat(tokenizer):
    tokens, _ = chat.encode_chat(tokenizer, TURNS[:1], 3, 4)
    question, answer = (tokenizer.encode(text) for text in TURNS[0])
    t = tokenizer
    image = [t.special_tokens["<image>"]] * 3
    assert tokens.tolist() == [
        t.special_tokens["<s>"],
        *image,
        t.special_tokens["<user>"],
        *question,
        t.special_tokens["<assistant>"],
        *answer,
        t.special_tokens["<end>"],
    ]


def test_prompt_is_the_beginning_of_the_chat(tokenizer):
    tokens, is_answer = chat.encode_chat(tokenizer, TURNS[:1], 4, 4)
    prompt = chat.encode_prompt(tokenizer, TURNS[0][0], 4, 4)
    np.testing.assert_array_equal(prompt, tokens[: np.flatnonzero(is_answer)[0]])
    assert prompt[-1] == tokenizer.special_tokens["<assistant>"]


def test_turns_that_do_not_fit_are_left_out_whole(tokenizer):
    whole, _ = chat.encode_chat(tokenizer, TURNS, 4, 4)
    only_second, _ = chat.encode_chat(tokenizer, TURNS[1:], 4, 4)
    long = ("What is the page?", "x" * 100)
    for turns, limit, expected in (
        (TURNS, len(whole), whole),
        (TURNS[::-1], len(whole) - 1, only_second),
        ([long, TURNS[1]], len(only_second), only_second),
    ):
        tokens, is_answer = chat.encode_chat(tokenizer, turns, 4, 4, max_length=limit)
        np.testing.assert_array_equal(tokens, expected)
        assert len(is_answer) == len(tokens)


class Named:
    """A tokenizer of which only the special tokens are known."""

    chat_files = ChatFiles()

    def __init__(self, names):
        self.name = "named"
        self.special_tokens = {name: 10 + i for i, name in enumerate(sorted(names))}

    def encode(self, text):
        return [1000 + ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("family", "begin"),
    [
        ("marks", "<s>"),
        ("llama3", "<|begin_of_text|>"),
        ("chatml", None),
        ("smollm", None),
        ("llama2", "<s>"),
    ],
)
def test_a_text_begins_with_what_a_chat_begins_with_unless_that_opens_a_turn(family, begin):
    tokenizer = Named(
        chat_format.required_tokens(chat_format.FAMILIES[family])
        | chat_format.OWN.get(family, set())
    )
    assert chat.begin_ids(tokenizer) == ([] if begin is None else [tokenizer.special_tokens[begin]])
