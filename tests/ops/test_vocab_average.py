"""The average over a vocabulary, plain and chunked, against NumPy float64 and against itself, on
the mesh and off it.

Gradients of all five inputs: within 1e-5 of the reference's largest entry in float32, within 2e-2
in bfloat16.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignvlm_jax.ops import chunked, vocab_average
from alignvlm_jax.ops.vocab_average import Norm
from alignvlm_jax.parallel import mesh as mesh_lib
from tests.conftest import tiny_config

EPS = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one comparison; `block` is of a shard's rows."""

    rows: int
    width: int
    words: int
    chunk: int
    table_width: int = 0
    padding: int = 0
    has_norm: bool = True
    has_subset: bool = False
    labels: int = 2
    linear: bool = False
    column_mean: float = 0.0  # of the head's columns, whose deviation is 1
    top_k: int = 0
    kept: int = 0  # entries of each row that are given


# On the mesh 2 x 2 x 2 there are 4 shards of rows: 52 / 4 = 13 rows, and 50 rows do not divide.
CASES = {
    "block_divides": Case(52, 10, 34, 13),
    "last_block_is_filled_up": Case(52, 10, 34, 5),
    "one_row_a_block": Case(8, 6, 20, 1),
    "block_larger_than_all": Case(12, 10, 34, 64),
    "rows_do_not_divide_over_the_mesh": Case(50, 10, 34, 7),
    "padded_table": Case(52, 10, 34, 5, padding=3),
    "subset": Case(52, 10, 34, 5, has_subset=True),
    "padded_subset": Case(24, 10, 34, 4, padding=5, has_subset=True),
    "without_norm": Case(52, 10, 34, 5, has_norm=False),
    # Ovis: x are features, the table learned.
    "table_of_another_width": Case(52, 6, 34, 5, table_width=14, labels=0),
    "linear": Case(52, 10, 34, 5, linear=True),
    "large_mean": Case(52, 10, 34, 5, column_mean=30.0),
    "top_1": Case(52, 10, 34, 5, top_k=1),
    "top_3_rows_do_not_divide": Case(50, 10, 34, 7, top_k=3),
    # More than a chunk has, and with a table of another width.
    "top_4": Case(52, 6, 34, 3, table_width=14, labels=0, top_k=4),
    "top_4_padded_subset": Case(24, 10, 34, 4, padding=5, has_subset=True, top_k=4),
    "top_2_without_norm": Case(52, 10, 34, 64, has_norm=False, top_k=2),
    "top_k_of_all": Case(24, 10, 34, 5, padding=3, top_k=34),
    "given": Case(50, 10, 34, 5, kept=3),
    "given_padded_subset": Case(24, 10, 34, 4, padding=5, has_subset=True, kept=3),
    "linear_padded_subset": Case(24, 10, 34, 4, padding=5, has_subset=True, linear=True),
}


@pytest.fixture(params=["mesh", "single"])
def devices(request):
    """On the 2 x 2 x 2 mesh, and without one."""
    config = tiny_config()
    with (
        mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train))
        if request.param == "mesh"
        else contextlib.nullcontext()
    ):
        yield request.param


def given(case: Case) -> np.ndarray | None:
    """Different entries of each row, the last of which is none in every second row."""
    if not case.kept:
        return None
    order = np.random.default_rng(3).random((case.rows, case.words)).argsort(-1)
    ids = order[:, : case.kept].astype(np.int32)
    ids[::2, -1] = -1
    if case.has_subset:
        ids[:, 0] = draw(case)[1][:, 0]  # one of them at least has weight
    return ids


def draw(case: Case, seed: int = 0):
    """x, head, table, scale, bias; labels and subset; and the gradients that come back."""
    rng = np.random.default_rng(seed)
    table_width = case.table_width or case.width
    shapes = [
        (case.rows, case.width),
        (case.width, case.words),
        (case.words, table_width),
        (case.words,),
        (case.words,),
    ]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    inputs[1] += case.column_mean * rng.standard_normal((case.width, 1)).astype(np.float32)
    inputs[3] += 1
    words = case.words - case.padding
    labels = rng.integers(0, words, (case.rows, case.labels)).astype(np.int32)
    subset = rng.random(case.words) < 0.4 if case.has_subset else None
    if case.has_subset:
        subset[labels] = True  # the logit of a word without weight is -inf
    back = [
        rng.standard_normal(s).astype(np.float32)
        for s in ((case.rows, table_width), labels.shape, (case.rows,))
    ]
    return inputs, labels, subset, back


def apply(case: Case, inputs, labels, subset, chunk: int | None, dtype=jnp.float32):
    x, head, table, scale, bias = inputs
    return vocab_average.vocab_average(
        x.astype(dtype),
        head,
        table,
        Norm(scale, bias, EPS) if case.has_norm else None,
        label_ids=labels,
        unpadded_vocab_size=case.words - case.padding,
        subset=subset,
        linear=case.linear,
        top_k=case.top_k,
        kept_ids=given(case),
        chunk=chunk,
    )


def outputs_and_gradients(case: Case, chunk: int | None, dtype=jnp.float32):
    inputs, labels, subset, back = draw(case)

    @jax.jit
    def run(*inputs):
        outputs, pull = jax.vjp(
            lambda *inputs: apply(case, inputs, labels, subset, chunk, dtype), *inputs
        )
        return outputs, pull(type(outputs)(back[0].astype(dtype), *back[1:]))

    return run(*map(jnp.asarray, inputs))


def reference(case: Case, x, head, table, scale, bias, labels, subset):
    """The same in the dtype of its inputs, densely, one line an operation."""
    is_word = np.arange(case.words) < case.words - case.padding
    logits = x @ head
    if case.has_norm:
        mean = (logits * is_word).sum(-1, keepdims=True) / is_word.sum()
        variance = (((logits - mean) * is_word) ** 2).sum(-1, keepdims=True) / is_word.sum()
        logits = (logits - mean) / (variance + EPS) ** 0.5 * scale + bias
    allowed = is_word if subset is None else is_word & subset
    exponentials = jnp.where(allowed, jnp.exp(logits), 0.0)
    total = exponentials.sum(-1)
    ids = given(case)
    if case.top_k:
        # All that have a larger logit than the entry are fewer than k.
        rank = (exponentials[:, None, :] > exponentials[:, :, None]).sum(-1)
        exponentials = jnp.where(rank < case.top_k, exponentials, 0.0)
    if ids is not None:
        is_kept = (ids[:, :, None] == np.arange(case.words)).any(1)
        exponentials = jnp.where(is_kept, exponentials, 0.0)
    weights = (
        jnp.where(allowed, logits, 0.0) / allowed.sum() ** 0.5
        if case.linear
        else exponentials / exponentials.sum(-1, keepdims=True)
    )
    return weights @ table, jnp.take_along_axis(logits, labels, 1), jnp.log(total)


@functools.cache  # It is the same on a mesh and without one.
def reference_gradients(case: Case):
    """In float64: 1e-5 of float32's own rounding would be a tenth of what is tested."""
    inputs, labels, subset, back = draw(case)

    # One program: operation by operation, each would be compiled for each shape.
    @jax.jit
    def run(inputs, back):
        outputs, pull = jax.vjp(lambda *inputs: reference(case, *inputs, labels, subset), *inputs)
        return outputs, pull(back)

    with jax.enable_x64(True):
        inputs, back = ([jnp.asarray(x, jnp.float64) for x in xs] for xs in (inputs, back))
        return jax.tree.map(np.asarray, run(inputs, tuple(back)))


def assert_close(actual, expected, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max(initial=0)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64(devices, case):
    """Both forms, all outputs and the gradients of all five inputs."""
    expected = reference_gradients(case)
    for chunk in (None, case.chunk):
        assert_close(outputs_and_gradients(case, chunk), expected, 1e-5)


def test_drawn_shapes(devices):
    """Shapes and blocks drawn at random."""
    rng = np.random.default_rng(1)
    for _ in range(4):
        rows, width, words, chunk = (
            int(rng.integers(low, high)) for low, high in ((1, 60), (1, 9), (1, 20), (1, 70))
        )
        case = Case(4 * rows, 2 * width, 2 * words, chunk, labels=int(rng.integers(0, 4)))
        expected = reference_gradients(case)
        assert_close(outputs_and_gradients(case, chunk), expected, 1e-5)
        assert_close(outputs_and_gradients(case, chunk, jnp.bfloat16), expected, 2e-2)
        # Logits of bfloat16 may be in another order: only in float32.
        case = dataclasses.replace(case, top_k=int(rng.integers(1, case.words + 1)))
        expected = reference_gradients(case)
        assert_close(outputs_and_gradients(case, chunk), expected, 1e-5)


@pytest.mark.parametrize("chunk", [None, 5], ids=["plain", "chunked"])
def test_bfloat16(devices, chunk):
    case = CASES["last_block_is_filled_up"]
    outputs, gradients = outputs_and_gradients(case, chunk, jnp.bfloat16)
    assert outputs.average.dtype == jnp.bfloat16
    assert outputs.label_logits.dtype == outputs.log_sum_exp.dtype == jnp.float32
    assert_close((outputs, gradients), reference_gradients(case), 2e-2)


def test_bfloat16_rows_are_normalised_by_float32_statistics():
    """With rows and parameters that bfloat16 holds exactly, nothing before the softmax is rounded:
    a covariance of bfloat16 would be 1e-3 off."""
    case = Case(64, 96, 300, 128, labels=1)
    inputs, labels, _, _ = draw(case)
    inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in inputs]
    outputs = jax.jit(lambda *x: apply(case, x, labels, None, case.chunk, jnp.bfloat16))(*inputs)
    _, logits, log_sum_exp = reference(case, *(x.astype(np.float64) for x in inputs), labels, None)
    np.testing.assert_allclose(outputs.label_logits, logits, atol=2e-5 * np.abs(logits).max())
    np.testing.assert_allclose(outputs.log_sum_exp, log_sum_exp, rtol=2e-5)


@pytest.mark.parametrize("frozen", ["head", "table"])
def test_frozen_parameters_cost_no_matmul(frozen):
    """Forward there are 2 over the vocabulary; backward one for logits, one for their gradient, and
    one for each input that has a gradient."""
    case = Case(16, 8, 32, 8)
    inputs, labels, _, _ = draw(case)
    number = {"head": 1, "table": 2}[frozen]

    def total(*trained):
        held = list(trained)
        held.insert(number, jnp.asarray(inputs[number]))
        return apply(case, held, labels, None, case.chunk).average.sum()

    trained = [jnp.asarray(x) for index, x in enumerate(inputs) if index != number]
    program = jax.make_jaxpr(jax.grad(total, argnums=range(4)))(*trained)
    counts = [
        sum(eqn.primitive.name == "dot_general" for eqn in loop.eqns)
        for loop in loops_in(program.jaxpr)
    ]
    assert counts == [2, 4]


def loops_in(jaxpr):
    """Yields the bodies of scans, in order."""
    for eqn in jaxpr.eqns:
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(param, "eqns"):
                yield from [param] if eqn.primitive.name == "scan" else loops_in(param)


@pytest.mark.parametrize("chunk", [None, 1], ids=["plain", "chunked"])
def test_gradients_are_summed_in_float32(devices, chunk):
    """Under bfloat16 a sum of 1,024 equal parts, one a row, stops growing at 256 of them."""
    x = jnp.ones((1024, 1), jnp.bfloat16)
    labels = jnp.ones((1024, 1), jnp.int32)

    def total(head):
        return vocab_average.vocab_average(
            x, head, jnp.ones((4, 2)), None, label_ids=labels, chunk=chunk
        ).label_logits.sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones((1, 4), jnp.float32))
    np.testing.assert_array_equal(gradient, [[0, 1024, 0, 0]])


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_vocabulary_stays_split_over_tensor(mesh, top_k):
    """No device gathers all words of a matrix, or of its gradient."""
    case = Case(48, 10, 74, 5, labels=0, top_k=top_k)
    columns = PartitionSpec("fsdp", "tensor")
    table = PartitionSpec("tensor", "fsdp")
    words = PartitionSpec("tensor")
    specs = PartitionSpec(("data", "fsdp")), columns, table, words, words
    inputs = [jax.device_put(x, spec) for x, spec in zip(draw(case)[0], specs, strict=True)]
    labels = np.zeros((case.rows, 0), np.int32)

    def total(*inputs):
        return jnp.sin(apply(case, inputs, labels, None, case.chunk, jnp.bfloat16).average).sum()

    text = (
        jax.jit(jax.grad(total, argnums=range(5)), out_shardings=specs)
        .lower(*inputs)
        .compile()
        .as_text()
    )
    sizes = {int(size) for dims in re.findall(r"\w+\[([\d,]+)\]", text) for size in dims.split(",")}
    assert case.words // 2 in sizes and case.words not in sizes


def test_padding_and_words_out_of_the_subset_have_no_weight(devices):
    """Changing their rows of the table changes nothing."""
    case = CASES["padded_subset"]
    inputs, labels, subset, _ = draw(case)
    out = ~subset | (np.arange(case.words) >= case.words - case.padding)
    assert 0 < out.sum() < case.words
    other = [x.copy() for x in inputs]
    other[2][out] += 100.0
    run = jax.jit(lambda inputs: apply(case, inputs, labels, subset, case.chunk).average)
    averages = [run(x) for x in (inputs, other)]
    np.testing.assert_array_equal(*averages)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_label_that_is_no_token_has_a_logit_of_0(devices, chunk):
    """Also where the last token is left out, and columns of the last chunk come a second time."""
    case = CASES["padded_table"]
    inputs, labels, subset, _ = draw(case)
    labels = np.tile(np.array([-1, case.words], labels.dtype), (case.rows, 1))
    logits = jax.jit(lambda x: apply(case, x, labels, subset, chunk).label_logits)(inputs)
    np.testing.assert_array_equal(logits, np.zeros_like(logits))


@pytest.mark.parametrize("chunk", [5, 34], ids=["chunked", "plain"])
def test_of_equal_logits_the_first_are_kept(devices, chunk):
    """In chunks and over shards as by top-k over all: all logits are equal, and row i of the table
    is i."""
    x, head = jnp.ones((8, 2)), jnp.ones((2, 34))
    table = jnp.arange(34.0)[:, None] * jnp.ones((1, 2))
    has_weight = jnp.arange(34) >= 3

    def average(x):
        return vocab_average.vocab_average(
            x, head, table, None, subset=has_weight, top_k=4, chunk=chunk
        ).average

    np.testing.assert_allclose(jax.jit(average)(x), np.full((8, 2), (3 + 4 + 5 + 6) / 4))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_reaches_the_average(devices, sign):
    """Also one that a top-k takes for the smallest number."""
    case = dataclasses.replace(CASES["top_2_without_norm"], chunk=5)
    inputs, labels, subset, _ = draw(case)
    inputs[1][:, 20] = np.copysign(np.nan, sign)
    average = jax.jit(lambda x: apply(case, x, labels, subset, case.chunk).average)(inputs)
    assert np.isnan(average).all()


@pytest.mark.parametrize("kept", [{"top_k": 2}, {"kept": 2}], ids=["top_k", "given"])
def test_gradients_of_kept_rows_are_summed_in_float32(devices, kept):
    """1,024 rows add a half to each of two rows of the table: bfloat16 would stop at 128."""
    ids = np.tile(np.array([[0, 1]], np.int32), (1024, 1)) if "kept" in kept else None

    def total(table):
        return vocab_average.vocab_average(
            jnp.ones((1024, 1), jnp.bfloat16),
            jnp.ones((1, 4)),
            table,
            None,
            top_k=kept.get("top_k", 0),
            kept_ids=ids,
            chunk=2,
        ).average.sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones((4, 2), jnp.float32))
    np.testing.assert_array_equal(gradient, [[512, 512], [512, 512], [0, 0], [0, 0]])


def test_kept_entries_alone_have_gradients():
    """Of the logits, here the head's bias in LN's place."""
    case = Case(1, 4, 20, 7, labels=0, top_k=3)
    inputs, labels, _, _ = draw(case)

    def total(bias):
        return jnp.sin(apply(case, [*inputs[:4], bias], labels, None, case.chunk).average).sum()

    gradient = jax.jit(jax.grad(total))(jnp.asarray(inputs[4]))
    assert (np.abs(gradient) > 1e-4).sum() == 3 and (gradient == 0).sum() == 17


def test_columns_per_chunk(devices):
    """On the mesh a device has a quarter of the rows and half of the columns."""
    shards, halves = (4, 2) if devices == "mesh" else (1, 1)
    mib = 2.0  # 2**19 float32
    rows = 512 * shards
    columns_per_chunk = chunked.columns_per_chunk
    assert columns_per_chunk("plain", mib, rows, 10**6) is None
    assert columns_per_chunk("auto", mib, rows, 1024 * halves) is None
    assert columns_per_chunk("auto", mib, rows, 2048 * halves) == 1024
    assert columns_per_chunk("chunked", mib, rows, 100 * halves) == 100
    # As many chunks as of 1,024, of one size, in lanes of 128.
    assert columns_per_chunk("auto", mib, rows, 1100 * halves) == 640
    assert columns_per_chunk("auto", mib, 8192 * shards, 1000 * halves) == 63  # 16 of at most 64
    assert columns_per_chunk("auto", mib, 2**30 * shards, 1000 * halves) == 1
