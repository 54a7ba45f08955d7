"""Records that share a row are trained as if each had a row of its own."""

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import loader
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.models import vlm
from tests.conftest import random_params, tiny_config, tiny_connector

SIZES = ((16, 8), (16, 16), (32, 8))


def record(number: int, size: tuple[int, int]) -> Record:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    words = ((Word(f"a{number}", (0, 0, 9, 5)),),)
    return Record(
        str(number), "test", (file.getvalue(),), (Turn("Who?", (f"Ann {number}",)),), (words,)
    )


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    """A config, ALIGN's or of the connector asked for, parameters, three parts and the one row that
    they share."""
    tokenizer = SentencePieceTokenizer.train(
        tmp_path_factory.mktemp("t") / "tokenizer.model", ["Who is it?"]
    )
    config = tiny_config()
    llm = dataclasses.replace(config.model.llm, vocab_size=tokenizer.vocab_size)
    model = dataclasses.replace(
        config.model, llm=llm, connector=tiny_connector(getattr(request, "param", "align"))
    )
    data = dataclasses.replace(
        config.data, packing="offline", seq_len=128, max_tiles=6, record_tiles=2
    )
    train = dataclasses.replace(config.train, batch_size=1)
    config = dataclasses.replace(config, model=model, data=data, train=train)
    builder = ExampleBuilder.of(config, tokenizer)
    parts = [
        builder.segment(record(number, size), "answer", np.random.default_rng(0))
        for number, size in enumerate(SIZES, start=1)
    ]
    params = jax.device_put(
        random_params(
            vlm.VLM(config.model),
            vlm.abstract_batch(config.model, config.data, config.train.batch_size),
        )
    )
    return config, params, parts, builder.join(parts), builder


def losses(config, params, batch) -> vlm.Losses:
    return vlm.VLM(config.model).apply({"params": params}, batch, method=vlm.VLM.losses)


def gradients(loss, x, batch) -> np.ndarray:
    """Absolute gradients of each record's loss by x, the records along the first axis."""
    of_record = [batch["loss_weights"] * (batch["segment_ids"] == number) for number in (1, 2, 3)]
    return np.abs(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(x, np.stack(of_record)))


@pytest.mark.parametrize(
    "packed", ["align", "perceiver", "h_reducer", "c_abstractor"], indirect=True
)
def test_losses_are_those_of_each_record_in_a_row_of_its_own(packed):
    config, params, parts, row, builder = packed
    alone = loader.stack([builder.join([part]) for part in parts])
    run = jax.jit(functools.partial(losses, config, params))
    together = run(loader.stack([row]))
    apart = run(alone)
    slots = config.model.tokens_per_tile
    assert (row["tokens"] == config.model.image_token_id).sum() == 5 * slots
    tile = 0
    for number, part in enumerate(parts):
        here = row["segment_ids"] == number + 1
        length = len(part.tokens)
        assert row["loss_weights"][here].any()
        np.testing.assert_allclose(
            together.tokens.nll[0][here], apart.tokens.nll[number][:length], atol=1e-5
        )
        end = tile + len(part.tile_arrays["tiles"])
        np.testing.assert_allclose(
            together.patch_nll[0, tile:end], apart.patch_nll[number, : end - tile], atol=1e-5
        )
        tile = end
    assert tile == 5


def test_no_gradient_reaches_the_pixels_of_another_record(packed):
    config, params, parts, row, _ = packed
    batch = loader.stack([row])

    def loss(tiles, weights):
        return (losses(config, params, batch | {"tiles": tiles}).tokens.nll * weights).sum()

    grads = gradients(loss, batch["tiles"].astype(np.float32), batch).max(axis=(-3, -2, -1))
    tiles = np.arange(config.data.max_tiles)
    ends = np.cumsum([len(part.tile_arrays["tiles"]) for part in parts])
    for number, end in enumerate(ends):
        own = (tiles >= end - len(parts[number].tile_arrays["tiles"])) & (tiles < end)
        assert (grads[number, 0, own] > 0).all() and (grads[number, 0, ~own] == 0).all()


def test_no_gradient_reaches_the_embeddings_of_another_record(packed):
    config, params, parts, row, _ = packed
    batch = loader.stack([row])

    def nll(model: vlm.VLM, x):
        hidden, _ = model.llm(x, batch["positions"], batch["segment_ids"])
        return model.llm.token_losses(hidden, batch["targets"], "plain", 64.0).nll

    def loss(x, weights):
        return (vlm.VLM(config.model).apply({"params": params}, x, method=nll) * weights).sum()

    x = np.random.default_rng(0).standard_normal(
        (*row["tokens"].shape, config.model.llm.width), np.float32
    )
    grads = gradients(loss, x[None], batch).max(axis=-1)[:, 0]
    for number in range(len(parts)):
        is_own = row["segment_ids"] == number + 1
        last = np.flatnonzero(is_own & (row["loss_weights"] > 0))[-1]
        matters = is_own & (np.arange(len(is_own)) <= last)  # Nor does what follows an answer.
        assert (grads[number, matters] > 0).all() and (grads[number, ~matters] == 0).all()
