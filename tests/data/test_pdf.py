"""Pages of PDFs look alike to training and to questions: one function draws them."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from alignvlm_jax.data import images, pdf
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import text
from tests.ingest.formats.pdf.read_pdf import read_all

PAGE = make_pdf.pdf([text(20, 150, "Name:")])
FORM = make_pdf.pdf([text(20, 150, "Name:")], field="Jordan")
UNDRAWN = FORM.replace(b" /AP << /N 6 0 R >>", b" /DA (/F1 12 Tf)   ").replace(
    b"/AcroForm << /Fields [5 0 R] >>",
    b"/AcroForm << /Fields [5 0 R] /NeedAppearances true /DA (/F1 12 Tf 0 g) >>",
)
"""A form that leaves it to the viewer to draw what a field was filled in with."""


def load(tmp_path, content: bytes, **options) -> Image.Image:
    path = tmp_path / "page.pdf"
    path.write_bytes(content)
    return images.load_page(path, **options)


def ink(page: Image.Image) -> int:
    return int((np.asarray(page.convert("L")) < 128).sum())


@pytest.mark.parametrize("content", [PAGE, FORM, UNDRAWN], ids=["page", "form", "undrawn form"])
@pytest.mark.parametrize("dpi", [100, 72])
def test_a_page_is_asked_about_as_it_was_trained_on(tmp_path, content, dpi):
    asked = load(tmp_path, content, dpi=dpi)
    [record] = read_all(Pdf(dpi=dpi, holdout_by="page"), tmp_path)
    trained = images.decode_image(record.images[0], "page")
    np.testing.assert_array_equal(np.asarray(asked), np.asarray(trained))


def test_what_a_form_was_filled_in_with_is_drawn_and_read(tmp_path):
    blank, drawn, undrawn = (ink(load(tmp_path, one)) for one in (PAGE, FORM, UNDRAWN))
    assert drawn > 1.3 * blank and undrawn > 1.3 * blank
    [record] = read_all(Pdf(holdout_by="page"), tmp_path)
    said = [word.text for line in record.lines[0] for word in line]
    assert said == ["Name:", "Jordan"]


@pytest.mark.parametrize(
    "junk", [b"\n", b"\xef\xbb\xbf", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 450 + b"\r\n\r\n"]
)
def test_what_stands_before_the_header_is_passed_over(tmp_path, junk):
    assert ink(load(tmp_path, junk + PAGE)) == ink(load(tmp_path, PAGE)) > 0


def test_an_image_that_speaks_of_pdfs_is_an_image(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "made from %PDF-1.7")
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG", pnginfo=about)
    assert b"%PDF" in buffer.getvalue()[: pdf.MAX_JUNK]
    assert load(tmp_path, buffer.getvalue()).size == (30, 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_pdf.encrypted(), r"page\.pdf, page 1: a PDF that a password protects"),
        (b"%PDF-1.7 broken", r"page\.pdf, page 1: no PDF, or a damaged one"),
        (
            make_pdf.pdf([text(20, 100, "x")], size=(14_400, 14_400)),
            r"a page is too large \(20000 x 20000 pixels at 100 dpi; at most 67,108,864\)",
        ),
        (
            make_pdf.pdf([make_pdf.IMAGE], image=(60_000, 60_000, b"")),
            r"an image on a page is too large \(60000 x 60000 pixels of \d+ bits; at most 256 MiB",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize("size", [(4960, 7016), (5100, 6600)], ids=["A4", "Letter"])
@pytest.mark.parametrize("mode", ["1", "L"])
def test_scans_of_600_dpi_are_drawn(tmp_path, size, mode):
    """The limit is of bytes: archives keep black and white, at a bit a pixel."""
    scan = Image.new(mode, size, 255 if mode == "L" else 1)
    scan.paste(0, (600, 600, 3000, 900))
    scan.save(tmp_path / "scan.pdf", resolution=600)
    page = images.load_page(tmp_path / "scan.pdf")
    assert page.size == pytest.approx([side / 6 for side in size], abs=1)
    # A sixth of its sides.
    assert ink(page) == pytest.approx(400 * 50, rel=0.03)
