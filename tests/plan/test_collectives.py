"""Collectives read from programs' text: a hand-written one, and programs of which the traffic is
known."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import collectives
from alignvlm_jax.plan.collectives import Communication

# As the TPU's compiler writes them: a loop unrolled twice, an asynchronous pair, one gather spread
# over two fusions.
TPU = """
HloModule jit_step

%body (p: (u32[], bf16[8,16])) -> (u32[], bf16[8,16]) {
  %p = (u32[], bf16[8,16]) parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %cps = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %cpd = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute-done(%cps)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %cpd)
}

%condition (p: (u32[], bf16[8,16])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8), metadata={op_name="a(b)"}
  %p = (u32[], bf16[8,16]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%fused (param_0: f32[4]) -> f32[16] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %ag = f32[16]{0} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="3"}
}

%fused.2 (param_0: f32[4]) -> f32[16] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %ag.2 = f32[16]{0} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="3"}
}

ENTRY %main (a: bf16[8,16], b: f32[4], c: f32[64]) -> f32[16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[64]{0} parameter(2)
  %zero = u32[] constant(0)
  %init = (u32[], bf16[8,16]{1,0}) tuple(%zero, %a)
  %loop = (u32[], bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body
  %f = f32[16]{0} fusion(%b), kind=kCustom, calls=%fused
  %rs = f32[16]{0} reduce-scatter(%c), dimensions={0}, to_apply=%add
  %ar = (f32[16]{0}, f32[2]{0}) all-reduce(%f, %g), to_apply=%add
  %s = (f32[2]{0}, u32[], token[]) send(%x), frontend_attributes={_handler_name="xla_megascale_runtime"}
  %other = (f32[2]{0}, u32[], token[]) send(%x), is_host_transfer=true
  ROOT %f.2 = f32[16]{0} fusion(%b), kind=kCustom, calls=%fused.2
}
"""


def test_tpu_text():
    assert collectives.communication(TPU) == {
        "all-gather": Communication(1, 64),  # once, though two fusions name it
        "all-reduce": Communication(1, 72),
        "reduce-scatter": Communication(1, 256),  # what goes in is larger
        "collective-permute": Communication(4, 4 * 256),  # up to 8 by steps of 2
        "between slices": Communication(1, 8),
    }


def test_loops_count_as_often_as_they_run(mesh):
    """Five steps of x <- sin(x) w, summed over tensor: each reduces 16 x 32 float32."""
    split, tall, whole = (
        sharding.NamedSharding(mesh, PartitionSpec(*axes))
        for axes in ((None, "tensor"), ("tensor", None), ())
    )

    def step(x, w):
        halves = jax.lax.with_sharding_constraint(jnp.sin(x), split)
        return jax.lax.with_sharding_constraint(halves @ w, whole)

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=whole)
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=tall)
    run = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (step(x, w), None), x, length=5)[0])
    assert collectives.communication(run.lower(x, w).compile().as_text()) == {
        "all-reduce": Communication(5, 5 * 16 * 32 * 4)
    }


def test_a_program_without_collectives():
    text = jax.jit(jnp.sin).lower(np.ones(4, np.float32)).compile().as_text()
    assert collectives.communication(text) == {}
