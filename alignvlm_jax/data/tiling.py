"""The tiles of a page by `DataConfig.tiling`, for training and inference alike: the cells of a
grid, or its text lines."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import images, text_lines
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.errors import UserError, counted


def tile_page(
    image: Image.Image,
    vision: VisionConfig,
    data: DataConfig,
    most: int | None = None,
    name: str = "the page",
) -> Tiles:
    """Returns the tiles of an RGB page.

    By its text lines, each line is scaled to the tile's height and cut into pieces of the tile's
    width, from the left; a page without any is one tile.

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
    crops = [piece for line in lines for piece in _pieces(line, vision)]
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
    line: tuple[int, int, int, int], vision: VisionConfig
) -> Iterator[tuple[int, int, int, int]]:
    """Yields the crops of a line that are as wide as a tile, once they are as high."""
    left, top, right, bottom = line
    # Rounded down, or a piece would have to shrink by its width.
    width = max(1, vision.tile_width * (bottom - top) // vision.tile_height)
    for start in range(left, right, width):
        yield start, top, min(start + width, right), bottom


def seen_size(image: Image.Image, vision: VisionConfig, data: DataConfig) -> tuple[int, int]:
    """Returns the height and width in pixels to which a page is reduced, at most its own: most of
    its text lines, or all of it in a grid.

    Raises:
      UserError: as `tile_page`.
    """
    if data.tiling == "grid":
        return images.seen_size(
            image.height, image.width, vision, data.tiles_of_a_record, data.use_overview
        )
    scale = min(1.0, float(np.median(tile_page(image, vision, data).scales[:, 1])))
    return max(1, round(image.height * scale)), max(1, round(image.width * scale))
