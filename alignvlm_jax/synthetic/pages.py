"""The drawing of small pages: lines of cells in a font, with the exact box and character edges of
every word."""

import dataclasses

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from alignvlm_jax.data.record import Word
from alignvlm_jax.synthetic import fonts
from alignvlm_jax.synthetic.fonts import Face

PAGE_WIDTH = 128
MARGIN = 2
LINE_HEIGHT = 16
COLUMN_GAP = 8
LEADERS = "..."
"""The text of a row of dots, however many they are: their number tells a reader nothing."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the text of a page stands.

    Attributes:
      align: how the cells of a line are placed: "flow" joins them by `separator`, "grid" lines them
        up in columns, "right" is a grid with the last cell at the right edge.
      separator: text between the cells of a line in "flow".
      leaders: whether dots lead to the last cell in "right".
      ruled: whether a line is drawn below each line of text.
      title: whether a title stands above the text.
      pitch: height of a line, in pixels.
    """

    align: str = "flow"
    separator: str = ": "
    leaders: bool = False
    ruled: bool = False
    title: bool = False
    pitch: int = LINE_HEIGHT


@dataclasses.dataclass(frozen=True)
class Style:
    """What the letters of a page look like.

    Attributes:
      face: a face of `fonts`.
      size: font size, in pixels.
      left: left margin, in pixels.
      ink: gray level of the text, 0 for black.
      stretch: width of the letters, 1 for the face's own.
      slant: pixels to the right for each pixel up, in addition to the face's own slope.
      weight: gamma of the letters' soft edges: strokes are thinner below 1, and thicker above.
    """

    face: Face
    size: int
    left: int = 2
    ink: int = 0
    stretch: float = 1.0
    slant: float = 0.0
    weight: float = 1.0


Lines = tuple[tuple[str, ...], ...]
"""The text of a page: lines of cells. A cell may hold several words."""


def place(lines: Lines, layout: Layout, style: Style) -> list[list[tuple[float, str]]] | None:
    """Returns the cells of every line, each with its left edge, or None where they do not fit the
    page. All lengths are in pixels before letters are stretched."""
    font = fonts.load(style.face, style.size)
    left = style.left / style.stretch
    right = (PAGE_WIDTH - MARGIN) / style.stretch
    if layout.align == "flow":
        placed = [[(left, layout.separator.join(cells))] for cells in lines]
    else:
        columns = max(len(cells) for cells in lines)
        # A line with fewer cells than the others (a title, a shop's name) spans columns, and must
        # not widen any of them.
        grid = [cells for cells in lines if len(cells) == columns]
        widths = [max(font.getlength(cells[i]) for cells in grid) for i in range(columns)]
        lefts = [left + round(sum(widths[:i]) + COLUMN_GAP * i) for i in range(columns)]
        # Lines with fewer cells take the first columns.
        placed = [list(zip(lefts, cells, strict=False)) for cells in lines]
        if layout.align == "right":
            placed = [_to_the_right(cells, right, layout, font) for cells in placed]
    for cells in placed:
        # At least a pixel is free between cells, and at the right edge.
        ends = [left + font.getlength(text) for left, text in cells]
        starts = [left for left, _ in cells[1:]] + [right + 1]
        if any(end + 1 > start for end, start in zip(ends, starts, strict=True)):
            return None
    return placed


def _to_the_right(
    cells: list[tuple[float, str]], right: float, layout: Layout, font
) -> list[tuple[float, str]]:
    if len(cells) < 2:
        return cells
    *before, (_, last) = cells
    start = int(right - font.getlength(last))
    end = before[-1][0] + font.getlength(before[-1][1])
    count = int((start - end - 8) // font.getlength(".")) if layout.leaders else 0
    dots = [(round(end) + 4, "." * count)] if count >= 2 else []
    return [*before, *dots, (start, last)]


def draw(
    lines: Lines,
    rows: list[int],
    layout: Layout,
    style: Style,
    height: int,
    rng: np.random.Generator,
) -> tuple[Image.Image, tuple[tuple[Word, ...], ...]] | None:
    """Draws a page: line i stands in the strip `rows[i]` of `layout.pitch` pixels, moved by up to a
    pixel.

    Returns:
      A gray image of PAGE_WIDTH x `height` and the words by lines, or None where the text does not
      fit.
    """
    placed = place(lines, layout, style)
    if placed is None:
        return None
    ascent, descent = fonts.extent(style.face, style.size)
    page = Image.new("L", (PAGE_WIDTH, height), 255)
    words = []
    for row, cells in zip(rows, placed, strict=True):
        top = row * layout.pitch + (layout.pitch - ascent - descent) // 2 + int(rng.integers(-1, 2))
        top = min(max(top, 0), height - ascent - descent)
        ink, line = draw_line(cells, top, top + ascent + descent, top + ascent, style, page.size)
        page = ImageChops.darker(page, ink)
        words.append(line)
        if layout.ruled:
            y = min((row + 1) * layout.pitch - 1, height - 1)
            ImageDraw.Draw(page).line([(style.left, y), (PAGE_WIDTH - MARGIN, y)], fill=170)
    return page, tuple(words)


def draw_line(
    cells: list[tuple[float, str]],
    top: int,
    bottom: int,
    baseline: int,
    style: Style,
    size: tuple[int, int],
) -> tuple[Image.Image, tuple[Word, ...]]:
    """Returns an otherwise white page of `size` with a line of text, and the words in it."""
    font = fonts.load(style.face, style.size)
    # Before letters are stretched, a page with narrow ones is wider than the page.
    ink = Image.new("L", (round(size[0] / min(style.stretch, 1)), size[1]), 255)
    canvas = ImageDraw.Draw(ink)
    words = []
    for cell_left, cell in cells:
        for left, text in _words(font, cell_left, cell):
            # The edges are of the text as measured, and stretched below as its pixels are.
            canvas.text((left, baseline), text, fill=style.ink, font=font, anchor="ls")
            edges = [round(x * style.stretch, 2) for x in _edges(font, left, text)]
            box = (edges[0], float(top), edges[-1], float(bottom))
            words.append(Word(text if text.strip(".") else LEADERS, box, tuple(edges)))
    if (style.stretch, style.slant) != (1, 0):
        # The line leans about its middle, where the edges of its characters stay.
        middle = (top + bottom) / 2
        inverse = (1 / style.stretch, style.slant / style.stretch)
        shift = -style.slant * middle / style.stretch
        ink = ink.transform(
            size,
            Image.Transform.AFFINE,
            (*inverse, shift, 0, 1, 0),
            Image.Resampling.BICUBIC,
            fillcolor=255,
        )
    # White stays white, so that strokes change within their boxes.
    if style.weight != 1:
        ink = ink.point([round(255 * (gray / 255) ** style.weight) for gray in range(256)])
    return ink, tuple(words)


def _words(font, left: float, cell: str) -> list[tuple[int, str]]:
    placed = []
    start = 0
    for text in cell.split(" "):
        # Measured as a part of its cell: spaces, and kerning across them, are in the length.
        if text:
            placed.append((round(left + font.getlength(cell[:start])), text))
        start += len(text) + 1
    return placed


def _edges(font, left: float, text: str) -> list[float]:
    """Returns the left edge of each character and the right edge of the last; of leaders those of
    `LEADERS`, which share the row of dots evenly."""
    if text.strip("."):
        # By the lengths of prefixes: sums of single characters would leave out kerning.
        return [left + font.getlength(text[:i]) for i in range(len(text) + 1)]
    step = font.getlength(text) / len(LEADERS)
    return [left + step * i for i in range(len(LEADERS) + 1)]
