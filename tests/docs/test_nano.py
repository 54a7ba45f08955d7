"""docs/nano.py is an oracle: written from the mathematics alone, it gives the package's losses,
gradients and steps."""

import ast
import dataclasses
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from alignvlm_jax.config import Config
from alignvlm_jax.data import images
from alignvlm_jax.models import decoder, vlm
from alignvlm_jax.train import optim, state, step
from tests.conftest import random_params, tiny_config

PATH = pathlib.Path(__file__).parents[2] / "docs" / "nano.py"
TOLERANCE = 1e-5
"""Float32. Of losses relative; of a gradient relative to its largest entry: entries that cancel to
nearly 0 keep the rounding errors of what they are sums of."""

NO_GRADIENT = "vision/blocks/attn/k/bias"
"""A bias of all keys shifts all logits of a query and moves no softmax: its gradient is 0 but for
rounding."""


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nano", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_config(tie_embeddings: bool) -> Config:
    """The tiny model, on sequences that have room for several documents."""
    config = tiny_config()
    llm = dataclasses.replace(config.model.llm, tie_embeddings=tie_embeddings)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, llm=llm),
        data=dataclasses.replace(config.data, seq_len=64, max_tiles=4),
        train=dataclasses.replace(config.train, batch_size=4, patch_token_weight=0.7),
        optim=dataclasses.replace(config.optim, warmup_steps=1),
    )


def nano_config(nano, config: Config):
    vision = config.model.vision
    llm = config.model.llm
    adam = config.optim
    # What nano has no field for.
    assert (adam.b1, adam.b2, adam.eps, adam.weight_decay) == (0.9, 0.98, 1e-8, 0.01)
    assert (adam.clip_norm, adam.final_fraction) == (1.0, 0.05)
    assert llm.rope_scaling.factor == 1.0 and vision.gelu == "tanh" and config.train.z_loss == 0.0
    return nano.Config(
        tile_size=(vision.tile_height, vision.tile_width),
        patch_size=(vision.patch_height, vision.patch_width),
        max_tiles=config.data.max_tiles,
        vision_width=vision.width,
        vision_mlp_width=vision.mlp_width,
        vision_layers=vision.num_layers,
        vision_heads=vision.num_heads,
        vision_norm_eps=vision.norm_eps,
        vocab_size=llm.vocab_size,
        width=llm.width,
        mlp_width=llm.mlp_width,
        num_layers=llm.num_layers,
        num_heads=llm.num_heads,
        num_kv_heads=llm.num_kv_heads,
        head_dim=llm.head_dim,
        norm_eps=llm.norm_eps,
        rope_theta=llm.rope_theta,
        tie_embeddings=llm.tie_embeddings,
        image_token=config.model.image_token_id,
        patch_token_weight=config.train.patch_token_weight,
        learning_rate=adam.learning_rate,
        warmup_steps=adam.warmup_steps,
        num_steps=config.train.num_steps,
    )


def packed_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences of two or three documents, each of text around the image tokens of 0 to 2 tiles,
    then padding."""
    rng = np.random.default_rng(seed)
    vision = config.model.vision
    data = config.data
    size = config.train.batch_size
    vocab = config.model.llm.vocab_size
    patches = vision.num_patches
    shape = size, data.seq_len
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    for b in range(size):
        start = 0
        # The tiles of each document: the first sequence leaves all four unused, the third none.
        for segment, num_tiles in enumerate([(0, 0), (1, 0, 2), (2, 2), (1, 2)][b], start=1):
            tokens = rng.integers(8, vocab, num_tiles * patches + rng.integers(8, 13))
            first = rng.integers(3)
            tokens[first : first + num_tiles * patches] = config.model.image_token_id
            here = slice(start, start + len(tokens))
            batch["tokens"][b, here] = tokens
            batch["positions"][b, here] = np.arange(len(tokens))
            batch["segment_ids"][b, here] = segment
            start += len(tokens)
        assert start < data.seq_len
    targets = np.roll(batch["tokens"], -1, axis=1)
    # Weights other than 0 and 1, as loss_normalisation "record" gives them.
    weights = rng.uniform(0.2, 2.0, shape) * (rng.random(shape) < 0.5)
    is_taught = (batch["segment_ids"] > 0) & (batch["tokens"] != config.model.image_token_id)
    labels = (size, data.max_tiles, patches, data.max_patch_labels)
    fractions = rng.random(labels)
    tiles = (size, data.max_tiles, vision.tile_height, vision.tile_width, 3)
    return batch | {
        "targets": targets,
        "loss_weights": (weights * is_taught).astype(np.float32),
        "tiles": rng.integers(0, 256, tiles, dtype=np.uint8),
        "patch_label_ids": rng.integers(8, vocab, labels).astype(np.int32),
        "patch_label_weights": (fractions / fractions.sum(-1, keepdims=True)).astype(np.float32),
        "patch_loss_weights": rng.choice([0.0, 0.2, 1.0], labels[:3]).astype(np.float32),
    }


def make_params(config: Config) -> state.Params:
    return random_params(
        vlm.VLM(config.model),
        vlm.abstract_batch(config.model, config.data, config.train.batch_size),
    )


def keep_gradients() -> optax.GradientTransformation:
    """An optimizer that moves nothing; its state is the last gradient, beside the count that the
    step asks for."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    return optax.chain(keep, optax.scale_by_schedule(lambda count: 0.0 * count))


def package_step(config: Config, tx: optax.GradientTransformation):
    model = vlm.VLM(config.model)
    paths = set(state.flatten(make_params(config)))
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    return jax.jit(step.make_train_step(model, config.train, paths, tx, schedule))


def largest_difference(ours, theirs) -> float:
    """The largest difference of two arrays, relative to the largest entry."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_loss_its_parts_and_all_gradients_are_the_packages(nano, tie_embeddings):
    config = make_config(tie_embeddings)
    params = make_params(config)
    batch = packed_batch(config)
    tx = keep_gradients()
    new, metrics = package_step(config, tx)(
        state.TrainState(jnp.int32(0), params, tx.init(params)), batch
    )
    theirs = state.flatten(new.opt_state[0])

    value_and_grad = jax.jit(jax.value_and_grad(nano.loss, has_aux=True), static_argnums=2)
    (total, parts), grads = value_and_grad(params, batch, nano_config(nano, config))
    ours = state.flatten(grads)

    assert set(parts) == {"answer_loss", "token_accuracy", "patch_loss"}
    for name, value in {**parts, "loss": total}.items():
        assert float(value) == pytest.approx(float(metrics[name]), rel=TOLERANCE), name
        assert float(value) > 0.01, name
    assert set(ours) == set(theirs) == set(state.flatten(params))
    assert ("llm/head/kernel" in ours) is not tie_embeddings
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for path, grad in theirs.items():
        if path == NO_GRADIENT:
            assert max(np.abs(grad).max(), np.abs(ours[path]).max()) < 1e-6 * largest
        else:
            assert np.abs(grad).max() > 1e-4 * largest, path
            assert largest_difference(ours[path], grad) < TOLERANCE, path


def test_three_steps_end_at_the_packages_parameters(nano):
    """The package adds up the gradients of two microbatches; nano takes the batch whole."""
    config = make_config(tie_embeddings=True)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, grad_accum_steps=2)
    )
    params = make_params(config)
    c = nano_config(nano, config)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    ours_tx = nano.optimizer(c)
    theirs_step = package_step(config, tx)
    ours_step = jax.jit(nano.train_step, static_argnums=3)
    theirs = state.TrainState(jnp.int32(0), params, tx.init(params))
    ours = params
    opt_state = ours_tx.init(params)
    for seed in range(3):
        batch = packed_batch(config, seed)
        theirs, metrics = theirs_step(theirs, batch)
        ours, opt_state, total, _ = ours_step(ours, opt_state, batch, c)
        assert float(total) == pytest.approx(float(metrics["loss"]), rel=TOLERANCE)
    assert float(metrics["grad_norm"]) > config.optim.clip_norm  # Else clipping would go untested.
    start, theirs, ours = (state.flatten(tree) for tree in (params, theirs.params, ours))
    for path in start:
        if path == NO_GRADIENT:  # Adam makes whole steps of rounding errors.
            continue
        assert np.abs(theirs[path] - start[path]).max() > 1e-3, path
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_initial_parameters_have_the_packages_names_and_shapes(nano, tie_embeddings):
    config = make_config(tie_embeddings)
    ours = nano.init_params(0, nano_config(nano, config))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, make_params(config))
    np.testing.assert_array_equal(ours["connector"]["w2"]["kernel"], decoder.lm_head(ours["llm"]))


def test_pages_are_cut_into_the_packages_grids_and_tiles(nano):
    config = make_config(tie_embeddings=True)
    rng = np.random.default_rng(0)
    for max_tiles in (1, 4, 9):
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, max_tiles=max_tiles)
        )
        c = nano_config(nano, config)
        sizes = rng.integers(2, 80, (300, 2))
        theirs = images.choose_grids(sizes, config.model.vision, max_tiles)
        assert [nano.choose_grid(int(y), int(x), c) for y, x in sizes] == [
            tuple(grid) for grid in theirs.tolist()
        ]
    for height, width in ((16, 32), (24, 16), (40, 37), (5, 11)):
        page = np.asarray(
            Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
        )
        theirs = images.tile_image(
            Image.fromarray(page), config.model.vision, max_tiles, use_overview=False
        ).pixels
        ours = nano.tiles_of(page, c)
        assert ours.dtype == np.uint8 and ours.shape == theirs.shape
        # Pillow rounds to whole levels between its two passes.
        assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_the_toy_teaches_what_its_pages_show(nano):
    c = nano.Config()
    batch = nano.toy_batch(np.random.default_rng(0), c, 3)
    taught = batch["targets"][batch["loss_weights"] > 0].reshape(3, 2, -1)
    np.testing.assert_array_equal(taught[..., -1], nano.END)
    np.testing.assert_array_equal(
        taught[..., :-1].reshape(batch["patch_label_ids"].shape), batch["patch_label_ids"]
    )
    num_patches = np.prod(batch["patch_label_ids"].shape[1:3])
    np.testing.assert_array_equal((batch["tokens"] == c.image_token).sum(axis=1), num_patches)
    has_ink = (batch["tiles"].reshape(-1, 8, 4, 8, 3) == 0).any(axis=(1, 3, 4))
    np.testing.assert_array_equal(has_ink, batch["patch_label_ids"].reshape(-1, 4) != nano.BLANK)


def test_a_few_steps_of_main_lower_the_loss(nano, capsys):
    losses = nano.main(num_steps=40, num_sequences=4)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    printed = capsys.readouterr().out
    assert f"loss {losses[0]:.3f}" in printed and f"loss {losses[-1]:.3f}" in printed
    assert "patches" in printed


def test_the_file_is_short_and_imports_nothing_of_the_package():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 400
    assert max(map(len, text.splitlines())) <= 100
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots <= {"jax", "numpy", "optax"} | sys.stdlib_module_names
    assert not {"__import__", "importlib", "exec", "eval"} & {
        n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)
    }
