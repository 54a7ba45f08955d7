"""Which of our parameters is which published tensor: one table a layout, read in both directions.

An equation such as "DHh -> (Hh)D" says how the axes of our array (letters: `shapes.py`) lie in the
published one; brackets merge axes, 1 is an axis of size one. A name with {} stands for one tensor a
layer, where ours are stacked.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import LLMConfig


class Entry(NamedTuple):
    """One parameter of ours and its published tensor, or tensors."""

    path: str
    name: str
    equation: str

    @property
    def is_stacked(self) -> bool:
        """Whether our array has a leading axis of layers, each of them a tensor of its own
        there."""
        return "{}" in self.name

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the published names, one a layer where stacked, of our array of `shape`."""
        return (
            [self.name.format(layer) for layer in range(shape[0])]
            if self.is_stacked
            else [self.name]
        )

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each published tensor of our array of `shape`."""
        permutation, groups = _parse(self.equation)
        sizes = shape[1:] if self.is_stacked else shape
        return tuple(math.prod(sizes[permutation[i]] for i in group) for group in groups)

    def views(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns our array as the published tensors, one a layer where stacked, in the order of
        `names`.

        They are views of its memory: reading them exports, writing to them imports.
        """
        permutation, _ = _parse(self.equation)
        layers = list(array) if self.is_stacked else [array]
        shape = self.published_shape(array.shape)
        return [layer.transpose(permutation).reshape(shape, copy=False) for layer in layers]


@functools.cache
def _parse(equation: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The permutation of our axes, and the groups of permuted axes that make an axis there."""
    ours, theirs = equation.split(" -> ")
    terms = re.findall(r"\((\w+)\)|(\w)", theirs)
    letters = [merged or single for merged, single in terms]
    permutation = []
    groups = []
    for term in letters:
        start = len(permutation)
        permutation += [ours.index(letter) for letter in term if letter != "1"]
        groups.append(tuple(range(start, len(permutation))))
    if sorted(permutation) != list(range(len(ours))):
        raise ValueError(f"{equation!r} does not name every axis once")
    return tuple(permutation), tuple(groups)


def llama(config: LLMConfig) -> tuple[Entry, ...]:
    """Returns the table of LlamaForCausalLM."""
    blocks = "llm/blocks"
    layer = "model.layers.{}"
    head = (
        () if config.tie_embeddings else (Entry("llm/head/kernel", "lm_head.weight", "DV -> VD"),)
    )
    return (
        Entry("llm/embed/table", "model.embed_tokens.weight", "VD -> VD"),
        Entry(f"{blocks}/attn_norm/scale", f"{layer}.input_layernorm.weight", "D -> D"),
        Entry(f"{blocks}/attn/q/kernel", f"{layer}.self_attn.q_proj.weight", "DHh -> (Hh)D"),
        Entry(f"{blocks}/attn/k/kernel", f"{layer}.self_attn.k_proj.weight", "DKh -> (Kh)D"),
        Entry(f"{blocks}/attn/v/kernel", f"{layer}.self_attn.v_proj.weight", "DKh -> (Kh)D"),
        Entry(f"{blocks}/attn/o/kernel", f"{layer}.self_attn.o_proj.weight", "HhD -> D(Hh)"),
        Entry(f"{blocks}/mlp_norm/scale", f"{layer}.post_attention_layernorm.weight", "D -> D"),
        Entry(f"{blocks}/mlp/gate/kernel", f"{layer}.mlp.gate_proj.weight", "DF -> FD"),
        Entry(f"{blocks}/mlp/up/kernel", f"{layer}.mlp.up_proj.weight", "DF -> FD"),
        Entry(f"{blocks}/mlp/down/kernel", f"{layer}.mlp.down_proj.weight", "FD -> DF"),
        Entry("llm/final_norm/scale", "model.norm.weight", "D -> D"),
        *head,
    )


def siglip(
    prefix: str = "vision_model.", patch_embedding: str = "yxCE -> ECyx"
) -> tuple[Entry, ...]:
    """Returns the table of SiglipVisionModel.

    NaFlex SigLIP 2 has a flat patch embedding: "yxCE -> E(yxC)".
    """
    embeddings = f"{prefix}embeddings"
    layer = f"{prefix}encoder.layers.{{}}"
    return (
        Entry("vision/patch_embed/kernel", f"{embeddings}.patch_embedding.weight", patch_embedding),
        Entry("vision/patch_embed/bias", f"{embeddings}.patch_embedding.bias", "E -> E"),
        Entry("vision/positions", f"{embeddings}.position_embedding.weight", "PE -> PE"),
        *_vision_blocks(
            layer,
            norms=("layer_norm1", "layer_norm2"),
            attention=(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
            ),
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
        Entry("vision/final_norm/scale", f"{prefix}post_layernorm.weight", "E -> E"),
        Entry("vision/final_norm/bias", f"{prefix}post_layernorm.bias", "E -> E"),
    )


def dinov2(query: str, key: str, value: str, output: str) -> tuple[Entry, ...]:
    """Returns the table of Dinov2Model once its layer scale is folded into `output` and fc2, and
    its position table is [P, E]. The names of the attention's parts, below a layer, differ between
    versions of transformers."""
    return (
        Entry(
            "vision/patch_embed/kernel",
            "embeddings.patch_embeddings.projection.weight",
            "yxCE -> ECyx",
        ),
        Entry("vision/patch_embed/bias", "embeddings.patch_embeddings.projection.bias", "E -> E"),
        Entry("vision/positions", "embeddings.position_embeddings", "PE -> PE"),
        *_vision_blocks(
            "encoder.layer.{}",
            norms=("norm1", "norm2"),
            attention=(query, key, value, output),
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
        Entry("vision/final_norm/scale", "layernorm.weight", "E -> E"),
        Entry("vision/final_norm/bias", "layernorm.bias", "E -> E"),
    )


def big_vision(is_scanned: bool) -> tuple[Entry, ...]:
    """Returns the table of big_vision's ViT, below its `img/`; its kernels have our axes."""
    block = "Transformer/encoderblock" + ("" if is_scanned else "_{}")
    stack = "L" if is_scanned else ""
    attention = f"{block}/MultiHeadDotProductAttention_0"

    def both(path: str, name: str, kernel: str, bias: str) -> tuple[Entry, Entry]:
        """A layer's kernel and bias."""
        return (
            Entry(
                f"vision/blocks/{path}/kernel",
                f"{name}/kernel",
                f"{stack}{kernel} -> {stack}{kernel}",
            ),
            Entry(f"vision/blocks/{path}/bias", f"{name}/bias", f"{stack}{bias} -> {stack}{bias}"),
        )

    def norm(path: str, name: str) -> tuple[Entry, ...]:
        return tuple(
            Entry(f"vision/blocks/{path}/{part}", f"{name}/{part}", f"{stack}E -> {stack}E")
            for part in ("scale", "bias")
        )

    return (
        Entry("vision/patch_embed/kernel", "embedding/kernel", "yxCE -> yxCE"),
        Entry("vision/patch_embed/bias", "embedding/bias", "E -> E"),
        Entry("vision/positions", "pos_embedding", "PE -> 1PE"),
        *norm("attn_norm", f"{block}/LayerNorm_0"),
        *both("attn/q", f"{attention}/query", "EHh", "Hh"),
        *both("attn/k", f"{attention}/key", "EHh", "Hh"),
        *both("attn/v", f"{attention}/value", "EHh", "Hh"),
        *both("attn/o", f"{attention}/out", "HhE", "E"),
        *norm("mlp_norm", f"{block}/LayerNorm_1"),
        *both("mlp/up", f"{block}/MlpBlock_0/Dense_0", "EF", "F"),
        *both("mlp/down", f"{block}/MlpBlock_0/Dense_1", "FE", "E"),
        Entry("vision/final_norm/scale", "Transformer/encoder_norm/scale", "E -> E"),
        Entry("vision/final_norm/bias", "Transformer/encoder_norm/bias", "E -> E"),
    )


def _vision_blocks(
    layer: str, norms: tuple[str, str], attention: tuple[str, str, str, str], mlp: tuple[str, str]
) -> tuple[Entry, ...]:
    """The blocks of a PyTorch ViT: weights [out, in], one tensor a layer."""
    entries = []
    for path, name in zip(("attn_norm", "mlp_norm"), norms, strict=True):
        entries += [
            Entry(f"vision/blocks/{path}/scale", f"{layer}.{name}.weight", "E -> E"),
            Entry(f"vision/blocks/{path}/bias", f"{layer}.{name}.bias", "E -> E"),
        ]
    linear = {
        **{
            f"attn/{part}": (name, "EHh -> (Hh)E", "Hh -> (Hh)")
            for part, name in zip("qkv", attention, strict=False)
        },
        "attn/o": (attention[3], "HhE -> E(Hh)", "E -> E"),
        "mlp/up": (mlp[0], "EF -> FE", "F -> F"),
        "mlp/down": (mlp[1], "FE -> EF", "E -> E"),
    }
    for path, (name, kernel, bias) in linear.items():
        entries += [
            Entry(f"vision/blocks/{path}/kernel", f"{layer}.{name}.weight", kernel),
            Entry(f"vision/blocks/{path}/bias", f"{layer}.{name}.bias", bias),
        ]
    return tuple(entries)
