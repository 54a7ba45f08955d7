import concurrent.futures
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import images, labels
from alignvlm_jax.data.record import decode_record, encode_record
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.ingest.formats.base import Rejection, Unit
from alignvlm_jax.ingest.formats.pdf import document
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import table, text
from tests.ingest.formats.pdf.read_pdf import gray, read_all, texts, words


def write(path, num_pages=1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        make_pdf.pdf([text(20, 100, f"page {i}") for i in range(1, num_pages + 1)], **options)
    )


def test_a_file_that_claims_a_million_pages_is_told_once(tmp_path):
    whole = make_pdf.pdf([text(20, 100, "one")])
    (tmp_path / "many.pdf").write_bytes(whole.replace(b"/Count 1", b"/Count 1000000"))
    write(tmp_path / "good.pdf")
    form = Pdf()
    [good, many] = [raw for unit in form.units(str(tmp_path)) for raw in form.raws(unit)]
    assert good.id == "good-0001"
    assert many.reason == "the file says that it has 1,000,000 pages, and the last is not there"


def test_a_page_is_a_record_and_a_file_a_document(tmp_path):
    write(tmp_path / "b" / "report.v2.PDF", 2)
    write(tmp_path / "a" / "report.pdf")
    (tmp_path / "notes.txt").write_text("no PDF")
    form = Pdf()
    raws = [raw for unit in form.units(str(tmp_path)) for raw in form.raws(unit)]
    assert [(raw.id, raw.document) for raw in raws] == [
        ("a/report-0001", "a/report"),
        ("b/report.v2-0001", "b/report.v2"),
        ("b/report.v2-0002", "b/report.v2"),
    ]
    record = form.record(pickle.loads(pickle.dumps(raws[2])))
    assert (record.id, record.source, texts(record)) == ("b/report.v2-0002", "pdf", ["page 2"])
    assert decode_record(encode_record(record)) == record
    assert form.record(raws[2]) == record


def test_files_that_differ_in_their_endings_alone_are_two_documents(tmp_path):
    write(tmp_path / "1.PDF")
    write(tmp_path / "1.pdf", 2)
    raws = [raw for unit in Pdf().units(f"{tmp_path}//") for raw in Pdf().raws(unit)]
    assert [raw.id for raw in raws] == ["1-0001", "1.pdf-0001", "1.pdf-0002"]


def test_one_file_is_held_out_by_pages_only(tmp_path, prepare):
    write(tmp_path / "only.pdf", 2)
    for source in (tmp_path, tmp_path / "only.pdf"):
        with pytest.raises(UserError, match="--holdout_by=page"):
            prepare(Pdf(), source, holdout=0.1)
        form = Pdf(holdout_by="page")
        assert [r.document for unit in form.units(str(source)) for r in form.raws(unit)] == [
            "only-0001",
            "only-0002",
        ]


def test_a_large_file_is_cut_into_ranges_of_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(document, "PAGES_PER_UNIT", 2)
    write(tmp_path / "large.pdf", 5)
    (tmp_path / "zzz.pdf").write_bytes(b"x" * 2000)
    form = Pdf()
    units = form.units(str(tmp_path))
    assert [(unit.start, unit.stop) for unit in units] == [(0, 2), (2, 4), (4, 5), (0, -1)]
    found = read_all(form, tmp_path)
    assert [texts(record) for record in found[:5]] == [[f"page {i}"] for i in range(1, 6)]
    assert found[5].id == "zzz" and "no PDF" in found[5].reason


def test_a_file_in_a_bucket_is_held_in_memory(tmp_path, monkeypatch):
    write(tmp_path / "here.pdf")
    # In this process, where what stands for a bucket is known.
    monkeypatch.setattr(document.sandboxed, "call", lambda function, *args: function(*args))
    monkeypatch.setattr(document.filesystem, "is_remote", lambda path: True)
    pages = Unit(str(tmp_path / "here.pdf"), name="here")
    (raw,) = Pdf().raws(pages)
    assert texts(Pdf().record(raw)) == ["page 1"]
    document._open.cache_clear()
    monkeypatch.setattr(document, "MAX_REMOTE_BYTES", 100)
    (rejected,) = Pdf().raws(pages)
    assert rejected.reason.startswith("a file that cannot be read (")


def test_a_bucket_that_does_not_answer_is_no_damaged_file(monkeypatch):
    def silent(*_):
        raise OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)")

    monkeypatch.setattr(document.sandboxed, "call", lambda function, *args: function(*args))
    monkeypatch.setattr(document.filesystem, "read", silent)
    with pytest.raises(TryAgainError, match=r"gs://b/a\.pdf.*UNAVAILABLE.*; the same command goes"):
        list(Pdf().raws(Unit("gs://b/a.pdf", name="a")))


@pytest.mark.parametrize("options", [{"dpi": 0}, {"dpi": 601}, {"holdout_by": "pages"}])
def test_wrong_options(options):
    with pytest.raises(UserError):
        Pdf(**options)


def test_no_source(tmp_path):
    with pytest.raises(UserError, match="no source"):
        Pdf().units(str(tmp_path / "none"))


GOOD = make_pdf.pdf([text(20, 100, "good")])
BAD = {
    "empty": (b"", "no PDF"),
    "no PDF": (b"%PDF-1.7\n" + b"\0" * 100, "no PDF"),
    "an image": (b"\x89PNG\r\n\x1a\n", "no PDF"),
    "truncated": (GOOD[:200], "no PDF"),
    "no pages": (make_pdf.pdf([]), "no PDF"),
    "a page of 60,000 x 60,000": (
        make_pdf.pdf([text(20, 100, "x")], size=(60_000, 60_000)),
        "page is too large",
    ),
    "a page of no size": (make_pdf.pdf([text(20, 100, "x")], page="/CropBox [10 10 10 10]"), None),
    "a strip": (make_pdf.pdf([text(20, 100, "x")], size=(1, 10_000)), None),
    "a bomb": (
        make_pdf.pdf([make_pdf.IMAGE], image=(60_000, 60_000, b"")),
        "image on a page is too large",
    ),
    "a password": (make_pdf.encrypted(), "password"),
    "much text": (
        make_pdf.pdf(["BT /F1 12 Tf 20 100 Td" + " (word word) Tj" * 12_000 + " ET"]),
        "too much text",
    ),
    "pages in a circle": (GOOD.replace(b"/Kids [10 0 R]", b"/Kids [2 0 R]"), None),
    "a page that is none": (GOOD.replace(b"/Type /Page ", b"/Type /Font "), None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_rejected_and_the_others_go_on(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / "a.pdf").write_bytes(content)
    (tmp_path / "b.pdf").write_bytes(GOOD)
    *bad, good = read_all(Pdf(), tmp_path)
    assert texts(good) == ["good"]
    if reason:
        assert len(bad) == 1 and isinstance(bad[0], Rejection)
        assert bad[0].id.startswith("a") and reason in bad[0].reason


def test_damaged_bytes_raise_nothing_but_rejections(read):
    rng = np.random.default_rng(0)
    good = np.frombuffer(
        make_pdf.pdf([table(20, 180, [80, 80, 80], [["name", "size", "colour"]] * 3)]), np.uint8
    )
    num_read = 0
    for _ in range(100):
        damaged = good.copy()
        damaged[rng.integers(0, len(good), 5)] ^= 1 << rng.integers(0, 8, 5).astype(np.uint8)
        num_read += sum(not isinstance(item, Rejection) for item in read(damaged.tobytes()))
    assert 0 < num_read < 100


def test_pages_go_to_both_splits_and_each_that_cannot_be_used_has_its_reason(tmp_path, prepare):
    write(tmp_path / "in" / "a.pdf", 20)
    (tmp_path / "in" / "b.pdf").write_bytes(make_pdf.pdf(["", text(20, 100, "not blank")]))
    (tmp_path / "in" / "c.pdf").write_bytes(make_pdf.encrypted())
    prepared = prepare(Pdf(holdout_by="page"), tmp_path / "in", holdout=0.5)
    train, validation = (
        {record.id for record in prepared.records(split)} for split in ("train", "validation")
    )
    assert len(train) > 3 < len(validation)
    assert train | validation == {"b-0002", *(f"a-{page:04d}" for page in range(1, 21))}
    assert prepared.reasons() == {
        "b-0001": "nothing to learn: no answer and no words",
        "c": "a PDF that a password protects",
    }


def test_a_page_that_cannot_be_told_is_rejected(read):
    (few,) = read([text(20, 100, "* " + "words " * 9, 8)], meanings={"*": "FFFD"})
    (many,) = read([text(20, 100, "* " * 2 + "words " * 9, 8)], meanings={"*": "FFFD"})
    assert texts(few) == ["words " * 8 + "words"]
    assert many.reason == "words without Unicode (2 of 11)"


def test_a_blank_page_has_no_words(read):
    (record,) = read([""])
    assert (record.turns, record.lines) == ((), ((),))


@pytest.mark.parametrize("content", ["0 0 1 rg 20 20 50 50 re f\n", make_pdf.IMAGE])
def test_a_page_that_shows_something_and_has_no_words_is_a_scan(read, content):
    (rejected,) = read([content])
    assert rejected.reason.startswith("a scan: give OCR (--ocr=FOLDER), a text layer (`ocrmypdf")


def test_text_is_kept_without_loss_and_photos_are_not(read):
    (drawn,) = read([text(20, 100, "drawn")])
    assert (
        drawn.images[0].startswith(b"\x89PNG")
        and Image.open(io.BytesIO(drawn.images[0])).mode == "L"
    )
    rng = np.random.default_rng(0)
    (y, x, _) = np.mgrid[:150, :200, :1]
    photo = (
        128 + 90 * np.sin(x / 20 + [0, 1, 2]) * np.cos(y / 30) + rng.normal(0, 4, (150, 200, 3))
    ).astype(np.uint8)
    (scanned,) = read(
        [make_pdf.IMAGE + text(20, 100, "over it")], image=(200, 150, photo.tobytes())
    )
    assert (
        scanned.images[0].startswith(b"\xff\xd8")
        and Image.open(io.BytesIO(scanned.images[0])).mode == "RGB"
    )


def test_what_a_form_holds_is_part_of_the_page(read):
    (record,) = read([text(20, 100, "Name:")], field="Ada Lovelace")
    assert texts(record) == ["Name: Ada Lovelace"]
    name = words(record)[1]
    assert (
        gray(record)[int(name.box[1]) : int(name.box[3]), int(name.box[0]) : int(name.box[2])] < 128
    ).any()


def test_threads_take_turns_at_pdfium(tmp_path):
    write(tmp_path / "shared.pdf", 2)
    form = Pdf(holdout_by="page")
    raws = [raw for unit in form.units(str(tmp_path)) for raw in form.raws(unit)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(form.record, raw) for raw in raws]
        assert [texts(future.result()) for future in waiting] == [["page 1"], ["page 2"]]


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("page", ["", "/Rotate 90"])
def test_patches_are_labelled_with_the_words_that_they_show(read, tokenizer, size, page):
    """Over a page that is cut, resized and padded: what is dark is labelled as text, what is far
    from ink as blank, and the middle of every token lies in a patch that has it among its
    labels."""
    strings = ("Total 123.45", "What is it", "5.4 and 3.2")
    matrix, at = (
        ("0 1 -1 0", [(70 + 60 * i, 20) for i in range(3)])
        if page
        else ("1 0 0 1", [(20, y) for y in (150, 100, 50)])
    )
    content = "".join(
        text(*place, string, 20, matrix) for place, string in zip(at, strings, strict=True)
    )
    (record,) = read([content], 150, page=page)
    vision = VisionConfig(tile_height=size, tile_width=size, patch_height=14, patch_width=14)
    tiles = images.tile_image(
        images.decode_image(record.images[0], ""), vision, 10, use_overview=True
    )
    assert len(tiles.pixels) > 2 and not (tiles.scales == 1).any()
    every = DataConfig(full_cover=1 / 8, min_token_height=0, min_contrast=0)
    ids, _, loss_weights = labels.patch_labels(record.lines[0], tiles, tokenizer, vision, every)
    rows, columns = vision.patch_grid
    is_text = (loss_weights == 1).reshape(-1, rows, columns)
    cut = tiles.pixels[:, : rows * 14, : columns * 14, 0].reshape(-1, rows, 14, columns, 14)
    assert is_text[(cut < 128).sum((2, 4)) > 14 * 14 / 4].all()
    is_inked = np.pad(cut.min((2, 4)) < 200, ((0, 0), (1, 1), (1, 1)))
    is_near_ink = np.lib.stride_tricks.sliding_window_view(is_inked, (3, 3), axis=(1, 2)).any(
        (3, 4)
    )
    assert not is_text[~is_near_ink].any()
    found = []  # (in the overview, has the label)
    for word in words(record):
        for token, start, end in tokenizer.token_offsets(word.text):
            middle = np.array([word.edges[start] + word.edges[end], word.box[1] + word.box[3]]) / 2
            for tile, (crop, scale) in enumerate(zip(tiles.crops, tiles.scales, strict=True)):
                if (crop[:2] <= middle).all() and (middle < crop[2:]).all():
                    column, row = ((middle - crop[:2]) * scale // 14).astype(int)
                    found.append((tile == 0, token in ids[tile, row * columns + column]))
    assert len(found) == 2 * sum(len(tokenizer.token_offsets(word.text)) for word in words(record))
    assert all(has_label for is_overview, has_label in found if not is_overview)
    # A patch of the overview may show more tokens than it has labels for.
    assert np.mean([has_label for is_overview, has_label in found if is_overview]) > 0.9
