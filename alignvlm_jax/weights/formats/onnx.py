"""The DINOv2 backbone inside an ONNX file, under the names of Dinov2Model."""

from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families import dinov2
from alignvlm_jax.weights.source import Arrays, Tower

PREFIX = "backbone."
EPS = 1e-6


def open_vision(path: Path, tile_size: int | None = None) -> Tower:
    """Returns a DINOv2 backbone whose graph kept the names of transformers below `backbone`.

    Args:
      path: the ONNX file.
      tile_size: pixels of a tile's side; None takes the size of the graph's input.

    Raises:
      UserError: `onnx` is not installed, the file is damaged, it holds no such backbone, or its
        patch does not divide `tile_size`.
    """
    graph = _read(path)
    arrays = _arrays(path, graph)
    source = Arrays(str(path), arrays)
    # [E, C, y, x], with square patches.
    width, _, patch, _ = arrays["embeddings.patch_embeddings.projection.weight"].shape
    # An input of variable size has dim_value 0, and needs `tile_size`.
    size = tile_size or graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    if size < patch or size % patch:
        nearest_size = max(1, round(size / patch)) * patch
        raise UserError(
            f"--tile_size {size} is not a multiple of the patch of {path}, {patch}; nearest: "
            f"{nearest_size}"
        )
    layers = {name.split(".")[2] for name in arrays if name.startswith("encoder.layer.")}
    config = VisionConfig(
        tile_height=size,
        tile_width=size,
        patch_height=patch,
        patch_width=patch,
        width=width,
        mlp_width=len(arrays["encoder.layer.0.mlp.fc1.bias"]),
        num_layers=len(layers),
        num_heads=width // 64,  # Every DINOv2 has heads of 64.
        norm_eps=EPS,
        gelu="exact",
        pixel_mean=dinov2.MEAN,
        pixel_std=dinov2.STD,
    )
    return dinov2.tower(source, config)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the backbone's tensors under the names of Dinov2Model; the class token's position is
    zero. UserError as `open_vision`."""
    return _arrays(path, _read(path))


def _read(path: Path) -> Any:
    """Returns the graph in an ONNX file; UserError where `onnx` is not installed or the file is
    damaged."""
    try:
        import onnx
    except ImportError as err:
        raise UserError(f"reading {path} needs onnx: pip install onnx") from err
    try:
        return onnx.load(path).graph
    except Exception as err:  # Protobuf's own errors, of which there are several kinds.
        raise UserError(f"{path} is damaged or cut short: {' '.join(str(err).split())}") from err


def _arrays(path: Path, graph: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of a graph under the names of Dinov2Model."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    arrays = {name.removeprefix(PREFIX): x for name, x in stored.items() if name.startswith(PREFIX)}
    # Weights of linear layers lie transposed, [in, out], under names without a meaning; the MatMul
    # nodes that use them kept the layers' names.
    start = f"/{PREFIX.rstrip('.')}/"
    end = "/MatMul"
    for node in graph.node:
        weights = [name for name in node.input if name in stored]
        if node.op_type == "MatMul" and node.name.startswith(start) and weights:
            layer = node.name.removeprefix(start).removesuffix(end).replace("/", ".")
            arrays[f"{layer}.weight"] = stored[weights[0]].T
    table = _position_table(stored)
    if table is None or "embeddings.patch_embeddings.projection.weight" not in arrays:
        raise UserError(
            f"{path} holds no DINOv2 backbone: neither positions nor a patch embedding were found "
            "in it"
        )
    # Dinov2Model has the class token's position in front of the table. The encoder drops it with
    # the class token, so zeros stand in for it.
    arrays[dinov2.POSITIONS] = np.concatenate([np.zeros_like(table[:, :1]), table], 1)
    return arrays


def _position_table(stored: dict[str, np.ndarray]) -> np.ndarray | None:
    """Returns the position embeddings of the patch grid [1, P, E], or None without any.

    The graph resamples them at run time, under no name to rely on: they are the longest array of
    that shape.
    """
    tables = [x for x in stored.values() if x.ndim == 3 and x.shape[0] == 1 and x.shape[1] > 1]
    return max(tables, key=lambda x: x.shape[1], default=None)
