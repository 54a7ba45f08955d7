"""OCR beside scanned PDFs, and in a folder of its own."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.ingest.formats.images import Images
from alignvlm_jax.ingest.formats.ocr import beside
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from tests.ingest.formats.ocr import make_ocr
from tests.ingest.formats.ocr.make_ocr import HEIGHT, WIDTH, WORDS
from tests.ingest.formats.pdf import make_pdf, read_pdf

OTHER = [[("Other", 20, 10, 70, 30, 0.9)]]


def scan(number: int, scale: int = 1) -> Image.Image:
    """The page, with its words as black boxes; each number gives another page."""
    page = Image.new("L", (WIDTH * scale, HEIGHT * scale), 255)
    for line in WORDS:
        for _, *sides, _ in line:
            page.paste(0, tuple(int(side * scale) for side in sides))
    page.putpixel((number, 0), 0)
    return page


def write_pdf(path, num_pages: int) -> None:
    first, *rest = [scan(number, 2) for number in range(num_pages)]
    first.save(path, save_all=True, append_images=rest, resolution=144)


@pytest.fixture(autouse=True)
def _fresh():
    beside._read.cache_clear()


def reasons(found) -> dict[str, str]:
    return {one.id: one.reason for one in found if hasattr(one, "reason")}


def lines_of(record) -> list[str]:
    return [" ".join(word.text for word in line) for line in record.lines[0]]


def assert_on_ink(record) -> None:
    """The boxes of all words are black, and around them the page is white."""
    pixels = np.asarray(Image.open(io.BytesIO(record.images[0])).convert("L"))
    for word in (word for line in record.lines[0] for word in line):
        left, top, right, bottom = (round(side) for side in word.box)
        assert (pixels[top + 2 : bottom - 2, left + 2 : right - 2] < 60).all()
        around = pixels[top - 3 : bottom + 3, left - 3 : right + 3].copy()
        around[2:-2, 2:-2] = 255
        assert (around[[0, -1]] > 100).all() and (around[:, [0, -1]] > 100).all()


WHOLE = {
    "hocr": make_ocr.hocr([WORDS, OTHER]),
    "json": make_ocr.pixparse([WORDS, OTHER]),
}


@pytest.mark.parametrize("ending", WHOLE)
def test_a_scanned_pdf_has_the_words_of_one_file_beside_it(tmp_path, ending):
    write_pdf(tmp_path / "a.pdf", 2)
    (tmp_path / f"a.{ending}").write_text(WHOLE[ending])
    first, second = read_pdf.read_all(Pdf(holdout_by="page"), tmp_path)
    assert lines_of(first) == ["Total 12.50", "exam-"] and lines_of(second) == ["Other"]
    assert first.lines[0][0][0].confidence == pytest.approx(0.9)
    assert_on_ink(first)
    # A page of --dpi has its boxes there.
    large, _ = read_pdf.read_all(Pdf(holdout_by="page", dpi=200), tmp_path)
    assert large.lines[0][0][0].box[2] == pytest.approx(2 * first.lines[0][0][0].box[2], abs=1)


def test_each_page_may_have_a_file_of_its_own_in_another_folder(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "ocr" / "b").mkdir(parents=True)
    write_pdf(tmp_path / "in" / "b" / "a.pdf", 3)
    (tmp_path / "ocr" / "b" / "a-0001.xml").write_text(make_ocr.alto())
    (tmp_path / "ocr" / "b" / "a-0003.xml").write_text(make_ocr.page_xml())
    form = Pdf(holdout_by="page", ocr=str(tmp_path / "ocr"))
    first, second, third = read_pdf.read_all(form, tmp_path / "in")
    assert lines_of(first) == lines_of(third) == ["Total 12.50", "exam-"]
    assert second.id == "b/a-0002" and second.reason.startswith("a scan: give OCR (--ocr=FOLDER)")


def test_a_page_with_text_keeps_it(tmp_path):
    (tmp_path / "a.pdf").write_bytes(make_pdf.pdf([make_pdf.text(20, 100, "its own")]))
    (tmp_path / "a.hocr").write_text(make_ocr.hocr())
    [record] = read_pdf.read_all(Pdf(holdout_by="page"), tmp_path)
    assert lines_of(record) == ["its own"]


WRONG = {
    "one page": ({"a.hocr": make_ocr.hocr()}, "a.hocr has 1, and the document 2"),
    "three": ({"a.json": make_ocr.pixparse([WORDS] * 3)}, "a.json has 3, and the document 2"),
    "two files": (
        {"a.hocr": WHOLE["hocr"], "a.json": WHOLE["json"]},
        "several files of OCR (a.hocr, a.json); leave one",
    ),
    "another page": (
        {"a.hocr": WHOLE["hocr"].replace("bbox 0 0 200 100", "bbox 0 0 200 280")},
        "another shape (200 x 280, and the image has 278 x 139 pixels)",
    ),
    "damaged": ({"a.xml": "<alto"}, "no XML, or damaged"),
    "no words": ({"a.hocr": make_ocr.hocr([[], []])}, "OCR without a word (a.hocr)"),
    "many of one": (
        {"a-0001.hocr": WHOLE["hocr"]},
        "a-0001.hocr has 2, and the document 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_ocr_that_does_not_fit_is_told_with_numbers(tmp_path, name):
    files, reason = WRONG[name]
    write_pdf(tmp_path / "a.pdf", 2)
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    first, _ = read_pdf.read_all(Pdf(holdout_by="page"), tmp_path)
    assert reason in first.reason


def test_a_folder_of_images(tmp_path, prepare):
    source = tmp_path / "in"
    (source / "book").mkdir(parents=True)
    scan(1).save(source / "a.png")
    (source / "a.png.hocr").write_text(make_ocr.hocr())
    scan(2).save(source / "book" / "b.jpg", quality=95)
    (source / "book" / "b.xml").write_text(make_ocr.alto("mm10", 10.5))
    first, *rest = [scan(number, 2) for number in (3, 4)]
    first.save(source / "c.tif", save_all=True, append_images=rest)
    (source / "c.json").write_text(make_ocr.pixparse([WORDS, OTHER]))
    scan(5).save(source / "none.png")
    (source / "damaged.png").write_bytes((source / "a.png").read_bytes()[:60])
    (source / "damaged.hocr").write_text(make_ocr.hocr())
    (source / "cut.png").write_bytes(b"\x89PNG")
    (source / "other.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (source / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    prepared = prepare(Images(), source)
    made = {record.id: record for record in prepared.records()}
    assert set(made) == {"a", "book/b", "c-0001", "c-0002"}
    assert made["a"].images == ((source / "a.png").read_bytes(),) and made["a"].source == "images"
    assert lines_of(made["c-0002"]) == ["Other"] and made["c-0002"].images[0] != made["c-0001"]
    for name in ("a", "book/b", "c-0001"):
        assert lines_of(made[name]) == ["Total 12.50", "exam-"]
        assert_on_ink(made[name])
    told = prepared.reasons()
    assert told["none"] == "a scan: give OCR (--ocr=FOLDER) or questions (--format=jsonl)"
    assert "an image cannot be decoded" in told["damaged"] and "image cut.png" in told["cut"]
    assert told["script"].startswith(("an image of a kind", "cannot read image"))


@pytest.mark.parametrize("is_folder", [True, False])
def test_ocr_that_was_edited_is_read_anew(tmp_path, prepare, is_folder):
    scan(1).save(tmp_path / "a.png")
    source = tmp_path if is_folder else tmp_path / "a.png"
    for text in ("Total", "Topal"):
        whole = make_ocr.hocr().replace("Total", text)
        (tmp_path / "a.hocr").write_text(whole)
        [record] = prepare(Images(), source).records()
        assert lines_of(record)[0].split()[0] == text


def test_turned_photos_are_told(tmp_path, prepare):
    """OCR programs leave the orientation of EXIF aside: their boxes are those of the image on its
    side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    scan(0).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.hocr").write_text(make_ocr.hocr())
    [unit] = Images().units(str(tmp_path))
    [raw] = Images().raws(unit)
    found = read_pdf.read_all(Images(), tmp_path)
    assert raw.id == "a" and "200 x 100, and the image has 100 x 200 pixels" in found[0].reason


def test_pages_of_a_folder_may_be_held_out_together(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            scan(number).save(tmp_path / folder / f"{number}.png")
    form = Images(holdout_by="folder")
    documents = [raw.document for unit in form.units(str(tmp_path)) for raw in form.raws(unit)]
    assert documents == ["x", "x", "y", "y"]


@pytest.mark.parametrize("kind", [Pdf, Images])
def test_flags_are_checked_before_anything_is_read(tmp_path, kind):
    with pytest.raises(UsageError, match=r"--min_confidence=50 is not from 0 to 1"):
        kind(min_confidence=50.0)
    with pytest.raises(UserError, match="no source"):
        kind(ocr=str(tmp_path / "missing"))
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no file that ends in \.hocr"):
        kind(ocr=str(tmp_path))
    if kind is Images:
        with pytest.raises(UsageError, match=r"--holdout_by=page.*file"):
            kind(holdout_by="page")


def test_unsure_words_are_left_out_of_a_page(tmp_path, prepare):
    line = [(f"w{i}", 10 * i, 0, 10 * i + 9, 9, 0.2 if i == 3 else 0.9) for i in range(20)]
    scan(0).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(make_ocr.pixparse([[line]]))
    [record] = read_pdf.read_all(Images(min_confidence=0.5), tmp_path)
    assert len(record.lines[0][0]) == 19
    assert json.loads((tmp_path / "a.json").read_text())["pages"][0]["words"]["score"][3] == 0.2
