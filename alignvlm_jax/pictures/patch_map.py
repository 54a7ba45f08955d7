"""What patches say: ALIGN's distribution over the vocabulary, on the page it was computed from, to
be looked at."""

import dataclasses
import html as html_lib
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.data.record import Box
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.pictures import html, plotting

FILE = "lens.html"
TITLE = "What the patches say"
MAX_SIDE = 2400
"""Pixels of a page's longer side in the HTML."""

FRAME_HEIGHT = 820
"""Pixels, in a notebook."""

PICTURE_INCHES = 9.0
DPI = 110
TINT = 0.45


@dataclasses.dataclass(frozen=True)
class Lens:
    """A page and what its patches say; patches that lie wholly in a tile's padding are left out.

    In a notebook it shows itself; `save` writes it to a file.

    Attributes:
      page: the page, RGB.
      boxes: float [N, 4], left, top, right, bottom of patches in pixels of the page.
      tokens: int32 [N, K], each patch's likeliest tokens, the likeliest first.
      probabilities: float32 [N, K], theirs.
      entropies: float32 [N], of the whole distributions in bits: 0 for one certain token, log2(V)
        for all alike.
      is_overview: bool [N], patches of the overview tile, which covers the page once more.
      tokenizer: what spells the tokens.
      unpadded_vocab_size: V.
    """

    page: Image.Image
    boxes: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray
    entropies: np.ndarray
    is_overview: np.ndarray
    tokenizer: Tokenizer
    unpadded_vocab_size: int

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        size = f"{self.page.width} x {self.page.height} pixels"
        return f"Lens({size}, {len(self)} patches, {self.entropies.mean():.2f} bits on average)"

    def _repr_html_(self) -> str:
        # A frame of its own: neither its styles nor its script meet the notebook's.
        page = html_lib.escape(self.html())
        return (
            f'<iframe srcdoc="{page}" style="width: 100%; height: {FRAME_HEIGHT}px; border: '
            '0"></iframe>'
        )

    def top(self, index: int) -> list[tuple[str, float]]:
        """Returns a patch's likeliest tokens, readable, with their probabilities."""
        found = zip(self.tokens[index], self.probabilities[index], strict=True)
        return [(self.tokenizer.piece(int(token)), float(p)) for token, p in found]

    def detail(self) -> "Lens":
        """Returns the patches that cover the page once: those of the overview are left out."""
        kept = ~self.is_overview
        names = ("boxes", "tokens", "probabilities", "entropies", "is_overview")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in names})

    def html(self, title: str = TITLE) -> str:
        """Returns a page of HTML to hover over, which needs no other file."""
        return html.render(
            FILE, title=title, lens=self, data=_page_data(self), page=_page_uri(self.page)
        )

    def save(self, path: str | os.PathLike[str], title: str = TITLE) -> Path:
        """Writes the page to hover over (.html), which has a title, or the still picture (.png);
        returns the path.

        Raises:
          UserError: another suffix.
        """
        path = storage.path(path)
        check_suffix(path)
        if path.suffix == ".png":
            storage.write_whole(path, picture(self))
        else:
            storage.write_whole(path, self.html(title))
        return path


@dataclasses.dataclass(frozen=True)
class Reading:
    """One patch: its picture, its entropy in bits, its likeliest tokens (readable) with their
    probabilities."""

    image: Image.Image
    entropy: float
    tokens: tuple[tuple[str, float], ...]


def check_suffix(path: Path) -> None:
    """Raises UserError if a lens is not saved in files of that name."""
    if path.suffix not in (".html", ".png"):
        raise UserError(
            f"cannot save a lens as {path.name}: a name ends in .html, to hover over, or in .png"
        )


def picture(lens: Lens) -> bytes:
    """Returns a PNG: the page, every patch framed, tinted by its entropy, its likeliest token at
    its foot."""
    lens, vocab_bits = lens.detail(), np.log2(lens.unpadded_vocab_size)
    # Patches of a trained model differ below one bit: the square root keeps them apart.
    norm = PowerNorm(0.5, 0, vocab_bits)
    colors = mpl.colormaps["plasma_r"]
    height = PICTURE_INCHES * lens.page.height / lens.page.width
    figure = Figure(
        figsize=(PICTURE_INCHES, height + 0.55), dpi=DPI, layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    axes.imshow(
        lens.page, extent=(0, lens.page.width, lens.page.height, 0), interpolation="lanczos"
    )
    points = 72 * PICTURE_INCHES / lens.page.width
    space = lens.tokenizer.space_id
    piece = lens.tokenizer.piece
    for box, token, entropy in zip(lens.boxes, lens.tokens[:, 0], lens.entropies, strict=True):
        _draw_patch(axes, box, piece(int(token)), token == space, colors(norm(entropy)), points)
    axes.set(xlim=(0, lens.page.width), ylim=(lens.page.height, 0))
    axes.set_axis_off()
    scale = mpl.cm.ScalarMappable(norm, colors)
    bar = figure.colorbar(
        scale, ax=axes, orientation="horizontal", aspect=60, pad=0.02, alpha=TINT + 0.25
    )
    bar.set_ticks(
        [0, 0.25, 1, 2, 4, vocab_bits], labels=["0 bits", "¼", "1", "2", "4", f"{vocab_bits:.3g}"]
    )
    bar.ax.tick_params(labelsize=12, length=3)
    bar.outline.set_visible(False)
    return plotting.to_png(figure)


def readings(lens: Lens, count: int, num_tokens: int = 3) -> list[Reading]:
    """Returns `count` patches spread evenly from the most to the least certain of those that do not
    say a space."""
    lens = lens.detail()
    (inked,) = np.nonzero(lens.tokens[:, 0] != lens.tokenizer.space_id)
    ordered = inked[np.argsort(lens.entropies[inked], kind="stable")]
    chosen = ordered[
        np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    ]
    return [_reading(lens, index, num_tokens) for index in chosen]


def _page_data(lens: Lens) -> dict[str, Any]:
    """What the page's script reads; boxes in fractions of the page, a token by its place among
    `pieces`."""
    used, places = np.unique(lens.tokens, return_inverse=True)
    size = np.array([lens.page.width, lens.page.height] * 2)
    return {
        "pieces": [lens.tokenizer.piece(int(token)) for token in used],
        "space": int(np.searchsorted(used, lens.tokenizer.space_id))
        if lens.tokenizer.space_id in used
        else -1,
        "boxes": (lens.boxes / size).round(5).tolist(),
        "tokens": places.reshape(lens.tokens.shape).tolist(),
        "probabilities": lens.probabilities.astype(float).round(5).tolist(),
        "entropies": lens.entropies.astype(float).round(3).tolist(),
        "overview": np.flatnonzero(lens.is_overview).tolist(),
        "bits": float(np.log2(lens.unpadded_vocab_size)),
        "width": lens.page.width,
        "height": lens.page.height,
    }


def _page_uri(page: Image.Image) -> str:
    shown = page.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    return html.image_uri(shown)


def _draw_patch(
    axes: Axes, box: Box, token: str, is_space: bool, color: tuple[float, ...], points: float
) -> None:
    """`points` is the size of a page pixel on paper, 1/72 inch."""
    left, top, right, bottom = box
    frame = (left, top), right - left, bottom - top
    axes.add_patch(
        Rectangle(*frame, facecolor=(*color[:3], TINT), edgecolor="#00000022", linewidth=0.6)
    )
    # A monospaced character is 0.6 as wide as its size: the token fills the patch, or the lower
    # third of it.
    size = points * min((right - left) / (0.6 * len(token)), (bottom - top) / 3)
    axes.text(
        (left + right) / 2, bottom, token, ha="center", va="bottom", fontsize=size,
        fontfamily="monospace", fontweight="bold", color="#00000055" if is_space else "#b3005e",
        path_effects=[] if is_space else [withStroke(linewidth=size / 6, foreground="white")],
    )  # fmt: skip


def _reading(lens: Lens, index: int, num_tokens: int) -> Reading:
    crop = lens.page.crop(tuple(int(edge) for edge in np.round(lens.boxes[index])))
    return Reading(crop, float(lens.entropies[index]), tuple(lens.top(index)[:num_tokens]))
