"""Compiled programs that outlive the process: a run that goes on does not compile anew what it
compiled before."""

import contextlib
import os
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax

# jax has no public name for what reads its own files.
from jax._src.compilation_cache import decompress_executable
from jax.experimental.compilation_cache import compilation_cache

from alignvlm_jax import storage

FOLDER = "compiled"
LEAST_SECONDS = 0.2
"""Programs that compile faster are not worth a file; jax's own bound of a second leaves out those
of a small run."""


@contextlib.contextmanager
def kept_in(workdir: Path) -> Iterator[None]:
    """While entered, programs are read from and kept in `workdir`/compiled, which may be in a
    bucket.

    JAX_COMPILATION_CACHE_DIR names another place, and JAX_ENABLE_COMPILATION_CACHE=0 keeps none. Of
    several processes the first one writes, and all read. A folder that cannot be written is left
    alone.
    """
    if jax.config.jax_compilation_cache_dir is not None or not _is_writable(workdir):
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    folder = storage.absolute(workdir) / FOLDER
    if jax.default_backend() == "cpu":
        # jax does not ask whether this processor has the instructions that a program was compiled
        # for.
        folder /= _processor()
    if jax.process_index() == 0:
        _remove_cut_programs(folder)
    _use(str(folder), LEAST_SECONDS)
    try:
        yield
    finally:
        _use(None, least)


def _use(folder: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # The place is looked up once, when the first program is compiled.
    compilation_cache.reset_cache()


def _processor() -> str:
    """What this machine's processor can do, in short."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    able = next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
    return f"{platform.machine()}-{zlib.crc32(able.encode()):08x}"


def _remove_cut_programs(folder: Path) -> None:
    """A kill or a full disk may cut a file short; jax would find it unreadable at every start, and
    never replace it."""
    if storage.is_bucket(folder) or not folder.is_dir():  # An object appears whole.
        return
    for program in folder.glob("*-cache"):
        try:
            decompress_executable(program.read_bytes())
        except Exception:  # Of whichever library compresses.
            with contextlib.suppress(OSError):
                program.unlink()


def _is_writable(workdir: Path) -> bool:
    if storage.is_bucket(workdir):
        return True
    existing = next(
        folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists()
    )
    return os.access(existing, os.W_OK)
