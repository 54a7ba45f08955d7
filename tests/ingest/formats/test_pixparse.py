import copy
import io
import itertools
import json
import re

import pytest
from PIL import Image

from alignvlm_jax.errors import UsageError
from alignvlm_jax.ingest.formats.webdataset import WebDataset
from tests.ingest.formats.hub import public_sets
from tests.ingest.formats.hub.public_sets import DOCUMENTS, document, words
from tests.ingest.formats.pdf import make_pdf


@pytest.fixture
def read(tmp_path, prepare):
    """A function of the JSON beside a document that returns what `prepare` makes of it, beside a
    good one."""

    outs = (f"out {number}" for number in itertools.count())

    def read(content, name="PDFA", **options):
        ending, make = DOCUMENTS[name]
        members = {"good.png": public_sets.picture(3), "good.txt": b"A page."}
        members |= {f"a.{ending}": make(), "a.json": json.dumps(content).encode()}
        path = public_sets.write_tar(tmp_path / "x.tar", members)
        # Of tar files with one size `prepare` takes the second for the first.
        return prepare(WebDataset(**options), path, next(outs))

    return read


def changed(*path, value):
    content = document()
    at = content["pages"][0]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


def texts(record):
    return [[word.text for word in line] for line in record.lines[0]]


def test_boxes_are_pixels_of_the_drawn_page(read):
    _, first, _ = read(document(), dpi=72).records()
    assert Image.open(io.BytesIO(first.images[0])).size == (300, 200)
    assert first.lines[0][0][0].box == pytest.approx((30, 20, 90, 30))
    _, first, _ = read(document(), dpi=144).records()
    assert first.lines[0][0][1].box == pytest.approx((240, 40, 360, 60))


def test_each_page_of_a_tiff_is_its_own(read):
    _, first, second = read(document(), "IDL").records()
    sizes = [Image.open(io.BytesIO(one.images[0])).size for one in (first, second)]
    assert sizes == [(60, 80), (60, 81)]


def test_words_of_little_confidence_are_left_out_and_pages_of_many(read):
    content = document()
    content["pages"][0] = words([f"w{i}" for i in range(10)])
    content["pages"][0]["words"]["score"][3] = 0.5
    content["pages"][0]["words"]["score"][4] = None
    prepared = read(content, min_confidence=0.8)
    assert [record.id for record in prepared.records()] == ["x/good", "x/a-0001"]
    assert texts(prepared.records()[1])[:3] == [["w0", "w1"], ["w2"], ["w4", "w5"]]
    assert prepared.reasons() == {
        "x/a-0002": "OCR that is not sure of its words (2 of 2; --min_confidence is 0.8)"
    }
    with pytest.raises(UsageError, match="--min_confidence=2"):
        WebDataset(min_confidence=2.0)


def test_words_come_in_the_order_of_their_lines(read):
    page = words(["12.50", "due", "Total"])
    page["words"]["line_pos"] = [[0, 1], [1, 0], [0, 0]]
    content = {"pages": [page, words(["Second"])]}
    assert texts(read(content).records()[1]) == [["Total", "12.50"], ["due"]]


def test_lines_tell_their_words_where_words_do_not(read):
    content = changed("words", "line_pos", value=None)
    assert texts(read(content).records()[1]) == [["Total", "12.50"], ["due"]]
    content["pages"][0]["words"] = None
    assert texts(read(content).records()[1]) == [["Total 12.50"], ["due"]]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("words", "bbox", 0), [10, 20, 30, 40], "no.* left, top, width and height as fractions"),
        (("words", "bbox", 0), [0.5, 0.5, 0.9, 0.6], "as fractions"),
        (("words", "bbox", 0), [0.5, 0.5, -0.1, 0.1], "as fractions"),
        (("words", "bbox", 0), [0.1, 0.2, 0.3], "not of four numbers"),
        (("words", "bbox", 0), [0.1, 0.2, 0.3, float("nan")], "not of four numbers"),
        (("words", "bbox", 0), [10**400, 0.2, 0.3, 0.1], "not of four numbers"),
        (("words", "bbox"), [[0.1] * 4], r"differ in number \(3 of text, 1 of bbox"),
        (("words", "score"), [1.0], "differ in number"),
        (("words", "score", 0), 95, "a confidence is not from 0 to 1"),
        (("words", "text", 0), None, "a word is no text"),
        (("words", "text"), "Total", "differ in number"),
        (("words",), [], "the words of a page are no object"),
        (("words",), {"bbox": []}, "have no text"),
    ],
)
def test_words_that_are_none_reject_their_page_alone(path, value, reason, read):
    prepared = read(changed(*path, value=value))
    ids = [record.id for record in prepared.records()]
    assert ids == ["x/good", "x/a-0002"]
    [(name, found)] = prepared.reasons().items()
    assert name == "x/a-0001"
    assert re.search(reason, found)


def test_words_whose_lines_are_not_told_are_rejected(read):
    content = changed("words", "line_pos", value=[None] * 3)
    for slices in ([[0, 2], [2, 2]], [[0, 2], [1, 3]], [[0, 10**9], [2, 3]], [None, None]):
        wrong = copy.deepcopy(content)
        wrong["pages"][0]["lines"]["word_slice"] = slices
        reasons = read(wrong).reasons()
        assert reasons == {"x/a-0001": "words whose lines are not told (3 words, 2 lines)"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_pages_and_words_must_agree_in_number(name, read):
    for pages in (document()["pages"][:1], [*document()["pages"], words(["Third"])]):
        prepared = read({"pages": pages}, name)
        assert [record.id for record in prepared.records()] == ["x/good"]
        assert prepared.reasons() == {
            "x/a": f"words of another number of pages ({len(pages)} for 2)"
        }


def test_members_that_make_no_document(tmp_path, prepare):
    content = json.dumps(document()).encode()
    members = {
        "good.png": public_sets.picture(1),
        "good.txt": b"A page.",
        "alone.pdf": public_sets.two_pages(),
        "damaged.pdf": b"%PDF-1.4",
        "damaged.json": content,
        "broken.pdf": public_sets.two_pages(),
        "broken.json": b'{"pages"',
        "other.pdf": public_sets.two_pages(),
        "other.json": b'{"caption": "A page."}',
        "words.json": content,
        "half.tif": public_sets.two_frames()[:60],
        "half.json": content,
        "empty.pdf": make_pdf.pdf(["", ""]),
        "empty.json": json.dumps({"pages": [words([]), words([" "])]}).encode(),
    }
    prepared = prepare(WebDataset(), public_sets.write_tar(tmp_path / "a.tar", members))
    assert [record.id for record in prepared.records()] == ["a/good"]
    expected = {
        "a/alone": "a PDF without its words",
        "a/damaged": "no PDF, or a damaged one",
        "a/broken": "no JSON object",
        "a/other": "no list of pages",
        "a/words": "words without a PDF or an image",
        "a/half": "an image cannot be read",
        "a/empty-0001": "a page without words",
        "a/empty-0002": "nothing to learn",
    }
    reasons = prepared.reasons()
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]


def test_captions_may_speak_of_pages(tmp_path, prepare):
    caption = json.dumps({"caption": "A book.", "pages": 300}).encode()
    members = {"0.png": public_sets.picture(1), "0.json": caption}
    [record] = prepare(WebDataset(), public_sets.write_tar(tmp_path / "a.tar", members)).records()
    assert record.turns[0].answers == ("A book.",)
