"""Storage on this machine or in a bucket (gs://); only this package tells them apart.

A path is a `pathlib.Path`, or for a bucket an `etils.epath.Path`, which has the same methods. The
operations in which they differ are here: writing a file whole, appending, moving, and folders that
appear whole. Errors are OSErrors with the path and a reason.
"""

import atexit
import contextlib
import errno
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import appending, bucket, bucket_requests, lease
from alignvlm_jax.storage.appending import Appender
from alignvlm_jax.storage.bucket import SCHEME, is_bucket, name_of
from alignvlm_jax.storage.bucket_requests import RUN_PATIENCE, patience

__all__ = ["RUN_PATIENCE", "Appender", "Path", "is_bucket", "patience"]

INCOMPLETE = "INCOMPLETE"
"""Name of the file that marks an unfinished folder where folders cannot be renamed: it is there
from before the folder's first file until after its last."""
CANNOT_RENAME = {
    errno.EMFILE,
    errno.ENOTSUP,
    errno.EXDEV,
    errno.ENOSYS,
    errno.EPERM,
    errno.EIO,
    errno.EINVAL,
}
"""Errors that mounts of buckets raise when a folder is to be renamed; EMFILE is gcsfuse's for a
folder with more files than it renames."""


def path(text: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder, on this machine or gs://BUCKET/NAME.

    Raises:
      UserError: it is of another kind of storage, or names no bucket.
    """
    text = os.fspath(text)
    if text.startswith("gs:/") and not text.startswith(SCHEME):
        raise UserError(f"{text} has one slash after gs:; did you mean {SCHEME}{text[4:]}?")
    if "://" not in text:
        return Path(text)
    if not text.startswith((SCHEME, "gcs://")):
        raise UserError(f"cannot use {text}: known are local paths and {SCHEME}BUCKET/NAME")
    rest = text.partition("://")[2]
    name = "/".join(part for part in rest.split("/") if part)
    if not name or rest.startswith("/"):
        raise UserError(f"{text} names no bucket; expected {SCHEME}BUCKET/NAME")
    # Imported here: commands without a bucket do not pay for it.
    from etils import epath

    bucket.register()
    return epath.Path(SCHEME + name)


def check_name(where: Path) -> None:
    """Raises UserError for a folder whose name has characters that libraries take for syntax: orbax
    finds the files of a checkpoint by a glob pattern that begins with it, and a URL ends at # or
    ?."""
    name = os.fspath(absolute(where))
    if wrong := sorted(set(name) & set("*?[]\\#" if is_bucket(where) else "*?[]\\")):
        raise UserError(
            f"{name} has {' '.join(wrong)} in it, which no checkpoint can be written below; take "
            "a name without"
        )


def absolute(where: Path) -> Path:
    """Returns a path that means the same from any folder."""
    return where if is_bucket(where) else where.absolute()


def write_whole(where: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8; at any moment, also after a crash, the name has the old content
    or the new, whole."""
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(where):
        bucket.put(name_of(where), content)
        return
    # In the same folder, since a rename is atomic within one file system only. Synced before the
    # rename: a crash could otherwise leave the new name with nothing in it.
    beside = where.with_name(f"{where.name}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, where)


def move(source: Path, target: Path) -> None:
    """Renames a file within its kind of storage, replacing a file of the new name."""
    if is_bucket(source):
        # Not atomic: a kill in between leaves the file under both names, never under none.
        bucket.filesystem().cp_file(name_of(source), name_of(target))
        bucket.filesystem().rm_file(name_of(source))
    else:
        os.replace(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, also from one kind of storage to the other."""
    if is_bucket(source) and is_bucket(target):
        bucket.filesystem().cp_file(name_of(source), name_of(target))
    elif is_bucket(source):
        bucket.filesystem().get_file(name_of(source), os.fspath(target))
    elif is_bucket(target):
        bucket.filesystem().put_file(os.fspath(source), name_of(target))
    else:
        shutil.copyfile(source, target)


def remove_tree(folder: Path) -> None:
    """Removes a folder and all below it; does nothing where there is none."""
    if is_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Renames a folder to a free name beside its own.

    Where folders cannot be renamed, all files are copied before the first is removed. The file
    `last`, directly in the folder, is copied last and removed first: a folder that has it is whole.
    """
    if can_rename_folders(source.parent):
        source.rename(target)
        return
    names = [name for name in files_below(source) if name != last]
    for name in (*names, last) if (source / last).exists() else names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target / name)
    (source / last).unlink(missing_ok=True)
    remove_tree(source)


def children(folder: Path) -> list[Path]:
    """Returns the paths in a folder; none where the folder does not exist, as an empty one never
    does in a bucket."""
    try:
        # iterdir may be lazy: the list is made here, so that its error is caught here.
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def files_below(folder: Path) -> list[str]:
    """Returns the names, relative to `folder`, of all files below it, sorted."""
    if is_bucket(folder):
        found = bucket.filesystem().find(name_of(folder))
        return sorted(name.removeprefix(f"{name_of(folder)}/") for name in found)
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@contextlib.contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """A context with a folder on this machine, for libraries that write only there; at its end the
    files go to `target`."""
    if not is_bucket(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for name in files_below(Path(folder)):
            copy_file(Path(folder, name), target / name)


def free_bytes(folder: Path) -> int | None:
    """Returns the free space of a folder's disk in bytes; None for a bucket."""
    return None if is_bucket(folder) else shutil.disk_usage(folder).free


def can_rename_folders(folder: Path) -> bool:
    """Whether a folder that is not empty can be renamed within `folder`, which must exist.

    In a bucket it never can, on a mount of one it may. It is found out by trying, once for each
    folder.
    """
    return False if is_bucket(folder) else _can_rename(str(folder.absolute()))


@functools.cache
def _can_rename(folder: str) -> bool:
    # Mounts may rename an empty folder and refuse one with files: the probe has a file in it.
    probe = Path(folder, f".rename-{uuid.uuid4().hex}")
    renamed = probe.with_suffix(".renamed")
    try:
        probe.mkdir()
        (probe / "file").write_bytes(b"")
        probe.rename(renamed)
    except OSError as err:
        if err.errno in CANNOT_RENAME:
            return False
        raise
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)
    return True


def refuse_existing(out: Path) -> None:
    """Raises UserError where `out` exists already; an unfinished folder may be written over."""
    if out.exists() and not (out / INCOMPLETE).exists():
        raise UserError(f"{out} exists; take another --out, or remove it")


def check_whole(folder: Path) -> None:
    """Raises UserError for a folder that was left half written."""
    if (folder / INCOMPLETE).exists():
        raise UserError(
            f"{folder} was not finished: what wrote it was stopped; remove it and write it again"
        )


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A context with a folder to write into, which becomes `out` at its end, or is removed where an
    error ends it.

    Where folders can be renamed, it lies beside `out` until then. Elsewhere it is `out` itself,
    with a file `INCOMPLETE` in it from before its first file until after its last, for which
    `check_whole` looks.

    Raises:
      UserError: `out` exists already.
    """
    refuse_existing(out)
    if not is_bucket(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    renames = can_rename_folders(out.parent)
    staging = out.with_name(f"{out.name}.tmp") if renames else out
    # A run that was killed may have left files there, which the new folder must not contain.
    remove_tree(staging)
    staging.mkdir(parents=True, exist_ok=True)
    if not renames:
        write_whole(
            out / INCOMPLETE,
            "This folder is not whole: it is being written, or what wrote it was stopped.\n",
        )
    try:
        yield staging
    except BaseException:  # SystemExit and KeyboardInterrupt, too.
        remove_tree(staging)
        raise
    if renames:
        # Fails where another process has filled `out` meanwhile: then this folder is dropped.
        try:
            os.replace(staging, out)
        finally:
            remove_tree(staging)
    else:
        (out / INCOMPLETE).unlink()  # From here on the folder is whole.


def check_held(where: Path) -> None:
    """Raises UserError where the lease on a folder around `where` was lost; where that is not known
    yet, it returns, and the next write waits."""
    if is_bucket(where):
        with contextlib.suppress(TimeoutError):
            bucket_requests.check_guards(name_of(where))


def sync_all() -> None:
    """Writes out all that was appended to files, and returns when it is safe from a kill; OSError
    or UserError where it cannot be written."""
    appending.sync_all()


def close_all() -> None:
    """Closes all files that grow, and releases leases: for a process that is about to end."""
    # In this order: without its lease, the process may not write any more.
    appending.close_all()
    lease.release_all()


atexit.register(close_all)
