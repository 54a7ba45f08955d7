"""Images: decoding anything to RGB, and cutting a page into the encoder's tiles."""

import dataclasses
import functools
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pypdfium2
from PIL import Image, ImageOps, UnidentifiedImageError

from alignvlm_jax import storage
from alignvlm_jax.config import VisionConfig
from alignvlm_jax.errors import UserError

MIN_COVERAGE = 0.9
PDF_SCALE = 2.0
"""Pixels a point at which a PDF page is drawn: 144 dpi."""

ORIENTATION = 0x0112
"""EXIF's tag; at 5 to 8 the sides change places."""

BAD_IMAGE = (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError)
"""What Pillow raises for damaged files; RuntimeError for AVIF."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one page.

    Page point (x, y), if in `crops[n]`, is at `(x - left, y - top) * scales[n]` of tile n.
    """

    pixels: np.ndarray  # uint8 [n, Y, X, 3], white where the crop does not reach
    crops: np.ndarray  # float32 [n, 4]: left, top, right, bottom in pixels of the page
    scales: np.ndarray  # float32 [n, 2]: x, y


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB: turned upright, transparency laid on white, the first frame of
    several.

    Raises:
      UserError: it cannot be read; the message holds `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            # In place: a page that stands upright already is not copied.
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnidentifiedImageError as err:
        raise UserError(f"cannot read image {name}: no known image format") from err
    except BAD_IMAGE as err:
        raise UserError(
            f"cannot read image {name}: {' '.join(str(err).split()) or type(err).__name__}"
        ) from err


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Returns the height and width that `decode_image` gives, from the file's header alone.

    Raises:
      UserError: it cannot be read; the message holds `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # Pillow has turned the size of a TIFF already.
            is_turned = image.format != "TIFF" and 5 <= image.getexif().get(ORIENTATION, 1) <= 8
    except BAD_IMAGE as err:
        raise UserError(
            f"cannot read image {name}: {' '.join(str(err).split()) or type(err).__name__}"
        ) from err
    return (width, height) if is_turned else (height, width)


def load_page(path: str | Path, page: int = 1) -> Image.Image:
    """Reads an image file, or draws a page of a PDF (the first is 1), as RGB.

    Raises:
      UserError: the file is missing or unreadable, or has no such page.
    """
    try:
        data = storage.path(path).read_bytes()
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}") from err
    if data.startswith(b"%PDF"):
        return _draw_pdf_page(data, str(path), page)
    if page != 1:
        raise UserError(f"{path} has no page {page}: it is an image")
    return decode_image(data, str(path))


def open_page(source: str | Path | Image.Image | np.ndarray, page: int = 1) -> Image.Image:
    """Returns a page as RGB: of a file, as `load_page`; of an image in memory, Pillow's or uint8
    [Y, X] or [Y, X, C], where C is 1, 3 or 4.

    Raises:
      UserError: the file cannot be read, there is no such page, or an array is no image.
    """
    if isinstance(source, str | os.PathLike):
        return load_page(source, page)
    if page != 1:
        raise UserError(f"an image in memory has no page {page}")
    if isinstance(source, np.ndarray):
        channels = source.shape[2:] or (1,)
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or channels[0] not in (1, 3, 4)
            or not source.size
        ):
            raise UserError(
                f"an array of {source.dtype} {list(source.shape)} is no image: uint8 [Y, X] or "
                "[Y, X, 1, 3 or 4] is"
            )
        source = Image.fromarray(
            source[..., 0] if source.ndim == 3 and channels == (1,) else source
        )
    if not isinstance(source, Image.Image):
        raise UserError(
            f"a {type(source).__name__} is no image: a path, a PIL image or a NumPy array is"
        )
    return _to_rgb(ImageOps.exif_transpose(source))


def _draw_pdf_page(data: bytes, name: str, page: int) -> Image.Image:
    try:
        document = pypdfium2.PdfDocument(data)
        try:
            if not 1 <= page <= len(document):
                raise UserError(f"{name} has no page {page}: its pages are 1 to {len(document)}")
            return document[page - 1].render(scale=PDF_SCALE).to_pil().convert("RGB")
        finally:
            document.close()
    except pypdfium2.PdfiumError as err:
        raise UserError(f"cannot read PDF {name}: {err}") from err


def choose_grids(
    sizes: np.ndarray, vision: VisionConfig, max_tiles: int, use_overview: bool = False
) -> np.ndarray:
    """Returns the rows and columns of cells that pages are cut into, as Ovis v1.6 does, for tiles
    of any shape.

    A grid covers the fraction of the page's pixels that is left after its cells shrank to the tile.
    Of the grids that cover more than 0.9 the one with the fewest cells is taken; else the best
    covering of all, of equals the one with fewer cells. The overview takes one of `max_tiles` where
    there is more than one cell.

    Args:
      sizes: int [M, 2], height and width of each page.

    Returns:
      int32 [M, 2].
    """
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    grids = [(r, c) for r, c in grids if r * c == 1 or r * c + use_overview <= max_tiles]
    chosen = np.ones((len(sizes), 2), np.int32)
    best = np.zeros(len(sizes))
    height, width = np.transpose(sizes)
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        shrink = np.minimum(
            1.0, np.minimum(vision.tile_height * rows / height, vision.tile_width * columns / width)
        )
        coverage = shrink * shrink
        # No tie to break: where two grids of as many cells cover, so does one of fewer.
        better = (coverage > best) & (best <= MIN_COVERAGE)
        chosen[better] = rows, columns
        best[better] = coverage[better]
    return chosen


@functools.lru_cache(maxsize=4096)  # Pages of a data set have few different sizes.
def choose_grid(
    height: int, width: int, vision: VisionConfig, max_tiles: int, use_overview: bool = False
) -> tuple[int, int]:
    """Returns the rows and columns of `choose_grids` for one page."""
    [(rows, columns)] = choose_grids(
        np.array([[height, width]]), vision, max_tiles, use_overview
    ).tolist()
    return rows, columns


def count_tiles(
    sizes: np.ndarray, vision: VisionConfig, max_tiles: int, use_overview: bool
) -> np.ndarray:
    """Returns the number of tiles, int32 [M], that `tile_image` makes of pages of these sizes, int
    [M, 2]."""
    grids = choose_grids(sizes, vision, max_tiles, use_overview)
    # A page with fewer pixels than cells has empty ones, which are no tiles.
    cells = np.minimum(grids, sizes).prod(axis=1)
    return (cells + (use_overview & (grids.prod(axis=1) > 1))).astype(np.int32)


def tile_image(
    image: Image.Image, vision: VisionConfig, max_tiles: int, use_overview: bool
) -> Tiles:
    """Cuts an RGB page into at most `max_tiles` tiles, the overview first, then cells by rows.

    Cells keep their aspect: they are resized to fit the tile and lie at its top left. A page of
    exactly the grid's size is cut without resampling.
    """
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
    # A page with fewer pixels than cells has empty ones.
    crops = [crop for crop in crops if crop[0] < crop[2] and crop[1] < crop[3]]
    return _stack(_fit(image, crop, vision) for crop in crops)


def _fit(image: Image.Image, crop: tuple[int, int, int, int], vision: VisionConfig):
    """Returns a crop's tile as uint8 [Y, X, 3], the crop, and its scales along x and y."""
    width = crop[2] - crop[0]
    height = crop[3] - crop[1]
    scale = min(vision.tile_width / width, vision.tile_height / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    tile = np.full((vision.tile_height, vision.tile_width, 3), 255, np.uint8)
    cell = image.crop(crop)
    if size != (width, height):
        cell = cell.resize(size, Image.Resampling.BICUBIC)
    tile[: size[1], : size[0]] = np.asarray(cell)
    return tile, crop, (size[0] / width, size[1] / height)


def _stack(tiles: Iterable) -> Tiles:
    pixels, crops, scales = zip(*tiles, strict=True)
    return Tiles(np.stack(pixels), np.array(crops, np.float32), np.array(scales, np.float32))


def _gray_of_floats(image: Image.Image) -> np.ndarray:
    """Levels from 0, black, to 1. There is no rule what the numbers of such a file mean."""
    levels = np.asarray(image)
    least = levels.min()
    most = levels.max()
    if not (least >= 0 and most <= 1):  # also where some are NaN
        raise UserError(
            f"an image of floating-point numbers from {least:g} to {most:g}; they must be from 0 "
            "to 1"
        )
    return levels


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode.

    Pillow's own conversion clips 16-bit gray and drops transparency to black.
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray(
            (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        )
    elif image.mode == "F":
        image = Image.fromarray((_gray_of_floats(image) * 255).astype(np.uint8))
    if image.mode == "RGBA" or "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def encode_png(image: Image.Image) -> bytes:
    """Returns the image as a quickly compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
