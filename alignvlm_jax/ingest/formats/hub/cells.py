"""Images of a row of a parquet file, in all the ways that cells hold them."""

from collections.abc import Sequence
from typing import Any

from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Reject


def images(value: Any, folder: str, without_image: str = "") -> list[bytes]:
    """Returns the image files of a cell: bytes, a text as `files.image` reads it, a struct of bytes
    and path, or a list of these.

    Args:
      value: the cell.
      folder: the folder that paths start from.
      without_image: what stands in place of images where there is none, as
        `known_sets.KnownSet.without_image`.

    Raises:
      Reject: an image is missing, or cannot be read.
    """
    is_list = isinstance(value, list)
    if is_list and not value:
        if without_image == "empty":
            return []
        raise Reject("the image is missing (an empty list in its column)")
    if not is_list and without_image == "null" and _file(value) is None:
        return []
    found = []
    for number, cell in enumerate(value if is_list else [value]):
        file = _file(cell)
        if isinstance(file, str):
            file = files.image(folder, file)
        if not isinstance(file, bytes):
            of_list = f", number {number} of {len(value)}" if is_list else ""
            raise Reject(
                f"the image is missing ({type(cell).__name__} in its column{of_list}, where bytes, "
                "a path or base64 should be)"
            )
        found.append(file)
    # Each may be large; in memory they are together.
    if sum(map(len, found)) > files.MAX_BYTES:
        raise Reject(f"images are too large together (at most {files.MAX_BYTES:,} bytes)")
    return found


def pages(cells: Sequence[Any], folder: str) -> list[bytes]:
    """Returns the image files of cells with a page each, of which the last ones may be null.

    Raises:
      Reject: there is none, a page before the last is missing, or as `images`.
    """
    present = [_file(cell) is not None for cell in cells]
    count = sum(present)
    # After a gap, every page would be taken for the one before it.
    if not count or not all(present[:count]):
        at = present.index(False) + 1
        raise Reject(f"the image of page {at} is missing ({count} of {len(cells)} are there)")
    return images(list(cells[:count]), folder)


def _file(cell: Any) -> Any:
    """Returns what a cell holds of an image: bytes, a text, or None for nothing."""
    # The `datasets` library stores an image as a struct, with bytes or only a path.
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"}:
        return cell.get("bytes") or cell.get("path") or None
    return cell
