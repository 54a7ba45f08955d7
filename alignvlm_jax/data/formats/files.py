"""Images that a record names or holds."""

import base64
import binascii
from collections.abc import Iterable

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.formats.base import Reject
from alignvlm_jax.storage import faults

MAX_BYTES = 256 << 20
"""Of an image, and of all images of a record together, which are in memory several times."""

MAX_PATH = 4096
"""Characters; a longer text is base64."""


def images(folder: str, names: Iterable[str]) -> tuple[bytes, ...]:
    """Returns the bytes of the images of a record; see `image`.

    Raises:
      Reject: also where they are too large together.
    """
    found, room = [], MAX_BYTES
    for name in names:
        found.append(image(folder, name, room))
        room -= len(found[-1])
    return tuple(found)


def image(folder: str, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the bytes of an image by its path from `folder`, or of its base64: a data URI, or a text that is too
    long for a path.

    Raises:
      Reject: there is no such file, or no such base64, or it is too large.
      UserError: a bucket does not answer. That is no fault of the record, and the run may go on later.
    """
    if name.startswith("data:") or len(name) > MAX_PATH:
        return _decode(name.partition("base64,")[2] if name.startswith("data:") else name)
    path = filesystem.join(folder, name)
    if not filesystem.is_readable(path):
        raise Reject(f"an image is neither local nor on gs:// ({name})")
    try:
        return filesystem.read(path, max_bytes)
    except FileNotFoundError as err:
        raise Reject(f"an image is missing ({name})") from err
    except ValueError as err:
        raise Reject(f"an image file cannot be read ({name}: {err})") from err
    except OSError as err:
        if filesystem.is_remote(path):
            raise faults.as_error(f"cannot read {path}: {err}; the same command goes on", err) from err
        raise Reject(f"an image file cannot be read ({name}: {err.strerror or err})") from err


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise Reject(f"an image is no base64 ({err})") from err
