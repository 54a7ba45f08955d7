"""Turns that refer to one another, images in the midst of them, and system turns."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from alignvlm_jax.benchmarks import questions
from alignvlm_jax.data import chat, chat_format, chat_template, index, record, tokenizers
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.images import encode_png
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.tokenizers import letters
from tests.data import templates

IMAGE = 999
SAID = (
    ChatTurn("Compare and tell.", "Alike.", (7, 7)),
    ChatTurn("And this?", "No.", (9,)),
    ChatTurn("Why?", "It is black."),
    ChatTurn("Which one?", "The last.", (0,)),
)
COUNTS = [2, 3, 4, 1]


@pytest.fixture(params=["marks", *templates.FAMILIES])
def family(request, tmp_path, tokenizer):
    if request.param == "marks":
        return tokenizer
    templates.write(tmp_path, templates.FAMILIES[request.param])
    return tokenizers.load(tmp_path)


def page(shade: int, width: int = 128) -> bytes:
    return encode_png(Image.fromarray(np.full((64, width), shade, np.uint8)))


def conversation(said=SAID, **fields) -> Record:
    turns = tuple(Turn(one.question, (one.answer,), "", one.image_offsets) for one in said)
    num_images = sum(len(one.image_offsets) for one in said)
    images = tuple(page(40 * i) for i in range(num_images))
    return Record("c", "test", images, turns, is_conversation=True, **fields)


def runs(tokens: np.ndarray) -> list[int]:
    """The lengths of runs of image tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens == IMAGE, [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_images_stand_in_their_questions(family):
    tokens, is_answer = chat.encode_chat(family, SAID, COUNTS, IMAGE)
    # Two of the first question stand at one place.
    assert runs(tokens) == [5, 4, 1]
    assert not is_answer[tokens == IMAGE].any()
    without, mask = chat.encode_chat(
        family, [turn._replace(image_offsets=()) for turn in SAID], 0, IMAGE
    )
    assert tokens[tokens != IMAGE].tolist() == without.tolist()
    assert is_answer[tokens != IMAGE].tolist() == mask.tolist()
    # Between the text that stands before it and after it in the first question, before the token
    # that has the place in its midst, as "e " would.
    first = int((tokens == IMAGE).argmax())
    before = family.decode(tokens[:first])
    after = family.decode(tokens[first + 5 :]).lstrip()
    assert before.endswith(("Compare", "Compar"))
    assert after.startswith(("and tell.", "e and tell."))


def test_of_a_conversation_the_end_alone_is_cut(family):
    lengths = [len(chat.encode_chat(family, SAID[:k], COUNTS, IMAGE)[0]) for k in (1, 2, 3, 4)]
    shown = [5, 9, 9, 10]
    for limit in range(lengths[0], lengths[-1] + 2):
        tokens, is_answer = chat.encode_chat(
            family, SAID, COUNTS, IMAGE, max_length=limit, has_order=True
        )
        ends = (
            tokens[is_answer] == family.special_tokens[chat_template.format_of(family).end]
        ).sum()
        assert (tokens == IMAGE).sum() == shown[ends - 1]
        assert len(tokens) <= limit
    # A turn that does not fit takes with it what comes after, which is short.
    long = [SAID[2], ChatTurn("What is the page?", "x" * 300), SAID[2]]
    only = chat.encode_chat(family, long[:1], 0, IMAGE)[0]
    cut = chat.encode_chat(family, long, 0, IMAGE, len(only) * 3, has_order=True)[0]
    free = chat.encode_chat(family, long, 0, IMAGE, len(only) * 3)[0]
    assert cut.tolist() == only.tolist() and len(free) > len(only)


def test_a_follow_up_is_asked_after_what_came_before(family):
    for k in range(len(SAID)):
        tokens, is_answer = chat.encode_chat(family, SAID[: k + 1], COUNTS, IMAGE)
        prompt = chat.encode_prompt(family, SAID[k], COUNTS, IMAGE, SAID[:k])
        last = np.flatnonzero(np.diff(is_answer.astype(int)) == 1)[-1] + 1
        assert prompt.tolist() == tokens[:last].tolist()


def test_a_system_turn_stands_where_the_template_has_it(family):
    chat_format = chat_template.format_of(family)
    turns = [(one.question, one.answer) for one in SAID]
    told, _ = chat.encode_chat(family, turns, 0, IMAGE, system="Read it.")
    plain, _ = chat.encode_chat(family, turns, 0, IMAGE)
    count = chat.count_tokens(family, turns, system="Read it.")
    assert len(told) <= count and told.tolist() != plain.tolist()
    text = family.decode(told)
    assert text.index("Read it.") < text.index("Compare")
    if chat_format.system_before is None:
        assert "Read it.\n\nCompare" in text
    elif chat_format.is_joined:
        spelled = chat_format.spell(turns, system="Read it.")
        reference = Tokenizer.from_file(family.name)
        assert told.tolist() == reference.encode(spelled, add_special_tokens=False).ids


def test_templates_that_have_a_place_for_a_system_turn(tmp_path):
    found = {}
    for name, template in templates.FAMILIES.items():
        templates.write(tmp_path / name, template)
        found[name] = (
            chat_template.format_of(tokenizers.load(tmp_path / name)).system_before is not None
        )
    assert found["llama3"] and found["llama32"] and found["qwen25"] and found["smollm2"]
    # Llama 2's stands inside of a question; Mistral's would be the words of the assistant.
    assert not found["llama2"] and not found["mistral"]


@pytest.mark.parametrize("images_first", [False, True])
@pytest.mark.parametrize("task", ["answer", "answer_and_transcribe"])
def test_tiles_are_those_of_the_image_tokens(demo_config, tokenizer, images_first, task):
    one = conversation(system="Be short.")
    model = demo_config.model
    for seq_len in range(90, 400, 31):
        data = dataclasses.replace(
            demo_config.data, seq_len=seq_len, max_tiles=8, images_first=images_first
        )
        config = dataclasses.replace(demo_config, data=data)
        builder = ExampleBuilder.of(config, tokenizer)
        segment = builder.segment(one, task, np.random.default_rng(0))
        tiles = segment.tile_arrays["tiles"]
        num_image_tokens = (segment.tokens == model.image_token_id).sum()
        # Where not even the images fit, the sequence has no answer at all.
        if not images_first or num_image_tokens < seq_len - 1:
            assert num_image_tokens == len(tiles) * builder.tokens_per_tile
        # In the order of the images, whose shades rise.
        shades = [int(tile.max()) for tile in tiles]
        assert shades == sorted(shades)
        assert len(segment.tile_arrays["patch_loss_weights"]) == len(tiles)


def test_the_order_of_a_conversation_is_kept_and_that_of_questions_is_not(demo_config, tokenizer):
    builder = ExampleBuilder.of(demo_config, tokenizer)
    said = [one._replace(image_offsets=()) for one in SAID]
    kept = conversation(said)
    free = dataclasses.replace(kept, is_conversation=False)
    orders = {}
    for one in (kept, free):
        texts = [
            tokenizer.decode(builder.segment(one, "answer", np.random.default_rng(seed)).tokens)
            for seed in range(20)
        ]
        orders[one.is_conversation] = set(texts)
    assert len(orders[True]) == 1 and len(orders[False]) > 5
    assert orders[True].pop().index("Compare") < orders[False].pop().index("Why?") + 1000


def test_the_index_counts_what_is_encoded(tokenizer):
    for one in (conversation(), conversation(system="Be short."), conversation(SAID[2:3])):
        counted = index.of_records([one], tokenizer, "t").text_tokens["answer"]
        turns = [ChatTurn(turn.question, turn.answers[0]) for turn in one.turns]
        tokens, _ = chat.encode_chat(tokenizer, turns, 0, IMAGE, system=one.system)
        assert counted.tolist() == [len(tokens)]


def test_each_answer_may_have_one_weight(demo_config, tokenizer):
    data = dataclasses.replace(demo_config.data, loss_normalisation="answer", seq_len=400)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    one = conversation([turn._replace(image_offsets=()) for turn in SAID])
    segment = builder.segment(one, "answer", np.random.default_rng(0))
    weights = segment.loss_weights
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
    sums = [weights[a:b].sum() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    np.testing.assert_allclose(sums, np.ones(len(SAID)), rtol=1e-6)


def test_a_question_of_a_conversation_sees_what_came_before(demo_config, tokenizer):
    data = dataclasses.replace(demo_config.data, seq_len=600, max_tiles=8)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    one = conversation(system="Be short.")
    asked = {
        question.turn.question: question for question in questions.choose_questions([one], None)
    }
    shown = {"Compare and tell.": 2, "And this?": 3, "Why?": 3, "Which one?": 4}
    whole = builder.segment(one, "answer", np.random.default_rng(0)).tokens.tolist()
    for text, count in shown.items():
        question = asked[text]
        prompt = builder.prompt(one, question.chat_turn(), question.before)
        length = int(prompt["segment_ids"].sum())
        assert prompt["tokens"][:length].tolist() == whole[:length]
        num_image_tokens = (prompt["tokens"] == demo_config.model.image_token_id).sum()
        num_tiles = num_image_tokens // builder.tokens_per_prompt_tile
        shades = {int(tile.max()) for tile in prompt["tiles"][:num_tiles]}
        assert len(shades) == count
        assert question.told()
    # A prompt of a benchmark may stand around the question.
    question = asked["And this?"]
    put = question.chat_turn("Answer shortly: And this?")
    assert put.image_offsets == (len("Answer shortly: And this?"),)


@pytest.mark.parametrize("images_first", [False, True])
def test_turns_are_spelled_once_an_image_was_shown_and_no_sooner(
    demo_config, tokenizer, images_first
):
    """In training as in prompts, which cannot know of images that follow."""
    data = dataclasses.replace(
        demo_config.data,
        seq_len=900,
        max_tiles=8,
        text_unit="letter",
        images_first=images_first,
    )
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    text = "A reader of the pages."
    assert letters.spell(text, tokenizer) != tokenizer.encode(text)
    greeting = [ChatTurn(text, text)] * 2
    said = [*greeting, *(turn._replace(answer=text) for turn in SAID)]
    one = conversation(said)
    segment = builder.segment(one, "answer", np.random.default_rng(0))
    whole = segment.tokens.tolist()
    for question in questions.choose_questions([one], None):
        prompt = builder.prompt(one, question.chat_turn(), question.before)
        length = int(prompt["segment_ids"].sum())
        assert prompt["tokens"][:length].tolist() == whole[:length]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], segment.loss_weights > 0, [0]])))
    answers = [whole[a + 1 : b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    for i, (turn, found) in enumerate(zip(said, answers, strict=True)):
        is_spelled = images_first or i >= len(greeting)
        spelled = letters.spell(turn.answer, tokenizer)
        assert found == (spelled if is_spelled else tokenizer.encode(turn.answer))
    # Image tokens stand in the midst of some questions.
    text_tokens = [token for token in whole if token != demo_config.model.image_token_id]
    assert all(_count(letters.spell(one.question, tokenizer), text_tokens) for one in SAID)
    # Each turn has it as its answer, and the greeting as its question, too.
    of_greeting = 2 * len(greeting)
    spelled = len(SAID) + of_greeting * images_first
    assert _count(letters.spell(text, tokenizer), text_tokens) == spelled
    assert _count(tokenizer.encode(text), text_tokens) == of_greeting * (not images_first)


def _count(part: list[int], whole: list[int]) -> int:
    return sum(whole[i : i + len(part)] == part for i in range(len(whole)))


def test_no_image_stands_in_what_the_model_is_told_first(family):
    """Where a format has that in the first question, whose white space at its ends goes."""
    asked = ChatTurn("    hi", "", (0,))
    tokens = chat.encode_prompt(family, asked, [1], IMAGE, system="Be brief.").tolist()
    assert "Be brief." in family.decode(tokens[: tokens.index(IMAGE)])


def test_a_transcription_that_does_not_fit_takes_no_conversation_with_it(demo_config, tokenizer):
    line = tuple(record.Word("word", (0, 0, 9, 9)) for _ in range(300))
    said = [one._replace(image_offsets=()) for one in SAID[:2]]
    one = dataclasses.replace(conversation(said), images=(page(7),), lines=((line,),))
    data = dataclasses.replace(demo_config.data, seq_len=400)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    for seed in range(8):
        segment = builder.segment(one, "answer_and_transcribe", np.random.default_rng(seed))
        assert segment.loss_weights.any()


def test_words_of_pages_that_are_not_shown_are_left_out(demo_config, tokenizer):
    line = (record.Word("word", (0, 0, 9, 9)),)
    one = dataclasses.replace(conversation(), lines=((line,),) * 4)
    data = dataclasses.replace(demo_config.data, seq_len=200, max_tiles=8)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    segment = builder.segment(one, "answer", np.random.default_rng(0))
    tiles = segment.tile_arrays["tiles"]
    assert 0 < len(tiles) == len(segment.tile_arrays["patch_loss_weights"])
    assert {int(tile.max()) for tile in tiles} < {0, 40, 80, 120}


def test_images_of_turns_that_nobody_answered_are_not_shown(demo_config, tokenizer):
    data = dataclasses.replace(demo_config.data, seq_len=600, max_tiles=8)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    whole = conversation()
    secret = [dataclasses.replace(turn, answers=()) for turn in whole.turns]
    one = dataclasses.replace(whole, turns=tuple(secret))
    chosen = questions.choose_questions([one], None, needs_answers=False)
    [asked] = [q for q in chosen if "this" in q.turn.question]
    prompt = builder.prompt(one, asked.chat_turn(), asked.before)
    num_image_tokens = (prompt["tokens"] == demo_config.model.image_token_id).sum()
    num_tiles = num_image_tokens // builder.tokens_per_prompt_tile
    # The third image alone, whose shade is 80.
    assert {int(tile.max()) for tile in prompt["tiles"][:num_tiles]} == {80}
    # In training nothing follows a turn without an answer.
    some = dataclasses.replace(one, turns=(whole.turns[0], *secret[1:3], whole.turns[3]))
    segment = builder.segment(some, "answer", np.random.default_rng(0))
    assert {int(tile.max()) for tile in segment.tile_arrays["tiles"]} == {0, 40}


def test_what_was_counted_before_system_turns_stays_counted(tmp_path):
    for name in ("llama3", "qwen25", "chatml"):
        templates.write(tmp_path / name, templates.FAMILIES[name])
        tokenizer = tokenizers.load(tmp_path / name)
        own = chat_template.format_of(tokenizer)
        assert own.system_before is not None
        before = dataclasses.replace(own, system_before=None, system_after="")
        (tmp_path / name / "chat_format.json").write_text(chat_format.to_json(before))
        old = tokenizers.load(tmp_path / name)
        assert chat_template.format_of(old) == before
        assert index.fingerprint_of(old) == index.fingerprint_of(tokenizer)
        # And no such copy has more tokens than were counted.
        turns = [("Who?", "Nobody"), ("Where?", "Here")]
        counted = chat.count_tokens(tokenizer, turns, system="Read it.")
        assert len(chat.encode_chat(old, turns, 0, 0, system="Read it.")[0]) <= counted


def test_independent_questions_are_asked_alone():
    one = dataclasses.replace(
        conversation([turn._replace(image_offsets=()) for turn in SAID]), is_conversation=False
    )
    named = dataclasses.replace(one, turns=(dataclasses.replace(one.turns[0], id="q7"),))
    assert all(not q.before and not q.told() for q in questions.choose_questions([one], None))
    assert [q.known_as for q in questions.choose_questions([named], None)] == ["q7"]


def test_a_record_that_has_none_of_it_is_the_bytes_that_it_was():
    plain = Record("r", "s", (b"1",), (Turn("q", ("a",)),))
    assert record.encode_record(plain) == (
        b'{"id":"r","source":"s","images":[1],"turns":[{"question":"q","answers":["a"]}],'
        b'"lines":[]}\x001'
    )
    whole = conversation(system="Be short.")
    assert record.decode_record(record.encode_record(whole)) == whole


@pytest.mark.parametrize("images_first", [False, True])
def test_blank_patches_of_images_in_turns_are_left_out(demo_config, tokenizer, images_first):
    """Also of a white page, a black one, and one whose colours are inverted, which keeps as many as
    the page itself."""
    pixels = np.full((64, 128), 255, np.uint8)
    pixels[9:20, 10:60] = np.random.default_rng(0).integers(0, 200, (11, 50))
    shown = (pixels, 255 - pixels, np.full_like(pixels, 255), np.zeros_like(pixels))
    images = tuple(encode_png(Image.fromarray(one)) for one in shown)
    one = dataclasses.replace(conversation(), images=images)
    data = dataclasses.replace(
        demo_config.data,
        seq_len=700,
        max_tiles=4,
        max_patch_labels=3,
        blank_contrast=24,
        images_first=images_first,
    )
    config = dataclasses.replace(demo_config, data=data)
    builder = ExampleBuilder.of(config, tokenizer)
    arrays = builder.sequence(one, "answer", np.random.default_rng(0))
    kept = arrays["kept_patches"].reshape(4, *config.model.vision.patch_grid)
    counts = kept.sum((1, 2)).tolist()
    assert counts[0] == counts[1] > counts[2] == counts[3] == config.model.vision.patch_grid[0]
    is_image = arrays["tokens"] == config.model.image_token_id
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_image, [0]])))
    found = (edges[1::2] - edges[::2]).tolist()
    # Two stand at one place.
    in_turns = [counts[0] + counts[1], counts[2], counts[3]]
    assert found == ([sum(counts)] if images_first else in_turns)
    # A prompt in the midst shows what came before it; one that is cut, what is left.
    before, question = one.turns[:1], ChatTurn(*SAID[1])
    prompt = builder.prompt(one, question, before)
    num_shown = 4 if images_first else 3
    assert builder.num_tiles(prompt) == num_shown
    assert (prompt["tokens"] == config.model.image_token_id).sum() == sum(counts[:num_shown])
    cut = int(np.flatnonzero(is_image)[-1]) + 2
    if not images_first:
        short = dataclasses.replace(builder, data=dataclasses.replace(data, seq_len=cut))
        arrays = short.sequence(one, "answer", np.random.default_rng(0))
        assert arrays["kept_patches"].any(1).tolist() == [True] * 3 + [False]
        assert (arrays["tokens"] == config.model.image_token_id).sum() == sum(counts[:3])
