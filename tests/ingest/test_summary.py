"""What `prepare` tells of a folder: documents by split, where rejected records lie, what moved."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from alignvlm_jax.ingest import staging, summary
from alignvlm_jax.ingest.formats import REGISTRY, files
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.test_webdataset import write as write_tar

PAGES = 4


@pytest.fixture
def source(tmp_path, png):
    """Twenty documents of four pages each, one file an image, and a line without its image."""
    lines = []
    for number in range(20 * PAGES):
        (tmp_path / f"{number}.png").write_bytes(png(shade=number))
        turns = [{"question": "What?", "answers": [str(number)]}]
        of = {"document": f"d{number // PAGES}", "images": [f"{number}.png"], "turns": turns}
        lines.append(json.dumps(of))
    lines[5] = lines[5].replace("5.png", "none.png")
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "own.jsonl"


def test_documents_are_counted_by_split(source, prepare):
    prepared = prepare(Jsonl(), source, holdout=0.2, group_tokens=100)
    told = summary.of(prepared.folder)
    counts = {}
    for split in ("train", "validation"):
        names = {record.turns[0].answers[0] for record in prepared.records(split)}
        counts[split] = len({int(name) // PAGES for name in names})
        assert (
            f"{split}: {len(names)} records, {len(names)} images, from {counts[split]} doc" in told
        )
    assert counts["validation"] > 1 and sum(counts.values()) == 20
    description = prepared.folder / "prepare.json"
    # What is counted is what is held out together.
    description.write_text(json.dumps({"holdout_by": "page"}))
    assert f"from {counts['train']} pages" in summary.of(prepared.folder)
    (prepared.folder / staging.COUNTS).write_text("{}")
    assert ", from" not in summary.of(prepared.folder)


def test_a_document_all_of_whose_records_are_dropped_is_none(source, prepare):
    lines = source.read_text().splitlines()
    copies = [line.replace('"d0"', '"copy"') for line in lines[:PAGES]]
    source.write_text("\n".join([*lines, *copies]) + "\n")
    prepared = prepare(Jsonl(), source, group_tokens=100)
    assert "from 20 documents" in summary.of(prepared.folder)


def test_the_first_rejected_record_is_told_with_its_file_line_and_image(source, prepare):
    prepared = prepare(Jsonl(), source)
    [line] = prepared.rejected()
    place = {"source": str(source), "place": "line 6", "images": ["none.png"]}
    assert line.items() >= place.items()
    told = summary.of(prepared.folder)
    assert f"  1: an image is missing; {source}, line 6, none.png, id {line['id']}" in told


def contents(name, png):
    """The ending and the bytes of a file of a format whose second record is a copy of the first."""
    if name in ("llava", "docdownstream", "llava_array"):
        user, answerer = ("user", "assistant") if name == "docdownstream" else ("human", "gpt")
        role, text = ("role", "content") if name == "docdownstream" else ("from", "value")
        messages = "messages" if name == "docdownstream" else "conversations"
        turns = [{role: user, text: "What?"}, {role: answerer, text: "This."}]
        line = json.dumps({"image": "1.png", messages: turns})
        if name == "llava_array":
            return ".json", f"[\n{line},\n{line}\n]".encode()
        return ".jsonl", f"{line}\n{line}\n".encode()
    if name == "parquet":
        file = io.BytesIO()
        row = {"image": {"bytes": None, "path": "1.png"}, "query": "What?", "label": "This."}
        parquet.write_table(pa.Table.from_pylist([row, row]), file)
        return ".parquet", file.getvalue()
    return ".pdf", make_pdf.pdf([make_pdf.text(20, 100, "good")], pages=2)


PLACES = {
    "llava": "line 2",
    "llava_array": "line 3",
    "docdownstream": "line 2",
    "parquet": "row 2",
}


@pytest.mark.parametrize("name", PLACES)
def test_every_format_tells_where_a_record_lies(name, tmp_path, prepare, png):
    source = tmp_path / "in"
    source.mkdir()
    (source / "1.png").write_bytes(png())
    ending, data = contents(name, png())
    (source / f"1{ending}").write_bytes(data)
    prepared = prepare(REGISTRY[name.removesuffix("_array")](), source, group_tokens=100)
    [line] = prepared.rejected()
    assert line["place"] == PLACES[name]
    assert (
        f"in {source}/1{ending}, {PLACES[name][:-1]}{int(PLACES[name][-1]) - 1})" in line["reason"]
    )


def test_members_and_pages_are_places(tmp_path, prepare, png):
    members = [("1.png", png()), ("1.txt", b"A page."), ("2.png", png()), ("2.txt", b"A page.")]
    write_tar(tmp_path / "1.tar", members)
    [line] = prepare(REGISTRY["webdataset"](), tmp_path / "1.tar", group_tokens=100).rejected()
    assert line["place"] == "member 2.png"
    form = REGISTRY["images"]()
    (tmp_path / "scans").mkdir()
    page = Image.new("L", (9, 9), 255)
    page.save(tmp_path / "scans/1.tif", save_all=True, append_images=[page])
    (tmp_path / "scans/2.hocr").write_text("")
    items = list(form.raws(form.units(str(tmp_path / "scans"))[0]))
    assert [item.place for item in items] == ["page 1", "page 2"]


def test_lines_are_counted_however_bytes_come(tmp_path):
    text = "".join("x" * (n % 7) + "\n" for n in range(100))
    (tmp_path / "a.jsonl").write_text(text)
    places = files.Places(str(tmp_path / "a.jsonl"))
    for at in np.random.default_rng(0).permutation(len(text))[:60].tolist():
        line = text[:at].count("\n") + 1
        assert places.spelled(at) == f"line {line}"


def test_far_into_a_file_bytes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_COUNTED", 10)
    (tmp_path / "a.jsonl").write_text("\n" * 99)
    assert files.Places(str(tmp_path / "a.jsonl")).spelled(11) == "byte 11"


def test_records_that_change_sides_are_counted(source, prepare, png):
    prepared = prepare(Jsonl(), source, holdout=0.1)
    before = summary.hashes(prepared.folder, ("train", "validation"))
    assert summary.moved(before, prepared.folder) == ""
    prepare(Jsonl(), source, holdout=0.5)
    left = len(before["train"]) - len(prepared.records())
    told = f"of {len(before['train'])} records of train {left} now in validation"
    assert told in summary.moved(before, prepared.folder)
    # Records that come besides move none of those that were there.
    before = summary.hashes(prepared.folder, ("train", "validation"))
    (source.parent / "new.png").write_bytes(png(shade=200))
    lines = source.read_text().splitlines()
    source.write_text(
        "\n".join([*lines, lines[0].replace('"d0"', '"new"').replace("0.png", "new.png")])
    )
    prepare(Jsonl(), source, holdout=0.5)
    assert summary.moved(before, prepared.folder) == ""
    source.write_text("\n".join(lines[: 10 * PAGES]) + "\n")
    prepare(Jsonl(), source, holdout=0.5)
    assert "gone or changed" in summary.moved(before, prepared.folder)
