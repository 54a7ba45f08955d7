"""Collectives read from programs' text: a hand-written one, and programs of which the traffic is
known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import collectives, hlo
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


def communication(text: str) -> dict[str, Communication]:
    return collectives.communication(collectives.find(hlo.parse(text)))


def test_tpu_text():
    assert communication(TPU) == {
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
    assert communication(run.lower(x, w).compile().as_text()) == {
        "all-reduce": Communication(5, 5 * 16 * 32 * 4)
    }


def test_a_program_without_collectives():
    text = jax.jit(jnp.sin).lower(np.ones(4, np.float32)).compile().as_text()
    assert communication(text) == {}


# Of the two computations of a conditional the second sends more; of a predicate's the first.
BRANCHES = """
HloModule branches

%small (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %ar = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[2,4]T(1,0), to_apply=%add
}

%large (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %ag = f32[64]{0} all-gather(%p), replica_groups={{0,2},{1,3}}, dimensions={0}
  ROOT %s = f32[4]{0} slice(%ag), slice={[0:4]}
}

ENTRY %main (i: s32[], b: pred[], a: f32[4]) -> f32[4] {
  %i = s32[] parameter(0)
  %b = pred[] parameter(1)
  %a = f32[4]{0} parameter(2)
  %c = f32[4]{0} conditional(%i, %a, %a), branch_computations={%small, %large}
  ROOT %d = f32[4]{0} conditional(%b, %c, %c), true_computation=%large, false_computation=%small
}
"""


def test_of_several_branches_the_costliest_counts():
    assert communication(BRANCHES) == {"all-gather": Communication(2, 512)}


def test_every_computation_that_is_called_counts():
    both = BRANCHES.replace("branch_computations", "called_computations")
    assert communication(both) == {
        "all-gather": Communication(2, 512),
        "all-reduce": Communication(1, 16),
    }


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("no groups", ()),
    ],
)
def test_first_group(attributes, group):
    text = BRANCHES.replace("replica_groups={{0,2},{1,3}}", attributes)
    found = collectives.find(hlo.parse(text))
    assert {one.group for one in found} == {group}
