import io

import pytest
from PIL import EpsImagePlugin, Image

from alignvlm_jax.ingest.formats import checks, sandboxed
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.hub import pdf_pages
from alignvlm_jax.ingest.formats.parquet import Parquet
from tests.ingest.formats.hub import public_sets
from tests.ingest.formats.hub.public_sets import ROWS, picture
from tests.ingest.formats.pdf import make_pdf

TEXT = make_pdf.text(50, 150, "Total")


def test_pages_with_their_words():
    images, lines = pdf_pages.all_pages(make_pdf.pdf([TEXT, ""]), 72)
    assert [Image.open(io.BytesIO(image)).size for image in images] == [(300, 200)] * 2
    # A blank page has no words, and that is known.
    assert [[word.text for line in page for word in line] for page in lines] == [["Total"], []]


def test_a_scan_among_the_pages_leaves_all_without_words():
    images, lines = pdf_pages.all_pages(make_pdf.pdf([TEXT, make_pdf.IMAGE]), 72)
    assert len(images) == 2 and lines == ()


def test_long_and_broken_files_are_rejected(monkeypatch):
    monkeypatch.setattr(pdf_pages, "MAX_PAGES", 2)
    with pytest.raises(Reject, match=r"too many pages for a record \(3; at most 2"):
        pdf_pages.all_pages(make_pdf.pdf([TEXT] * 3), 72)
    with pytest.raises(Reject, match="no PDF, or a damaged one"):
        pdf_pages.all_pages(b"%PDF-1.4", 72)
    with pytest.raises(Reject, match="a page is too large"):
        pdf_pages.image(make_pdf.pdf([TEXT], size=(14_000, 14_000)), 0, 600)


def test_pages_of_images(monkeypatch):
    data = public_sets.two_frames()
    assert (pdf_pages.frames(data), pdf_pages.frames(picture(1))) == (2, 1)
    assert Image.open(io.BytesIO(pdf_pages.frame(data, 1))).size == (60, 81)
    monkeypatch.setattr(checks, "MAX_PIXELS", 60 * 80)
    with pytest.raises(Reject, match="too large"):
        pdf_pages.read_frame(data, 1)
    with pytest.raises(Reject, match="an image cannot be read"):
        pdf_pages.frames(b"no image")


def test_no_program_is_called_for_an_image(monkeypatch):
    """As Pillow calls Ghostscript for EPS, which may be named .tif."""
    file = io.BytesIO()
    Image.new("L", (20, 10)).save(file, "EPS")
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: called.append(args))
    for read in (pdf_pages.count_frames, lambda data: pdf_pages.read_frame(data, 0)):
        with pytest.raises(Reject, match=r"of a kind that is not read \(EPS\)"):
            read(file.getvalue())
    assert not called


def test_pages_of_images_are_read_in_the_other_process(monkeypatch):
    called = []
    monkeypatch.setattr(sandboxed.sandbox, "call", lambda *args: called.append(args[0]))
    pdf_pages.frames(b"")
    pdf_pages.frame(b"", 0)
    assert called == [pdf_pages.count_frames, pdf_pages.read_frame]


def test_rows_whose_pdf_is_none(tmp_path, prepare):
    [row] = ROWS["Docmatix-pdf"]
    rows = [row, row | {"pdf": picture(1)}, row | {"pdf": None}, row | {"pdf": b"%PDF-"}]
    path = public_sets.write_rows(tmp_path / "a.parquet", rows)
    prepared = prepare(Parquet(), path)
    assert [record.id for record in prepared.records()] == ["a-0"]
    reasons = prepared.reasons()
    assert reasons["a-1"] == "the PDF is none" and "missing" in reasons["a-2"]
    assert "damaged" in reasons["a-3"]
