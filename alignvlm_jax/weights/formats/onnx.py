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
    """Opens a DINOv2 backbone whose graph kept the names of transformers below `backbone`.

    Args:
      tile_size: pixels a side; the graph's own input by default.

    Raises:
      UserError: `onnx` is not installed, the file is damaged, or it holds no such backbone.
    """
    graph = _read(path)
    arrays = _arrays(path, graph)
    source = Arrays(str(path), arrays)
    width, _, patch, _ = arrays["embeddings.patch_embeddings.projection.weight"].shape
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
    """Returns the backbone's tensors by the names of Dinov2Model; the class token's position is
    zero."""
    return _arrays(path, _read(path))


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError as err:
        raise UserError(
            f"reading {path} takes onnx: pip install -r requirements-weights.txt"
        ) from err
    try:
        return onnx.load(path).graph
    except Exception as err:  # Protobuf's own errors, of which there are several kinds.
        raise UserError(f"{path} is damaged or cut short: {' '.join(str(err).split())}") from err


def _arrays(path: Path, graph: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    arrays = {name.removeprefix(PREFIX): x for name, x in stored.items() if name.startswith(PREFIX)}
    # Weights of linear layers lie transposed under names that say nothing; the nodes that use them
    # say which they are.
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
    # In front of the table stands the class token's own position, which is dropped with it.
    arrays[dinov2.POSITIONS] = np.concatenate([np.zeros_like(table[:, :1]), table], 1)
    return arrays


def _position_table(stored: dict[str, np.ndarray]) -> np.ndarray | None:
    """The grid's positions [1, P, E], which the graph resamples: the only square table of that
    shape."""
    tables = [x for x in stored.values() if x.ndim == 3 and x.shape[0] == 1 and x.shape[1] > 1]
    return max(tables, key=lambda x: x.shape[1], default=None)
