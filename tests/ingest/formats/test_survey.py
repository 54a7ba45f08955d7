"""What a source of any kind is found to hold, and which format reads it."""

import json

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import REGISTRY, survey
from tests.ingest.formats.pdf import make_pdf

OWN = {"images": ["a.png"], "turns": []}
LLAVA = {"image": "a.png", "conversations": []}
DOWNSTREAM = {"image": ["a.png"], "messages": []}


def write(folder, **contents):
    """Files of these names, `__` for a dot: bytes as they are, objects as JSON lines."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = b"\n".join(json.dumps(one).encode() for one in content)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"a__PDF": b"", "b__png": b"", "c__docx": b""}, "pdf"),
        ({"a__jsonl": [OWN], "a__png": b""}, "jsonl"),
        ({"a__jsonl": [LLAVA]}, "llava"),
        ({"a__json": b'[{"conversations": []}]'}, "llava"),
        ({"a__ndjson": [DOWNSTREAM]}, "docdownstream"),
        ({"a__jsonl": b""}, "jsonl"),
        ({"a__png": b"", "a__hocr": b"", "notes__txt": b""}, "images"),
        ({"a__jpg": b"", "a__jpg__xml": b""}, "images"),
        ({"a__jsonl": [OWN], "a__png": b"", "a__hocr": b""}, "jsonl"),
        ({"a__jsonl": b"\xff{"}, "jsonl"),
        ({"a__parquet": b""}, "parquet"),
        ({"a__tar__gz": b""}, "webdataset"),
    ],
)
def test_the_one_format_that_reads_a_source_is_taken(tmp_path, contents, expected):
    write(tmp_path, **contents)
    found = survey.survey(str(tmp_path))
    assert found.format("prepare", "out", "") == expected and found.by_format == {expected: 1}


def test_each_format_reads_the_example_of_its_schema():
    """A JSON object in a schema is taken for a record of that format."""
    for name, kind in REGISTRY.items():
        assert kind.about and "\n" not in kind.about and len(kind.about) < 100
        lines = [line.strip() for line in kind.schema.splitlines()]
        for line in lines:
            if line.startswith('{"image') and line.endswith("}"):
                keys = set(json.loads(line))
                assert kind.first_key in {*keys, ""}, name
        assert max(map(len, lines)) <= 150


def test_images_are_counted_and_told_where_they_go(tmp_path):
    write(tmp_path, a__pdf=b"", b__png=b"", c__PNG=b"", d__tiff=b"")
    found = survey.survey(str(tmp_path))
    assert str(found).endswith(": 1 file for pdf; 3 images (2 PNG, 1 TIFF)")
    said = found.about_images("pdf")
    assert said.startswith("not read: 3 images (2 PNG, 1 TIFF). An image alone teaches nothing")
    assert "prepare --format=jsonl --help" in said
    assert found.about_images("jsonl") == found.about_unnamed("jsonl", 3) == ""
    assert "holds 3 images (2 PNG, 1 TIFF), and records have 2: " in found.about_unnamed("jsonl", 2)


def test_of_images_alone_there_is_no_format(tmp_path):
    write(tmp_path, b__png=b"")
    with pytest.raises(UserError, match=r"1 image \(1 PNG\)\. An image alone .*--format=jsonl"):
        survey.survey(str(tmp_path)).format("prepare", "out", "")


def test_of_several_formats_the_commands_are_given(tmp_path):
    write(tmp_path / "my files", a__pdf=b"", b__jsonl=[OWN], c__jsonl=[LLAVA])
    found = survey.survey(str(tmp_path / "my files"))
    with pytest.raises(UserError, match="Several formats read it") as error:
        found.format("prepare", "data/mine", "--tokenizer=x")
    for name in ("pdf", "jsonl", "llava"):
        command = f"prepare --format={name} --source='{tmp_path}/my files' --out=data/mine/{name} --tokenizer=x"
        assert command in str(error.value)
    assert str(error.value).count("--tokenizer=x --holdout_by=page") == 1
    assert found.about_files("pdf") == "beside them: 1 for --format=jsonl; 1 for --format=llava"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "holds no file"),
        ({"a__docx": b""}, r"1 other file \(1 \.docx\)\. No format reads that: give \.jsonl"),
        ({"a__json": b"{}"}, r"1 other file \(1 \.json\)"),
        # JSON that other programs write, with images and without.
        (
            {"a__json": b'{"form": []}', "a__png": b""},
            r"1 image .* a\.json has form; docs/data\.md",
        ),
        ({"a__json": b'[{"id": 1, "data": {}}]'}, r"give .*\. a\.json has data, id; docs/data\.md"),
        ({"a__csv": b"", "a__png": b""}, r"An image alone .*; docs/data\.md has how tables"),
        ({"line\nbreak__x\ny": b""}, r"1 other file \(1 \.x\\ny\)"),
    ],
)
def test_what_nothing_reads_is_named_on_one_line(tmp_path, contents, message):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", **contents)
    with pytest.raises(UserError, match=message) as error:
        survey.survey(str(tmp_path / "in")).format("prepare", "out", "")
    assert "\n" not in str(error.value)


def test_what_was_prepared_within_the_source_is_no_part_of_it(tmp_path):
    write(tmp_path, a__pdf=make_pdf.pdf([""]))
    write(tmp_path / "out", rejected__jsonl=[{}])
    assert survey.survey(str(tmp_path), str(tmp_path / "out")).by_format == {"pdf": 1}


def test_of_many_json_files_some_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "MAX_OPENED", 2)
    for number in range(5):
        write(tmp_path, **{f"{number}__json": b'[{"conversations": []}]'})
    write(tmp_path, **{"4__json": b"{}"})
    assert survey.survey(str(tmp_path)).by_format == {"llava": 5}


def test_links_to_nothing_are_counted(tmp_path):
    write(tmp_path, a__pdf=b"")
    (tmp_path / "b.pdf").symlink_to(tmp_path / "nowhere.pdf")
    found = survey.survey(str(tmp_path))
    assert found.by_format == {"pdf": 1} and str(found).endswith("1 other file (1 broken link)")
    assert found.about_files("pdf") == "beside them: 1 broken link"
