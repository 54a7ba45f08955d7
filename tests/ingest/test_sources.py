"""Sources as they lie: names of any bytes, files that are edited, paths that lead elsewhere."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignvlm_jax.commands import prepare as command
from alignvlm_jax.data import filesystem, prepared
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import job
from alignvlm_jax.ingest.formats import REGISTRY, survey
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from tests.ingest.formats.pdf import make_pdf

FORMATS = ("jsonl", "llava", "docdownstream", "parquet", "webdataset", "pdf")
BAD = os.fsdecode(b"r\xe9sum\xe9")


def tar(image: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("1.png", image), ("1.txt", b"A page.")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def contents(name: str, image: bytes) -> tuple[str, bytes]:
    """The ending and the bytes of a file of a format; it may name 1.png."""
    chat = {"user": ("role", "content", "messages"), "human": ("from", "value", "conversations")}
    if name in ("llava", "docdownstream"):
        (user, answerer) = ("human", "gpt") if name == "llava" else ("user", "assistant")
        role, text, messages = chat[user]
        turns = [{role: user, text: "What?"}, {role: answerer, text: "This."}]
        return ".jsonl", json.dumps({"image": "1.png", messages: turns}).encode()
    if name == "jsonl":
        turns = [{"question": "What?", "answers": ["This."]}]
        return ".jsonl", json.dumps({"images": ["1.png"], "turns": turns}).encode()
    if name == "parquet":
        file = io.BytesIO()
        row = {"image": {"bytes": None, "path": "1.png"}, "query": "What?", "label": "This."}
        parquet.write_table(pa.Table.from_pylist([row]), file)
        return ".parquet", file.getvalue()
    if name == "webdataset":
        return ".tar", tar(image)
    return ".pdf", make_pdf.pdf([make_pdf.text(20, 100, "good")])


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_is_no_utf8_is_a_line_and_ends_nothing(name, tmp_path, prepare, png):
    source = tmp_path / "in"
    (source / BAD).mkdir(parents=True)
    (source / "1.png").write_bytes(png())
    ending, data = contents(name, png())
    for path in (f"good{ending}", f"{BAD}{ending}", f"{BAD}/below{ending}", f"{BAD}.txt"):
        (source / path).write_bytes(data)
    form = REGISTRY[name](**({"holdout_by": "page"} if name == "pdf" else {}))
    prepared = prepare(form, source)
    assert len(prepared.records()) == 1
    lines = prepared.rejected()
    assert [line["reason"] for line in lines] == 2 * ["the file's name is no UTF-8; rename it"]
    assert {line["id"] for line in lines} == {rf"r\xe9sum\xe9{ending}", f"below{ending}"}
    assert all(r"/r\xe9sum\xe9" in line["source"] for line in lines)
    (source / f"good{ending}").unlink()
    with pytest.raises(
        UserError,
        match=r"no file that ends .* but 2 that nothing can open, as .*: the file's name is no UTF-8",
    ):
        prepare(form, source)


@pytest.mark.parametrize("name", FORMATS)
def test_a_link_that_leads_nowhere_is_a_line_and_ends_nothing(name, tmp_path, prepare, png):
    source = tmp_path / "in"
    source.mkdir()
    (source / "1.png").write_bytes(png())
    ending, data = contents(name, png())
    (source / f"good{ending}").write_bytes(data)
    for link, target in {
        "self": f"self{ending}",
        "gone": "nowhere",
        "x": f"y{ending}",
        "y": f"x{ending}",
    }.items():
        (source / f"{link}{ending}").symlink_to(target)
    (source / "folder").symlink_to("folder")
    form = REGISTRY[name](**({"holdout_by": "page"} if name == "pdf" else {}))
    prepared = prepare(form, source)
    assert len(prepared.records()) == 1
    reason = "a link that leads nowhere, or to itself"
    found = [(line["id"], line["reason"]) for line in prepared.rejected()]
    assert sorted(found) == [(f"{link}{ending}", reason) for link in ("gone", "self", "x", "y")]
    # As are the listings by which prepared folders are read, of which such a link hid all files.
    assert set(filesystem.listing(source)) == {"1.png", f"good{ending}"}
    assert survey.survey(str(source)).others == {"broken link": 5}
    (source / f"good{ending}").unlink()
    with pytest.raises(UserError, match=r"no file that ends .* but 4 that nothing can open, as"):
        prepare(form, source)
    with pytest.raises(UserError, match=r"/self\.\w+ is a link that leads nowhere, or to itself"):
        prepare(form, source / f"self{ending}")


def test_a_source_or_an_image_of_such_a_name_is_told(tmp_path, prepare, png):
    (tmp_path / f"{BAD}.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"name .*r\\xe9sum\\xe9\.jsonl is no UTF-8; rename it"):
        prepare(Jsonl(), tmp_path / f"{BAD}.jsonl")
    turns = [{"question": "What?", "answers": ["This."]}]
    (tmp_path / f"{BAD}.png").write_bytes(png())
    (tmp_path / "1.jsonl").write_text(json.dumps({"images": [f"{BAD}.png"], "turns": turns}))
    with pytest.raises(UserError, match=r"an image has a name that is no UTF-8 \(r\\xe9sum"):
        prepare(Jsonl(), tmp_path / "1.jsonl")


def test_a_link_to_a_folder_around_it_is_not_followed_for_ever(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/1.pdf").touch()
    (tmp_path / "in/b").symlink_to("a")
    (tmp_path / "in/a/loop").symlink_to("../../in")
    found = filesystem.list_files(str(tmp_path / "in"), (".pdf",))
    assert found == [f"{tmp_path}/in/a/1.pdf", f"{tmp_path}/in/b/1.pdf"]


def test_a_file_edited_to_the_same_size_is_prepared_anew(tmp_path, prepare, png, tokenizer):
    (tmp_path / "1.png").write_bytes(png())
    source = tmp_path / "data.jsonl"
    for answer in ("AAAA", "BBBB"):
        turns = [{"question": "What?", "answers": [answer]}]
        source.write_text(json.dumps({"images": ["1.png"], "turns": turns}))
        [record] = prepare(Jsonl(), source).records()
        assert record.turns[0].answers == (answer,)
    request = job.Request("test", Jsonl(), str(source), tokenizer.name, 0.0, shard_records=10)
    assert not job.prepare(request, tmp_path / "out", job.on_processes(1))


@pytest.mark.parametrize("name", ["jsonl", "llava", "docdownstream", "parquet"])
def test_an_image_that_was_edited_came_or_went_is_prepared_anew(
    name, tmp_path, prepare, png, monkeypatch
):
    source = tmp_path / "in"
    source.mkdir()
    ending, data = contents(name, png())
    again = data.replace(b"1.png", b"2.png")
    (source / f"a{ending}").write_bytes(data)
    (source / f"b{ending}").write_bytes(again if name != "parquet" else data)
    second = "2.png" if name != "parquet" else "1.png"
    form = REGISTRY[name]()

    def first() -> bytes:
        return prepare(form, source, group_tokens=0).records()[0].images[0]

    for shade in (1, 2):  # files of one size
        (source / "1.png").write_bytes(png(shade=shade))
        assert first() == png(shade=shade)
    fingerprint = prepared.fingerprint(tmp_path / "out")
    os.utime(source / "1.png", (9, 9))
    first()
    assert prepared.fingerprint(tmp_path / "out") != fingerprint
    if second == "2.png":
        (source / "2.png").write_bytes(png(shade=3))
        assert len(prepare(form, source, group_tokens=0).records()) == 2
        (source / "2.png").unlink()
        assert len(prepare(form, source, group_tokens=0).records()) == 1
    monkeypatch.setattr(job.UnitWriter, "__call__", lambda *_: pytest.fail("prepared again"))
    assert first() == png(shade=2)


def test_a_part_whose_image_was_edited_meanwhile_is_made_anew(tmp_path, prepare, png, monkeypatch):
    source = tmp_path / "data.jsonl"
    turns = [{"question": "What?", "answers": ["This."]}]
    source.write_text(json.dumps({"images": ["1.png"], "turns": turns}))
    for shade in (1, 2):
        (tmp_path / "1.png").write_bytes(png(shade=shade))
        with monkeypatch.context() as patch:
            if shade == 1:
                patch.setattr(job.finish, "finish", lambda *_: (_ for _ in ()).throw(OSError()))
                with pytest.raises(OSError):
                    prepare(Jsonl(), source)
    assert prepare(Jsonl(), source).records()[0].images == (png(shade=2),)


def test_a_file_that_was_edited_meanwhile_does_not_go_on_with_old_parts(
    tmp_path, prepare, png, monkeypatch
):
    (tmp_path / "1.png").write_bytes(png())
    source = tmp_path / "data.jsonl"
    for answer in ("AAAA", "BBBB"):
        turns = [{"question": "What?", "answers": [answer]}]
        source.write_text(json.dumps({"images": ["1.png"], "turns": turns}))
        with monkeypatch.context() as patch:
            if answer == "AAAA":
                patch.setattr(job.finish, "finish", lambda *_: (_ for _ in ()).throw(OSError()))
                with pytest.raises(OSError):
                    prepare(Jsonl(), source)
    [record] = prepare(Jsonl(), source).records()
    assert record.turns[0].answers == ("BBBB",)


@pytest.mark.parametrize("name", ["jsonl", "llava", "docdownstream", "parquet"])
@pytest.mark.parametrize("way", ["..", "absolute", "link", "folder link"])
def test_an_image_outside_is_refused_unless_it_is_allowed(
    name, way, tmp_path, prepare, png, tokenizer
):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    (tmp_path / "out side").mkdir()
    (tmp_path / "out side/1.png").write_bytes(png())
    path = {
        "..": "../../out side/1.png",
        "absolute": f"{tmp_path}/out side/1.png",
        "link": "x.png",
        "folder link": "x/1.png",
    }[way]
    (source / "deep/x.png").symlink_to("../../out side/1.png")
    (source / "deep/x").symlink_to("../../out side")
    ending, data = contents(name, png())
    if name == "parquet":
        row = {"image": {"bytes": None, "path": path}, "query": "What?", "label": "This."}
        parquet.write_table(pa.Table.from_pylist([row]), source / "deep/d.parquet")
    else:
        (source / f"deep/d{ending}").write_bytes(data.replace(b"1.png", path.encode()))
    with pytest.raises(UserError, match=r"an image lies outside of its folder \(.*1?.png; --allow"):
        prepare(REGISTRY[name](), source)
    assert len(prepare(REGISTRY[name](), source, allow_outside=True).records()) == 1
    flags = [f"--format={name}", f"--source={source}", f"--tokenizer={tokenizer.name}"]
    command.main([*flags, f"--out={tmp_path}/cli", "--allow_outside"])
    # What lies below the source, or the folder of --images, is inside.
    if name in ("jsonl", "llava", "docdownstream"):
        form = REGISTRY[name](images=str(tmp_path / "out side"))
        (source / f"deep/d{ending}").write_bytes(data)
        assert len(prepare(form, source, "b").records()) == 1
    if way == "..":
        (source / "1.png").write_bytes(png())
        if name != "parquet":
            (source / f"deep/d{ending}").write_bytes(data.replace(b"1.png", b"../1.png"))
            assert len(prepare(REGISTRY[name](), source, "c").records()) == 1


def test_links_of_a_whole_source_are_its_owners(tmp_path, prepare, png):
    """As where a folder of data lies on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/1.png").write_bytes(png())
    (tmp_path / "disk/d.jsonl").write_bytes(contents("jsonl", b"")[1])
    (tmp_path / "in").symlink_to("disk")
    assert len(prepare(Jsonl(), tmp_path / "in").records()) == 1
    assert len(prepare(Jsonl(), Path(tmp_path / "in/d.jsonl"), "b").records()) == 1


def test_what_was_prepared_below_the_source_is_no_source(tmp_path, prepare, png):
    """Its lists of rejected records and of images end in .jsonl, too."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "1.png").write_bytes(png())
    (source / "own.jsonl").write_bytes(contents("jsonl", png())[1] + b"\nno JSON\n")
    below = prepare(Jsonl(), source, "in/prepared")
    assert len(below.folder.joinpath("rejected.jsonl").read_text().splitlines()) == 1
    again = prepare(Jsonl(), source, "again")
    assert again.files().keys() == below.files().keys()
    assert again.files()["rejected.jsonl"] == below.files()["rejected.jsonl"]


def test_what_a_job_wrote_into_its_source_makes_no_other_data(tmp_path, tokenizer):
    """Formats with OCR read .json beside their units, and prepare.json ends so."""
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.pdf").write_bytes(make_pdf.pdf([make_pdf.text(20, 100, "good")]))
    request = job.Request("pdf", REGISTRY["pdf"](), str(source), tokenizer.name, 0.0)
    run = job.on_processes(1)
    assert job.prepare(request, source / "b" / "out", run)
    assert not job.prepare(request, source / "b" / "out", run)


@pytest.mark.parametrize("content", ['{"version": 1}', "[1]", "{"])
def test_a_prepare_json_of_another_program_hides_nothing(
    content, tmp_path, prepare, png, tokenizer
):
    source = tmp_path / "in"
    for folder in (source, source / "deep"):
        folder.mkdir()
        (folder / "1.png").write_bytes(png())
        ending, text = contents("jsonl", png())
        (folder / f"own{ending}").write_bytes(text)
        (folder / "prepare.json").write_text(content)
    # In the source itself, in a folder below and in the one that is written.
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.json").write_text(content)
    assert len(prepare(Jsonl(), source, group_tokens=0).records()) == 2


def test_what_was_prepared_below_is_told_and_no_format_of_the_source(tmp_path, prepare, png, capfd):
    source = tmp_path / "in"
    source.mkdir()
    (source / "1.png").write_bytes(png())
    (source / "own.jsonl").write_bytes(contents("jsonl", png())[1] + b"\nno JSON\n")
    below = prepare(Jsonl(), source, "in/deep/prepared").folder
    assert "left out" not in capfd.readouterr().err
    (below / "more").mkdir()
    (below / "more" / "own.jsonl").write_bytes(contents("jsonl", png())[1])
    prepare(Jsonl(), source, "again")
    assert f"{below} is what prepare wrote: it is left out" in capfd.readouterr().err
    assert survey.survey(str(source)).by_format == {"jsonl": 1}
