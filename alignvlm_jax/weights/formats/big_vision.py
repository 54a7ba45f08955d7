"""The image tower of a big_vision SigLIP checkpoint: an .npz of its flattened parameter tree."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.mapping import Entry
from alignvlm_jax.weights.source import (
    Derived,
    Made,
    Source,
    Tensor,
    Tower,
    resample,
    rows_per_chunk,
)

# In checkpoints of the whole training state, and in those of parameters alone.
ROOTS = ("params/img/", "img/")
POSITIONS = "pos_embedding"
BLOCK = "Transformer/encoderblock"
ATTENTION = "MultiHeadDotProductAttention_0"
# Pooling head, final projection, text tower or PaliGemma's language model, temperature and bias of
# the loss, optimizer state.
IGNORED = (
    r"MAPHead_0/.*",
    r"head/.*",
    r"(params/)?(txt|llm)/.*",
    r"(params/)?[tb]",
    r"opt/.*",
)
# What zipfile, zlib and numpy raise for a damaged file.
BAD_ZIP = (zipfile.BadZipFile, ValueError, OSError, EOFError, zipfile.zlib.error)


class NpzFile:
    """The arrays of an .npz, streamed out of the zip in blocks of rows and never unpickled.

    np.load would read an array whole, and a memory map cannot reach a zip's members, which may be
    compressed.

    Attributes:
      name: the path, for messages.
      tensors: shapes and dtypes by name; of names below `img/`, the part after it.

    Raises:
      UserError: the file is damaged, or an array is pickled or in Fortran order.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.tensors: dict[str, Tensor] = {}
        self._members: dict[str, str] = {}
        where = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.removesuffix(".npy")
                    where = f"{path}: tensor {name}"
                    with archive.open(member) as file:
                        shape, dtype = _header(file, where)
                    for root in ROOTS:
                        name = name.removeprefix(root)
                    self._members[name] = member
                    self.tensors[name] = Tensor(shape, dtype)
        except BAD_ZIP as err:
            raise UserError(f"{where} is damaged or cut short: {err}") from err

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yields an array in blocks of rows, as `source.Source.blocks` defines."""
        member = self._members[name]
        tensor = self.tensors[name]
        where = f"{self.name}: tensor {member.removesuffix('.npy')}"
        # An array of no or one dimension comes in one block.
        rows = rows_per_chunk(tensor) if len(tensor.shape) > 1 else math.prod(tensor.shape[:1])
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        try:
            with zipfile.ZipFile(self.name) as archive, archive.open(member) as file:
                # The member is an .npy stream: behind the header the numbers lie row after row.
                _header(file, where)
                left = tensor.shape[0] if tensor.shape else 1
                while left:
                    count = min(rows, left)
                    data = file.read(count * row_bytes)
                    yield np.frombuffer(data, tensor.dtype).reshape(count, *tensor.shape[1:])
                    left -= count
        except BAD_ZIP as err:
            raise UserError(f"{where} is damaged or cut short: {err}") from err


def open_vision(path: Path, tile_size: int | None = None) -> Tower:
    """Returns the image tower of a checkpoint; its sizes follow from the shapes of its arrays.

    Args:
      path: the .npz file.
      tile_size: pixels of a tile's side; None takes the checkpoint's own. For another size the
        position embeddings are resampled.

    Raises:
      UserError: the file is damaged, holds no ViT with an MLP and learned positions, or its patch
        does not divide `tile_size`.
    """
    source = NpzFile(path)
    is_scanned = f"{BLOCK}/LayerNorm_0/scale" in source.tensors
    # A scanned encoder has all layers in one array, with the axis of layers first.
    first = BLOCK if is_scanned else f"{BLOCK}_0"
    skip = 1 if is_scanned else 0

    def shape(name: str) -> tuple[int, ...]:
        if name not in source.tensors:
            raise UserError(
                f"{path} lacks {name}: is it a big_vision SigLIP with {ROOTS[0]} in it?"
            )
        return source.tensors[name].shape

    # [y, x, C, E], with square patches.
    patch, _, _, width = shape("embedding/kernel")
    # Kernels of the query are [E, H, h], and positions [1, P, E] of a square grid.
    num_heads = shape(f"{first}/{ATTENTION}/query/kernel")[skip + 1]
    side = math.isqrt(shape(POSITIONS)[1])
    size = tile_size or side * patch
    if size % patch:
        nearest_size = max(1, round(size / patch)) * patch
        raise UserError(
            f"--tile_size {size} is not a multiple of the patch of {path}, {patch}; nearest: "
            f"{nearest_size}"
        )
    numbers = {name.split("/")[1] for name in source.tensors if name.startswith(f"{BLOCK}_")}
    config = VisionConfig(
        tile_height=size,
        tile_width=size,
        patch_height=patch,
        patch_width=patch,
        width=width,
        mlp_width=shape(f"{first}/MlpBlock_0/Dense_0/kernel")[skip + 1],
        num_layers=shape(f"{first}/LayerNorm_0/scale")[0] if is_scanned else len(numbers),
        num_heads=num_heads,
    )
    tower_source: Source = source
    if (side, side) != config.patch_grid:
        tensor = Tensor((1, config.num_patches, width), np.dtype(np.float32))

        def make(table: np.ndarray) -> np.ndarray:
            # [1, P, E] -> [P, E] -> [1, P', E]
            return resample(table[0], (side, side), config.patch_grid, "linear")[None]

        tower_source = Derived(source, {POSITIONS: Made(tensor, (POSITIONS,), make)})
    return Tower(tower_source, config, table(is_scanned), IGNORED)


def table(is_scanned: bool) -> tuple[Entry, ...]:
    """Returns the table of big_vision's ViT, below its `img/`; its kernels have our axes."""
    block = "Transformer/encoderblock" + ("" if is_scanned else "_{}")
    stack = "L" if is_scanned else ""
    attention = f"{block}/MultiHeadDotProductAttention_0"

    def entry(path: str, name: str, axes: str) -> Entry:
        return Entry(f"vision/blocks/{path}", name, f"{stack}{axes} -> {stack}{axes}")

    def both(path: str, name: str, kernel: str, bias: str) -> tuple[Entry, Entry]:
        """A layer's kernel and bias."""
        return (
            entry(f"{path}/kernel", f"{name}/kernel", kernel),
            entry(f"{path}/bias", f"{name}/bias", bias),
        )

    def norm(path: str, name: str) -> tuple[Entry, Entry]:
        return (
            entry(f"{path}/scale", f"{name}/scale", "E"),
            entry(f"{path}/bias", f"{name}/bias", "E"),
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


def _header(file: object, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of an .npy stream, and leaves the stream at its first number."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject or (is_fortran and len(shape) > 1):
        raise UserError(
            f"{where} is {'pickled' if dtype.hasobject else 'in Fortran order'}, which is not read"
        )
    # numpy has no bfloat16: it stores such arrays as two opaque bytes a number.
    return shape, np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
