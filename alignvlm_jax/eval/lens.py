"""What patches say: ALIGN's distribution over the vocabulary, read on the page it was computed from."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence

import jax
import matplotlib as mpl
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from alignvlm_jax.config import Config
from alignvlm_jax.data import images
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.schema import Box, Record
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import connectors
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Float

PICTURE_INCHES = 9.0
DPI = 110
TINT = 0.45


@dataclasses.dataclass(frozen=True)
class Lens:
    """A page and what its patches say; patches that lie wholly in a tile's padding are left out.

    Attributes:
      page: the page, RGB.
      boxes: float [N, 4], left, top, right, bottom of patches in pixels of the page.
      probabilities: float [N, V].
    """

    page: Image.Image
    boxes: np.ndarray
    probabilities: np.ndarray

    def entropies(self) -> np.ndarray:
        """Returns the entropy of each patch in bits: 0 for one certain token, log2(V) for all alike."""
        p = self.probabilities
        return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """One patch: its picture, its entropy in bits, its likeliest tokens (readable) with their probabilities."""

    image: Image.Image
    entropy: float
    tokens: tuple[tuple[str, float], ...]


def look(model: VLM, params: Mapping, mesh: Mesh, config: Config, records: Sequence[Record]) -> list[Lens]:
    """Returns a lens for the first image of each record.

    Raises:
      UserError: the model's connector has no distribution over the vocabulary, or an image cannot be read.
    """
    check_readable(config)
    pages = [images.decode_image(record.images[0], record.id) for record in records]
    vision, data = config.model.vision, config.data
    tiles = [images.tile_image(page, vision, data.max_tiles, data.use_overview) for page in pages]
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = (-(-len(pages) // ways) * ways, data.max_tiles, vision.tile_height, vision.tile_width, 3)
    pixels = np.zeros(shape, np.uint8)
    for row, page_tiles in zip(pixels, tiles, strict=False):
        row[: len(page_tiles.pixels)] = page_tiles.pixels
    with mesh_lib.use(mesh):
        batch = sharding.put_batch({"tiles": pixels}, mesh)
        probabilities = np.asarray(jax.jit(functools.partial(_probabilities, model))(params, batch), np.float64)
    return [
        _lens(page, page_tiles, config, p_IPV)
        for page, page_tiles, p_IPV in zip(pages, tiles, probabilities, strict=False)
    ]


def check_readable(config: Config) -> None:
    """Raises UserError where the connector has no distribution over the vocabulary."""
    name = config.model.connector.name
    if not hasattr(connectors.get(name), "probabilities"):
        raise UserError(f"connector {name!r} gives patches no distribution over words: there is nothing to read")


def picture(lens: Lens, tokenizer: Tokenizer) -> bytes:
    """Returns a PNG: the page, every patch framed, tinted by its entropy, its likeliest token at its foot."""
    vocab_bits = np.log2(lens.probabilities.shape[-1])
    # Patches of a trained model differ below one bit: the square root keeps them apart.
    norm, colors = PowerNorm(0.5, 0, vocab_bits), mpl.colormaps["plasma_r"]
    height = PICTURE_INCHES * lens.page.height / lens.page.width
    figure = Figure(figsize=(PICTURE_INCHES, height + 0.55), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.imshow(lens.page, extent=(0, lens.page.width, lens.page.height, 0), interpolation="lanczos")
    points = 72 * PICTURE_INCHES / lens.page.width
    top, entropies = lens.probabilities.argmax(-1), lens.entropies()
    for box, token, entropy in zip(lens.boxes, top, entropies, strict=True):
        _draw_patch(axes, box, tokenizer.piece(token), token == tokenizer.space_id, colors(norm(entropy)), points)
    axes.set(xlim=(0, lens.page.width), ylim=(lens.page.height, 0))
    axes.set_axis_off()
    scale = mpl.cm.ScalarMappable(norm, colors)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", aspect=60, pad=0.02, alpha=TINT + 0.25)
    bar.set_ticks([0, 0.25, 1, 2, 4, vocab_bits], labels=["0 bits", "¼", "1", "2", "4", f"{vocab_bits:.3g}"])
    bar.ax.tick_params(labelsize=12, length=3)
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def readings(lens: Lens, tokenizer: Tokenizer, count: int, num_tokens: int = 3) -> list[Reading]:
    """Returns `count` patches spread evenly from the most to the least certain of those that do not say a space."""
    top, entropies = lens.probabilities.argmax(-1), lens.entropies()
    (inked,) = np.nonzero(top != tokenizer.space_id)
    ordered = inked[np.argsort(entropies[inked], kind="stable")]
    chosen = ordered[np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))]
    return [_reading(lens, tokenizer, index, entropies[index], num_tokens) for index in chosen]


def _probabilities(model: VLM, params: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B I P V"]:
    return model.apply({"params": params}, batch, method="patch_probabilities")


def _lens(page: Image.Image, tiles: Tiles, config: Config, p_IPV: np.ndarray) -> Lens:
    vision = config.model.vision
    rows, columns = vision.patch_grid
    size = np.array([vision.patch_width, vision.patch_height])
    corners = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * size
    boxes, kept = [], []
    for crop, scale, p_PV in zip(tiles.crops, tiles.scales, p_IPV, strict=False):
        left_top = crop[:2] + corners / scale
        right_bottom = np.minimum(crop[:2] + (corners + size) / scale, crop[2:])
        drawn = (right_bottom > left_top).all(-1)
        boxes.append(np.concatenate([left_top, right_bottom], -1)[drawn])
        kept.append(p_PV[drawn])
    return Lens(page, np.concatenate(boxes), np.concatenate(kept))


def _draw_patch(axes: Axes, box: Box, token: str, is_space: bool, color: tuple[float, ...], points: float) -> None:
    """`points` is the size of a page pixel on paper, 1/72 inch."""
    left, top, right, bottom = box
    frame = (left, top), right - left, bottom - top
    axes.add_patch(Rectangle(*frame, facecolor=(*color[:3], TINT), edgecolor="#00000022", linewidth=0.6))
    # A monospaced character is 0.6 as wide as its size: the token fills the patch, or the lower third of it.
    size = points * min((right - left) / (0.6 * len(token)), (bottom - top) / 3)
    axes.text(
        (left + right) / 2, bottom, token, ha="center", va="bottom", fontsize=size, fontfamily="monospace",
        fontweight="bold", color="#00000055" if is_space else "#b3005e",
        path_effects=[] if is_space else [withStroke(linewidth=size / 6, foreground="white")],
    )  # fmt: skip


def _reading(lens: Lens, tokenizer: Tokenizer, index: int, entropy: float, num_tokens: int) -> Reading:
    p = lens.probabilities[index]
    likeliest = np.argsort(-p, kind="stable")[:num_tokens]
    crop = lens.page.crop(tuple(int(edge) for edge in np.round(lens.boxes[index])))
    return Reading(crop, float(entropy), tuple((tokenizer.piece(token), float(p[token])) for token in likeliest))
