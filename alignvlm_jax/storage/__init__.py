"""Paths of every kind, on this machine or in a bucket (gs://): the only part that knows kinds of
storage.

A path is a `pathlib.Path`, or for a bucket an `etils.epath.Path`, which has the same methods.
What those do not do alike is here: writing whole, appending, moving, and folders that appear
whole. Errors are OSErrors with the path and a reason.
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
"""Stands in a folder that cannot be renamed when it is whole, from before its first file until
after its last."""
CANNOT_RENAME = {
    errno.EMFILE,
    errno.ENOTSUP,
    errno.EXDEV,
    errno.ENOSYS,
    errno.EPERM,
    errno.EIO,
    errno.EINVAL,
}
"""What mounts of buckets say when a folder is to be renamed."""


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
    from etils import epath

    bucket.register()
    return epath.Path(SCHEME + name)


def check_name(where: Path) -> None:
    """Raises UserError for a folder in whose name libraries that write below it see more than a
    name: orbax finds the files of a checkpoint by a pattern that begins with it, and a URL ends at
    # or ?."""
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
    """Writes a file, text as UTF-8; what has that name is whole at any moment, and stays after a
    crash."""
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(where):
        bucket.put(name_of(where), content)
        return
    beside = where.with_name(f"{where.name}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, where)


def move(source: Path, target: Path) -> None:
    """Gives a file another name in its kind of storage, replacing what had it."""
    if is_bucket(source):
        bucket.filesystem().cp_file(name_of(source), name_of(target))
        bucket.filesystem().rm_file(name_of(source))
    else:
        os.replace(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file between any two kinds of storage."""
    if is_bucket(source) and is_bucket(target):
        bucket.filesystem().cp_file(name_of(source), name_of(target))
    elif is_bucket(source):
        bucket.filesystem().get_file(name_of(source), os.fspath(target))
    elif is_bucket(target):
        bucket.filesystem().put_file(os.fspath(source), name_of(target))
    else:
        shutil.copyfile(source, target)


def remove_tree(folder: Path) -> None:
    """Removes a folder and all below it, where there is one."""
    if is_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Gives a folder another name beside its own, which must be free.

    Where folders cannot be renamed all files are copied before the first is removed; `last`, of
    those in the folder itself, is the last that is copied and the first that is removed: what has
    it is whole.
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
    """Returns what stands in a folder; nothing where it is not there, as one without files never is
    in a bucket."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def files_below(folder: Path) -> list[str]:
    """Returns the names, from `folder` on, of all files below it, sorted."""
    if is_bucket(folder):
        found = bucket.filesystem().find(name_of(folder))
        return sorted(name.removeprefix(f"{name_of(folder)}/") for name in found)
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@contextlib.contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """Gives a folder on this machine, for libraries that write only there; what it holds then goes
    to `target`."""
    if not is_bucket(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for name in files_below(Path(folder)):
            copy_file(Path(folder, name), target / name)


def free_bytes(folder: Path) -> int | None:
    """Returns how much a folder still takes, or None where nobody can say."""
    return None if is_bucket(folder) else shutil.disk_usage(folder).free


def can_rename_folders(folder: Path) -> bool:
    """Whether a folder with something in it can be renamed within `folder`, which must be there: no
    bucket does it, and of mounts only some. Tried, once a folder."""
    return False if is_bucket(folder) else _can_rename(str(folder.absolute()))


@functools.cache
def _can_rename(folder: str) -> bool:
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
    """Raises UserError where `out` is there already; what was left unfinished is not."""
    if out.exists() and not (out / INCOMPLETE).exists():
        raise UserError(f"{out} exists; take another --out, or remove it")


def check_whole(folder: Path) -> None:
    """Raises UserError where a folder was left half written."""
    if (folder / INCOMPLETE).exists():
        raise UserError(
            f"{folder} was not finished: what wrote it was stopped; remove it and write it again"
        )


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to write into, which is `out` if all goes well and gone if not.

    Where folders can be renamed it lies beside `out` until then. Elsewhere it is `out`, with a file
    `INCOMPLETE` in it from before its first file until after its last, for which `check_whole`
    looks.
    """
    refuse_existing(out)
    if not is_bucket(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    renames = can_rename_folders(out.parent)
    staging = out.with_name(f"{out.name}.tmp") if renames else out
    remove_tree(staging)
    staging.mkdir(parents=True, exist_ok=True)
    if not renames:
        write_whole(
            out / INCOMPLETE,
            "This folder is not whole: it is being written, or what wrote it was stopped.\n",
        )
    try:
        yield staging
    except BaseException:
        remove_tree(staging)
        raise
    if renames:
        try:
            os.replace(staging, out)
        finally:
            remove_tree(staging)
    else:
        (out / INCOMPLETE).unlink()


def check_held(where: Path) -> None:
    """Raises UserError where a lease on a folder around `where` was lost; where nobody knows, the
    next write waits."""
    if is_bucket(where):
        with contextlib.suppress(TimeoutError):
            bucket_requests.check_guards(name_of(where))


def sync_all() -> None:
    """Returns when all that was appended to files is safe from a kill; OSError or UserError where
    it cannot be."""
    appending.sync_all()


def close_all() -> None:
    """Writes out what is kept back of files that grow, and releases leases: for a process that ends
    at once."""
    appending.close_all()
    lease.release_all()


atexit.register(close_all)
