"""A GGUF file of a language model, under the names that its family has in Hugging Face folders."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from alignvlm_jax.config import LLMConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import families
from alignvlm_jax.weights.source import Derived, Made, Tensor, Tower, rows_per_chunk

MAGIC = b"GGUF"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """The tensors of a GGUF file; quantised ones become float32 as they are read."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._tensors = {_published_name(tensor.name): tensor for tensor in _open(path).tensors}
        # GGUF lists axes with the contiguous one first, the reverse of numpy's order.
        self.tensors = {
            name: Tensor(tuple(int(size) for size in tensor.shape[::-1]), np.dtype(np.float32))
            for name, tensor in self._tensors.items()
        }

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor in blocks of rows as float32, as `source.Source.blocks` defines."""
        tensor = self._tensors[name]
        shape = self.tensors[name].shape
        if len(shape) < 2:
            yield _numbers(tensor.data, tensor).reshape(shape)
            return
        # Quantised blocks lie within a row, so that rows can be dequantised apart from each other.
        # The bound on a block's bytes is that of its float32 numbers.
        step = rows_per_chunk(self.tensors[name])
        rows = tensor.data.reshape(shape[0], -1)
        for start in range(0, shape[0], step):
            yield _numbers(rows[start : start + step], tensor).reshape(-1, *shape[1:])


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic bytes."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def fields(path: Path) -> dict[str, Any]:
    """Returns the metadata of a GGUF file as plain values; UserError where it is damaged."""
    return {name: field.contents() for name, field in _open(path).fields.items()}


def open_llm(path: Path) -> Tower:
    """Opens a language model of a family of `families.LLMS`; its sizes follow from the metadata.

    Raises:
      UserError: the file is damaged, of another architecture, or scales its rotary positions.
    """
    source = GGUFFile(path)
    metadata = fields(path)
    family = families.llm_of_gguf(path, metadata.get("general.architecture"))
    group = family.gguf_architecture

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{group}.{name}", default)
        if value is None:
            raise UserError(f"{path} does not say {group}.{name}")
        return value

    # Llama 3's scaling is stored as a factor for each frequency, and its four parameters cannot be
    # computed from these.
    scaled = [name for name in ("rope_freqs.weight",) if name in source.tensors]
    if scaled or get("rope.scaling.type", "none") != "none":
        raise UserError(
            f"{path}: rotary positions are scaled, which a GGUF does not hold whole; take the "
            "safetensors"
        )
    num_heads = get("attention.head_count")
    width = get("embedding_length")
    config = LLMConfig(
        vocab_size=source.tensors["model.embed_tokens.weight"].shape[0],
        width=width,
        mlp_width=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=get("attention.key_length", width // num_heads),
        # Metadata are float32: without rounding, 1e-5 comes back as 9.99999974e-06.
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        # Without an output matrix the head is the table.
        tie_embeddings="lm_head.weight" not in source.tensors,
        context_length=get("context_length", 0),
        **family.traits,
    )
    made = _rotated(source, config) if family.gguf_pairs_neighbours else {}
    return Tower(Derived(source, made), config, family.entries(config))


def _rotated(source: GGUFFile, config: LLMConfig) -> dict[str, Made]:
    """The kernels of queries and keys with their channels in our order."""
    # llama.cpp permutes the rows of q and k for its own rotary kernel: other matrices are as
    # published.
    made = {}
    for layer in range(config.num_layers):
        for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            if name in source.tensors:
                make = functools.partial(_halves, num_heads=heads)
                made[name] = Made(source.tensors[name], (name,), make)
    return made


def _open(path: Path) -> gguf.GGUFReader:
    """Returns gguf's reader, which maps the file into memory; UserError where it is damaged."""
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as err:
        raise UserError(
            f"{path} is damaged or cut short: {' '.join(str(err).split())[:200]}"
        ) from err


def _published_name(name: str) -> str:
    """Returns the name in LlamaForCausalLM of a tensor: "blk.0.attn_q.weight" is
    "model.layers.0.self_attn.q_proj.weight"."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return ".".join([NAMES.get(parts[0], parts[0]), *parts[1:]])


def _numbers(data: np.ndarray, tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.dequantize(data, tensor.tensor_type).astype(np.float32)


def _halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns the weight [H h, D] of q or k with the rows of each head permuted: rotary pairs that
    the file has as neighbours (2i, 2i + 1) become (i, i + h/2), as `layers.apply_rope` has them."""
    rows, columns = weight.shape
    # [H, h/2, 2, D] to [H, 2, h/2, D].
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
