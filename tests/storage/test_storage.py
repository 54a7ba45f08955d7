"""Every way to write and read, on this machine and in a bucket."""

import errno
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import bucket as bucket_lib
from alignvlm_jax.storage import bucket_requests

CONTENTS = [("Größe\n", "Größe\n".encode()), (b"\x89PNG", b"\x89PNG")]


@pytest.mark.parametrize(("content", "expected"), CONTENTS)
def test_content_replaces_what_was_there(folder, content, expected):
    path = folder / "name.json"
    storage.write_whole(path, "old")
    storage.write_whole(path, content)
    assert path.read_bytes() == expected
    assert [found.name for found in folder.iterdir()] == ["name.json"]


def test_what_was_there_stays_if_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "name.json"
    path.write_text("old")

    def stop(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="No space"):
        storage.write_whole(path, "new")
    assert path.read_text() == "old"


def test_an_object_stays_if_writing_fails(bucket, bucket_folder):
    path = bucket_folder / "name.json"
    storage.write_whole(path, "old")
    with (
        bucket.faulty(status=403, names="name.json"),
        pytest.raises(PermissionError, match="no permission"),
    ):
        storage.write_whole(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/x", Path("runs/x")),
        (Path("/a/b"), Path("/a/b")),
        ("gs://b/x/", "gs://b/x"),
        ("gs://b//x", "gs://b/x"),
    ],
)
def test_paths_of_both_kinds(text, expected):
    path = storage.path(text)
    assert os.fspath(path) == os.fspath(expected)
    assert storage.path(path) == path
    assert storage.is_bucket(path) == str(expected).startswith("gs:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs:/bucket/x", "one slash after gs:; did you mean gs://bucket/x"),
        ("s3://bucket/x", "known are local paths and gs://BUCKET/NAME"),
        ("gs://", "names no bucket"),
        ("gs:///x", "names no bucket"),
    ],
)
def test_paths_of_no_kind_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        storage.path(text)


def test_folders_are_listed_moved_copied_and_removed(folder):
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("a/1.json", "a/b/2.json", "a/3.txt"):
        storage.write_whole(folder / name, name)
    assert sorted(path.name for path in (folder / "a").glob("*.json")) == ["1.json"]
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["1.json", "3.txt", "b"]
    assert (
        (folder / "a").is_dir()
        and not (folder / "a" / "1.json").is_dir()
        and not (folder / "c").exists()
    )
    storage.move(folder / "a" / "1.json", folder / "a" / "3.txt")
    assert (folder / "a" / "3.txt").read_text() == "a/1.json" and not (
        folder / "a" / "1.json"
    ).exists()
    storage.copy_file(folder / "a" / "3.txt", folder / "a" / "4.txt")
    assert (folder / "a" / "4.txt").read_text() == "a/1.json"
    storage.remove_tree(folder / "a")
    storage.remove_tree(folder / "a")
    assert not (folder / "a").exists()


def test_what_is_written_on_this_machine_goes_to_its_place(folder):
    with storage.local_folder(folder) as here:
        assert isinstance(here, Path)
        (here / "below").mkdir()
        (here / "below" / "file").write_bytes(b"x")
    assert (folder / "below" / "file").read_bytes() == b"x"
    assert storage.files_below(folder) == ["below/file"]


def test_files_go_from_anywhere_to_anywhere(tmp_path, bucket_folder):
    (tmp_path / "0").write_bytes(b"x" * 7)
    way = [tmp_path / "0", bucket_folder / "1", bucket_folder / "2", tmp_path / "3"]
    for source, target in itertools.pairwise(way):
        storage.copy_file(source, target)
        assert target.read_bytes() == b"x" * 7


@pytest.mark.parametrize("last", ["b", "none"])
def test_a_folder_is_moved(folder, last):
    for name in ("a", "b", "c/d"):
        (folder / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(folder / "from" / name, name)
    storage.move_folder(folder / "from", folder / "to", last=last)
    assert storage.files_below(folder) == ["to/a", "to/b", "to/c/d"]


def test_nobody_knows_the_space_in_a_bucket(tmp_path, bucket_folder):
    assert storage.free_bytes(bucket_folder) is None
    assert storage.free_bytes(tmp_path) > 0


def test_whether_folders_can_be_renamed_is_tried(tmp_path, bucket_folder):
    assert storage.can_rename_folders(tmp_path)
    assert not storage.can_rename_folders(bucket_folder)
    assert list(tmp_path.iterdir()) == []


def test_that_folders_cannot_be_renamed_is_found_out(tmp_path, unrenamed):
    assert not storage.can_rename_folders(tmp_path)
    assert list(tmp_path.iterdir()) == []


def make_folder(out, stop: bool = False) -> None:
    with storage.whole_folder(out) as inside:
        storage.write_whole(inside / "a", "1")
        if stop:
            raise UserError("stop")
        storage.write_whole(inside / "b", "2")


def test_a_folder_is_whole(folder):
    make_folder(folder / "out")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a", "b"]
    assert [path.name for path in folder.iterdir()] == ["out"]
    storage.check_whole(folder / "out")
    with pytest.raises(UserError, match="exists; take another --out"):
        make_folder(folder / "out")


def test_a_folder_that_fails_is_gone(folder):
    with pytest.raises(UserError, match="stop"):
        make_folder(folder / "out", stop=True)
    assert not (folder / "out").exists()
    assert not folder.exists() or list(folder.iterdir()) == []
    make_folder(folder / "out")


def test_a_folder_is_whole_where_none_can_be_renamed(tmp_path, unrenamed):
    make_folder(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_half_written_by_a_kill_is_not_taken_for_whole(bucket, bucket_folder):
    program = f"""
import os, signal
from alignvlm_jax import storage
with storage.whole_folder(storage.path("{bucket_folder}/out")) as inside:
    storage.write_whole(inside / "a", "1")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60)
    with pytest.raises(UserError, match="was not finished: what wrote it was stopped"):
        storage.check_whole(bucket_folder / "out")
    make_folder(bucket_folder / "out")
    storage.check_whole(bucket_folder / "out")


REQUESTS = {
    "write": lambda path: storage.write_whole(path, "x"),
    "read": lambda path: path.read_bytes(),
    "list": lambda path: list(path.parent.iterdir()),
    "exists": lambda path: path.exists(),
    "is a folder": lambda path: path.is_dir(),
    "glob": lambda path: list(path.parent.glob("*")),
    "remove": lambda path: path.unlink(),
    "state": lambda path: bucket_lib.stored(str(path).removeprefix("gs://")),
}
FAULTS = {
    "no permission": ({"status": 403}, PermissionError, "no permission"),
    "unavailable": ({"error_rate": 1.0}, OSError, "Cloud Storage does not answer"),
    "hangs up": ({"lost_rate": 1.0}, OSError, "Cloud Storage does not answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_name", REQUESTS)
def test_what_cannot_be_done_is_told_in_a_line_and_soon(
    bucket, bucket_folder, monkeypatch, request_name, fault
):
    """Also whether something exists: no answer is none, and not "no"."""
    changes, kind, message = FAULTS[fault]
    storage.write_whole(bucket_folder / "x", "x")
    monkeypatch.setattr(bucket_requests, "_patience", 1.0)
    began = time.monotonic()
    with bucket.faulty(**changes), pytest.raises(kind, match=message) as caught:
        REQUESTS[request_name](bucket_folder / "x")
    assert time.monotonic() - began < 15
    assert "\n" not in caught.value.strerror and caught.value.filename.startswith("gs://bucket")


def test_passing_faults_are_tried_again(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(bucket_requests, "MAX_PAUSE", 0.2)
    with bucket.faulty(error_rate=0.2, lost_rate=0.1, cut_rate=0.1, seed=1), storage.patience(60):
        for i in range(10):
            storage.write_whole(bucket_folder / str(i), str(i))
            assert (bucket_folder / str(i)).read_text() == str(i)
        for i in range(10):
            (bucket_folder / str(i)).unlink()
    assert bucket.requests["faults"] > 10


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(FileNotFoundError, match="there is no bucket gs://elsewhere"):
        storage.write_whole(storage.path("gs://elsewhere/x"), "x")
    assert not storage.path("gs://elsewhere/x").exists()


def test_paths_cost_nothing_where_there_is_no_bucket():
    program = "import sys; from alignvlm_jax import storage; storage.path('x')\n"
    program += (
        "assert not {'gcsfs', 'fsspec', 'etils', 'aiohttp', 'jax'} & sys.modules.keys(), "
        "sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_preconditions_hold(bucket, bucket_folder):
    name = f"{bucket_folder}/x".removeprefix("gs://")
    first = bucket_lib.put(name, b"1", "0")
    with pytest.raises(FileExistsError):
        bucket_lib.put(name, b"2", "0")
    second = bucket_lib.put(name, b"2", first)
    for act in (lambda: bucket_lib.put(name, b"3", first), lambda: bucket_lib.remove(name, first)):
        with pytest.raises(FileExistsError):
            act()
    assert bucket_lib.stored(name).generation == second and 0 <= bucket_lib.stored(name).age < 10
    bucket_lib.remove(name, second)
    assert bucket_lib.stored(name) is None


def test_without_gcsfs_a_bucket_is_answered_with_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    without = {"gcsfs": None}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: without.get(name, name) and find(name, *args),
    )
    with pytest.raises(UserError, match=r"need gcsfs: pip install 'alignvlm_jax\[gcs\]', or `make"):
        storage.path("gs://bucket/run")
    assert storage.path("run").name == "run"
