"""The drawing of snippets: a few lines of text, or a small table, in many faces and colours, with
the exact box and character edges of every word."""

import dataclasses

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from alignvlm_jax.data.record import Word
from alignvlm_jax.synthetic import documents, fonts, pages
from alignvlm_jax.synthetic.pages import Style

SIZES = (11, 22)
"""Smallest and largest font size, in pixels."""
PLAIN = 0.65
"""Fraction of snippets on white."""
DEGRADED = 0.2
"""Fraction of snippets that are degraded like a scan, lightly."""
RULED_HEIGHT = 6.2
"""Height of a table with upright rules, in heights of its letters: shorter could be strokes."""
RULED_WIDTH = 48
"""Its width for each rule, in pixels: of a page with little else the letters are not told apart."""

Lines = tuple[tuple[Word, ...], ...]
Snippet = tuple[Image.Image, Lines]


def draw_style(rng: np.random.Generator, unseen_faces: bool) -> Style:
    """Returns a random style, of the variations that documents of training have."""
    varied = documents.Split(evaluation=False, unseen_fonts=unseen_faces, varied=True)
    size = int(rng.integers(SIZES[0], SIZES[1] + 1))
    return dataclasses.replace(documents.draw_style(rng, varied), size=size)


def num_fitting(texts: list[str], style: Style, width: float) -> int:
    """Returns how many of some words a line of this width in pixels holds, and at least one."""
    font = fonts.load(style.face, style.size)
    count = 1
    while count < len(texts) and (
        font.getlength(" ".join(texts[: count + 1])) * style.stretch <= width
    ):
        count += 1
    return count


def text(lines: list[str], style: Style, rng: np.random.Generator) -> Snippet:
    """Returns lines of text below each other, from the left or centred."""
    font = fonts.load(style.face, style.size)
    ascent, descent = fonts.extent(style.face, style.size)
    pitch = round((ascent + descent) * rng.uniform(1.1, 1.6))
    widths = [font.getlength(line) * style.stretch for line in lines]
    left, top, right, bottom = rng.integers(3, 13, 4).tolist()
    # In pixels of the image, once letters are stretched; `draw_line` takes those before.
    spare = max(widths) - np.array(widths)
    is_centred = rng.random() < 0.2
    lefts = left + (spare / 2 if is_centred else 0 * spare)
    # Letters that lean reach beyond their advance.
    size = (
        round(left + max(widths) + right + style.size * abs(style.slant)),
        top + pitch * (len(lines) - 1) + ascent + descent + bottom,
    )
    placed = [
        ([(float(x) / style.stretch, line)], top + pitch * row, style)
        for row, (x, line) in enumerate(zip(lefts, lines, strict=True))
    ]
    image, drawn = _draw(placed, size)
    return _finished(image, rng), drawn


def table(cells: list[tuple[str, ...]], style: Style, rng: np.random.Generator) -> Snippet:
    """Returns a table of rows of cells, the first of which is its header; with or without rules."""
    styles = [_header_style(style, rng), *[style] * (len(cells) - 1)]
    height = max(sum(fonts.extent(one.face, one.size)) for one in styles)
    rules = _Rules(*(rng.random(3) < [0.4, 0.35, 0.35]).tolist())
    pitch = round(height * rng.uniform(1.25, 2.1))
    least_width = 0
    if rules.between_columns or rules.frame:
        pitch = max(pitch, int(np.ceil(RULED_HEIGHT * height / len(cells))))
        least_width = RULED_WIDTH * (len(cells[0]) + 1)
    left, top = rng.integers(5, 13, 2).tolist()
    starts, ends, lefts = _columns(cells, styles, left, least_width, rng)
    placed = [
        (
            [(x / style.stretch, cell) for x, cell in zip(row_lefts, row, strict=True)],
            top + pitch * number + (pitch - height) // 2,
            styles[number],
        )
        for number, (row, row_lefts) in enumerate(zip(cells, lefts, strict=True))
    ]
    size = round(ends[-1] + rng.integers(8, 20)), 2 * top + pitch * len(cells)
    image, drawn = _draw(placed, size)
    ys = [top + pitch * row for row in range(len(cells) + 1)]
    # In the middle between columns, and beside the outer ones.
    inner = [round((end + start) / 2) for end, start in zip(ends, starts[1:], strict=False)]
    xs = [round(starts[0]) - 4, *inner, size[0] - 4]
    ruled = rules.draw(size, xs, ys, rng)
    return _finished(ImageChops.darker(image, ruled), rng), drawn


@dataclasses.dataclass(frozen=True)
class _Rules:
    """The rules of a table; where it has none between its cells its header may have one below."""

    between_rows: bool
    between_columns: bool
    frame: bool

    def draw(
        self, size: tuple[int, int], xs: list[int], ys: list[int], rng: np.random.Generator
    ) -> Image.Image:
        """Returns an otherwise white image with those of columns and rows that end at xs and ys."""
        page = Image.new("L", size, 255)
        canvas = ImageDraw.Draw(page)
        line = {"fill": int(rng.integers(0, 130)), "width": int(rng.integers(1, 3))}
        below_header = not (self.between_rows or self.between_columns) and rng.random() < 0.6
        rows = [ys[0], ys[-1]] * self.frame + ys[1:-1] * self.between_rows + [ys[1]] * below_header
        for y in rows:
            canvas.line([(xs[0], y), (xs[-1], y)], **line)
        for x in [xs[0], xs[-1]] * self.frame + xs[1:-1] * self.between_columns:
            canvas.line([(x, ys[0]), (x, ys[-1])], **line)
        return page


def _header_style(style: Style, rng: np.random.Generator) -> Style:
    """Returns the style of a table's header: in half of them of another face of the family."""
    if rng.random() < 0.5:
        return style
    families = (fonts.SEEN | fonts.UNSEEN).values()
    # By search, since a face does not know its family.
    [family] = [faces for faces in families if style.face in faces]
    return dataclasses.replace(style, face=family[rng.integers(len(family))])


def _columns(
    cells: list[tuple[str, ...]],
    styles: list[Style],
    left: int,
    least_width: int,
    rng: np.random.Generator,
) -> tuple[list[float], list[float], list[list[float]]]:
    """Returns where columns start and end, and where each cell of each row starts, in pixels."""
    widths = np.array(
        [
            [fonts.load(one.face, one.size).getlength(cell) * one.stretch for cell in row]
            for row, one in zip(cells, styles, strict=True)
        ]
    )
    column_widths = widths.max(0)
    # A table with upright rules has a least width: rules that outnumber letters would join all rows
    # into one line.
    spare = least_width - column_widths.sum()
    gap = max(int(rng.integers(14, 50)), round(spare / (len(column_widths) - 1)))
    starts = left + np.cumsum([0, *(column_widths[:-1] + gap)])
    # Columns after the first may stand at the right, as numbers do.
    is_right = np.append(False, rng.random(widths.shape[1] - 1) < 0.3)
    lefts = starts + is_right * (column_widths - widths)
    return starts.tolist(), (starts + column_widths).tolist(), lefts.tolist()


def _draw(
    lines: list[tuple[list[tuple[float, str]], int, Style]], size: tuple[int, int]
) -> Snippet:
    """Draws lines of cells, each with its top and style, on a white image of this size."""
    image = Image.new("L", size, 255)
    drawn = []
    for cells, top, style in lines:
        ascent, descent = fonts.extent(style.face, style.size)
        ink, words = pages.draw_line(cells, top, top + ascent + descent, top + ascent, style, size)
        # Lines may touch: the later one must not paint over the descenders of the one before.
        image = ImageChops.darker(image, ink)
        drawn.append(words)
    return image, tuple(drawn)


def _finished(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns black on white as some snippets are: degraded, on grey or a colour, or inverted."""
    if rng.random() < DEGRADED:
        image = documents.degrade(image, rng, rng.uniform(0.1, 0.5))
    if rng.random() < PLAIN:
        return image
    # Light paper and dark ink, in grey or in colours.
    ink, paper = rng.integers([[0], [195]], [[60], [256]], (2, 3)).astype(float)
    if rng.random() < 0.4:
        ink[:] = ink.mean()
        paper[:] = paper.mean()
    # How much of the paper each pixel shows.
    depth = np.asarray(image, np.float32)[:, :, None] / 255
    if rng.random() < 0.3:
        depth = 1 - depth
    levels = ink + (paper - ink) * depth
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
