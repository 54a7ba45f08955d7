"""Logical axes to devices: rules, indivisible sizes, batches, the printed table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import sharding


def boxed(shape: tuple[int, ...], *axes: str | None) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


def test_rules_by_logical_axis(mesh):
    tree = {
        "table": boxed((8, 4), "vocab", "embed"),
        "blocks": {"q": boxed((3, 4, 2, 6), "layers", "embed", "heads", "head_dim")},
        "vision": boxed((4, 4), "vis_mlp", "vis_embed"),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.tree_sharding(tree, mesh))
    assert specs == {
        "table": PartitionSpec("tensor", "fsdp"),
        "blocks": {"q": PartitionSpec(None, "fsdp", "tensor", None)},
        "vision": PartitionSpec("tensor", "fsdp"),
        "step": PartitionSpec(),
    }


def test_unbox_gives_the_structure_of_the_shardings(mesh):
    tree = {
        "a": {"kernel": boxed((8, 4), "vocab", "embed")},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    unboxed = sharding.unbox(tree)
    assert jax.tree.structure(unboxed) == jax.tree.structure(sharding.tree_sharding(tree, mesh))
    assert unboxed["a"]["kernel"].shape == (8, 4)


def test_every_matrix_of_the_model_is_sharded(mesh, config):
    """Nothing with two dimensions lies whole on a device, but those that a reader expects to."""
    model = vlm.VLM(config.model)
    abstract = jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0)))
    shardings = jax.tree.leaves_with_path(sharding.tree_sharding(abstract, mesh))
    whole = {sharding.path_name(path) for path, s in shardings if set(s.spec) <= {None}}
    assert not [path for path in whole if path.split("/")[-1] in ("kernel", "table")]


def test_indivisible_dimension_names_path_and_axis(mesh):
    tree = {"llm": {"embed": {"table": boxed((33, 4), "vocab", "embed")}}}
    with pytest.raises(
        UserError,
        match=r"llm/embed/table \(33, 4\): dimension 33 .* mesh axis tensor of 2.*mesh\.tensor",
    ):
        sharding.tree_sharding(tree, mesh)


def test_indivisible_dimension_over_two_axes(mesh):
    with pytest.raises(UserError, match=r"x \(6,\): dimension 6 .* mesh axis data x fsdp of 4"):
        sharding.tree_sharding({"x": boxed((6,), "act_batch")}, mesh)


def test_unknown_logical_axis_names_parameter_and_nearest(mesh):
    with pytest.raises(
        UserError, match=r"llm/kernel has the unknown logical axis 'vocabb'; did you mean 'vocab'"
    ):
        sharding.tree_sharding({"llm": {"kernel": boxed((8, 4), "vocabb", "embed")}}, mesh)


def test_put_batch_round_trip(mesh, batch):
    arrays = sharding.put_batch(batch, mesh)
    assert arrays.keys() == batch.keys()
    for name, array in arrays.items():
        assert array.dtype == batch[name].dtype
        assert array.sharding == sharding.batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {
            len(batch[name]) // 4
        }
        np.testing.assert_array_equal(array, batch[name])


def test_replicated(mesh):
    array = jax.device_put(np.arange(3), sharding.replicated(mesh))
    assert [shard.data.shape for shard in array.addressable_shards] == [(3,)] * 8


def test_table(mesh):
    tree = {
        "blocks": {"q": boxed((2, 512, 1024), "layers", "embed", "heads")},
        "rows": boxed((8,), "act_batch"),
        "scale": boxed((256,), None),
    }
    lines = sharding.table(sharding.unbox(tree), sharding.tree_sharding(tree, mesh)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["blocks/q", "2x512x1024", "-", "fsdp", "tensor", "1.000"],
        ["rows", "8", "data+fsdp", "0.000"],
        ["scale", "256", "-", "0.001"],
    ]
    assert lines[0].split()[:4] == ["parameter", "shape", "sharded", "over"]
    assert (
        len(
            {
                line.index(cell)
                for line, cell in zip(lines, ["shape", "2x512", "8", "256"], strict=True)
            }
        )
        == 1
    )


def test_path_name():
    [(path, _)] = jax.tree.leaves_with_path({"llm": {"blocks": [1]}})
    assert sharding.path_name(path) == "llm/blocks/0"
