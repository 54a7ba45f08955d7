"""Images: decodes files of any format to RGB, and cuts a page into the encoder's tiles."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from alignvlm_jax import storage
from alignvlm_jax.config import VisionConfig
from alignvlm_jax.data import pdf
from alignvlm_jax.errors import UserError

MIN_COVERAGE = 0.9
"""Coverage above which a grid is good enough, as in Ovis v1.6."""

ORIENTATION = 0x0112
"""EXIF's tag of the orientation; with values 5 to 8, height and width change places."""
EXIF_OF_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""One of these stands in a PNG that says its orientation."""
SIXTEEN_BITS = ("PPM", "PNG")
"""File formats that have no wider integers, though Pillow opens some of them as such."""
NEW_SUBFILE_TYPE = 254
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262  # 0 where 0 is white
REDUCED = 1
"""Bit of a TIFF frame's kind: it is another one at a lower resolution."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation."""
# Pillow refuses an image with a longer text or colour profile, which all viewers show.
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 27

PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colours are multiplied by their opacity, and those that hold the same otherwise."""

BAD_IMAGE = (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError)
"""The exceptions that Pillow raises for damaged files (RuntimeError for AVIF)."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one page.

    The page's point (x, y), if in `crops[n]`, is at `(x - left, y - top) * scales[n]` in tile n.
    """

    pixels: np.ndarray  # uint8 [n, Y, X, 3], white where the crop does not reach
    crops: np.ndarray  # float32 [n, 4]: left, top, right, bottom in pixels of the page
    scales: np.ndarray  # float32 [n, 2]: x, y


def decode_image(data: bytes, name: str, page: int = 1) -> Image.Image:
    """Returns an image file decoded to RGB.

    It is turned upright (EXIF), and transparency is composed on white. A TIFF may have several
    pages; of an animation the first frame is taken.

    Raises:
      UserError: the file cannot be read, or has no such page; the message has `name`.
    """
    with _opened(data, name) as image:
        # Before the pixels: `seek` leaves those of the page before.
        if page != 1:
            frames = page_frames(image)
            if not 1 <= page <= len(frames):
                has = f"its pages are 1 to {len(frames)}" if frames[1:] else "it is an image"
                raise UserError(f"{name} has no page {page}: {has}")
            image.seek(frames[page - 1])
        return as_rgb(image)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Returns the height and width that `decode_image` gives, from the file's header alone.

    Raises:
      UserError: the file cannot be read; the message has `name`.
    """
    with _opened(data, name) as image:
        width, height = image.size
        # For a TIFF, Pillow's size already has the orientation in it; and of a PNG it decodes all
        # pixels, to look for EXIF behind them.
        has_exif = image.format != "TIFF" and (
            image.format != "PNG" or any(place in data for place in EXIF_OF_PNG)
        )
        is_turned = has_exif and 5 <= _orientation(image) <= 8
    return (width, height) if is_turned else (height, width)


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Opens an image file; what is wrong with it becomes a UserError, here and in the block."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as err:
        raise UserError(f"cannot read image {name}: no known image format") from err
    except BAD_IMAGE as err:
        raise UserError(
            f"cannot read image {name}: {' '.join(str(err).split()) or type(err).__name__}"
        ) from err


def page_frames(image: Image.Image) -> list[int]:
    """Returns the numbers of the frames of an open image file that are pages: of a TIFF all but
    those that are said to be small copies of another, of other kinds the first."""
    found = [0]
    if image.format != "TIFF":
        return found
    # Where the next frame lies may be wrong, and the first be whole all the same.
    with contextlib.suppress(Exception):
        for frame in range(1, image.n_frames):
            image.seek(frame)
            if not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & REDUCED:
                found.append(frame)
    image.seek(0)
    return found


def _upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF says."""
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Returns the orientation of an image, 1 (upright) where its EXIF cannot be read."""
    # This tag alone is read, and nothing written: many a photo has a wrong value in some other tag,
    # on which ImageOps.exif_transpose fails.
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def load_page(path: str | Path, page: int = 1, dpi: float = pdf.DPI) -> Image.Image:
    """Returns an image file, or a page of a PDF file, as RGB.

    Args:
      path: the file, local or in a bucket.
      page: number of the page, from 1; of images only a TIFF may have more.
      dpi: pixels an inch at which a PDF page is drawn.

    Raises:
      UserError: the file is missing or unreadable, or has no such page.
    """
    try:
        data = storage.path(path).read_bytes()
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}") from err
    if pdf.is_pdf(data):
        return pdf.draw_of_file(data, str(path), page, dpi)
    return decode_image(data, str(path), page)


def as_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in memory as `decode_image` returns that of a file."""
    # Pillow turns a TIFF as it loads it; until then its EXIF says otherwise.
    image.load()
    return _to_rgb(_upright(image), image.format, getattr(image, "tag_v2", {}))


def choose_grids(
    sizes: np.ndarray, vision: VisionConfig, max_tiles: int, use_overview: bool = False
) -> np.ndarray:
    """Returns the grids of cells that pages are cut into, by the rule of Ovis v1.6.

    The coverage of a grid is the fraction of the page's pixels that is left after its cells were
    shrunk to the tile. The grid with the fewest cells whose coverage is above `MIN_COVERAGE` is
    chosen; if there is none, the one with the largest coverage, and among equals the one with
    fewer cells. Unlike in Ovis, tiles may have any shape.

    Args:
      sizes: height and width of each page, int [M, 2].
      vision: gives the size of a tile.
      max_tiles: the largest number of tiles of a page, with its overview.
      use_overview: whether a page of more than one cell has an overview tile.

    Returns:
      The rows and columns of each grid, int32 [M, 2].
    """
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    grids = [(r, c) for r, c in grids if r * c == 1 or r * c + use_overview <= max_tiles]
    chosen = np.ones((len(sizes), 2), np.int32)
    best = np.zeros(len(sizes))
    height, width = np.transpose(sizes)
    # Fewest cells first, for all pages at once: `best` [M] is the coverage of `chosen` so far.
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        shrink = np.minimum(
            1.0, np.minimum(vision.tile_height * rows / height, vision.tile_width * columns / width)
        )
        # Both sides of a cell shrink alike: its pixels go by the square.
        coverage = shrink * shrink
        # A page that has a good grid keeps it. There is no tie to break between grids of as many
        # cells: if two of them are good, so is one of fewer.
        better = (coverage > best) & (best <= MIN_COVERAGE)
        chosen[better] = rows, columns
        best[better] = coverage[better]
    return chosen


# Cached, since the pages of a data set have few different sizes.
@functools.lru_cache(maxsize=4096)
def choose_grid(
    height: int, width: int, vision: VisionConfig, max_tiles: int, use_overview: bool = False
) -> tuple[int, int]:
    """Returns the rows and columns of the grid of one page, as `choose_grids` has it."""
    [(rows, columns)] = choose_grids(
        np.array([[height, width]]), vision, max_tiles, use_overview
    ).tolist()
    return rows, columns


def seen_size(
    height: int, width: int, vision: VisionConfig, max_tiles: int, use_overview: bool
) -> tuple[int, int]:
    """Returns the height and width in pixels to which a page is reduced, at most its own; the
    arguments are those of `choose_grid`."""
    rows, columns = choose_grid(height, width, vision, max_tiles, use_overview)
    shrink = min(1.0, vision.tile_height * rows / height, vision.tile_width * columns / width)
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def count_tiles(
    sizes: np.ndarray, vision: VisionConfig, max_tiles: int, use_overview: bool
) -> np.ndarray:
    """Returns the number of tiles that `tile_image` makes of each page, int32 [M].

    Args:
      sizes: height and width of each page, int [M, 2].
      vision: gives the size of a tile.
      max_tiles: the largest number of tiles of a page, with its overview.
      use_overview: whether a page of more than one cell has an overview tile.
    """
    grids = choose_grids(sizes, vision, max_tiles, use_overview)
    # A page with fewer pixels than cells has empty cells, which are no tiles.
    cells = np.minimum(grids, sizes).prod(axis=1)
    return (cells + (use_overview & (grids.prod(axis=1) > 1))).astype(np.int32)


def tile_image(
    image: Image.Image, vision: VisionConfig, max_tiles: int, use_overview: bool
) -> Tiles:
    """Returns the tiles of an RGB page, at most `max_tiles`: the overview, then cells by rows.

    Cells keep their aspect ratio: each is resized to fit the tile, at whose top left it lies. A
    page of exactly the grid's size is cut without resampling.
    """
    # Bounds of cells are whole pixels, which partition the page even if it does not divide evenly.
    rows, columns = choose_grid(image.height, image.width, vision, max_tiles, use_overview)
    crops = [
        (
            image.width * column // columns,
            image.height * row // rows,
            image.width * (column + 1) // columns,
            image.height * (row + 1) // rows,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    if use_overview and len(crops) > 1:
        crops.insert(0, (0, 0, image.width, image.height))
    # A page with fewer pixels than cells has empty cells.
    crops = [crop for crop in crops if crop[0] < crop[2] and crop[1] < crop[3]]
    return stack(fit(image, crop, vision) for crop in crops)


def fit(image: Image.Image, crop: tuple[int, int, int, int], vision: VisionConfig):
    """Returns the tile of a crop, uint8 [Y, X, 3], the crop, and its scales along x and y."""
    width = crop[2] - crop[0]
    height = crop[3] - crop[1]
    scale = min(vision.tile_width / width, vision.tile_height / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    tile = np.full((vision.tile_height, vision.tile_width, 3), 255, np.uint8)
    cell = image.crop(crop)
    if size != (width, height):
        cell = cell.resize(size, Image.Resampling.BICUBIC)
    tile[: size[1], : size[0]] = np.asarray(cell)
    # Not `scale` itself: sides are rounded to whole pixels, and boxes of words have to match.
    return tile, crop, (size[0] / width, size[1] / height)


def stack(tiles: Iterable) -> Tiles:
    """Returns what `fit` has made of each crop of a page as its tiles."""
    pixels, crops, scales = zip(*tiles, strict=True)
    return Tiles(np.stack(pixels), np.array(crops, np.float32), np.array(scales, np.float32))


def _gray_of_floats(image: Image.Image) -> np.ndarray:
    """Returns the gray levels of a floating-point image, float32 [Y, X] from 0 (black) to 1.

    There is no rule what the numbers of such a file mean: others are refused.

    Raises:
      UserError: a level is outside of 0 to 1.
    """
    levels = np.asarray(image)
    least = levels.min()
    most = levels.max()
    # Not `least < 0 or most > 1`, which NaN would pass.
    if not (least >= 0 and most <= 1):
        raise UserError(
            f"an image of floating-point numbers from {least:g} to {most:g}; they must be from 0 "
            "to 1"
        )
    return levels


def _gray_of_integers(image: Image.Image, file_format: str | None, bits: int) -> np.ndarray:
    """Returns the gray levels of an image of 32-bit integers, uint8 [Y, X]: as they are up to 255,
    and up to 65,535 the upper byte of so many bits, which those of `SIXTEEN_BITS` always have.

    Raises:
      UserError: a level is outside of these.
    """
    # Signed and unsigned numbers come alike: only a wider type tells them apart.
    levels = np.asarray(image).astype(np.int64)
    least = levels.min()
    most = levels.max()
    if least < 0 or most > 65_535:
        raise UserError(
            f"an image of 32-bit integers from {least} to {most}; they must be from 0 to 255, or "
            "to 65535"
        )
    has_8_bits = most <= 255 and file_format not in SIXTEEN_BITS
    return (levels if has_8_bits else levels >> (bits - 8)).astype(np.uint8)


def _to_rgb(image: Image.Image, file_format: str | None, tags: Mapping[int, Any]) -> Image.Image:
    """Returns an image of any mode, from a file of this format and with these tags, as RGB.

    Pillow's own conversion would clip 16-bit gray to 8 bits and compose transparency on black.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        [bits, *_] = tags.get(BITS_PER_SAMPLE, (16,))
        if image.mode == "F":
            levels = (_gray_of_floats(image) * 255).astype(np.uint8)
        elif image.mode == "I":
            # Signed numbers of 16 bits have 15 for their levels.
            levels = _gray_of_integers(image, file_format, 15 if bits == 16 and tags else 16)
        else:
            # Of 16 bits the upper byte; a TIFF may have 12.
            levels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        # Where 0 is white, Pillow inverts 8 bits and less alone.
        image = Image.fromarray(255 - levels if tags.get(PHOTOMETRIC) == 0 else levels)
    elif image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode == "RGBA" or "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # convert copies even an RGB image.
    return image if image.mode == "RGB" else image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """Returns the image as a quickly compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
