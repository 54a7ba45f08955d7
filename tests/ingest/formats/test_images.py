"""Page images that are links, or lie in a bucket."""

import io

import pytest
from PIL import Image

from alignvlm_jax.commands import prepare as command
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Raw, Unit
from alignvlm_jax.ingest.formats.images import Images
from tests.ingest.formats.ocr import make_ocr


def write_page(folder, name, image):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(image)
    write_ocr(folder, name)


def write_ocr(folder, name):
    (folder / f"{name}.hocr").write_text(make_ocr.hocr())


@pytest.fixture
def scan():
    file = io.BytesIO()
    Image.new("L", (make_ocr.WIDTH, make_ocr.HEIGHT), 255).save(file, "PNG")
    return file.getvalue()


def test_a_link_within_the_source_is_read(tmp_path, prepare, scan):
    write_page(tmp_path / "in/store", "1", scan)
    (tmp_path / "in/pages").mkdir()
    (tmp_path / "in/pages/2.png").symlink_to("../store/1.png")
    write_ocr(tmp_path / "in/pages", "2")
    prepared = prepare(Images(), tmp_path / "in")
    assert [record.id for record in prepared.records()] == ["pages/2", "store/1"]


def test_a_link_that_leads_out_is_refused_unless_it_is_allowed(tmp_path, prepare, scan, tokenizer):
    write_page(tmp_path / "out side", "1", scan)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/2.png").symlink_to("../out side/1.png")
    write_ocr(tmp_path / "in", "2")
    with pytest.raises(UserError, match=r"outside of its folder \(2\.png; --allow_outside reads"):
        prepare(Images(), tmp_path / "in")
    assert len(prepare(Images(), tmp_path / "in", allow_outside=True).records()) == 1
    flags = ["--format=images", f"--source={tmp_path}/in", f"--tokenizer={tokenizer.name}"]
    command.main([*flags, f"--out={tmp_path}/cli", "--allow_outside"])


def test_a_bucket_that_does_not_answer_rejects_no_page(monkeypatch):
    def silent(*_):
        raise OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)")

    monkeypatch.setattr(files.filesystem, "read", silent)
    with pytest.raises(TryAgainError, match=r"gs://b/a\.png.*UNAVAILABLE"):
        list(Images().raws(Unit("gs://b/a.png", name="a")))
    with pytest.raises(TryAgainError, match=r"gs://b/a\.png.*UNAVAILABLE"):
        Images().record(Raw("a", "a", {"place": ("gs://b/a.png", "a", 0, 1)}))
