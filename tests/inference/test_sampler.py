"""Generation from the cache against the whole forward pass repeated for every token."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from alignvlm_jax import config as config_lib
from alignvlm_jax.inference import answering, sampler
from alignvlm_jax.models import vlm
from alignvlm_jax.ops import attention
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from tests.conftest import random_batch, random_params, tiny_config

CONFIG = tiny_config()
# Untied: a tied head with random weights says the token that it read, over and over.
MODEL = vlm.VLM(
    dataclasses.replace(
        CONFIG.model,
        llm=dataclasses.replace(CONFIG.model.llm, tie_embeddings=False, rope_theta=30.0),
    )
)
PAD = 0
NUM_NEW = 7
ROWS = CONFIG.train.batch_size
LENGTH = CONFIG.data.seq_len
VOCAB = CONFIG.model.llm.vocab_size
# of different lengths, one image token after another in front
PROMPTS = random_batch(CONFIG, seed=7)
PROMPT_LENGTHS = PROMPTS["segment_ids"].sum(-1)


@pytest.fixture(scope="module")
def params():
    params = random_params(
        MODEL, vlm.abstract_batch(CONFIG.model, CONFIG.data, CONFIG.train.batch_size)
    )
    params["llm"]["blocks"] = jax.tree.map(lambda x: 2 * x, params["llm"]["blocks"])
    return params


@pytest.fixture(scope="module")
def uncached(params):
    """Prompts, new tokens [B, NUM_NEW] -> [B, NUM_NEW + 1, V]: logits of the prompt's end and after
    every new token, each row written without a gap and read by the whole model."""
    apply = jax.jit(lambda params, batch: MODEL.apply({"params": params}, batch).logits)

    def logits(prompts: dict, tokens: np.ndarray) -> np.ndarray:
        rows = np.arange(ROWS)[:, None]
        batch = {
            "tokens": np.pad(prompts["tokens"], ((0, 0), (0, NUM_NEW))),
            "tiles": prompts["tiles"],
        }
        lengths = prompts["segment_ids"].sum(-1)[:, None]
        batch["tokens"][rows, lengths + np.arange(NUM_NEW)] = tokens
        index = np.tile(np.arange(LENGTH + NUM_NEW), (ROWS, 1))
        batch["segment_ids"] = (index < lengths + NUM_NEW).astype(np.int32)
        batch["positions"] = (index * batch["segment_ids"]).astype(np.int32)
        return np.asarray(apply(params, batch))[rows, lengths - 1 + np.arange(NUM_NEW + 1)]

    return logits


@pytest.fixture(scope="module")
def greedy(uncached):
    """What the model would say without ever stopping."""
    tokens = np.zeros((ROWS, NUM_NEW), np.int32)
    for step in range(NUM_NEW):
        tokens[:, step] = uncached(PROMPTS, tokens)[:, step].argmax(-1)
    return tokens


@pytest.fixture(scope="module")
def end_id(greedy) -> int:
    """A token that ends some rows at different steps, and leaves some to the end."""

    def variety(token: int) -> tuple:
        steps = np.where((greedy == token).any(-1), (greedy == token).argmax(-1), NUM_NEW)
        return NUM_NEW in steps, len({*steps} - {0})

    return max(range(VOCAB), key=variety)


@pytest.fixture(scope="module")
def expected(greedy, end_id):
    before_end = np.cumsum(greedy == end_id, axis=1) - (greedy == end_id) == 0
    return np.where(before_end, greedy, PAD)


def make_sampler(mesh, params, end_id: int):
    """Its `generate`, of these parameters."""
    boxed = jax.eval_shape(lambda: vlm.init_params(MODEL, jax.random.key(0)))
    params = jax.device_put(params, sharding.tree_sharding(boxed, mesh))
    ours = sampler.Sampler(MODEL, mesh, end_ids=(end_id, VOCAB + 1), pad_id=PAD)
    return functools.partial(ours.generate, {"params": params})


def test_prompts_and_answers_differ(greedy, end_id):
    """Else the tests below could not see a row that reads another's slots, or a token that never
    changes."""
    assert len(set(PROMPT_LENGTHS)) > 3 and PROMPT_LENGTHS.max() == LENGTH
    assert len({tuple(row) for row in greedy}) == ROWS
    assert np.mean(greedy[:, 1:] != greedy[:, :-1]) > 0.5
    # the whole forward pass would take it for an image token
    assert CONFIG.model.image_token_id not in greedy
    is_end = greedy == end_id
    ends = np.where(is_end.any(-1), is_end.argmax(-1), NUM_NEW)
    assert len(set(ends)) >= 3 and NUM_NEW in ends


def with_texts_among(prompts: dict) -> dict:
    """Every second row without image tokens, its tiles unused."""
    is_text = np.arange(ROWS)[:, None] % 2 == 1
    is_slot = prompts["tokens"] == CONFIG.model.image_token_id
    return prompts | {"tokens": np.where(is_text & is_slot, 9, prompts["tokens"])}


def with_any_padding(prompts: dict) -> dict:
    """What stands after a prompt is nothing that anybody may see."""
    is_padding = prompts["segment_ids"] == 0
    return prompts | {
        "tokens": np.where(is_padding, 11, prompts["tokens"]),
        "positions": np.where(is_padding, 5, prompts["positions"]),
    }


def model_with(kernel: str) -> vlm.VLM:
    return vlm.VLM(dataclasses.replace(MODEL.config, attention=kernel))


@pytest.mark.parametrize(
    ("kernel", "chunk_size_mib", "change"),
    [
        ("auto", attention.CHUNK_SIZE_MIB, lambda prompts: prompts),
        ("auto", attention.CHUNK_SIZE_MIB, with_texts_among),
        ("auto", attention.CHUNK_SIZE_MIB, with_any_padding),
        # 5 queries of 2 rows and 2 heads a device
        ("auto", 5 * 2 * 2 * 4 * LENGTH / 2**20, with_texts_among),
        ("splash", attention.CHUNK_SIZE_MIB, with_texts_among),
    ],
    ids=["xla", "xla_texts", "xla_padding", "xla_chunks", "splash"],
)
def test_prefill_and_decode_equal_the_whole_forward_pass(
    mesh, params, uncached, monkeypatch, kernel, chunk_size_mib, change
):
    tokens = np.random.default_rng(1).integers(8, VOCAB, (ROWS, NUM_NEW)).astype(np.int32)
    prompts = change({name: PROMPTS[name] for name in sampler.PROMPT_FIELDS if name in PROMPTS})
    expected = uncached(
        with_texts_among(PROMPTS) if change is with_texts_among else PROMPTS, tokens
    )
    monkeypatch.setattr(attention, "CHUNK_SIZE_MIB", chunk_size_mib)
    model = model_with(kernel)
    prefill = jax.jit(
        lambda params, batch: model.apply({"params": params}, batch, NUM_NEW, method="prefill")
    )
    decode = jax.jit(lambda params, *args: model.apply({"params": params}, *args, method="decode"))
    logits, cache = prefill(params, prompts)
    steps = [logits]
    slots = np.arange(LENGTH + NUM_NEW)
    for step in range(NUM_NEW):
        mask = (slots < PROMPT_LENGTHS[:, None]) | ((slots >= LENGTH) & (slots <= LENGTH + step))
        positions = (PROMPT_LENGTHS + step).astype(np.int32)
        logits, cache = decode(params, tokens[:, step], positions, mask, cache)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, 1), expected, atol=1e-5 * np.abs(expected).max())


def test_generates_up_to_the_end_token_then_pads_in_one_trace(
    mesh, params, greedy, end_id, expected, monkeypatch
):
    traces = []
    generate = answering.generate
    monkeypatch.setattr(
        answering, "generate", lambda *args, **kwargs: traces.append(1) or generate(*args, **kwargs)
    )
    ours = make_sampler(mesh, params, end_id)
    tokens = ours(PROMPTS, NUM_NEW)
    assert tokens.shape == (ROWS, NUM_NEW) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, expected)
    other = {name: array[::-1] for name, array in PROMPTS.items()}
    np.testing.assert_array_equal(ours(other, NUM_NEW), expected[::-1])
    assert len(traces) == 1


def test_sharded_equals_single_device(params, end_id, expected):
    config = dataclasses.replace(CONFIG, mesh=config_lib.MeshConfig(data=1, fsdp=1, tensor=1))
    mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train, jax.devices()[:1])
    np.testing.assert_array_equal(make_sampler(mesh, params, end_id)(PROMPTS, NUM_NEW), expected)


def test_without_tiles_the_language_model_answers_as_to_rows_without_image_slots(mesh, params):
    texts = dict(PROMPTS)
    texts["tokens"] = np.where(
        PROMPTS["tokens"] == CONFIG.model.image_token_id, 9, PROMPTS["tokens"]
    )
    ours = sampler.Sampler(MODEL, mesh, end_ids=(VOCAB,), pad_id=PAD)
    with_tiles = ours.generate({"params": params}, texts, NUM_NEW)
    del texts["tiles"]
    np.testing.assert_array_equal(ours.generate({"params": params}, texts, NUM_NEW), with_tiles)
    assert len(np.unique(with_tiles)) > 2


def test_the_last_token_is_not_read(params, end_id, expected, monkeypatch):
    """Of NUM_NEW tokens the prompt gives the first and every one but the last is read; and none
    once all rows ended."""
    reads = []
    decode = vlm.VLM.decode

    def counted(self, tokens, *args):
        jax.debug.callback(lambda: reads.append(1))
        return decode(self, tokens, *args)

    monkeypatch.setattr(vlm.VLM, "decode", counted)
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        np.testing.assert_array_equal(
            make_sampler(mesh, params, end_id)(PROMPTS, NUM_NEW), expected
        )
        jax.effects_barrier()
        assert len(reads) == NUM_NEW - 1
        ends = (expected == end_id).argmax(-1) * (expected == end_id).any(-1)
        row = np.flatnonzero((ends > 0) & (ends < NUM_NEW - 1))[0]
        same = {
            name: np.repeat(array[row : row + 1], ROWS, axis=0) for name, array in PROMPTS.items()
        }
        reads.clear()
        np.testing.assert_array_equal(
            make_sampler(mesh, params, end_id)(same, NUM_NEW)[0], expected[row]
        )
        jax.effects_barrier()
        assert len(reads) == ends[row]


def arrays_of(jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of all that a program makes, its loops' bodies and what they call included."""
    for equation in jaxpr.eqns:
        yield from (
            variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape")
        )
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_a_long_prompt_has_no_logits_of_all_pairs():
    """On CPU, where no kernel makes them apart: neither for all heads, nor a mask of one."""
    length = 4096
    batch = 2
    config = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, batch_size=batch),
        data=dataclasses.replace(CONFIG.data, seq_len=length),
    )
    boxed = jax.eval_shape(lambda: vlm.init_params(MODEL, jax.random.key(0)))
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        prompts = sampler.abstract_prompts(config, batch, mesh)
        generate = functools.partial(
            answering.generate, MODEL, num_new=NUM_NEW, end_ids=(1,), pad_id=PAD
        )
        program = jax.make_jaxpr(generate)({"params": sharding.unbox(boxed)}, prompts)
    shapes = set(arrays_of(program.jaxpr))
    assert any(length + NUM_NEW in shape for shape in shapes)  # the cache: loops were looked into
    assert not [
        shape for shape in shapes if sum(size in (length, length + NUM_NEW) for size in shape) > 1
    ]
    assert max(map(math.prod, shapes)) * 4 <= attention.CHUNK_SIZE_MIB * 2**20
