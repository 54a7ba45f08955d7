import base64
import dataclasses
import io
import json
import math
import re

import pytest
from PIL import Image

from alignvlm_jax.data import chat, index
from alignvlm_jax.data.record import Turn, Word
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from tests.ingest.formats.pdf import make_pdf

TURNS = [{"question": "Why?", "answers": ["So.", "Thus."]}]
LINES = [[[{"text": "Total", "box": [0, 0, 2.5, 1]}]]]


def write(folder, objects, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in objects))
    return folder / name


@pytest.fixture
def images(tmp_path, png):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/a.png").write_bytes(png())
    return tmp_path


def test_all_that_the_schema_holds(images, prepare, png):
    in_line = "data:image/png;base64," + base64.b64encode(png(5, 5)).decode()
    long = base64.b64encode(png(2, 2) + b"\0" * 4096).decode()
    source = write(
        images,
        [
            {"id": "x", "images": ["scans/a.png"], "turns": TURNS, "lines": LINES},
            {"id": 7, "images": ["./scans/../scans/a.png", in_line, long], "turns": TURNS},
            {"turns": [{"question": "Text only?", "answers": "yes"}]},
        ],
    )
    first, second, third = prepare(Jsonl(), source).records()
    assert first.id == "x" and first.source == "jsonl" and first.images == (png(),)
    assert first.turns == (Turn("Why?", ("So.", "Thus.")),)
    assert first.lines == (((Word("Total", (0, 0, 2.5, 1)),),),)
    assert second.id == "7" and second.images[:2] == (png(), png(5, 5)) and len(second.images) == 3
    assert third.turns == (Turn("Text only?", ("yes",)),) and third.id.startswith("data-")


WORD = {"text": "ab", "box": [10, 0, 30, 10]}
KNOWN = {
    "all that OCR says": {"edges": [10, 19.5, 31], "confidence": 0.93},
    "from right to left": {"text": "אב", "edges": [30, 20, 10]},
    "nothing known": {"edges": None, "confidence": None},
    "sure": {"confidence": 1},
}


@pytest.mark.parametrize("name", KNOWN)
def test_words_keep_their_edges_and_confidence(images, prepare, png, name):
    """A record of the project's own could not be written out and read back."""
    (images / "scans/a.png").write_bytes(png(40, 20))
    record = {"images": ["scans/a.png"], "lines": [[[WORD | KNOWN[name]]]]}
    [made] = prepare(Jsonl(), write(images, [record])).records()
    [[[word]]] = made.lines
    edges = KNOWN[name].get("edges")
    assert word.edges == (None if edges is None else tuple(map(float, edges)))
    assert word.confidence == KNOWN[name].get("confidence")
    # As a record is written out.
    again = dataclasses.asdict(word)
    assert (
        prepare(
            Jsonl(),
            write(images, [record | {"lines": [[[json.loads(json.dumps(again))]]]}], "again.jsonl"),
            "again",
        )
        .records()[0]
        .lines
        == made.lines
    )


WRONG = {
    "too few": ({"edges": [10, 30]}, "2 edges of 2 characters, 'ab'; one more"),
    "no list": ({"edges": 3}, "edges of a word are a int"),
    "no numbers": ({"edges": [10, "x", 30]}, "could not convert"),
    "infinite": ({"edges": [10, float("inf"), 30]}, "edges that are no numbers"),
    "back and forth": ({"edges": [10, 30, 20]}, "edges of 'ab' go back and forth"),
    "elsewhere": ({"edges": [110, 120, 130]}, "from 110 to 130, and its box is from 10 to 30"),
    "percent": ({"confidence": 93}, "a confidence of 93; it must be from 0 to 1"),
    "text": ({"confidence": "0.9"}, "a confidence of '0.9'"),
    "misspelt": ({"confidance": 0.9}, "did you mean confidence?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_edges_and_confidence_that_cannot_be_are_told(images, prepare, png, name):
    (images / "scans/a.png").write_bytes(png(40, 20))
    fields, reason = WRONG[name]
    good = {"images": ["scans/a.png"], "turns": TURNS}
    bad = {"id": "bad", "images": ["scans/a.png"], "lines": [[[WORD | fields]]]}
    assert reason in prepare(Jsonl(), write(images, [good, bad])).reasons()["bad"]


def test_what_is_ones_own_goes_into_meta(images, prepare):
    record = {"turns": TURNS, "meta": {"page": 3}}
    assert len(prepare(Jsonl(), write(images, [record])).records()) == 1


def test_the_examples_of_the_schema_are_records(images, prepare, png):
    lines = [line for line in Jsonl.schema.splitlines() if line.startswith("    {")]
    for name in ("1", "2"):
        (images / "scans" / f"{name}.png").write_bytes(png(120, 40))
    prepared = prepare(Jsonl(), write(images, map(json.loads, lines)))
    asked, read = prepared.records()
    assert asked.turns == (Turn("What is the total?", ("12.50", "12,50")),)
    assert [word.text for word in read.lines[0][0]] == ["Total", "12.50"]


def test_image_paths_may_start_elsewhere(images, prepare, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    source = write(tmp_path / "elsewhere", [{"images": ["a.png"], "turns": TURNS}])
    assert len(prepare(Jsonl(images=str(images / "scans")), source).records()) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": ["scans/none.png"], "turns": TURNS}, "missing"),
        ({"images": ["/dev/zero"], "turns": TURNS}, "outside of its folder"),
        ({"images": ["scans"], "turns": TURNS}, "missing"),
        ({"images": ["a\0b"], "turns": TURNS}, "image"),
        ({"images": ["x" * 4000], "turns": TURNS}, "image"),
        ({"images": ["data:image/png;base64,!"], "turns": TURNS}, "base64"),
        ({"images": "scans/a.png", "turns": TURNS}, "no list of texts"),
        (
            {"image": "scans/a.png", "question": "q"},
            r"^unknown keys 'image', 'question'; known: id, document, source, images, turns, "
            r"conversation, system, lines, meta; did you mean images, turns\[\]\.question\?$",
        ),
        (
            {"turns": [{"question": "q", "answers": "['a', 'b']"}]},
            r"^answers is the text of a list; write a list \(\"\['a', 'b'\]\"\)$",
        ),
        ({"turns": [{"question": '["q", "r"]', "answers": ["a"]}]}, "question is the text of a"),
        ({"turns": TURNS, "imgaes": ["scans/a.png"]}, r"key 'imgaes'; .*did you mean images\?$"),
        ({"turns": TURNS, "split": "x"}, r"key 'split'; .*what is your own goes into `meta`"),
        ({"messages": []}, r"did you mean --format=docdownstream\?$"),
        (
            {"turns": [{"question": "q", "answer": "a"}]},
            r"key 'answer' of a turn; known: question, answers, id; did you mean answers\?$",
        ),
        ({"images": [3], "turns": TURNS}, "no list of texts|no text"),
        ({"turns": "Why?"}, "no list of objects"),
        ({"turns": [{"question": None, "answers": ["a"]}]}, "question is no text"),
        ({"turns": [{"question": "q", "answers": {"a": 1}}]}, "answer is no text"),
        ({"id": ["x"], "turns": TURNS}, "id is no text"),
        ({"turns": [{"question": "q", "answers": [math.nan]}]}, r"the answer is no number \(nan\)"),
        ({"turns": [{"question": "q", "answers": [math.inf]}]}, r"the answer is no number \(inf\)"),
        ({"turns": TURNS, "system": 0}, r"system is no text \(int\)"),
        ({"turns": TURNS, "system": "See <image>"}, "an image mark in a system turn"),
        ({"turns": TURNS, "conversation": 0}, "conversation is neither true nor false"),
        ({"turns": TURNS, "conversation": ""}, "conversation is neither true nor false"),
        ({"turns": [{"question": " ", "answers": ["a"]}]}, "^a question is empty$"),
        ({"images": ["scans/a.png"], "lines": [[{"text": "x"}]]}, "a str stands where a word"),
        ({"images": ["scans/a.png"], "lines": [[[{"text": "x"}]]]}, "a word has no box"),
        (
            {
                "images": ["scans/a.png"],
                "lines": [[[{"text": "x", "box": [0, 0, 1, 1], "font": 2}]]],
            },
            "unknown key 'font' of a word; known: text, box",
        ),
        (
            {"images": ["scans/a.png"], "lines": [[[{"text": "far", "box": [90, 0, 95, 1]}]]]},
            r"a word lies outside its image \(image 0 of 3 x 2 pixels: 'far' at \[90.0, 0.0",
        ),
        (
            {"images": ["scans/a.png"], "lines": [[[{"text": "x", "box": [0.1, 0.2, 0.9, 1]}]]]},
            r"boxes are fractions of the image, and pixels are needed \(image 0\)",
        ),
        (
            {"images": ["scans/a.png"], "lines": [[[{"text": "x", "box": [0, 0, "nan", 1]}]]]},
            "no box",
        ),
        ({"images": ["scans/a.png"], "lines": [[[{"text": "x", "box": [2, 0, 1, 1]}]]]}, "no box"),
        ({"images": ["scans/a.png"], "lines": LINES * 2}, "another number of images"),
    ],
)
def test_rejects(images, prepare, fields, reason):
    prepared = prepare(Jsonl(), write(images, [fields, {"id": "good", "turns": TURNS}]))
    assert [record.id for record in prepared.records()] == ["good"]
    ((_, given),) = prepared.reasons().items()
    assert re.search(reason, given) and "\n" not in given


def test_numbers_keep_the_digits_of_the_file(tmp_path, prepare):
    source = tmp_path / "data.jsonl"
    source.write_text(
        '{"turns": [{"id": 0, "question": "q", "answers": [12.50, 7, 1.10e3, -0.0]}]}'
    )
    [record] = prepare(Jsonl(), source).records()
    assert record.turns == (Turn("q", ("12.50", "7", "1.10e3", "-0.0"), "0"),)


def test_the_words_of_a_conversation_without_answers_are_kept(images, prepare):
    turns = [{"question": "<image>Q?", "answers": []}, *TURNS]
    fields = {"images": ["scans/a.png"], "turns": turns, "lines": LINES, "conversation": True}
    [record] = prepare(Jsonl(), write(images, [fields])).records()
    assert record.turns == () and len(record.images) == len(record.lines) == 1


def test_lines_that_cannot_be_parsed_shift_no_other(tmp_path, prepare):
    good = [json.dumps({"id": f"good{i}", "turns": TURNS}).encode() for i in range(4)]
    bad = [b'{"id": "\xff", "turns": []}', b"{", b"[" * 100_000, b"[]", b"1" * 5000, b"\0\0"]
    source = tmp_path / "data.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good[0], b"", *bad, *good[1:]]))
    prepared = prepare(Jsonl(), source)
    assert [record.id for record in prepared.records()] == ["good0", "good1", "good2", "good3"]
    assert len(prepared.rejected()) == len(bad)
    assert "invalid UTF-8" in prepared.rejected()[0]["reason"]


@pytest.mark.parametrize("units", [1, 5])
def test_a_line_that_cannot_be_read_is_named_by_its_number(tmp_path, prepare, monkeypatch, units):
    monkeypatch.setattr(files, "UNIT_RECORDS", -(-12 // units))
    good = json.dumps({"turns": TURNS})
    twice = '{"turns": [], "id": "a", "turns": []}'
    lines = [good, good + ",", "", *[good] * 5, "[1]", twice, "file,question,answer", good]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    prepared = prepare(Jsonl(), tmp_path / "q.jsonl")
    assert [line["reason"] for line in prepared.rejected()] == [
        f"no JSON object a line (Extra data at column {len(good) + 1})",
        "no JSON object a line (a list)",
        "a key stands twice in an object ('turns')",
        "no JSON object a line (Expecting value at column 1)",
    ]
    assert [line["place"] for line in prepared.rejected()] == [
        "line 2",
        "line 9",
        "line 10",
        "line 11",
    ]
    (tmp_path / "wide.jsonl").write_text(good, encoding="utf-16")
    with pytest.raises(UserError, match=r"save the file as UTF-8\) \(.*wide.jsonl, line 1, id"):
        prepare(Jsonl(), tmp_path / "wide.jsonl")


@pytest.mark.parametrize("step", [1, 7, 50, 1000])
def test_every_line_is_in_one_range(tmp_path, monkeypatch, step):
    source = write(tmp_path, [{"n": "x" * (i % 40)} for i in range(30)])
    monkeypatch.setattr(files, "UNIT_RECORDS", 0)
    monkeypatch.setattr(files, "MAX_UNITS", source.stat().st_size // step or 1)
    units = files.line_units(str(source))
    read = [value for unit in units for _, value, _ in files.json_objects(unit)]
    assert read == [{"n": "x" * (i % 40)} for i in range(30)]
    assert len(units) > 1 or step == 1000


def test_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    source = write(tmp_path, [{"n": "x" * 1000}, {"n": 1}])
    first, second = files.json_objects(files.line_units(str(source))[0])
    assert "too long" in first.reason and second[1] == {"n": 1}


def test_special_tokens_in_a_text_stay_text(tmp_path, prepare, tokenizer):
    # A question that has the mark of an image needs an image.
    hostile = "".join(name for name in tokenizer.special_tokens if name != "<image>")
    prepared = prepare(
        Jsonl(), write(tmp_path, [{"turns": [{"question": hostile, "answers": [hostile]}]}])
    )
    (record,) = prepared.records()
    tokens, _ = chat.encode_chat(
        tokenizer, [(record.turns[0].question, record.turns[0].answers[0])], 0, 0
    )
    harmless, _ = chat.encode_chat(tokenizer, [("q", "a")], 0, 0)
    special = set(tokenizer.special_tokens.values())
    assert [token for token in tokens if token in special] == [
        token for token in harmless if token in special
    ]
    assert index.load(prepared.folder, "train").text_tokens["answer"].tolist() == [len(tokens)]


def test_a_source_that_is_not_there(tmp_path):
    write(tmp_path, [])
    with pytest.raises(UserError, match=r"did you mean 'data\.jsonl'"):
        Jsonl().units(str(tmp_path / "date.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file that ends in \.jsonl"):
        Jsonl().units(str(tmp_path / "empty"))


def test_pages_of_a_pdf_are_images(images, prepare):
    """Drawn as `prepare` draws them of PDFs; pages of a file are one document."""
    pages = [make_pdf.text(20, 100, "Total 1"), make_pdf.text(20, 50, "And 2")]
    (images / "one.pdf").write_bytes(make_pdf.pdf(pages[:1]))
    (images / "scans" / "two.PDF").write_bytes(make_pdf.pdf(pages))
    names = ["one.pdf", "scans/two.PDF#page=1", "scans/two.PDF#page=2", f"{images}/one.pdf#page=1"]
    prepared = prepare(Jsonl(), write(images, [{"images": [one], "turns": TURNS} for one in names]))
    alone, first, second, again = (record.images[0] for record in prepared.records())
    assert alone == first == again != second
    with Image.open(io.BytesIO(alone)) as drawn:
        # Of 300 x 200 points.
        assert drawn.size == (417, 278)
    unit = Unit(str(images / "data.jsonl"))
    assert [files.document_of(unit, name) for name in names] == [
        "one.pdf",
        "scans/two.PDF",
        "scans/two.PDF",
        "one.pdf",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two.pdf", "no page can be drawn (two.pdf has 2 pages; name one, as two.pdf#page=1)"),
        ("two.pdf#page=3", "(two.pdf has no page 3: its pages are 1 to 2)"),
        ("two.pdf#page=0", "(two.pdf has no page 0: its pages are 1 to 2)"),
        ("two.pdf#page=x", "an image is missing (two.pdf#page=x)"),
        ("none.pdf#page=1", "an image is missing (none.pdf)"),
        ("scans/a.png#page=1", "no pages, since it is no PDF (scans/a.png#page=1)"),
    ],
)
def test_a_page_of_a_pdf_that_is_none_is_told(images, prepare, name, reason):
    (images / "two.pdf").write_bytes(make_pdf.pdf([make_pdf.text(20, 100, "Total 1")] * 2))
    good = {"images": ["scans/a.png"], "turns": TURNS}
    source = write(images, [good, {"id": "bad", "images": [name], "turns": TURNS}])
    assert reason in prepare(Jsonl(), source).reasons()["bad"]
