"""What compilations told, kept on disk: a second plan of the same program takes seconds.

The folder is `alignvlm_jax/plans` in XDG_CACHE_HOME, or ~/.cache. A summary has a name made of all
that its program depends on: the config, the slices, the versions of what traces and compiles, their
flags, and this package's own source. It may be removed at any time.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax import storage

PACKAGE = Path(__file__).parents[1]
DEPENDENCIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_")
"""Beginnings of the environment variables that change what is compiled."""


def folder() -> Path:
    """Returns where summaries are; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "alignvlm_jax" / "plans"


def key(*program: object) -> str:
    """Returns the name of a program's summary; `program` is all that it is made of beside versions,
    flags and source: values whose text differs where they do."""
    flags = {name: value for name, value in os.environ.items() if name.startswith(FLAGS)}
    parts = (program, sorted(flags.items()), _versions(), _source())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def load(name: str) -> dict[str, Any] | None:
    """Returns a summary; None where there is none, or none that can be read."""
    try:
        return json.loads((folder() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None


def save(name: str, summary: Mapping[str, Any]) -> None:
    """Keeps a summary, where it can be written."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        storage.write_whole(folder() / f"{name}.json", json.dumps(summary))
    except OSError:  # A read-only home is no reason to do without the plan.
        return


@functools.cache
def _versions() -> tuple[str, ...]:
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    versions = [f"{name} {found.get(name, 'absent')}" for name in DEPENDENCIES]
    return platform.python_version(), *versions


@functools.cache
def _source() -> str:
    """A checksum of this package's source."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
