"""Pages as a model of alignvlm_jax sees them: upright, on white, cut into tiles; for
`processing_alignvlm.py`."""

import pathlib

import numpy as np
from PIL import Image

PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the orientation of its EXIF."""


def choose_grid(height, width, c):
    """Rows and columns that a page is cut into: the fewest cells that keep enough of its pixels."""
    most = c["max_tiles"]
    grids = [(y, x) for y in range(1, most + 1) for x in range(1, most // y + 1)]
    grids = [(y, x) for y, x in grids if y * x == 1 or y * x + c["use_overview"] <= most]
    best = 0.0
    chosen = (1, 1)
    # Fewest cells first; a page that has a good grid keeps it.
    for y, x in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        shrink = min(1.0, c["tile_height"] * y / height, c["tile_width"] * x / width)
        if shrink * shrink > best and best <= c["min_coverage"]:
            best = shrink * shrink
            chosen = (y, x)
    return chosen


def cut_tiles(page, c):
    """Tiles of an RGB page, uint8 [n, height, width, 3]: the overview, then cells row by row."""
    w, h = page.size
    rows, columns = choose_grid(h, w, c)
    boxes = [
        (w * x // columns, h * y // rows, w * (x + 1) // columns, h * (y + 1) // rows)
        for y in range(rows)
        for x in range(columns)
    ]
    # Of a page of one cell the overview would be that cell again.
    if c["use_overview"] and len(boxes) > 1:
        boxes.insert(0, (0, 0, w, h))
    tiles = []
    for box in boxes:
        width = box[2] - box[0]
        height = box[3] - box[1]
        # A page with fewer pixels than cells has empty ones.
        if not width or not height:
            continue
        scale = min(c["tile_width"] / width, c["tile_height"] / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Cells keep their aspect ratio, and lie at the top left of their tile.
        cell = page.crop(box)
        if size != (width, height):
            cell = cell.resize(size, Image.Resampling.BICUBIC)
        tile = np.full((c["tile_height"], c["tile_width"], 3), c["background"], np.uint8)
        tile[: size[1], : size[0]] = np.asarray(cell)
        tiles.append(tile)
    return np.stack(tiles)


def as_page(page):
    """A page as an RGB image: of a path, a Pillow image, or an array, uint8 [Y, X] or [Y, X, C]."""
    if isinstance(page, str | pathlib.Path):
        page = Image.open(page)
    elif isinstance(page, np.ndarray) and page.dtype == np.uint8 and page.ndim in (2, 3):
        page = Image.fromarray(page)
    if not isinstance(page, Image.Image):
        raise TypeError(
            f"a {type(page).__name__} is no page: a path, a Pillow image or a uint8 array is"
        )
    return as_rgb(page)


def as_rgb(page):
    """A Pillow image upright, and on white."""
    page.load()
    # This tag alone: many a photo has a wrong value in some other.
    try:
        turn = UPRIGHT.get(int(page.getexif().get(0x0112, 1)))
    except Exception:
        turn = None
    kind = page.format
    page = page if turn is None else page.transpose(turn)
    if page.mode.startswith("I") or page.mode == "F":
        page = Image.fromarray(gray_levels(page, kind))
    page = page.convert(PREMULTIPLIED.get(page.mode, page.mode))
    if "A" in page.getbands() or "transparency" in page.info:
        page = page.convert("RGBA")
        white = Image.new("RGBA", page.size, (255, 255, 255, 255))
        page = Image.alpha_composite(white, page)
    return page.convert("RGB")


def gray_levels(page, kind):
    """Gray levels, uint8 [Y, X], of a page of wider numbers, which Pillow itself would clip."""
    levels = np.asarray(page)
    most = 1 if page.mode == "F" else 65535
    # Not `levels < 0`, which NaN would pass.
    if not (levels.min() >= 0 and levels.max() <= most):
        raise ValueError(
            f"a page of numbers from {levels.min()} to {levels.max()}, not 0 to {most}"
        )
    if page.mode == "F":
        return (levels * 255).astype(np.uint8)
    has_8_bits = page.mode == "I" and levels.max() <= 255 and kind not in ("PPM", "PNG")
    return (levels if has_8_bits else levels.astype(np.int64) >> 8).astype(np.uint8)
