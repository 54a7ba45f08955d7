"""Text as the tokens of its letters: what is spelled is what patches show, and decodes to the text."""

import dataclasses

import pytest

from alignvlm_jax.data import chat, labels, tokenizers
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Word
from alignvlm_jax.data.tokenizers import letters
from alignvlm_jax.errors import UserError
from tests.conftest import tiny_config
from tests.weights.tokenizers import AWKWARD, write_chatml, write_sentencepiece, write_tiktoken

TEXTS = (
    "",
    " ",
    "Total: 12.50 Ames",
    "  two  spaces \n\n and lines\n  begin and end ",
    "é naïve ﬁne → 漢字 한글 🙂 e\u0301",
    "<image><end> <|im_end|> ▁x \t#include <a.h>",
    AWKWARD,
)


@pytest.fixture(params=["ours", "huggingface", "tiktoken"])
def any_tokenizer(request, tmp_path, tokenizer):
    if request.param == "ours":
        return tokenizer
    if request.param == "huggingface":
        write_chatml(tmp_path)
    else:
        write_tiktoken(tmp_path / "tokenizer.model")
    return tokenizers.load(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_a_spelled_text_decodes_to_itself_and_has_no_special_token(any_tokenizer, text):
    letters.check(any_tokenizer, "text_unit")
    ids = letters.spell(text, any_tokenizer)
    if any_tokenizer.decode(any_tokenizer.encode(text)) != text:
        pytest.skip("the vocabulary has no letter é")
    assert any_tokenizer.decode(ids) == text
    assert all(map(any_tokenizer.is_text, ids))


def test_it_is_spelled_by_the_labels_of_its_words(any_tokenizer):
    """Of a line of text with a space before it."""
    text = "Read me: 12.50 of Ames"
    words = [Word(word, (0.0, 0.0, 8.0, 8.0)) for word in text.split()]
    placed = labels.place_tokens([words], any_tokenizer, "letter")
    spelled = letters.spell(f" {text}", any_tokenizer)
    # Where a tokenizer has no letter with a space before it, the space is no label.
    space = any_tokenizer.space_id
    assert placed.ids.tolist() == [token for token in spelled if token != space]


def test_a_word_behind_two_spaces_begins_as_its_patch_does(any_tokenizer):
    begun = letters.with_space("A", any_tokenizer) or letters.of_character("A", any_tokenizer)
    assert letters.spell("  A", any_tokenizer)[-len(begun) :] == list(begun)


def test_questions_and_answers_are_spelled_and_make_the_same_text(any_tokenizer):
    turns = [("What is the total?", "of Ames"), ("And the city?", "in Ohio")]
    whole, is_said = chat.encode_chat(any_tokenizer, turns, 3, 4)
    spelled, is_answer = chat.encode_chat(any_tokenizer, turns, 3, 4, text_unit="letter")
    texts = [any_tokenizer.decode(tokens[tokens != 4].tolist()) for tokens in (spelled, whole)]
    assert texts[0] == texts[1]
    # What stands around questions is the format's own, in the tokens that it always has.
    prompts = spelled[~is_answer].tolist()
    for question, _ in turns:
        part = letters.spell(question, any_tokenizer)
        start = next(i for i in range(len(prompts)) if prompts[i : i + len(part)] == part)
        del prompts[start : start + len(part)]
    bare, is_of_bare = chat.encode_chat(any_tokenizer, [("", answer) for _, answer in turns], 3, 4)
    assert prompts == bare[~is_of_bare].tolist()
    end = whole[is_said][-1].item()
    said = [[*letters.spell(answer, any_tokenizer), end] for _, answer in turns]
    assert spelled[is_answer].tolist() == [token for one in said for token in one]
    # A prompt goes on from what was said in the same way.
    prompt = chat.encode_prompt(any_tokenizer, turns[1][0], 3, 4, turns[:1], text_unit="letter")
    assert prompt.tolist() == spelled[: len(prompt)].tolist()
    cut, _ = chat.encode_chat(any_tokenizer, turns, 3, 4, len(whole), text_unit="letter")
    assert len(whole) <= len(spelled) and len(cut) <= len(whole)


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused(tmp_path):
    write_sentencepiece(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    config = tiny_config()
    for changes in ({"text_unit": "letter"}, {"label_unit": "letter"}, {"label_unit": "character"}):
        [field] = changes
        data = dataclasses.replace(config.data, **changes)
        message = rf"makes .* of the letters of .*; config\.data\.{field} must be 'token' with it"
        with pytest.raises(UserError, match=message):
            ExampleBuilder.of(dataclasses.replace(config, data=data), tokenizer)
