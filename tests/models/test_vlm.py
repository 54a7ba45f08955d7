"""The whole model: sharded equals single, what stands at image tokens, who sees whom, options that
change nothing."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core as extend_core
from jax.sharding import PartitionSpec

from alignvlm_jax import config as config_lib
from alignvlm_jax.data.record import Batch
from alignvlm_jax.models import connectors, decoder, vit, vlm
from alignvlm_jax.models.decoder import Llama
from alignvlm_jax.models.layers import Einsum, LayerNorm, RMSNorm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import flops
from tests.conftest import random_batch, random_params, tiny_config, tiny_connector

# Sizes that no two axes share, whole or divided by the mesh, so that a shape in the compiled
# program names its axes.
CONFIG = tiny_config(
    model=config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            tile_height=8,
            tile_width=12,
            patch_height=4,
            patch_width=3,
            width=12,
            mlp_width=20,
            num_layers=2,
            num_heads=2,
        ),
        llm=config_lib.LLMConfig(
            vocab_size=74,
            width=10,
            mlp_width=28,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
        ),
        image_token_id=4,
    ),
    data=config_lib.DataConfig(seq_len=34, max_tiles=2),
)
MODEL = CONFIG.model
MLP_UNTIED = dataclasses.replace(
    MODEL,
    connector=config_lib.connector("mlp"),
    llm=dataclasses.replace(MODEL.llm, tie_embeddings=False),
)
ROWS = CONFIG.train.batch_size
LENGTH = CONFIG.data.seq_len
TILES = CONFIG.data.max_tiles
PATCHES = 8
VOCAB = MODEL.llm.vocab_size
IMAGE = MODEL.image_token_id


@functools.cache
def batch_of(model: config_lib.ModelConfig) -> dict[str, np.ndarray]:
    """Its rows have the image tokens of the model's connector."""
    return random_batch(dataclasses.replace(CONFIG, model=model))


BATCH = batch_of(MODEL)

# On the mesh 2 x 2 x 2 a device has 37 columns, and a quarter of the rows: of tokens 7 columns fit,
# of patches twice as many, which leaves 3 chunks of 13.
TOKENS_A_SHARD = ROWS * LENGTH // 4
PATCHES_A_SHARD = ROWS * TILES * PATCHES // 4
CHUNKS = {(TOKENS_A_SHARD, 7), (PATCHES_A_SHARD, 13)}
CHUNKED = {"vocab_impl": "chunked", "chunk_size_mib": 7.5 * TOKENS_A_SHARD * 4 / 2**20}


def draw_params(model: config_lib.ModelConfig) -> dict:
    return random_params(
        vlm.VLM(model), vlm.abstract_batch(CONFIG.model, CONFIG.data, CONFIG.train.batch_size)
    )


@pytest.fixture(scope="module")
def params():
    return draw_params(MODEL)


def gradient_step(model: config_lib.ModelConfig, grad_shardings=None):
    """Compiles params, batch -> (loss, losses), gradients: both losses, each divided by its
    weight."""

    def loss(params, batch):
        losses = vlm.VLM(model).apply({"params": params}, batch, method=vlm.VLM.losses)
        loss_sum = (losses.tokens.nll * batch["loss_weights"]).sum()
        patch_sum = (losses.patch_nll * batch["patch_loss_weights"]).sum()
        return loss_sum / batch["loss_weights"].sum() + patch_sum / batch[
            "patch_loss_weights"
        ].sum(), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, grad_shardings))


@functools.cache
def single_step(model: config_lib.ModelConfig):
    """(loss, losses), gradients on one device, in the plain form."""
    model = dataclasses.replace(model, vocab_impl="plain")
    return jax.device_get(gradient_step(model)(draw_params(model), batch_of(model)))


def assert_same_gradients(grads, expected) -> None:
    """Equal to 3e-5 of each array's largest entry: sums in another order are rounded otherwise, by
    less than 1e-5 on a CPU with AVX-512 and by 2e-5 on one with AVX2 alone. A row or head that is
    left out or counted twice changes the first digits."""
    for (path, a), b in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(b).max()
        if sharding.path_name(path).endswith("k/bias"):
            # a bias of all keys moves no softmax: this gradient is rounding
            scale = max(scale, 1e-2)
        assert scale > 0, path
        np.testing.assert_allclose(
            a, b, rtol=0, atol=3e-5 * scale, err_msg=sharding.path_name(path)
        )


# Sharded against single-device.


class Sharded:
    """One compiled step on the mesh, its results, and the same step's on one device."""

    def __init__(self, model: config_lib.ModelConfig):
        (self.single_loss, self.single_losses), self.single_grads = single_step(model)
        with mesh_lib.use(mesh_lib.make_mesh(CONFIG.mesh, CONFIG.model, CONFIG.train)) as mesh:
            boxed = jax.eval_shape(lambda: vlm.init_params(vlm.VLM(model), jax.random.key(0)))
            self.shardings = sharding.tree_sharding(boxed, mesh)
            params = jax.device_put(draw_params(model), self.shardings)
            batch = sharding.put_batch(batch_of(model), mesh)
            lowered = gradient_step(model, self.shardings).lower(params, batch)
            compiled = lowered.compile()
            (self.loss, self.losses), self.grads = compiled(params, batch)
        self.lowered_text = lowered.as_text()
        self.compiled_text = compiled.as_text()


SHARDED = {
    "align_tied": MODEL,
    "mlp_untied": MLP_UNTIED,
    "align_untied_chunked": dataclasses.replace(MLP_UNTIED, connector=MODEL.connector, **CHUNKED),
    "align_tied_chunked": dataclasses.replace(MODEL, **CHUNKED),
    "ovis_chunked": dataclasses.replace(MODEL, connector=tiny_connector("ovis"), **CHUNKED),
    **{
        name: dataclasses.replace(MODEL, connector=tiny_connector(name))
        for name in connectors.REGISTRY
        if name not in ("align", "mlp")
    },
}


@pytest.fixture(scope="module", params=SHARDED.values(), ids=SHARDED)
def sharded(request):
    return Sharded(request.param)


def test_sharded_loss_equals_single_device(sharded):
    assert float(sharded.loss) == pytest.approx(float(sharded.single_loss), abs=1e-5)
    for a, b in zip(
        jax.tree.leaves(sharded.losses), jax.tree.leaves(sharded.single_losses), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_sharded_gradients_equal_single_device(sharded):
    assert_same_gradients(sharded.grads, sharded.single_grads)


def test_shardings_are_live(sharded):
    assert sharded.lowered_text.count("sdy.sharding_constraint") > 0


@pytest.mark.parametrize("sharded", [MODEL], ids=["align_tied"], indirect=True)
def test_no_device_holds_all_tokens_by_all_words(sharded):
    """Neither a batch's patches or tokens by the whole vocabulary nor a device's, forward or
    backward."""
    assert sharded.shardings["connector"]["w2"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\w+\[([\d,]+)\]", sharded.compiled_text)
    }
    local_patches = ROWS // 4 * TILES * PATCHES
    assert (local_patches, VOCAB // 2) in shapes and (ROWS // 4 * LENGTH, VOCAB // 2) in shapes
    assert not [
        shape for shape in shapes if VOCAB in shape and np.prod(shape) // VOCAB >= local_patches
    ]


def test_no_device_holds_the_activations_of_all_rows(sharded):
    """As the partitioner would have it where it finds no better way from one sharding to the next:
    newer versions of jax say so on stderr ("Involuntary full rematerialization"), this one does
    not."""
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", sharded.compiled_text)
    }
    wide = {
        shape
        for shape in shapes
        if np.prod(shape) % MODEL.llm.width == 0 or np.prod(shape) % MODEL.vision.width == 0
    }
    rows = ROWS // 4
    assert (rows, LENGTH, MODEL.llm.width) in wide
    assert not [
        s
        for s in wide
        if s[:2] == (ROWS, LENGTH) or s[0] in (ROWS * LENGTH, ROWS * TILES * PATCHES, ROWS * TILES)
    ]


@pytest.mark.parametrize(
    "sharded", [SHARDED["align_tied_chunked"]], ids=["align_tied"], indirect=True
)
def test_chunked_a_device_holds_no_more_than_a_chunk(sharded):
    """Nothing lies over all columns of a shard but the parameters themselves and what belongs to a
    column."""
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\w+\[([\d,]+)\]", sharded.compiled_text)
    }
    assert shapes >= CHUNKS
    with_columns = {shape for shape in shapes if VOCAB // 2 in shape or VOCAB in shape}
    widths = {1, MODEL.llm.width, MODEL.llm.width // 2}
    assert {
        int(np.prod(shape)) // (VOCAB if VOCAB in shape else VOCAB // 2) for shape in with_columns
    } <= widths


# Image tokens.


def mixed_batch() -> dict[str, np.ndarray]:
    """The random batch with every layout of a row: slots first; text before and between images; one
    tile only; two packed segments with an image each; an image that is all there is."""
    slots = [IMAGE] * PATCHES
    text = list(range(8, 60))
    layouts = {
        1: (text[:3] + slots + text[3:5] + slots + text[5:9], []),
        2: (text[:2] + slots + text[2:9], []),
        3: (slots + text[:5], slots + text[5:12]),
        4: (slots, []),
    }
    batch = {name: array.copy() for name, array in BATCH.items()}
    for row, segments in layouts.items():
        for name in ("tokens", "positions", "segment_ids"):
            batch[name][row] = 0
        start = 0
        for number, tokens in enumerate(segments, start=1):
            part = slice(start, start + len(tokens))
            batch["tokens"][row, part] = tokens
            batch["positions"][row, part] = np.arange(len(tokens))
            batch["segment_ids"][row, part] = number
            start += len(tokens)
    return batch


MIXED = mixed_batch()
NUM_SLOTS = (MIXED["tokens"] == IMAGE).sum(-1)


def apply_model(
    params, batch, visual_source: str, model: config_lib.ModelConfig = MODEL, shift=0.0
):
    """The model's output, and the vectors that the decoder reads; `shift` is added to them."""
    read = []

    def intercept(method, args, kwargs, context):
        if isinstance(context.module, Llama) and context.method_name == "__call__":
            read.append(args[0])
            args = (args[0] + shift, *args[1:])
        return method(*args, **kwargs)

    with nn.intercept_methods(intercept):
        output = vlm.VLM(model).apply({"params": params}, batch, visual_source)
    return output, read[0]


@pytest.fixture(scope="module")
def run():
    return jax.jit(apply_model, static_argnames="visual_source")


@pytest.fixture(scope="module")
def probabilities():
    model = vlm.VLM(MODEL)
    return jax.jit(
        lambda params, batch: model.apply({"params": params}, batch, method="patch_probabilities")
    )


@pytest.mark.parametrize("visual_source", ["pixels", "oracle"])
def test_nth_slot_holds_nth_visual_token(mesh, params, run, probabilities, visual_source):
    """From pixels the average of text embeddings that the patch's distribution names; from labels,
    theirs."""
    table = params["llm"]["embed"]["table"]
    if visual_source == "pixels":
        visual = np.asarray(probabilities(params, MIXED)) @ table
    else:
        visual = (MIXED["patch_label_weights"][..., None] * table[MIXED["patch_label_ids"]]).sum(-2)
    visual = visual.reshape(ROWS, TILES * PATCHES, -1)
    _, read = run(params, MIXED, visual_source)
    for row in range(ROWS):
        is_slot = MIXED["tokens"][row] == IMAGE
        np.testing.assert_allclose(read[row][is_slot], visual[row, : is_slot.sum()], atol=1e-5)
        np.testing.assert_array_equal(read[row][~is_slot], table[MIXED["tokens"][row][~is_slot]])


@pytest.mark.parametrize("visual_source", ["pixels", "oracle"])
def test_image_tokens_count_kept_patches_alone(mesh, params, run, visual_source):
    """Those of other patches are nowhere, and what is kept stays in its order."""
    _, before = run(params, MIXED, visual_source)
    is_kept = np.random.default_rng(3).random((ROWS, TILES, PATCHES)) < 0.6
    is_kept.reshape(ROWS, -1)[:, 0] = True
    num_kept = is_kept.reshape(ROWS, -1).sum(1)
    batch = {**MIXED, "kept_patches": is_kept, "tokens": MIXED["tokens"].copy()}
    full = {**MIXED, "tokens": MIXED["tokens"].copy()}
    for row in range(ROWS):
        for tokens, count in ((batch["tokens"], num_kept[row]), (full["tokens"], TILES * PATCHES)):
            tokens[row] = 7
            tokens[row, 2 : 2 + count] = IMAGE
    _, every = run(params, full, visual_source)
    _, read = run(params, batch, visual_source)
    assert read.shape == before.shape
    for row in range(ROWS):
        visual = every[row][2 : 2 + TILES * PATCHES]
        expected = visual[is_kept[row].reshape(-1)]
        np.testing.assert_allclose(read[row][2 : 2 + num_kept[row]], expected, atol=1e-6)
        np.testing.assert_array_equal(read[row][2 + num_kept[row]], every[row][0])


def test_certain_labels_equal_plain_text(mesh, params, run):
    """A patch that shows one word for certain is that word: the image might as well be typed."""
    batch = {name: array.copy() for name, array in MIXED.items()}
    batch["patch_label_weights"] = np.zeros_like(batch["patch_label_weights"])
    batch["patch_label_weights"][..., 1] = 1
    words = batch["patch_label_ids"][..., 1].reshape(ROWS, -1)
    typed = {**batch, "tokens": batch["tokens"].copy()}
    for row in range(ROWS):
        typed["tokens"][row][batch["tokens"][row] == IMAGE] = words[row, : NUM_SLOTS[row]]
    expected, _ = run(params, typed, "oracle")
    np.testing.assert_allclose(run(params, batch, "oracle")[0].logits, expected.logits, atol=2e-5)


@pytest.mark.parametrize("visual_source", ["pixels", "oracle"])
def test_unused_tiles_change_nothing(mesh, params, run, visual_source):
    used = NUM_SLOTS > PATCHES
    batch = {name: array.copy() for name, array in MIXED.items()}
    batch["tiles"][:, 1] = 255 - batch["tiles"][:, 1]
    batch["patch_label_ids"][:, 1] = 9
    logits = np.asarray(run(params, MIXED, visual_source)[0].logits)
    other = np.asarray(run(params, batch, visual_source)[0].logits)
    assert 0 < used.sum() < ROWS
    np.testing.assert_array_equal(logits[~used], other[~used])
    assert np.abs(logits - other)[used].max((1, 2)).min() > 1e-3


def test_positions_are_those_of_the_batch(mesh, params, run):
    """A shift of a whole segment would not show: rotary positions are relative."""
    stretched = {**MIXED, "positions": 3 * MIXED["positions"]}
    logits, other = (
        np.asarray(run(params, batch, "pixels")[0].logits) for batch in (MIXED, stretched)
    )
    assert np.abs(logits - other)[MIXED["positions"] > 1].max(-1).min() > 1e-3


def test_labels_look_at_no_pixels(mesh, params, run):
    """The language model's own stage costs no vision tower: without tiles in the batch the result
    is the same."""
    without = {name: array for name, array in MIXED.items() if name != "tiles"}
    output, _ = run(params, without, "oracle")
    np.testing.assert_array_equal(output.logits, run(params, MIXED, "oracle")[0].logits)
    np.testing.assert_array_equal(output.patch_nll, np.zeros((ROWS, TILES, PATCHES)))


def test_without_labels_there_is_no_patch_loss(mesh, params, run):
    without = {name: array for name, array in MIXED.items() if not name.startswith("patch")}
    output, _ = run(params, without, "pixels")
    np.testing.assert_array_equal(output.patch_nll, np.zeros((ROWS, TILES, PATCHES)))
    # Another program, which sums in another order: 1.2e-5 apart on a CPU with AVX2 alone.
    np.testing.assert_allclose(output.logits, run(params, MIXED, "pixels")[0].logits, atol=3e-5)


def test_text_alone_is_read_by_the_decoder_alone(mesh, params, run):
    """As where there are tiles that no slot asks for."""
    with_tiles = {name: array for name, array in MIXED.items() if not name.startswith("patch")}
    with_tiles["tokens"] = np.where(MIXED["tokens"] == IMAGE, 9, MIXED["tokens"])
    text = {name: array for name, array in with_tiles.items() if name != "tiles"}
    losses = jax.jit(
        lambda llm: vlm.VLM(MODEL).apply({"params": {"llm": llm}}, text, method="losses")
    )(params["llm"])
    log_p = jax.nn.log_softmax(run(params, with_tiles, "pixels")[0].logits)
    expected = -np.take_along_axis(log_p, text["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.tokens.nll, expected, atol=2e-5)
    assert losses.patch_nll.shape == (ROWS, 0, PATCHES)


def test_patch_probabilities_agree_with_the_patch_loss(mesh, params, run, probabilities):
    weights = np.asarray(probabilities(params, BATCH), np.float64)
    assert weights.shape == (ROWS, TILES, PATCHES, VOCAB)
    shown = np.take_along_axis(weights, BATCH["patch_label_ids"], -1)
    expected = -(np.log(shown) * BATCH["patch_label_weights"]).sum(-1)
    np.testing.assert_allclose(run(params, BATCH, "pixels")[0].patch_nll, expected, rtol=1e-5)


def test_slots_see_and_are_seen_causally(mesh, params):
    """By gradient: each position sees what stands at and before it in its segment, text or image;
    and a tile is seen from its first slot on, not by text before it."""
    direction = np.random.default_rng(5).standard_normal(VOCAB).astype(np.float32)

    @jax.jit
    def influence(params, batch, shift, tiles):
        def scores(shift, tiles):
            output, _ = apply_model(params, {**batch, "tiles": tiles}, "pixels", shift=shift)
            # rows are independent: their gradients do not mix
            return (output.logits @ direction).sum(0)

        by_vector, by_pixel = jax.jacrev(scores, argnums=(0, 1))(shift, tiles)
        return jnp.abs(by_vector).sum(-1).swapaxes(0, 1), jnp.abs(by_pixel).max((3, 4, 5)).swapaxes(
            0, 1
        )

    shift = np.zeros((ROWS, LENGTH, MODEL.llm.width), np.float32)
    by_vector, by_tile = map(
        np.asarray, influence(params, MIXED, shift, MIXED["tiles"].astype(np.float32))
    )
    segment_ids = MIXED["segment_ids"]
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(LENGTH, dtype=bool)
    assert (by_vector[~seen] == 0).all()
    assert by_vector[seen].min() > 1e-6
    for row in range(ROWS):
        slots = np.flatnonzero(MIXED["tokens"][row] == IMAGE).reshape(-1, PATCHES)
        for tile in range(TILES):
            sees = seen[row][:, slots[tile, 0]] if tile < len(slots) else np.zeros(LENGTH, bool)
            assert (by_tile[row, ~sees, tile] == 0).all()
            assert (by_tile[row, sees, tile] > 1e-9).all()


# Options that change no result.


@pytest.mark.parametrize(
    "option",
    [
        *({"remat": remat} for remat in ("full", "dots", "attention", "attention+qkv+mlp")),
        {"scan_unroll": 2},
    ],
    ids=str,
)
def test_option_keeps_the_gradients(params, option):
    _, grads = gradient_step(dataclasses.replace(MODEL, **option))(params, BATCH)
    assert_same_gradients(grads, single_step(MODEL)[1])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_splash_keeps_the_gradients(mesh, params, remat):
    """On the mesh, in both towers, in their loops over layers and their rematerialisation; rows are
    packed."""
    model = dataclasses.replace(MODEL, attention="splash", remat=remat)
    (loss, _), grads = gradient_step(model)(params, MIXED)
    (expected_loss, _), expected = gradient_step(MODEL)(params, MIXED)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    assert_same_gradients(grads, expected)


def test_remat_policies_recompute_more_and_more(params):
    """Matrix products in the gradient: "dots" keeps their results but attention's, "full" keeps
    none."""
    none, dots, full = (
        gradient_step(dataclasses.replace(MODEL, remat=remat))
        .lower(params, BATCH)
        .as_text()
        .count("dot_general")
        for remat in ("none", "dots", "full")
    )
    assert none < dots < full


def recomputed(jaxpr: extend_core.Jaxpr, within: bool = False) -> int:
    """The matmuls of a gradient that are computed again."""
    count = 0
    for equation in jaxpr.eqns:
        here = within or flops.RECOMPUTED in str(equation.source_info.name_stack)
        count += here and equation.primitive.name == "dot_general"
        count += sum(recomputed(inner, here) for inner in flops._inner(equation))
    return count


def test_what_a_remat_policy_names_is_saved(params, mesh):
    """Of both towers: without its name a layer makes its queries, keys and values, logits, their
    mix, attention's output and the MLP's first matmuls again; the last matmul nothing needs."""
    names = {"attention": 1 + 1, "qkv": 3 + 3, "mlp": 2 + 1}
    counts = {
        remat: recomputed(
            jax.make_jaxpr(gradient_step(dataclasses.replace(MODEL, remat=remat)))(
                params, BATCH
            ).jaxpr
        )
        for remat in ("full", *config_lib.SAVED_BY_NAME)
    }
    assert counts.pop("full") == 8 + 7
    assert counts == {remat: 15 - sum(names[name] for name in remat.split("+")) for remat in counts}


# bfloat16.


def in_bfloat16(model: config_lib.ModelConfig) -> config_lib.ModelConfig:
    return dataclasses.replace(model, dtype="bfloat16")


def rounded_between_modules(params: dict, batch: dict[str, np.ndarray]) -> vlm.Output:
    """The float32 model with its matrices, and what projections, norms and blocks hand on, rounded
    to bfloat16.

    Nothing is computed in bfloat16, so neither the casts of the model nor the products of a version
    of jax matter.
    """

    def rounded(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def intercept(method, args, kwargs, context):
        output = method(*args, **kwargs)
        is_rounded = context.method_name == "__call__" and isinstance(
            context.module, (Einsum, LayerNorm, RMSNorm, vit.Block, decoder.Block)
        )
        return jax.tree.map(rounded, output) if is_rounded else output

    def round_matrix(path, x):
        return rounded(x) if path[-1].key in ("kernel", "table", "positions") else x

    params = jax.tree_util.tree_map_with_path(round_matrix, params)
    with nn.intercept_methods(intercept):
        return vlm.VLM(MODEL).apply({"params": params}, batch)


def relative_rms(array, reference) -> float:
    return float(np.sqrt(np.square(array - reference).mean() / np.square(reference).mean()))


def test_bfloat16_computes_in_it_and_ends_in_float32(mesh, params, run):
    """The error is the one that rounding what modules hand on must make, as a root mean square.

    The largest error says nothing: one or two of 272 tokens amplify any rounding, and it is 0.035
    to 0.084 by where XLA rounds. On CPU jax 0.10 keeps products of bfloat16 in float32; jax 0.12
    sums them in float32 too, and rounds them as the program says. With
    xla_allow_excess_precision=false both round all that it says, and agree to four digits.
    """
    batch = {**BATCH, "positions": BATCH["positions"] + 700}  # bfloat16 does not tell these apart
    output, read = jax.jit(lambda params: apply_model(params, batch, "pixels", in_bfloat16(MODEL)))(
        params
    )
    expected = run(params, batch, "pixels")[0]
    assert read.dtype == jnp.bfloat16
    assert output.logits.dtype == output.patch_nll.dtype == jnp.float32
    least = jax.jit(rounded_between_modules)(params, batch)
    for ours, rounded, reference in zip(output, least, expected, strict=True):
        # 1.2 for logits and 1.4 for the patch loss: modules round inside too.
        assert 0.8 < relative_rms(ours, reference) / relative_rms(rounded, reference) < 1.6


def programs_in(jaxpr: extend_core.Jaxpr) -> Iterator[extend_core.Jaxpr]:
    """The program, the bodies of its loops, and what it calls."""
    yield jaxpr
    for inner in extend_core.subjaxprs(jaxpr):
        yield from programs_in(inner)


FLOAT32_FUNCTIONS = {"exp", "log", "rsqrt", "sin", "cos", "reduce_sum", "reduce_max"}


@pytest.mark.parametrize("model", SHARDED.values(), ids=SHARDED)
def test_bfloat16_leaves_norms_softmax_rope_and_losses_in_float32(model):
    """In the program as written: the functions that they are made of take no bfloat16, and nothing
    is rounded to it between two computations in float32. The error of a model this small is hardly
    greater without."""
    model = in_bfloat16(model)
    program = jax.make_jaxpr(
        lambda params: vlm.VLM(model).apply({"params": params}, batch_of(model), method="losses")
    )
    taken = []
    rounded = []
    seen = set()
    for jaxpr in programs_in(program(draw_params(model)).jaxpr):
        casts = {}
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            dtypes = [var.aval.dtype for var in eqn.invars]
            if name in FLOAT32_FUNCTIONS:
                seen.add(name)
                taken += [str(eqn)] if jnp.bfloat16 in dtypes else []
            if name == "convert_element_type":
                (source,) = eqn.invars
                (target,) = eqn.outvars
                casts[target] = source
                back = casts.get(source)
                lost = (jnp.float32, jnp.bfloat16, jnp.float32)
                if (
                    back is not None
                    and (back.aval.dtype, source.aval.dtype, target.aval.dtype) == lost
                ):
                    rounded.append(str(eqn))
    assert seen == FLOAT32_FUNCTIONS
    assert not taken
    assert not rounded


# Shapes and the start.


def test_fresh_layers_differ_and_keep_the_scale():
    """Layers are drawn one by one, with the variance that their number of inputs asks for."""
    model = vlm.VLM(dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, num_heads=16)))

    @jax.jit
    def kernels(rng):
        params = sharding.unbox(vlm.init_params(model, rng))
        return params["llm"]["blocks"]["attn"]["o"]["kernel"], params["vision"]["blocks"]["mlp"][
            "up"
        ]["kernel"]

    for kernel, num_inputs in zip(
        kernels(jax.random.key(0)), (16 * MODEL.llm.head_dim, MODEL.vision.width), strict=True
    ):
        assert abs(np.corrcoef(np.ravel(kernel[0]), np.ravel(kernel[1]))[0, 1]) < 0.3
        assert np.std(kernel) == pytest.approx(num_inputs**-0.5, rel=0.1)


def test_abstract_batch_is_the_schema():
    abstract = vlm.abstract_batch(CONFIG.model, CONFIG.data, CONFIG.train.batch_size)
    assert [*abstract, "kept_patches"] == list(Batch.__annotations__)
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == {
        name: (x.shape, x.dtype) for name, x in BATCH.items()
    }
    data = dataclasses.replace(CONFIG.data, blank_contrast=9)
    kept = vlm.abstract_batch(CONFIG.model, data, ROWS)["kept_patches"]
    assert (kept.shape, kept.dtype) == ((ROWS, TILES, PATCHES), bool)


def test_hidden_states_are_those_between_the_layers(mesh):
    """Against the decoder's blocks one by one, and nothing but parameters is initialised."""
    config = tiny_config()
    model = vlm.VLM(config.model)
    batch = random_batch(config)
    params = random_params(model, batch)
    found = np.asarray(vlm.hidden_states(model, {"params": params}, batch))
    assert set(jax.eval_shape(model.init, jax.random.key(0), batch)) == {"params"}
    expected = [model.apply({"params": params}, batch, method="prompt_embeddings")]
    block = decoder.Block(config.model.llm, jnp.dtype("float32"), "auto")
    for layer in range(config.model.llm.num_layers):
        own = jax.tree.map(lambda stacked, i=layer: stacked[i], params["llm"]["blocks"])
        inputs = (batch["positions"], batch["segment_ids"], None)
        carry = (expected[-1], None)
        (after, _), _ = block.apply({"params": own}, carry, jnp.int32(layer), *inputs)
        expected.append(after)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    llm = Llama(config.model.llm, jnp.dtype("float32"), "none")
    last, _ = llm.apply({"params": params["llm"]}, expected[0], *inputs[:2])
    norm = RMSNorm(config.model.llm.norm_eps)
    scaled = norm.apply({"params": params["llm"]["final_norm"]}, jnp.asarray(found[-1]))
    np.testing.assert_allclose(last, scaled, atol=1e-5)
