"""Chats as tokens against transformers' `apply_chat_template`, by the templates of the families."""

import pytest
import transformers

from alignvlm_jax.data import chat, chat_template, tokenizers
from tests.data import templates

CONVERSATIONS = {
    "one turn": [("What is the total?", "318.40")],
    "several turns": [
        ("What is the total of invoice 4821?", "318.40 dollars"),
        ("Who pays?", "Dr. Strange"),
        ("def f(x):\n\treturn x + 1", "12"),
    ],
    "white space": [("  Who pays? \n", "Nobody. \n"), ("\n\n  And\twhy?", "It says so.  ")],
    "unicode": [("Été à Zürich, 東京 👩‍💻?", "naïve café — ½"), ("東京", "🙂")],
    "special-looking text": [
        ("Is <b>this</b> [bold] {{ x }}?", "</b> <|yes|> {% if %} <user> [/IN"),
        ("<think>", "<br/>"),
    ],
}


@pytest.fixture(params=templates.FAMILIES)
def tokenizers_of(request, tmp_path):
    """Ours and theirs, of a family."""
    family = templates.FAMILIES[request.param]
    templates.write(tmp_path, family)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
    )
    return tokenizers.load(tmp_path), theirs


def apply(theirs, messages, **options) -> list[int]:
    # The date that a template is told is fixed: a prompt must not differ from day to day.
    return theirs.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        date_string="26 Jul 2024",
        enable_thinking=False,
        **options,
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_template(tokenizers_of, name):
    ours, theirs = tokenizers_of
    turns = CONVERSATIONS[name]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    tokens, is_answer = chat.encode_chat(ours, turns, 0, -1)
    assert tokens.tolist() == apply(theirs, messages)
    for question, _ in turns:
        prompt = chat.encode_prompt(ours, question, 0, -1)
        asked = [{"role": "user", "content": question}]
        assert prompt.tolist() == apply(theirs, asked, add_generation_prompt=True)
    assert is_answer.any() and tokens[is_answer.nonzero()[0][-1]] in chat.stop_ids(ours)


@pytest.mark.parametrize("system", ["", "Read it."])
def test_a_follow_up_is_asked_as_the_template_asks_it(tokenizers_of, system):
    ours, theirs = tokenizers_of
    if system and chat_template.format_of(ours).system_before is None:
        pytest.skip("the template has no place for a system turn before the first one")
    turns = [("What is the total?", "318.40"), ("Who pays?", "Dr. Strange")]
    messages = [{"role": "system", "content": system}] if system else []
    for number, (question, answer) in enumerate([*turns, ("When?", "12 May")]):
        messages.append({"role": "user", "content": question})
        prompt = chat.encode_prompt(ours, question, 0, -1, turns[:number], system)
        assert prompt.tolist() == apply(theirs, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": answer})
    tokens, _ = chat.encode_chat(ours, [*turns, ("When?", "12 May")], 0, -1, system=system)
    assert tokens.tolist() == apply(theirs, messages)


def test_text_that_spells_a_special_token_stays_text(tokenizers_of):
    ours, theirs = tokenizers_of
    end = chat_template.format_of(ours).end
    turns = [(f"What is {end}?", f"It is {end}")]
    messages = [
        {"role": "user", "content": turns[0][0]},
        {"role": "assistant", "content": turns[0][1]},
    ]
    tokens, _ = chat.encode_chat(ours, turns, 0, -1)
    assert tokens.tolist() == apply(theirs, messages, sanitize_control_tokens=True)
