import pytest
from pyarrow import fs

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import UserError


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path, monkeypatch):
    """A folder with files, under its path and under that of a bucket that lies in it."""
    (tmp_path / "bucket/deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.JSONL", "deep/c.jsonl", "d.txt"):
        (tmp_path / "bucket" / name).write_text(f"of {name}")
    if request.param == "local":
        return str(tmp_path / "bucket")
    monkeypatch.setattr(
        filesystem,
        "_filesystem",
        lambda scheme: fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()),
    )
    return "gs://bucket"


def test_files_are_listed_below_a_folder_and_read_by_the_names_that_came(root):
    names = filesystem.list_files(root, (".jsonl",))
    assert names == [f"{root}/{name}" for name in ("a.JSONL", "b.jsonl", "deep/c.jsonl")]
    assert [filesystem.read(name, 100) for name in names] == [
        b"of a.JSONL",
        b"of b.jsonl",
        b"of deep/c.jsonl",
    ]
    assert filesystem.list_files(names[1], (".csv",)) == [names[1]]
    assert filesystem.size(names[1]) == 10
    with filesystem.open_buffered(names[1], 3) as file:
        assert file.read() == b"b.jsonl"


def test_what_is_not_there_is_an_error(root):
    with pytest.raises(UserError, match=r"no source .*/nowhere"):
        filesystem.list_files(f"{root}/nowhere", (".jsonl",))
    with pytest.raises(UserError, match=r"holds no file that ends in \.csv or \.tsv \(4 others\)"):
        filesystem.list_files(root, (".csv", ".tsv"))
    with pytest.raises(UserError, match="is no file"):
        filesystem.size(f"{root}/deep")
    with pytest.raises(UserError, match="cannot open"):
        filesystem.open_file(f"{root}/nowhere")
    for missing in ("nowhere", "deep"):
        with pytest.raises(FileNotFoundError):
            filesystem.read(f"{root}/{missing}", 100)
    with pytest.raises(ValueError, match="10 bytes; at most 9"):
        filesystem.read(f"{root}/b.jsonl", 9)


def test_a_bucket_that_cannot_be_reached_is_an_error_in_one_line(monkeypatch):
    class Unreachable:
        def get_file_info(self, path):
            raise OSError("google::cloud::Status(UNAVAILABLE:\n  no network)")

    monkeypatch.setattr(filesystem, "_filesystem", lambda scheme: Unreachable())
    with pytest.raises(
        UserError, match=r"^cannot reach gs://mine/data: google.*UNAVAILABLE: no network\)$"
    ):
        filesystem.list_files("gs://mine/data", (".jsonl",))


def test_other_schemes_are_refused():
    with pytest.raises(UserError, match="cannot read s3:// paths"):
        filesystem.list_files("s3://mine/data", (".jsonl",))


def test_names_in_a_folder():
    assert filesystem.join("gs://b/data", "./imgs/../1.png") == "gs://b/data/1.png"
    assert filesystem.join("data", "/abs/1.png") == "/abs/1.png"
    assert filesystem.join("data", "gs://b/1.png") == "gs://b/1.png"
    assert filesystem.parent("gs://b/data/train.jsonl") == "gs://b/data"
    assert filesystem.stem("gs://b/data/train-0.tar.gz") == "train-0"


def test_a_range_that_is_not_all_there_is_an_error(tmp_path, bucket, bucket_folder):
    (tmp_path / "a").write_bytes(b"0123456789")
    bucket.put(str(bucket_folder).removeprefix(f"{bucket.url}/") + "/a", b"0123456789")
    for path in (tmp_path / "a", f"{bucket_folder}/a"):
        assert (
            filesystem.read_range(path, 3, 7) == b"3456"
            and filesystem.read_range(path, 4, 4) == b""
        )
        assert filesystem.read_whole(path, 10) == b"0123456789"
        with pytest.raises(OSError, match="a: it ends 2 bytes before byte 12"):
            filesystem.read_range(path, 5, 12)
