"""The tiles of a page by `DataConfig.tiling`, for training and inference alike: the cells of a
grid, or its text lines."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import images, text_lines
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Word
from alignvlm_jax.errors import UserError, counted

KeptPatches = Callable[[np.ndarray], np.ndarray]
"""Of tiles, uint8 [n, Y, X, C], the patches that have an image token, bool [n, P]: one at least of
each tile."""


ANY_NUMBER = sys.maxsize
"""The largest number of tiles of a page that may have as many as its lines take."""

SHORTEST = 0.75
"""Fraction of a tile's width that a piece of a line has at least, where another one follows: of a
line of text that much of a tile holds a gap between two words at its end."""


def word_heights(pages: Sequence[Tiles], lines: Sequence[Sequence[Sequence[Word]]]) -> list[float]:
    """Returns how many pixels high the words of pages are in the tiles that show them largest;
    words that no tile shows are left out.

    Args:
      pages: tiles of each page.
      lines: the lines of each.
    """
    heights = []
    for tiles, of_page in zip(pages, lines, strict=False):
        left, top, right, bottom = tiles.crops.T
        for word in (word for line in of_page for word in line if word.text.strip()):
            x = (word.box[0] + word.box[2]) / 2
            y = (word.box[1] + word.box[3]) / 2
            is_shown = (left <= x) & (x < right) & (top <= y) & (y < bottom)
            if is_shown.any():
                # An overview shows all of a page, small, beside its parts.
                scale = float(tiles.scales[is_shown, 1].max())
                heights.append(scale * (word.box[3] - word.box[1]))
    return heights


def tile_page(
    image: Image.Image,
    vision: VisionConfig,
    data: DataConfig,
    most: int | None = None,
    name: str = "the page",
) -> Tiles:
    """Returns the tiles of an RGB page.

    By its text lines, each line is scaled to the tile's height and cut from the left into pieces of
    at most the tile's width, where possible between two words; a page without any is one tile.

    Args:
      image: the page.
      vision: gives the size of a tile.
      data: says how the page is cut.
      most: the largest number of its tiles; None: all that a record may have.
      name: of the page, for messages.

    Raises:
      UserError: its lines are more tiles than that.
    """
    most = data.tiles_of_a_record if most is None else most
    if data.tiling == "grid":
        return images.tile_image(image, vision, most, data.use_overview)
    lines = text_lines.find(image).tolist()
    crops = [piece for line in lines for piece in _pieces(line, image, vision)]
    if len(crops) > most:
        field = f"config.data.{'record_tiles' if data.record_tiles else 'max_tiles'}"
        limit = f"{field} is {data.tiles_of_a_record}"
        if most < data.tiles_of_a_record:
            limit += f", which leaves {most} for it"
        raise UserError(
            f"{name} has {counted(len(lines), 'line')} in {counted(len(crops), 'tile')} of "
            f"{vision.tile_height} x {vision.tile_width} pixels; {limit}"
        )
    whole = (0, 0, image.width, image.height)
    return images.stack(images.fit(image, crop, vision) for crop in crops or [whole])


def _pieces(
    line: tuple[int, int, int, int], image: Image.Image, vision: VisionConfig
) -> Iterator[tuple[int, int, int, int]]:
    """Yields the crops of a line of a page that are at most as wide as a tile, once they are as
    high."""
    start, top, right, bottom = line
    # Rounded down, or a piece would have to shrink by its width.
    width = max(1, vision.tile_width * (bottom - top) // vision.tile_height)
    while right - start > width:
        first = start + math.ceil(SHORTEST * width)
        last = image.crop((first, top, start + width, bottom))
        end = first + _gap(np.asarray(last.convert("L")))
        yield start, top, end, bottom
        start = end
    yield start, top, right, bottom


def _gap(levels: np.ndarray) -> int:
    """Returns the column in the middle of the widest gap in part of a text line, uint8 [Y, X], the
    last of several; the number of columns where letters leave none."""
    behind = int(np.bincount(levels.ravel(), minlength=256).argmax())
    # A rule above or below the letters would join all of them.
    is_rule = (np.abs(levels.astype(np.int16) - behind) >= text_lines.CONTRAST).all(1)
    levels = np.where(is_rule[:, None], np.uint8(behind), levels)
    # No letter is as wide as a gap: the two sides of a cut would each show half of it.
    is_blank = levels.max(0) - levels.min(0) < text_lines.CONTRAST
    gaps = text_lines.runs_of(is_blank)
    if not gaps:
        return levels.shape[1]
    # Of equals `max` takes the first: here the last one of the line.
    return sum(max(reversed(gaps), key=lambda gap: gap[1] - gap[0])) // 2


def by_lines(tiles: Tiles, most: int) -> list[Tiles]:
    """Returns the tiles of each text line of a page that is cut by lines; one of more than `most`
    is divided."""
    # The pieces of a line follow each other, from the same row of pixels to the same row.
    is_new = (np.diff(tiles.crops[:, [1, 3]], axis=0) != 0).any(1)
    bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(tiles.crops)]
    spans = [
        (start, min(start + most, end))
        for first, end in itertools.pairwise(bounds)
        for start in range(first, end, most)
    ]
    return [
        Tiles(tiles.pixels[start:end], tiles.crops[start:end], tiles.scales[start:end])
        for start, end in spans
    ]


def kept_patches(pixels: np.ndarray, vision: VisionConfig, data: DataConfig) -> np.ndarray:
    """Returns the patches of tiles, uint8 [n, Y, X, C], whose visual tokens the LLM reads, bool
    [n, P]: all, or where `data.blank_contrast` leaves blank ones out, of a run of them the first.
    """
    if not data.blank_contrast:
        return np.ones((len(pixels), vision.num_patches), bool)
    return one_of_a_run(contrast(pixels, vision) < data.blank_contrast, vision)


def one_of_a_run(is_blank: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Returns the patches of tiles that are not blank, bool [n, P], and the first of each run of
    blank ones in a row of a tile."""
    # A row of patches begins anew in each tile: tiles are not neighbours on every page.
    shape = is_blank.shape
    is_blank = is_blank.reshape(-1, *vision.patch_grid)
    # The first of a row stays in any case: each tile then has a token, by which tiles are counted.
    # One stays: gaps between columns, and the ends of lines, are a part of what a page says.
    is_kept = ~is_blank
    is_kept[..., 0] = True
    is_kept[..., 1:] |= ~is_blank[..., :-1]
    return is_kept.reshape(shape)


def contrast(pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Returns the range of levels within each patch of tiles, uint8 [n, Y, X, C], in the colour
    where it is largest, int16 [n, P]."""
    rows, columns = vision.patch_grid
    # What no patch sees, of a tile that they do not divide evenly, is cut off.
    seen = pixels[:, : rows * vision.patch_height, : columns * vision.patch_width]
    lines = seen.reshape(len(seen), rows, vision.patch_height, -1)
    # One axis after the other: over both at once NumPy takes ten times as long.
    shape = (len(seen), rows, columns, vision.patch_width, 3)
    highest = lines.max(2).reshape(shape).max(3)
    lowest = lines.min(2).reshape(shape).min(3)
    return (highest.astype(np.int16) - lowest).max(-1).reshape(len(seen), -1)


def seen_size(image: Image.Image, vision: VisionConfig, data: DataConfig) -> tuple[int, int]:
    """Returns the height and width in pixels to which a page is reduced, at most its own: most of
    its text lines, or all of it in a grid."""
    if data.tiling == "grid":
        return images.seen_size(
            image.height, image.width, vision, data.tiles_of_a_record, data.use_overview
        )
    scales = tile_page(image, vision, data, ANY_NUMBER).scales
    scale = min(1.0, float(np.median(scales[:, 1])))
    return max(1, round(image.height * scale)), max(1, round(image.width * scale))
