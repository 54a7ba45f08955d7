"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, beside `path` first: what has that name is always whole."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def refuse_existing(out: Path) -> None:
    """Raises UserError where `out` is there already."""
    if out.exists():
        raise UserError(f"{out} exists; take another --out, or remove it")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, which becomes `out` if all goes well and is removed if not."""
    refuse_existing(out)
    staging = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
