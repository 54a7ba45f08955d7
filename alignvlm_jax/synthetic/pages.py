"""The drawing of small pages: lines of cells in a font, with the exact box and character edges of
every word."""

import dataclasses
import functools
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alignvlm_jax.data.record import Word
from alignvlm_jax.errors import UserError, how_to_install

_MATPLOTLIB = ("matplotlib", "mpl-data/fonts/ttf")

SEEN = {
    "DejaVu Sans": (*_MATPLOTLIB, "DejaVuSans.ttf"),
    "DejaVu Sans Mono": (*_MATPLOTLIB, "DejaVuSansMono.ttf"),
    "DejaVu Serif": (*_MATPLOTLIB, "DejaVuSerif.ttf"),
    "STIX General": (*_MATPLOTLIB, "STIXGeneral.ttf"),
    "Roboto": ("font_roboto", "files", "Roboto-Regular.ttf"),
    "Roboto Medium": ("font_roboto", "files", "Roboto-Medium.ttf"),
    "Source Sans Pro": ("font_source_sans_pro", "files", "SourceSansPro-Regular.ttf"),
    "Source Serif Pro": ("font_source_serif_pro", "files", "SourceSerifPro-Regular.ttf"),
}

UNSEEN = {
    "Lato": ("font_lato", "files", "Lato-Regular.ttf"),
    "Lato Bold": ("font_lato", "files", "Lato-Bold.ttf"),
    "Caladea": ("font_caladea", "files", "Caladea-Regular.ttf"),
}

PACKAGES = {package for package, *_ in (SEEN | UNSEEN).values()}
"""Packages that hold the fonts."""


@functools.lru_cache(maxsize=64)
def load_font(family: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a family's font at `size` pixels.

    Raises:
      UserError: its package is not installed.
    """
    package, folder, name = (SEEN | UNSEEN)[family]
    try:
        path = resources.files(package) / folder / name
        # Basic layout, since Raqm, which only some machines have, shapes text a little differently:
        # records must not depend on the machine.
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ModuleNotFoundError, OSError) as err:
        raise UserError(
            f"font {family!r} needs package {package} ({err}): {how_to_install('demo', 'setup')}"
        ) from err


@functools.lru_cache(maxsize=64)
def font_extent(family: str, size: int) -> tuple[int, int]:
    """Returns the pixels above and below the baseline that a font's letters and digits reach."""
    _, top, _, bottom = load_font(family, size).getbbox("bdfhklgjpqy()|0", anchor="ls")
    return -int(top), int(bottom)


PAGE_WIDTH = 128
LINE_HEIGHT = 16
COLUMN_GAP = 8


@dataclasses.dataclass(frozen=True)
class Style:
    """The layout of a page, with sizes in pixels.

    Attributes:
      family: a font in `SEEN` or `UNSEEN`.
      size: font size.
      align: how the cells of a line are placed: "flow" joins them by `separator`, "grid" lines them
        up in columns, "right" is a grid with the last cell at the right edge.
      separator: text between the cells of a line in "flow".
      leaders: whether dots lead to the last cell in "right".
      ruled: whether a line is drawn below each line of text.
      left: left margin.
      pitch: height of a line.
      ink: gray level of the text, 0 for black.
    """

    family: str
    size: int
    align: str = "flow"
    separator: str = ": "
    leaders: bool = False
    ruled: bool = False
    left: int = 2
    pitch: int = LINE_HEIGHT
    ink: int = 0


Lines = tuple[tuple[str, ...], ...]
"""The text of a page: lines of cells. A cell may hold several words."""


def place(lines: Lines, style: Style) -> list[list[tuple[int, str]]] | None:
    """Returns the cells of every line, each with its left edge in pixels; None where they do not
    fit the page."""
    font = load_font(style.family, style.size)
    right = PAGE_WIDTH - 2
    if style.align == "flow":
        placed = [[(style.left, style.separator.join(cells))] for cells in lines]
    else:
        columns = max(len(cells) for cells in lines)
        # A line with fewer cells than the others (a title, a shop's name) spans columns, and must
        # not widen any of them.
        grid = [cells for cells in lines if len(cells) == columns]
        widths = [max(font.getlength(cells[i]) for cells in grid) for i in range(columns)]
        lefts = [style.left + round(sum(widths[:i]) + COLUMN_GAP * i) for i in range(columns)]
        # Lines with fewer cells take the first columns.
        placed = [list(zip(lefts, cells, strict=False)) for cells in lines]
        if style.align == "right":
            placed = [_to_the_right(cells, right, style, font) for cells in placed]
    for cells in placed:
        ends = [left + font.getlength(text) for left, text in cells]
        starts = [left for left, _ in cells[1:]] + [right + 1]
        # At least a pixel is free between cells, and at the right edge.
        if any(end + 1 > start for end, start in zip(ends, starts, strict=True)):
            return None
    return placed


def _to_the_right(
    cells: list[tuple[int, str]], right: int, style: Style, font
) -> list[tuple[int, str]]:
    if len(cells) < 2:
        return cells
    *before, (_, last) = cells
    start = int(right - font.getlength(last))
    end = before[-1][0] + font.getlength(before[-1][1])
    count = int((start - end - 8) // font.getlength(".")) if style.leaders else 0
    dots = [(round(end) + 4, "." * count)] if count >= 2 else []
    return [*before, *dots, (start, last)]


def draw(
    lines: Lines, rows: list[int], style: Style, height: int, rng: np.random.Generator
) -> tuple[Image.Image, tuple[tuple[Word, ...], ...]] | None:
    """Draws a page: line i stands in the strip `rows[i]` of `style.pitch` pixels, moved by up to a
    pixel.

    Returns:
      A gray image of PAGE_WIDTH x `height` and the words by lines, or None where the text does not
      fit.
    """
    placed = place(lines, style)
    if placed is None:
        return None
    font = load_font(style.family, style.size)
    ascent, descent = font_extent(style.family, style.size)
    image = Image.new("L", (PAGE_WIDTH, height), 255)
    canvas = ImageDraw.Draw(image)
    words = []
    for row, cells in zip(rows, placed, strict=True):
        top = row * style.pitch + (style.pitch - ascent - descent) // 2 + int(rng.integers(-1, 2))
        top = min(max(top, 0), height - ascent - descent)
        words.append(
            tuple(
                _draw_word(
                    canvas, font, style.ink, text, left, top + ascent, (top, top + ascent + descent)
                )
                for cell_left, cell in cells
                for left, text in _words(font, cell_left, cell)
            )
        )
        if style.ruled:
            y = min((row + 1) * style.pitch - 1, height - 1)
            canvas.line([(style.left, y), (PAGE_WIDTH - 2, y)], fill=170)
    return image, tuple(words)


def _words(font, left: int, cell: str) -> list[tuple[int, str]]:
    placed = []
    start = 0
    for text in cell.split(" "):
        # Measured as a part of its cell: spaces, and kerning across them, are in the length.
        if text:
            placed.append((left + round(font.getlength(cell[:start])), text))
        start += len(text) + 1
    return placed


def _draw_word(
    canvas, font, ink: int, text: str, left: int, baseline: int, span: tuple[int, int]
) -> Word:
    canvas.text((left, baseline), text, fill=ink, font=font, anchor="ls")
    # Left edge of each character and right edge of the last, by the lengths of prefixes: sums of
    # single characters would leave out kerning.
    edges = tuple(round(left + font.getlength(text[:i]), 2) for i in range(len(text) + 1))
    return Word(text, (edges[0], float(span[0]), edges[-1], float(span[1])), edges)
