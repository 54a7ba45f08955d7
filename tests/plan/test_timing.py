"""Seconds of a step by hand from a hand-written program, and by the TPU's compiler of a small one."""

import dataclasses

import pytest

from alignvlm_jax.config import MeshConfig
from alignvlm_jax.plan import aot, hardware, hlo, timing
from alignvlm_jax.plan.collectives import BETWEEN_SLICES, Collective
from alignvlm_jax.plan.links import Links
from tests.conftest import tiny_config

V5E = hardware.parse_topology("v5e:4x4")
CYCLES = 'backend_config={"estimated_cycles":"%d"}'
VISION = 'metadata={op_name="jit(train_step)/jvp(VLM.losses)/VLM._read/vision/while/body/blocks"}'
LLM = 'metadata={op_name="jit(train_step)/transpose(jvp(VLM.losses))/VLM._hidden/llm/attn"}'
HEAD = 'metadata={op_name="jit(train_step)/jvp(VLM.losses)/llm.token_losses/shard_map"}'
# Three times a layer of vision, in which an operation has lost its name, and a gather that runs
# beside it; then a head, and a sum of 16 MiB that nothing hides.
PROGRAM = f"""
HloModule jit_train_step

%part (p: bf16[4]) -> bf16[64] {{
  %p = bf16[4]{{0}} parameter(0)
  ROOT %inside = bf16[64]{{0}} add(%p, %p), {CYCLES % 999}
}}

%body (p: (u32[], bf16[1024,1024])) -> (u32[], bf16[1024,1024]) {{
  %p = (u32[], bf16[1024,1024]) parameter(0)
  %x = bf16[1024,1024]{{1,0}} get-tuple-element(%p), index=1
  %ags = (bf16[1024,1024]{{1,0}}, bf16[16384,1024]{{1,0}}) all-gather-start(%x), dimensions={{0}}
  %f = bf16[1024,1024]{{1,0}} fusion(%x), kind=kOutput, calls=%part, {VISION}, {CYCLES % 150000}
  %agd = bf16[16384,1024]{{1,0}} all-gather-done(%ags)
  ROOT %out = (u32[], bf16[1024,1024]{{1,0}}) copy(%f), {CYCLES % 15000}
}}

%condition (p: (u32[], bf16[1024,1024])) -> pred[] {{
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (a: bf16[1024,1024]) -> f32[4194304] {{
  %a = bf16[1024,1024]{{1,0}} parameter(0)
  %loop = (u32[], bf16[1024,1024]) while(%a), condition=%condition, body=%body, {VISION}, known_trip_count={{"n":"3"}}
  %k = (f32[512,64], bf16[32,9728,64]) custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,19,19]{{2,1,0}}, bf16[32,9728,64]{{2,1,0}}, s32[9728,128]{{1,0}}}}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"more of it"
}}}}, {LLM.replace("attn", "splash_mha_fwd_segmented")}
  %h = f32[4194304]{{0}} fusion(%a), kind=kLoop, calls=%part, {HEAD}, {CYCLES % 1500000}
  %u = f32[4]{{0}} add(%h, %h), {CYCLES % 750000}
  ROOT %ar = f32[4194304]{{0}} all-reduce(%h), to_apply=%part
}}
"""


def test_by_hand():
    """v5e at 1.5 GHz: 1,500,000 cycles are a millisecond. Its links bring 200 GB/s where they wrap
    around; on 4x4 they do not, and a corner has half of them."""
    found = timing.estimate(hlo.parse(PROGRAM), Links(V5E))
    assert found.computing["vision"] == pytest.approx(3 * 0.11e-3)
    assert found.computing["loss"] == pytest.approx(1e-3)
    assert found.computing[timing.REST] == pytest.approx(0.5e-3)
    # 2 matmuls of 2 x 32 x 9,728^2 x 64, of which the blocks below the diagonal and on it, 190 of
    # 361, are computed; heads of 64 fill half of the matrix unit, which reaches half of its peak.
    kernel = 2 * 2 * 32 * 9728**2 * 64 * 190 / 361 / (197e12 / 4)
    assert found.computing["llm"] == found.attention == pytest.approx(kernel)
    gather = 3 * 32 * 2**20 * 15 / 16 / 100e9
    total = 2 * 16 * 2**20 * 15 / 16 / 100e9
    assert found.sent == pytest.approx(gather + total)
    # What the layer does not hide of its gather.
    assert found.exposed == pytest.approx(total + gather - 3 * 0.11e-3)
    assert found.step == pytest.approx(sum(found.computing.values()) + found.exposed)


@pytest.mark.parametrize(
    ("topology", "gb"),
    [
        ("v5e:16x16", 200),  # rings along both axes
        ("v5e:8x16", 150),
        ("v5e:4x4", 100),
        ("v5p:4x4x4", 600),
        ("v5p:2x4x4", 300),  # no cube: nothing wraps around
        ("v6e:16x16", 448),
    ],
)
def test_links_of_whole_slices(topology, gb):
    slices = hardware.parse_topology(topology)
    one = Collective("all-gather", 5, 10**9, (), False, "main")
    size = slices.num_devices
    expected = 5 * (size - 1) / size / gb
    assert Links(slices).seconds(one) == pytest.approx(expected)
    summed = one._replace(kind="all-reduce")
    assert Links(slices).seconds(summed) == pytest.approx(2 * expected)


def test_a_group_has_the_links_of_its_axes():
    """Of v5e:16x16 a row of 16 has a ring, half of a row has a line, a pair of neighbours a link."""
    slices = hardware.parse_topology("v5e:16x16")
    coordinates = [(x, y, 0) for y in range(16) for x in range(16)]
    links = Links(slices, coordinates)
    one = Collective("all-gather", 1, 10**9, (), False, "main")
    for size, gb in ((16, 100), (8, 50), (2, 50)):
        group = one._replace(group=tuple(range(size)))
        assert links.seconds(group) == pytest.approx((size - 1) / size / gb)


def test_the_network_is_slower_than_the_links():
    slices = hardware.parse_topology("v5e:4x4", num_slices=2)
    one = Collective(BETWEEN_SLICES, 1, 10**9, (), False, "main")
    assert Links(slices).seconds(one) == pytest.approx(1 / hardware.NETWORK_GB)


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
def test_a_real_program_has_seconds_of_every_component():
    base = tiny_config()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, dtype="bfloat16", remat="full"),
        train=dataclasses.replace(base.train, batch_size=16, grad_accum_steps=2),
        mesh=MeshConfig(data=1, fsdp=4, tensor=1),
    )
    small = hardware.parse_topology("v5e:2x2")
    found = aot.start(config, small, hardware.compile_only_devices(small))().timing
    assert all(found.computing.values())
    # Attention's kernel has no cycles, and is more than nothing and less than all of it.
    assert 0 < found.attention < found.computing["llm"] + found.computing["vision"]
    assert 0 < found.exposed <= found.sent and found.network == 0
    # No step of three layers takes a tenth of a second, or less than its FLOPs at the peak.
    assert 1e-6 < found.step < 0.1
