"""The patch-token lens: the distribution over the vocabulary of each patch, drawn on the page that
it was computed from."""

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
"""The most pixels of a page's longer side in the HTML; larger pages are scaled down."""

FRAME_HEIGHT = 820
"""Height of a lens in a notebook, in pixels."""

PICTURE_INCHES = 9.0
DPI = 110
TINT = 0.45


@dataclasses.dataclass(frozen=True)
class Lens:
    """A page and the likeliest tokens of its patches; patches that lie wholly in a tile's padding
    are left out.

    A notebook displays it as HTML; `save` writes it to a file.

    Attributes:
      page: the page, RGB.
      boxes: float [N, 4], left, top, right and bottom of the patches, in pixels of the page.
      tokens: int32 [N, k], each patch's likeliest tokens, the likeliest first.
      probabilities: float32 [N, k], the tokens' probabilities.
      entropies: float32 [N], entropies of the whole distributions, in bits: 0 for one certain
        token, log2(V) for the uniform distribution.
      is_overview: bool [N], whether a patch belongs to the overview tile, which covers the page a
        second time.
      tokenizer: spells the tokens.
      vocab_size: V, the vocabulary size.
    """

    page: Image.Image
    boxes: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray
    entropies: np.ndarray
    is_overview: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        size = f"{self.page.width} x {self.page.height} pixels"
        return f"Lens({size}, {len(self)} patches, {self.entropies.mean():.2f} bits on average)"

    def _repr_html_(self) -> str:
        # In a frame of its own, the page's styles and script do not interfere with the notebook's.
        page = html_lib.escape(self.html())
        return (
            f'<iframe srcdoc="{page}" style="width: 100%; height: {FRAME_HEIGHT}px; border: '
            '0"></iframe>'
        )

    def top(self, index: int) -> list[tuple[str, float]]:
        """Returns a patch's likeliest tokens as readable text, with their probabilities."""
        found = zip(self.tokens[index], self.probabilities[index], strict=True)
        return [(self.tokenizer.piece(int(token)), float(p)) for token, p in found]

    def detail(self) -> "Lens":
        """Returns the lens without the patches of the overview tile: the rest cover the page
        once."""
        kept = ~self.is_overview
        names = ("boxes", "tokens", "probabilities", "entropies", "is_overview")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in names})

    def html(self, title: str = TITLE) -> str:
        """Returns an interactive page of HTML, which needs no other file; hovering over a patch
        shows its tokens."""
        return html.render(
            FILE, title=title, lens=self, data=_page_data(self), page=_page_uri(self.page)
        )

    def save(self, path: str | os.PathLike[str], title: str = TITLE) -> Path:
        """Writes the interactive page (.html) or the still picture (.png), and returns the path.

        Args:
          path: file to write; its suffix chooses the form.
          title: heading of the page; a picture has none.

        Raises:
          UserError: the suffix is another.
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
    """A patch for a report: its picture, its entropy in bits, and its likeliest tokens, as readable
    text, with their probabilities."""

    image: Image.Image
    entropy: float
    tokens: tuple[tuple[str, float], ...]


def check_suffix(path: Path) -> None:
    """Raises UserError where a lens cannot be saved under the path's suffix."""
    if path.suffix not in (".html", ".png"):
        raise UserError(
            f"cannot save a lens as {path.name}: a name ends in .html, to hover over, or in .png"
        )


def picture(lens: Lens) -> bytes:
    """Returns a lens as a PNG: on the page, every patch is framed, tinted by its entropy, and has
    its likeliest token at its foot."""
    lens = lens.detail()
    vocab_bits = np.log2(lens.vocab_size)
    # Entropies of a trained model's patches differ below one bit, on a scale up to log2(V): the
    # square root keeps them apart.
    norm = PowerNorm(0.5, 0, vocab_bits)
    colors = mpl.colormaps["plasma_r"]
    height = PICTURE_INCHES * lens.page.height / lens.page.width
    figure = Figure(
        figsize=(PICTURE_INCHES, height + 0.65), dpi=DPI, layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    axes.imshow(
        lens.page, extent=(0, lens.page.width, lens.page.height, 0), interpolation="lanczos"
    )
    # A point of a font is 1/72 inch.
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
    bar.ax.tick_params(labelsize=18, length=3)
    bar.outline.set_visible(False)
    return plotting.to_png(figure)


def readings(lens: Lens, count: int, num_tokens: int = 3) -> list[Reading]:
    """Returns `count` patches, evenly spread from the most to the least certain; patches whose
    likeliest token is a space are left out."""
    lens = lens.detail()
    # The stable sort makes the choice the same on every machine.
    (inked,) = np.nonzero(lens.tokens[:, 0] != lens.tokenizer.space_id)
    ordered = inked[np.argsort(lens.entropies[inked], kind="stable")]
    # Without repetition: rounding may give one place twice.
    chosen = ordered[
        np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    ]
    return [_reading(lens, index, num_tokens) for index in chosen]


def _page_data(lens: Lens) -> dict[str, Any]:
    """Returns the data for the page's script.

    Boxes are in fractions of the page, and tokens are indices into `pieces`, which spells each
    token in use once: the page need not hold the whole vocabulary.
    """
    # Of which shape `places` are depends on numpy's version: they are reshaped below.
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
        "bits": float(np.log2(lens.vocab_size)),
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
    """Draws a patch's frame and token; `points` is the size of a page pixel, in 1/72 inch."""
    left, top, right, bottom = box
    frame = (left, top), right - left, bottom - top
    axes.add_patch(
        Rectangle(*frame, facecolor=(*color[:3], TINT), edgecolor="#00000022", linewidth=0.6)
    )
    # A monospaced character is 0.6 times as wide as its font size: the token is as wide as the
    # patch, but at most a third as high.
    size = points * min((right - left) / (0.6 * len(token)), (bottom - top) / 3)
    axes.text(
        (left + right) / 2, bottom, token, ha="center", va="bottom", fontsize=size,
        fontfamily="monospace", fontweight="bold", color="#00000055" if is_space else "#b3005e",
        path_effects=[] if is_space else [withStroke(linewidth=size / 6, foreground="white")],
    )  # fmt: skip


def _reading(lens: Lens, index: int, num_tokens: int) -> Reading:
    crop = lens.page.crop(tuple(int(edge) for edge in np.round(lens.boxes[index])))
    return Reading(crop, float(lens.entropies[index]), tuple(lens.top(index)[:num_tokens]))
