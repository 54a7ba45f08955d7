"""Attention of every kernel against loops and sums of our own; which kernel a mesh gets; the causal
mask."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.ops import attention, pallas
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from tests.conftest import matmul_dtypes


def test_a_token_sees_what_stands_before_it_in_its_segment():
    segment_ids = jnp.array([[1, 1, 2, 2], [1, 0, 0, 0]])
    expected = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
    ]
    # Alike queries and keys weigh all that is seen alike, and values tell which that is.
    same = np.ones((2, 4, 1, 4), np.float32)
    values = np.broadcast_to(np.eye(4, dtype=np.float32)[:, None], (2, 4, 1, 4))
    for kernel in ("xla", "plain"):
        with mesh_lib.use(mesh_lib.single_device()):
            weights = attention.self_attention(
                same, same, values, segment_ids, causal=True, kernel=kernel
            )[:, :, 0]
        np.testing.assert_array_equal(weights > 0, np.array(expected, bool))


def test_grouped_heads_and_mask():
    rng = np.random.default_rng(0)
    batch = 2
    length = 3
    keys = 5
    heads = 4
    kv_heads = 2
    head_dim = 6
    query = rng.standard_normal((batch, length, heads, head_dim)).astype(np.float32)
    key, value = rng.standard_normal((2, batch, keys, kv_heads, head_dim)).astype(np.float32)
    mask = rng.random((batch, length, keys)) < 0.5
    mask[..., 0] = True
    expected = np.zeros(query.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = np.flatnonzero(mask[b, t])
        scores = key[b, seen, h // 2].astype(np.float64) @ query[b, t, h] / np.sqrt(head_dim)
        expected[b, t, h] = np.exp(scores) / np.exp(scores).sum() @ value[b, seen, h // 2]
    np.testing.assert_allclose(
        attention.attention(query, key, value, jnp.array(mask)), expected, atol=1e-5
    )


def test_softmax_is_float32_under_bfloat16():
    """Over 512 equal keys a sum in bfloat16 stops growing at 256, and the average of ones would not
    be one."""
    ones = jnp.ones((1, 512, 1, 2), jnp.bfloat16)
    mixed = attention.attention(ones[:, :1], ones, ones)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(mixed), 1.0)


# Kernels against a reference.

ROWS = 4
LENGTH = 300
# What a row may look like: one segment, packed, packed and padded, all padding. 128 is the end of a
# block.
SEGMENTS = np.stack(
    [
        np.ones(LENGTH, np.int32),
        np.repeat([1, 2, 3], [100, 157, 43]),
        np.repeat([1, 2, 0], [128, 72, 100]),
        np.zeros(LENGTH, np.int32),
    ]
).astype(np.int32)


def draw(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype=np.float32
) -> list[np.ndarray]:
    """Query, key, value, and the gradient at the output."""
    rng = np.random.default_rng(0)
    counts = (heads, kv_heads, kv_heads, heads)
    return [
        rng.standard_normal((ROWS, length, n, head_dim)).astype(np.float32).astype(dtype)
        for n in counts
    ]


def reference(query, key, value, segment_ids, causal: bool):
    """Every key head repeated, all logits made, and those of the unseen set to -inf."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("BTHh,BSHh->BHTS", query, key, precision="highest") / math.sqrt(
        query.shape[-1]
    )
    length = query.shape[1]
    seen = np.ones((1, length, length), bool)
    if segment_ids is not None:
        seen = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        seen = seen & np.tri(length, dtype=bool)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHh->BTHh", weights, value, precision="highest")


def with_gradients(function, segment_ids):
    """Compiles (query, key, value, gradient of the output) -> output and the gradients of the
    three."""

    @jax.jit
    def run(query, key, value, cotangent):
        output, backward = jax.vjp(
            functools.partial(function, segment_ids=segment_ids), query, key, value
        )
        return output, *backward(cotangent)

    return run


def set_chunk(monkeypatch, queries: int, heads: int, length: int) -> None:
    """Has XLA's attention take so many queries at a time, on the mesh entered."""
    mesh = jax.sharding.get_abstract_mesh().shape
    rows = ROWS // (mesh["data"] * mesh["fsdp"])
    size = 4 * rows * heads // mesh["tensor"] * queries * length
    monkeypatch.setattr(attention, "CHUNK_SIZE_MIB", size / 2**20)
    assert attention._fitting_logits(ROWS, heads) == queries * length


MESHES = {"one_device": (1, 1, 1), "2x2x2": (2, 2, 2)}


@pytest.fixture(params=MESHES)
def any_mesh(request):
    sizes = MESHES[request.param]
    with mesh_lib.use(mesh_lib._mesh(sizes, jax.devices()[: math.prod(sizes)])) as mesh:
        yield mesh


@pytest.mark.parametrize("kernel", ["xla", "xla_chunks", "splash", "triton"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("length", "packed", "heads", "kv_heads", "head_dim"),
    [(LENGTH, True, 4, 2, 6), (LENGTH, False, 4, 4, 8), (256, True, 8, 2, 4), (9, False, 2, 2, 6)],
)
def test_equals_reference(
    any_mesh, monkeypatch, kernel, causal, length, packed, heads, kv_heads, head_dim
):
    """Outputs and gradients, over several blocks, the last of them padded, and in rows shorter than
    a block."""
    monkeypatch.setattr(pallas, "MAX_BLOCK", 128)
    if kernel == "xla_chunks":
        set_chunk(monkeypatch, min(37, length - 1), heads, length)
    arrays = draw(length, heads, kv_heads, head_dim)
    segment_ids = SEGMENTS[:, :length] if packed else None
    ours = functools.partial(
        attention.self_attention, causal=causal, kernel=kernel.removesuffix("_chunks")
    )
    expected = with_gradients(functools.partial(reference, causal=causal), segment_ids)(*arrays)
    results = with_gradients(ours, segment_ids)(*arrays)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kernel", ["xla", "splash", "triton"])
def test_kernels_keep_bfloat16(any_mesh, kernel):
    arrays = draw(40, 4, 2, 8, jnp.bfloat16)
    segment_ids = SEGMENTS[:, 95:135]
    ours = functools.partial(attention.self_attention, causal=True, kernel=kernel)
    expected = with_gradients(functools.partial(reference, causal=True), segment_ids)(
        *map(np.float32, arrays)
    )
    for result, wanted in zip(with_gradients(ours, segment_ids)(*arrays), expected, strict=True):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.float32(result), wanted, rtol=0, atol=0.02 * np.abs(wanted).max()
        )


def test_splash_computes_each_device_its_own(mesh):
    """Neither rows nor heads are gathered, forward or backward."""
    rows = sharding.batch_sharding(mesh)
    heads = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    ours = functools.partial(attention.self_attention, causal=True, kernel="splash")
    arrays = [jax.device_put(x, heads) for x in draw(8, 4, 2, 4)]
    run = with_gradients(ours, jax.device_put(SEGMENTS[:, :8], rows))
    assert [x.sharding.spec for x in run(*arrays)] == [heads] * 4
    text = run.lower(*arrays).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("length", [96, 160], ids=["one_part", "two_parts"])
def test_chunks_are_bounded_and_sharded(mesh, monkeypatch, length):
    """No logits of all queries, forward or backward, and neither rows nor heads are gathered."""
    heads = 4
    set_chunk(monkeypatch, 7, heads, length)
    rows = sharding.batch_sharding(mesh)
    by_heads = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    ours = functools.partial(attention.self_attention, causal=True, kernel="xla")
    arrays = [jax.device_put(x, by_heads) for x in draw(length, heads, 2, 4)]
    text = (
        with_gradients(ours, jax.device_put(SEGMENTS[:, :length], rows))
        .lower(*arrays)
        .compile()
        .as_text()
    )
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)]
    assert max(sizes) == 2 * 7 * length  # on a device: 2 heads, 7 queries of a row
    assert "all-gather" not in text and "all-to-all" not in text


def test_no_weights_are_copied_on_cpu():
    """Nor brought into another order, which took half of attention's time."""
    arrays = draw(96, 4, 2, 8)
    ours = functools.partial(attention.self_attention, causal=True, kernel="xla")
    with mesh_lib.use(mesh_lib.single_device()):
        run = with_gradients(ours, SEGMENTS[:, :96])
        text = run.lower(*arrays).compile().as_text()
    copied = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    assert copied and max(math.prod(map(int, dims.split(","))) for dims in copied) == arrays[0].size


def test_bfloat16_is_multiplied_as_such_on_cpu():
    """As by `layers.linear`: two matmuls forward and four backward, with sums in float32."""
    arrays = [x.astype(jnp.bfloat16) for x in draw(32, 4, 2, 8)]
    ours = functools.partial(attention.self_attention, causal=True, kernel="xla")
    with mesh_lib.use(mesh_lib.single_device()):
        text = with_gradients(ours, SEGMENTS[:, :32]).lower(*arrays).as_text()
    found = matmul_dtypes(text)
    assert len(found) >= 6 and {*found} == {("bf16", "bf16", "f32")}


@pytest.mark.parametrize(
    ("batch", "length", "heads", "queries"),
    [
        (1, 2048, 4, 2048),  # 64 MiB, all of it
        (1, 2049, 4, 1025),  # two chunks of nearly equal size, not 2,047 and 2
        (2, 1024, 9, 512),  # nor 910, of which the second chunk would be padding
        (1, 9344, 32, 56),
        (1000, 9344, 32, 1),
    ],
)
def test_queries_per_chunk(batch, length, heads, queries):
    fitting = attention._fitting_logits(batch, heads)
    assert attention._queries_per_chunk(length, length, fitting) == queries


@pytest.mark.parametrize(
    ("batch", "length", "heads", "is_whole"),
    [
        (1, 2048, 4, True),  # 64 MiB, all of it
        (1, 2049, 4, False),
        (100, 192, 4, True),  # an evaluation of the demonstration
    ],
)
def test_what_fits_is_not_divided_into_chunks(batch, length, heads, is_whole):
    array = jax.ShapeDtypeStruct((batch, length, heads, 8), np.float32)
    ours = functools.partial(attention.self_attention, causal=False, kernel="xla")
    with mesh_lib.use(mesh_lib.single_device()):
        jaxpr = jax.make_jaxpr(functools.partial(ours, segment_ids=None))(array, array, array)
    assert ("scan" in str(jaxpr)) != is_whole


@pytest.mark.parametrize(
    ("length", "causal", "made"),
    [
        (150, True, [(75, 75), (75, 150)]),
        (1024, True, [(256, 256), (256, 512), (256, 768), (256, 1024)]),
        (127, True, [(127, 127)]),
        (1024, False, [(1024, 1024)]),
    ],
)
def test_logits_that_no_query_may_see_are_not_made(length, causal, made):
    arrays = draw(length, 4, 2, 8)
    ours = functools.partial(attention.self_attention, causal=causal, kernel="xla")
    with mesh_lib.use(mesh_lib.single_device()):
        jaxpr = jax.make_jaxpr(functools.partial(ours, segment_ids=None))(*arrays[:3])
    # Queries of the two heads of a key head are rows of one matmul.
    found = re.findall(rf"f32\[{ROWS},2,(\d+),(\d+)\] = dot_general", str(jaxpr))
    shapes = [(int(n) // 2, int(num_keys)) for n, num_keys in found if int(num_keys) != 8]
    assert sorted(shapes) == sorted(made)


@pytest.mark.parametrize("length", [1, 9, 127, 128, 129, 512, 513, 640, 729, 1024, 3000, 8320])
def test_splash_blocks(length):
    """They divide the padded row, and less than LANES tokens a block are padding."""
    size = pallas.block_size(length)
    count = pallas.num_blocks(length)
    assert size % pallas.LANES == 0 and size <= pallas.MAX_BLOCK
    assert 0 <= size * count - length < pallas.LANES * count
    assert (pallas.block_size(size * count), pallas.num_blocks(size * count)) == (size, count)


# Which kernel.


def test_platform_is_that_of_the_mesh(mesh):
    seen = []
    jax.jit(lambda: seen.append(attention.mesh_platform()))()
    assert seen == ["cpu"] and attention.mesh_platform() == "cpu"


def test_without_a_mesh_there_is_no_platform(monkeypatch):
    """And no kernel: only shapes are asked for."""
    assert attention.mesh_platform() is None
    query, key, value, _ = draw(6, 2, 2, 4)
    for kernel in ("auto", "splash", "cudnn"):
        attention.self_attention(query, key, value, None, causal=True, kernel=kernel)


BF16 = jnp.bfloat16
F32 = jnp.float32


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "head_dim", "packed", "kernel"),
    [
        ("cpu", BF16, 8, 64, True, "xla"),
        ("tpu", BF16, 8, 64, True, "splash"),
        ("tpu", F32, 9, 72, False, "splash"),
        ("gpu", BF16, 8, 64, True, "cudnn"),
        ("gpu", F32, 8, 64, True, "xla"),
        ("gpu", BF16, 730, 72, False, "cudnn"),
        ("gpu", BF16, 729, 72, False, "xla"),
        ("gpu", BF16, 729, 72, True, "xla"),
        ("gpu", BF16, 8, 36, True, "xla"),
        ("gpu", BF16, 8, 256, True, "xla"),
    ],
)
def test_auto(monkeypatch, platform, dtype, length, head_dim, packed, kernel):
    monkeypatch.setattr(attention, "mesh_platform", lambda: platform)
    query = jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)
    segment_ids = jax.ShapeDtypeStruct((2, length), jnp.int32) if packed else None
    assert attention._resolve("auto", query, segment_ids) == kernel


@pytest.mark.parametrize(
    ("kernel", "platform", "dtype", "length", "head_dim", "message"),
    [
        (
            "splash",
            "gpu",
            BF16,
            8,
            64,
            "'splash' is for TPU and the mesh is of gpu; use 'cudnn' or 'auto'",
        ),
        ("cudnn", "cpu", BF16, 8, 64, "'cudnn' does not apply: the mesh is of cpu; use 'auto'"),
        ("cudnn", "tpu", BF16, 8, 64, "the mesh is of tpu"),
        ("triton", "tpu", BF16, 8, 64, "'triton' does not apply: the mesh is of tpu; use 'auto'"),
        ("triton", "gpu", F32, 8, 64, "it computes in bfloat16 or float16, not in float32"),
        ("cudnn", "gpu", F32, 8, 64, "it computes in bfloat16 or float16, not in float32"),
        ("cudnn", "gpu", BF16, 8, 36, "head dimension 36 must be a multiple of 8 up to 128"),
        ("cudnn", "gpu", BF16, 9, 64, "9 is an odd number of tokens"),
    ],
)
def test_kernel_that_does_not_apply(
    monkeypatch, kernel, platform, dtype, length, head_dim, message
):
    monkeypatch.setattr(attention, "mesh_platform", lambda: platform)
    query = jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)
    with pytest.raises(UserError, match=message):
        attention._resolve(kernel, query, jax.ShapeDtypeStruct((2, length), jnp.int32))


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "message"),
    [
        (6, 4, 2, "6 rows do not divide over mesh axis data x fsdp of 4"),
        (4, 3, 1, "3 heads do not divide over mesh axis tensor of 2"),
        (4, 4, 1, "1 key-value heads do not divide over mesh axis tensor of 2"),
    ],
)
def test_splash_must_divide_over_the_mesh(mesh, rows, heads, kv_heads, message):
    query = jnp.zeros((rows, 8, heads, 4))
    key = jnp.zeros((rows, 8, kv_heads, 4))
    with pytest.raises(UserError, match=message):
        attention.self_attention(query, key, key, None, causal=True, kernel="splash")


@pytest.mark.parametrize(("packed", "calls"), [(True, "ScaleBiasSoftmax"), (False, "Softmax")])
def test_cudnn_lowers_to_its_kernel(monkeypatch, packed, calls):
    """Forward and backward, for a GPU that is not here: its program has cuDNN's calls, and no
    logits of our own."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(attention, "mesh_platform", lambda: "gpu")
    arrays = draw(66, 4, 2, 16, jnp.bfloat16)
    ours = functools.partial(attention.self_attention, causal=True, kernel="auto")
    run = with_gradients(ours, SEGMENTS[:, :66] if packed else None)
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert f"__cudnn$fmha{calls}" in text and f"__cudnn$fmha{calls}Backward" in text
    assert "x4x66x66x" not in text


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_triton_lowers_to_its_kernel(monkeypatch, causal):
    """Forward and backward, for a GPU that is not here: its program has Triton's calls, and no
    array of all pairs of tokens."""
    monkeypatch.setattr(attention, "mesh_platform", lambda: "gpu")
    arrays = draw(LENGTH, 4, 2, 64, jnp.bfloat16)
    ours = functools.partial(attention.self_attention, causal=causal, kernel="triton")
    run = with_gradients(ours, SEGMENTS)
    try:
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as err:
        # From 0.12 on jax wants to know the GPU that a kernel is for.
        if "AbstractDevice" not in str(err):
            raise
        pytest.skip("this jax lowers a GPU's kernels where there is one")
    for name in ("mha_forward", "mha_preprocess_backward", "mha_backward"):
        assert f'name = "{name}"' in text
    padded = LENGTH + -LENGTH % pallas.TRITON_BLOCK
    assert not re.search(rf"{LENGTH}x{LENGTH}x|{padded}x{padded}x", text)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_odd_lengths_train_on_a_gpu(monkeypatch, causal):
    """As the 729 patches of SigLIP's tile: jax's cuDNN has no backward pass for them."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(attention, "mesh_platform", lambda: "gpu")
    ours = functools.partial(attention.self_attention, causal=causal, kernel="auto")
    run = with_gradients(ours, None)
    run.trace(*draw(9, 4, 4, 72, jnp.bfloat16)).lower(lowering_platforms=("cuda",))
