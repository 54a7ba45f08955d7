"""Chat formats: out of templates, out of files, and of folders from before there were any."""

import json
import re
import shutil
from itertools import permutations

import pytest
import sentencepiece
from tokenizers import Tokenizer

from alignvlm_jax.data import chat, chat_format, chat_template, tokenizers
from alignvlm_jax.data.chat_format import ChatFormat
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import towers
from tests.data import templates
from tests.weights.tokenizers import (
    CHATML,
    CORPUS,
    write_chatml,
    write_sentencepiece,
    write_tiktoken,
)

TURNS = [("What is the total?", "12.50"), ("  Who pays?", "Ames\nIowa ")]
SMOLLM = (*CHATML, "<repo_name>", "<gh_stars>", "<jupyter_start>")


@pytest.fixture(params=templates.FAMILIES)
def family(request, tmp_path):
    """A tokenizer with the template of a family."""
    templates.write(tmp_path, templates.FAMILIES[request.param])
    return tokenizers.load(tmp_path)


def test_formats_are_split_out_of_templates(tmp_path):
    def format_of(name: str) -> ChatFormat:
        templates.write(tmp_path / name, templates.FAMILIES[name])
        return chat_template.format_of(tokenizers.load(tmp_path / name))

    llama3 = format_of("llama3")
    plain = chat_format.FAMILIES["llama3"]
    for field in ("start", "user", "assistant", "end", "question_strip", "answer_strip"):
        assert getattr(llama3, field) == getattr(plain, field)
    assert format_of("llama32").start == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    )
    smollm2 = format_of("smollm2")
    assert (smollm2.start, smollm2.after) == (chat_format.FAMILIES["smollm"].start, "\n")
    assert format_of("chatml").start == "" and "Qwen" in format_of("qwen25").start
    qwen3 = format_of("qwen3")
    assert qwen3.assistant.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert qwen3.earlier_assistant == "<|im_end|>\n<|im_start|>assistant\n"
    assert (qwen3.answer_strip, qwen3.earlier_strip) == ("lstrip_newlines", "")
    llama2 = format_of("llama2")
    assert (llama2.start, llama2.user, llama2.assistant) == ("", "<s>[INST] ", " [/INST]")
    assert (llama2.before_answer, llama2.after_answer, llama2.end) == (" ", " ", "</s>")
    mistral = format_of("mistral")
    assert (mistral.start, mistral.user, mistral.question_strip) == ("<s>", "[INST] ", "")
    assert mistral.answer_strip == "strip" and mistral.stops == ("</s>",)
    zephyr = format_of("zephyr")
    assert (zephyr.user, zephyr.assistant) == ("<|user|>\n", "</s>\n<|assistant|>\n")


def test_a_chat_is_encoded_from_one_special_token_to_the_next(family):
    """As the library encodes the whole text of a chat; `tests/parity/test_chat.py` has transformers
    write it."""
    reference = Tokenizer.from_file(family.name)
    chat_format = chat_template.format_of(family)
    more = [*TURNS, ("Été\t東京?\n", "naïve \n"), ("Where?", "Here.")]
    for turns in (more[:1], more[:2], more):
        tokens, is_answer = chat.encode_chat(family, turns, 0, 999)
        expected = reference.encode(chat_format.spell(turns), add_special_tokens=False).ids
        assert tokens.tolist() == expected
        assert (tokens[is_answer] == family.special_tokens[chat_format.end]).sum() == len(turns)


def test_an_answer_is_what_goes_on_from_a_prompt(family):
    """Also where its white space would make a token with ours before it."""
    for question, answer in [*TURNS, ("Where?", "\n\n  here")]:
        prompt = chat.encode_prompt(family, question, 0, 999)
        tokens, is_answer = chat.encode_chat(family, [(question, answer)], 0, 999)
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert not is_answer[: len(prompt)].any() and is_answer[len(prompt)]
        assert family.decode(tokens[is_answer]).strip() == answer.strip()


def test_a_template_beside_a_sentencepiece_model(tmp_path):
    """Which puts a space before every stretch of text, as the template's strings do not begin."""
    content = write_sentencepiece(tmp_path)
    settings = {"chat_template": templates.LLAMA2, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.load(tmp_path)
    encode = sentencepiece.SentencePieceProcessor(model_proto=content).encode
    turns = [("What is the total?", "12.50"), ("  Who?", "Été")]
    tokens, is_answer = chat.encode_chat(tokenizer, turns, 0, 999)
    first = encode("[INST] What is the total? [/INST] 12.50 ")
    second = encode("[INST] Who? [/INST] Été ")
    assert tokens.tolist() == [1, *first, 2, 1, *second, 2]
    asked = chat.encode_prompt(tokenizer, "Who?", 2, 999)
    assert asked[asked != 999].tolist() == [1, *encode("[INST] Who? [/INST]")]
    (slots,) = (asked == 999).nonzero()
    assert slots[1] == slots[0] + 1
    assert tokenizer.decode(asked[slots[1] + 1 :]).lstrip(" ") == "Who? [/INST]"
    assert is_answer.sum() == len(encode("12.50 ")) + len(encode("Été ")) + 2


class Joining:
    """A tokenizer with a token of two line breaks, and one for each other character."""

    def encode(self, text):
        return [len(part) * 1000 + ord(part[0]) for part in re.findall("\n\n|.", text, re.DOTALL)]


def test_an_answer_keeps_the_tokens_of_its_prompt():
    tokenizer = Joining()
    for answer in ("here", "\nhere", "\n\nhere"):
        reply = chat._encode_after(tokenizer, "assistant\n", answer)
        assert reply == tokenizer.encode(answer)
    assert tokenizer.encode("\n\n") != tokenizer.encode("\n") * 2


def test_images_change_no_token_of_the_text(family):
    """So that a chat is as long as it was counted without them; they stand before the question."""
    for turns in (TURNS, TURNS[::-1]):
        without, is_answer = chat.encode_chat(family, turns, 0, 999)
        tokens, with_image = chat.encode_chat(family, turns, 3, 999)
        assert tokens[tokens != 999].tolist() == without.tolist()
        assert with_image[tokens != 999].tolist() == is_answer.tolist()
        (slots,) = (tokens == 999).nonzero()
        assert slots.tolist() == list(range(slots[0], slots[0] + 3))
        # Nothing of the header after them, but white space that makes a token with the question's.
        text = family.decode(tokens[slots[-1] + 1 :])
        blanks = " " if turns is TURNS else None
        assert text.lstrip(blanks).startswith(turns[0][0].strip())
    prompt = chat.encode_prompt(family, TURNS[0][0], 3, 999)
    first, is_answer = chat.encode_chat(family, TURNS[:1], 3, 999)
    assert prompt.tolist() == first[: is_answer.argmax()].tolist()


def test_no_order_of_turns_is_longer_than_was_counted(family):
    lengths = {len(chat.encode_chat(family, turns, 0, 0)[0]) for turns in (TURNS, TURNS[::-1])}
    assert lengths == {chat.count_tokens(family, TURNS)}
    # Qwen 3's strips line breaks off the last answer alone.
    turns = [("Who?", "Nobody"), ("Where?", "\n\nHere"), ("When?", "\nNow")]
    lengths = {len(chat.encode_chat(family, order, 0, 0)[0]) for order in permutations(turns)}
    assert max(lengths) == chat.count_tokens(family, turns)
    assert (len(lengths) > 1) == ("</think>" in chat_template.format_of(family).assistant)


def test_turns_that_do_not_fit_are_left_out(family):
    long = ("What is the page?", "x" * 300)
    only, is_answer = chat.encode_chat(family, [TURNS[0]], 2, 999)
    for turns in ([TURNS[0], long], [long, TURNS[0]], [TURNS[0], long, long]):
        tokens, mask = chat.encode_chat(family, turns, 2, 999, max_length=len(only))
        assert tokens.tolist() == only.tolist() and mask.tolist() == is_answer.tolist()
    cut, mask = chat.encode_chat(family, [long], 2, 999, max_length=len(only), cuts_answers=True)
    assert len(cut) == len(only) and mask[-1]


@pytest.mark.parametrize("options", [{}, {"is_listed": True}, {"is_file": True}], ids=str)
def test_where_a_template_stands(tmp_path, options):
    templates.write(tmp_path, templates.FAMILIES["llama32"], **options)
    (tmp_path / "README.md").write_text("of no matter")
    assert "Cutting" in chat_template.format_of(tokenizers.load(tmp_path / "tokenizer.json")).start
    assert chat.begin_ids(tokenizers.load(tmp_path)) == [0]
    assert chat.stop_ids(tokenizers.load(tmp_path)) == (4, 1)


def test_what_the_model_says_may_be_marked(tmp_path):
    marked = templates.CHATML_TURNS.replace(
        "{{ '<|im_start|>' + mes", "{% generation %}{{ '<|im_start|>' + mes"
    )
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    chatml = templates.FAMILIES["chatml"]
    templates.write(tmp_path / "plain", chatml)
    templates.write(tmp_path / "marked", chatml._replace(template=marked))
    assert "generation" in marked
    plain, same = (
        chat_template.format_of(tokenizers.load(tmp_path / name)) for name in ("plain", "marked")
    )
    assert plain == same


def test_several_templates_without_a_default(tmp_path):
    write_chatml(tmp_path)
    named = [{"name": "rag", "template": ""}, {"name": "tool_use", "template": ""}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(UserError, match=r"config\.json holds the chat templates 'rag', 'tool_use'"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in %}", r"cannot be rendered \(Expected an expression"),
        ("{{ messages.append(1) }}", r"cannot be rendered \(access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", r"cannot be rendered \(access to attribute '__class__'"),
        ("{{ raise_exception('no system') }}", r"cannot be rendered \(no system\)"),
        ("{{ messages[0].content }}", r"does not stand in it once as it is"),
        (
            templates.CHATML_TURNS.replace("'<|im_end|>' + ", ""),
            r"no special token ends an answer, but '\\n'",
        ),
        (
            templates.CHATML_TURNS.replace("assistant", "bot"),
            r"a prompt ends '<\|im_end\|>\\n<\|im_start\|>bot\\n', and before an answer stands",
        ),
        (
            templates.CHATML_TURNS.replace("message['content']", "message['content'] | upper"),
            r"it has 'HAT IS THE TOTAL\?.*' after '<\|im_start\|>user\\nW', where .* stand 'hat is",
        ),
        (
            # Whose third turn is another than the two before.
            templates.CHATML_TURNS.replace(
                "{% endfor %}", "{% if loop.index == 6 %}{{ 'Again.' }}{% endif %}{% endfor %}"
            ),
            r"it has 'Again\.' after '.*', where by its first turns would stand ''",
        ),
        (
            templates.CHATML_TURNS.replace("message['content']", "message['content'] | trim('W')"),
            r"it has 'hat is the total",
        ),
    ],
)
def test_a_template_that_is_none_of_alike_turns_is_refused(tmp_path, template, message):
    templates.write(tmp_path, templates.FAMILIES["chatml"]._replace(template=template))
    with pytest.raises(UserError, match=message) as error:
        chat_template.format_of(tokenizers.load(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/tokenizer_config.json: its chat template ")
    assert "\n" not in str(error.value)


def test_a_chat_format_goes_before_a_template_and_comes_back_as_it_is(tmp_path):
    templates.write(tmp_path, templates.FAMILIES["qwen25"])
    own = chat_template.format_of(tokenizers.load(tmp_path))
    mine = ChatFormat(
        start="", user="<|im_start|>q\n", assistant="\n", end="<|im_end|>", stops=("<|im_end|>",)
    )
    for one in (own, mine):
        (tmp_path / "chat_format.json").write_text(chat_format.to_json(one))
        assert chat_template.format_of(tokenizers.load(tmp_path)) == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"chat_format\.json is no chat format: .*missing"),
        ("{", r"chat_format\.json is no chat format"),
        ('{"start": 5}', r"chat_format\.json: start is 5; it must be of type str"),
        ('{"stops": "</s>"}', r"chat_format\.json: stops is '</s>'; it must be of type list"),
        ('{"answer_strip": "stripp"}', r"json: answer_strip is 'stripp'; did you mean 'strip'"),
        (
            '{"start": "", "user": "", "assistant": "", "end": "", "is_joined": true, '
            '"image_in_turn": false}',
            r"json: with is_joined, images stand in a turn: image_in_turn must be true",
        ),
        ('{"ned": "x"}', r"chat_format\.json: unknown field 'ned'; did you mean 'end'"),
        (
            '{"start": "", "user": "", "assistant": "", "end": "<|eot|>"}',
            r"chat_format\.json: an answer ends by '<\|eot\|>', which is no special token",
        ),
    ],
)
def test_a_damaged_chat_format_is_one_line(tmp_path, text, message):
    write_chatml(tmp_path)
    (tmp_path / "chat_format.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        chat_template.format_of(tokenizers.load(tmp_path))
    assert "\n" not in str(error.value)


def test_a_chat_format_without_stops_stops_at_the_end_of_an_answer(tmp_path):
    write_chatml(tmp_path)
    (tmp_path / "chat_format.json").write_text(
        '{"start": "", "user": "", "assistant": "", "end": "<|im_end|>"}'
    )
    tokenizer = tokenizers.load(tmp_path)
    assert chat.stop_ids(tokenizer) == (tokenizer.special_tokens["<|im_end|>"],)


def test_only_smollm_is_told_that_it_is_smollm(tmp_path):
    for name, special_tokens in (("other", CHATML), ("own", SMOLLM)):
        write_chatml(tmp_path / name, special_tokens)
        start = chat_template.format_of(tokenizers.load(tmp_path / name)).start
        assert ("SmolLM" in start) == (name == "own")


def test_what_is_written_says_its_format(tmp_path):
    templates.write(tmp_path / "published", templates.FAMILIES["llama32"])
    towers.write(str(tmp_path / "published"), tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "config.json").write_text("[{}]")
    published = tokenizers.load(tmp_path / "published")
    written = tokenizers.load(tmp_path / "run" / "tokenizer")
    assert chat_template.format_of(written) == chat_template.format_of(published)
    assert written.chat_files.name.endswith("chat_format.json")


BEFORE = {
    "marks": (
        "2 4 4 5 10 18 24 18 15 22 68 6 19 40 25 60 39 7 5 13 13 91 29 24 13 105 15 1 30 68 6 "
        "70 104 14 30 8 78 24 107 15 13 7"
    ),
    "smollm": (
        "1 88 94 88 89 74 82 204 62 84 90 226 275 74 226 70 226 77 74 81 85 75 90 81 226 38 "
        "46 226 70 88 88 78 88 89 70 83 89 226 83 70 82 74 73 226 56 82 84 81 49 50 17 226 89 "
        "87 70 78 83 74 73 226 71 94 226 45 90 76 76 78 83 76 226 43 70 72 74 2 204 1 90 88 "
        "74 87 204 999 999 60 77 70 89 311 226 89 77 74 326 36 2 204 1 70 88 88 78 88 89 70 "
        "83 89 204 22 23 19 26 21 2 204 1 90 88 74 87 204 226 226 60 77 84 226 85 70 94 88 36 "
        "2 204 1 70 88 88 78 88 89 70 83 89 204 38 82 74 88 204 46 84 92 70 226 2 204"
    ),
    "chatml": (
        "1 85 91 85 86 71 79 201 59 81 87 223 272 71 223 67 223 74 71 78 82 72 87 78 223 35 "
        "43 223 67 85 85 75 85 86 67 80 86 223 80 67 79 71 70 223 53 79 81 78 46 47 14 223 86 "
        "84 67 75 80 71 70 223 68 91 223 42 87 73 73 75 80 73 223 40 67 69 71 2 201 1 87 85 "
        "71 84 201 999 999 57 74 67 86 308 223 86 74 71 323 33 2 201 1 67 85 85 75 85 86 67 "
        "80 86 201 19 20 16 23 18 2 201 1 87 85 71 84 201 223 223 57 74 81 223 82 67 91 85 33 "
        "2 201 1 67 85 85 75 85 86 67 80 86 201 35 79 71 85 201 43 81 89 67 223 2 201"
    ),
    "llama3": (
        "265 271 263 264 272 262 999 999 87 104 97 116 32 105 115 258 256 111 116 97 108 63 "
        "274 271 97 115 115 105 115 116 97 110 116 272 262 49 50 46 53 48 274 271 263 264 272 "
        "262 87 104 111 32 112 97 121 115 63 274 271 97 115 115 105 115 116 97 110 116 272 "
        "262 65 109 101 115 10 73 111 119 97 274"
    ),
}
"""Token ids of TURNS with two image tokens, as they were before there were chat_format.json files
and templates were looked at."""


def write_before(folder, name: str) -> int:
    """Writes a tokenizer alone, as `prepare` and `convert` did; returns the image token."""
    folder.mkdir(parents=True)
    if name == "marks":
        SentencePieceTokenizer.train(folder / "tokenizer.model", CORPUS)
        return 4
    if name == "llama3":
        write_tiktoken(folder / "tokenizer.model")
    else:
        write_chatml(folder, SMOLLM if name == "smollm" else CHATML, vocab_size=330)
    return 999


@pytest.mark.parametrize("is_data", [True, False], ids=["prepared", "converted"])
@pytest.mark.parametrize("name", BEFORE)
def test_a_folder_from_before_keeps_its_format(tmp_path, name, is_data):
    folder = tmp_path / "before" if is_data else tmp_path / "before" / "tokenizer"
    image_id = write_before(folder, name)
    if is_data:
        (folder / "prepare.json").write_text("{}")
    else:
        (folder.parent / "config.json").write_text("[{}]")
        # Copied along then, and not looked at.
        settings = {"chat_template": templates.LLAMA32}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens, _ = chat.encode_chat(tokenizers.load(folder), TURNS, 2, image_id)
    assert tokens.tolist() == [int(token) for token in BEFORE[name].split()]
    assert chat_template.format_file(tokenizers.load(folder)) == ""


@pytest.mark.parametrize("name", ["marks", "smollm", "llama3"])
def test_formats_without_a_template_are_those_of_before(tmp_path, name):
    image_id = write_before(tmp_path / "new", name)
    tokens, _ = chat.encode_chat(tokenizers.load(tmp_path / "new"), TURNS, 2, image_id)
    assert tokens.tolist() == [int(token) for token in BEFORE[name].split()]


def test_a_published_model_is_not_from_before(tmp_path):
    """Its tokenizer may lie in a folder of that name, below the config.json of the model."""
    templates.write(tmp_path / "tokenizer", templates.FAMILIES["qwen25"])
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "Qwen" in chat_template.format_of(tokenizers.load(tmp_path / "tokenizer")).start
    moved = shutil.copytree(tmp_path / "tokenizer", tmp_path / "moved")
    assert "Qwen" in chat_template.format_of(tokenizers.load(moved)).start


@pytest.mark.parametrize("name", [*chat_format.FAMILIES, *templates.FAMILIES])
def test_a_template_is_written_that_says_the_same(name, tmp_path):
    """With a system turn as well, and what white space there is."""
    found = chat_format.FAMILIES.get(name)
    if name in templates.FAMILIES:
        templates.write(tmp_path, templates.FAMILIES[name])
        found = chat_template.format_of(tokenizers.load(tmp_path))
    written = ChatFiles("written", template=chat_format.to_template(found))
    template = chat_template.Template(written)
    asked = {"role": "user", "content": "  Who?\n"}
    for turns in chat_template.CONVERSATIONS:
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        assert template.render(messages, False) == found.spell(turns)
        prompt = template.render([*messages, asked], True)
        assert prompt == found.spell(turns, asked["content"])
        if found.system_before is None:
            continue
        told = [{"role": "system", "content": "Read."}, *messages, asked]
        assert template.render(told, True) == found.spell(turns, asked["content"], "Read.")
