"""Prompts of many lengths in few rows: each has the answer that it has alone, in any order, on any
mesh, and few programs are compiled."""

import types

import jax
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import batching, buckets, sampler
from alignvlm_jax.inference.batching import Answer, Prompts
from alignvlm_jax.inference.buckets import Bucket
from alignvlm_jax.inference.decoding import GREEDY, Decoding
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from tests.conftest import random_params
from tests.inference.test_sampler import CONFIG, MODEL, PAD, VOCAB

NUM_NEW = 7
COUNT = 40
SEQ_LEN = CONFIG.data.seq_len
PER_TILE = CONFIG.tokens_per_tile
TOKENIZER = types.SimpleNamespace(
    pad_id=PAD, decode=lambda tokens: " ".join(map(str, tokens)), special_tokens={}
)
END = 9


class Builder:
    """What batches know of `ExampleBuilder`."""

    data = CONFIG.data

    def extent(self, prompts, multiple):
        [one] = prompts
        image_tokens = int((one["tokens"] == CONFIG.model.image_token_id).sum())
        return int(one["segment_ids"].sum()), image_tokens // PER_TILE


def build(number: int) -> dict[str, np.ndarray]:
    """A prompt of no, one or two tiles and of any length."""
    rng = np.random.default_rng(number)
    vision = CONFIG.model.vision
    tiles = number % 3
    length = int(rng.integers(tiles * PER_TILE + 1, SEQ_LEN + 1))
    tokens = rng.integers(10, VOCAB, SEQ_LEN).astype(np.int32)
    tokens[: tiles * PER_TILE] = CONFIG.model.image_token_id
    is_token = np.arange(SEQ_LEN) < length
    shape = (CONFIG.data.max_tiles, vision.tile_height, vision.tile_width, 3)
    return {
        "tokens": np.where(is_token, tokens, PAD).astype(np.int32),
        "positions": np.where(is_token, np.arange(SEQ_LEN), 0).astype(np.int32),
        "segment_ids": is_token.astype(np.int32),
        "tiles": rng.integers(0, 256, shape, dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def params():
    params = random_params(
        MODEL, vlm.abstract_batch(CONFIG.model, CONFIG.data, CONFIG.train.batch_size)
    )
    params["llm"]["blocks"] = jax.tree.map(lambda x: 2 * x, params["llm"]["blocks"])
    return params


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    monkeypatch.setattr(batching.chat, "stop_ids", lambda _: (END,))


def make_sampler(mesh, params):
    boxed = jax.eval_shape(lambda: vlm.init_params(MODEL, jax.random.key(0)))
    placed = jax.device_put(params, sharding.tree_sharding(boxed, mesh))
    ours = sampler.Sampler(MODEL, mesh, end_ids=(END, *range(11, VOCAB, 4)), pad_id=PAD)
    return ours, {"params": placed}


def answers(made, order, size: int, decoding: Decoding = GREEDY) -> list[Answer]:
    ours, variables = made
    prompts = Prompts(len(order), Builder(), lambda number: build(order[number]), SEQ_LEN, 0)
    return list(
        batching.answer(ours, variables, TOKENIZER, prompts, size, NUM_NEW, decoding=decoding)
    )


def alone(made, number: int, decoding: Decoding = GREEDY) -> str:
    """The answer of the program that knows nothing of other prompts, nor of buckets."""
    ours, variables = made
    batch = {name: array[None] for name, array in build(number).items()}
    if not decoding.is_greedy:
        batch |= batching.decoding_lib.arrays([decoding])
    return TOKENIZER.decode(ours.generate(variables, batch, NUM_NEW)[0])


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=3)]
)
def test_every_prompt_has_the_answer_that_it_has_alone(params, decoding):
    made = make_sampler(mesh_lib.single_device(), params)
    expected = [alone(made, number, decoding) for number in range(COUNT)]
    lengths = {sum(token != str(PAD) for token in text.split()) for text in expected}
    assert len(lengths) > 2 and len(set(expected)) > COUNT / 2  # Else rows could be mixed up.
    order = np.random.default_rng(0).permutation(COUNT)
    for size in (1, 8, 32):
        found = answers(made, range(COUNT), size, decoding)
        assert [one.text for one in found] == expected
        shuffled = answers(made, order, size, decoding)
        assert [one.text for one in shuffled] == [expected[number] for number in order]


def test_rows_on_a_mesh_are_those_of_one_device(mesh, params):
    made = make_sampler(mesh_lib.single_device(), params)
    expected = [alone(made, number) for number in range(COUNT)]
    on_mesh = make_sampler(mesh, params)
    for size in (4, 16):
        assert [one.text for one in answers(on_mesh, range(COUNT), size)] == expected


def test_programs_are_one_a_bucket_and_no_more_for_other_prompts(params):
    made = make_sampler(mesh_lib.single_device(), params)
    answers(made, range(COUNT), 8)
    known = {
        buckets.of_extent(*Builder().extent([build(number)], 1), SEQ_LEN, CONFIG.data.max_tiles)
        for number in range(COUNT)
    }
    # Idle rows, and those that advance.
    assert made[0].num_programs == len(known) + 2 <= 8
    answers(made, range(COUNT)[::-1], 8)
    assert made[0].num_programs == len(known) + 2


def test_a_finished_row_makes_room(params, monkeypatch):
    """Steps of the decoder are those that the rows need together, and not those of the longest
    answer of each batch."""
    made = make_sampler(mesh_lib.single_device(), params)
    size = 8
    steps = []
    advance = made[0].advance

    def counted(variables, state, *args):
        before = np.array(state.step_B)
        state = advance(variables, state, *args)
        steps.append(int((np.array(state.step_B) - before).max()))
        return state

    monkeypatch.setattr(made[0], "advance", counted)
    found = answers(made, range(COUNT), size)
    lengths = [sum(token != str(PAD) for token in one.text.split()) for one in found]
    of_batches = sum(max(lengths[i : i + size]) - 1 for i in range(0, COUNT, size))
    assert sum(steps) < of_batches


def test_answers_of_the_last_batch_are_told_as_they_end(params):
    ours, variables = make_sampler(mesh_lib.single_device(), params)
    left = []
    advance = ours.advance

    def counted(variables, state, num_steps, num_working):
        state = advance(variables, state, num_steps, num_working)
        left.append(int((~np.asarray(state.finished_B)).sum()))
        return state

    ours.advance = counted
    # As many prompts as rows: none waits for one.
    assert len(answers((ours, variables), range(8), 8)) == 8
    assert left[-1] == 0 and any(0 < number < 8 for number in left)


def test_a_prompt_that_cannot_be_built_has_its_reason_and_no_row(params):
    made = make_sampler(mesh_lib.single_device(), params)
    expected = answers(made, range(6), 4)

    def broken(number):
        if number in (0, 3):
            raise UserError(f"page {number} is damaged")
        return build(number)

    prompts = Prompts(6, Builder(), broken, SEQ_LEN, 0, skips_problems=True)
    found = list(batching.answer(*made, TOKENIZER, prompts, 4, NUM_NEW))
    assert found == [
        Answer("", f"page {number} is damaged") if number in (0, 3) else expected[number]
        for number in range(6)
    ]
    with pytest.raises(UserError, match="page 0 is damaged"):
        list(
            batching.answer(*made, TOKENIZER, Prompts(6, Builder(), broken, SEQ_LEN, 0), 4, NUM_NEW)
        )


def test_an_answer_is_refused_where_the_language_model_knows_no_text_as_long(params):
    made = make_sampler(mesh_lib.single_device(), params)
    lengths = [Builder().extent([build(number)], 1)[0] for number in range(6)]
    longest = max(lengths) + NUM_NEW - 1
    prompts = Prompts(6, Builder(), build, SEQ_LEN, longest, skips_problems=True)
    found = list(batching.answer(*made, TOKENIZER, prompts, 4, NUM_NEW))
    for one, length in zip(found, lengths, strict=True):
        assert (one.problem is None) == (length + NUM_NEW <= longest)
    problem = found[int(np.argmax(lengths))].problem
    assert f"prompt has {max(lengths)} tokens and its answer up to {NUM_NEW}" in problem
    assert problem.endswith(f"up to {longest}; allow at most {NUM_NEW - 1} new tokens")
    with pytest.raises(UserError, match="shorten the prompt"):
        batching.check_context(64, 1, 64)
    batching.check_context(63, 1, 64)
    # Of an initialised model it is not known.
    batching.check_context(10**6, 1, 0)


def test_buckets_have_room_and_are_few():
    longest, most_tiles = 9344, 10
    known = set()
    for tiles in range(most_tiles + 1):
        for length in range(tiles * 256 + 1, longest + 1):
            bucket = buckets.of_extent(length, tiles, longest, most_tiles)
            assert tiles <= bucket.num_tiles <= max(2 * tiles - 1, tiles)
            assert length <= bucket.length < max(1.5 * length, length + 16)
            known.add(bucket)
    assert len({bucket.length for bucket in known}) <= 24
    assert Bucket(0, 80) == buckets.of_extent(72, 0, 128, 2)


def test_what_is_planned_is_what_runs(mesh, params):
    """The programs of `lower_batching` take a batch in the making, and go on with it alike."""
    ours, variables = make_sampler(mesh, params)
    size = 2 * CONFIG.train.batch_size
    count = 4
    batch = {name: np.stack([build(n)[name] for n in range(count)]) for name in build(0)}
    rows = np.array([0, size // 4, size // 2, 3 * size // 4], np.int32)
    prompts = sampler.abstract_prompts(CONFIG, count, mesh)
    lowered = ours.lower_batching(variables, prompts, size, NUM_NEW)
    insert, advance = (one.compile() for one in lowered)
    with mesh_lib.use(mesh):
        state = ours.idle(size, SEQ_LEN, NUM_NEW)
        state = insert(variables, state, sharding.put_batch(batch, mesh), rows)
        state = advance(variables, state, np.int32(NUM_NEW), np.int32(0))
    expected = ours.insert(variables, ours.idle(size, SEQ_LEN, NUM_NEW), batch, rows)
    expected = ours.advance(variables, expected, NUM_NEW)
    np.testing.assert_array_equal(state.tokens_BT, expected.tokens_BT)


@pytest.mark.parametrize(
    ("size", "length", "expected"),
    [
        (400, 64, 48),  # An eighth of the 100 rows of a device.
        (400, 512, 8),  # 1,024 tokens on each.
        (400, 7558, 4),  # One on each, however long,
        (4, 64, 4),  # and however few rows.
    ],
)
def test_prompts_are_read_a_part_of_the_rows_and_a_thousand_tokens_at_a_time(
    size, length, expected
):
    assert batching.prefill_size(size, length, data_parallel_size=4) == expected
