"""The persistent compilation cache: a run that is resumed does not compile its programs again."""

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
"""Programs that compile in less time are not worth a file; jax's own bound of a second leaves out
the programs of a small run."""


@contextlib.contextmanager
def kept_in(workdir: Path | None) -> Iterator[None]:
    """A context in which compiled programs are read from and kept in `workdir`/compiled, which may
    be in a bucket; without a workdir nowhere, unless the environment says so.

    JAX_COMPILATION_CACHE_DIR names another place, and JAX_ENABLE_COMPILATION_CACHE=0 switches the
    cache off. Of several processes the first one writes, and all read. There is no cache in a
    workdir that cannot be written, and none of several CPU devices, whatever the environment says.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        with _off():
            yield
        return
    is_named = jax.config.jax_compilation_cache_dir is not None
    if is_named or workdir is None or not _is_writable(workdir):
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    folder = storage.absolute(workdir) / FOLDER
    if jax.default_backend() == "cpu":
        # jax does not check whether this processor has the instructions that a program was compiled
        # for: on another kind of host, with the same workdir, it may crash.
        folder /= _processor()
    if jax.process_index() == 0:
        _remove_cut_programs(folder)
    _use(str(folder), LEAST_SECONDS)
    try:
        yield
    finally:
        _use(None, least)


@contextlib.contextmanager
def _off() -> Iterator[None]:
    """A context without a cache.

    XLA compiles a program for several CPU devices so that each takes part in one collective after
    another. Read back from a file (jaxlib 0.10.2) it starts them side by side, until every thread
    waits in another one than its peers: after 40 s XLA aborts the process.
    """
    was_on = jax.config.jax_enable_compilation_cache
    _switch(False)
    try:
        yield
    finally:
        _switch(was_on)


def _switch(is_on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", is_on)
    compilation_cache.reset_cache()  # See `_use`.


def _use(folder: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # jax opens the cache once, when the first program is compiled: without a reset, a change of the
    # folder would have no effect.
    compilation_cache.reset_cache()


def _processor() -> str:
    """Returns a short name for this machine's instruction set: its architecture, and a hash of the
    processor's feature flags."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    able = next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
    return f"{platform.machine()}-{zlib.crc32(able.encode()):08x}"


def _remove_cut_programs(folder: Path) -> None:
    """Removes programs that a kill or a full disk cut short, which jax would find unreadable at
    every start, and never replace."""
    if storage.is_bucket(folder) or not folder.is_dir():  # An object appears whole.
        return
    for program in folder.glob("*-cache"):
        try:
            decompress_executable(program.read_bytes())
        except Exception:  # Which one depends on the compression library that jax found.
            with contextlib.suppress(OSError):
                program.unlink()


def _is_writable(workdir: Path) -> bool:
    if storage.is_bucket(workdir):
        return True
    # The workdir may yet have to be created: its nearest parent that exists decides.
    existing = next(
        folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists()
    )
    return os.access(existing, os.W_OK)
