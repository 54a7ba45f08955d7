"""Files are whole or not there."""

from pathlib import Path

import pytest

from alignvlm_jax import files


@pytest.mark.parametrize(("content", "expected"), [("Größe\n", "Größe\n".encode()), (b"\x89PNG", b"\x89PNG")])
def test_content_replaces_what_was_there(tmp_path, content, expected):
    path = tmp_path / "name.json"
    path.write_text("old")
    files.write_whole(path, content)
    assert path.read_bytes() == expected
    assert [found.name for found in tmp_path.iterdir()] == ["name.json"]


def test_what_was_there_stays_if_writing_fails(tmp_path, monkeypatch):
    path, original = tmp_path / "name.json", Path.write_bytes
    path.write_text("old")

    def stop(path, content):
        original(path, content[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
