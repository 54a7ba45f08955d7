import io
import json
import tarfile

import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.webdataset import WebDataset


def write(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_images_with_captions(tmp_path, prepare, png):
    path = write(
        tmp_path / "00000.tar",
        [
            ("000.jpg", png(file_format="JPEG")),
            ("000.json", json.dumps({"caption": "of json"}).encode()),
            ("000.txt", b"A cat.\n"),
            ("a/001.PNG", png()),
            ("a/001.json", json.dumps({"caption": "A dog."}).encode()),
        ],
    )
    first, second = prepare(WebDataset(prompt="What?"), path).records()
    assert (first.id, first.turns, first.source) == (
        "00000/000",
        (Turn("What?", ("A cat.",)),),
        "webdataset",
    )
    assert second.id == "00000/a/001" and second.images == (png(),)


def test_a_caption_that_is_the_text_of_a_list_is_told(tmp_path, prepare, png):
    listed = json.dumps({"caption": "['A cat.', 'Cats.']"}).encode()
    members = [("0.png", png()), ("0.txt", b"A cat."), ("1.png", png()), ("1.json", listed)]
    prepared = prepare(WebDataset(), write(tmp_path / "a.tar", members))
    [reason] = prepared.reasons().values()
    assert reason.startswith("a caption is the text of a list; write a list")


def test_a_member_of_a_longer_ending_is_told(tmp_path, prepare, png):
    """From the first dot on, as the library of that name has it: scan.v2.jpg is no .jpg."""
    members = [("scan.v2.png", png()), ("scan.v2.txt", b"x"), ("0.png", png()), ("0.txt", b"x")]
    members += [("0.seg.png", png()), ("0.left.npy", b"")]
    prepared = prepare(WebDataset(), write(tmp_path / "a.tar", members))
    assert [record.id for record in prepared.records()] == ["a/0"]
    assert prepared.reasons() == {
        "scan.v2.png": "an ending that is not read (.v2.png, from the first dot on)",
        "scan.v2.txt": "an ending that is not read (.v2.txt, from the first dot on)",
        "0.seg.png": "an ending that is not read (.seg.png, from the first dot on)",
    }


def test_names_may_come_again_in_other_files(tmp_path, prepare, png):
    for name in ("a.tar", "b.tar.gz"):
        write(
            tmp_path / name,
            [("0.png", png()), ("0.txt", b"x")],
            "w:gz" if name.endswith("gz") else "w",
        )
    assert [record.id for record in prepare(WebDataset(), tmp_path).records()] == ["a/0", "b/0"]


def test_members_that_cannot_be_used(tmp_path, prepare, png):
    members = [
        ("../evil.png", png()),
        ("/tmp/evil.png", png()),
        ("a/../../evil.png", png()),
        ("alone.png", png()),
        ("words.txt", b"x"),
        ("bytes.png", png()),
        ("bytes.txt", b"\xff"),
        ("json.png", png()),
        ("json.json", b"{"),
        ("null.png", png()),
        ("null.json", b"[]"),
        ("README", b"no part of a record"),
        ("good.png", png()),
        ("good.txt", b"x"),
    ]
    before = set(tmp_path.parent.rglob("*evil*"))
    prepared = prepare(WebDataset(), write(tmp_path / "a.tar", members))
    assert [record.id for record in prepared.records()] == ["a/good"]
    reasons = prepared.reasons()
    assert {name: reason for name, reason in reasons.items() if "outside" in reason}.keys() == {
        "../evil.png",
        "/tmp/evil.png",
        "a/../../evil.png",
    }
    for name, reason in {
        "alone": "without a caption",
        "words": "without an image",
        "bytes": "UTF-8",
    }.items():
        assert reason in reasons[f"a/{name}"]
    assert "no JSON" in reasons["a/json"] and "no answer" in reasons["a/null"] and len(reasons) == 8
    assert set(tmp_path.parent.rglob("*evil*")) == before


def test_members_that_come_again_under_one_name(tmp_path, prepare, png):
    """Which of them belong together nobody can tell."""
    members = [
        ("image.png", png()),
        ("image.txt", b"x"),
        ("image.PNG", png(file_format="PNG")),
        ("text.png", png()),
        ("text.txt", b"x"),
        ("text.txt", b"y"),
        ("both.png", png()),
        ("both.jpg", png(file_format="JPEG")),
        ("both.txt", b"x"),
        ("good.png", png()),
        ("good.txt", b"x"),
    ]
    prepared = prepare(WebDataset(), write(tmp_path / "a.tar", members))
    assert [record.id for record in prepared.records()] == ["a/good"]
    assert prepared.reasons() == {
        "a/image": "a member came before under the same name (image.png)",
        "a/text": "a member came before under the same name (text.txt)",
        "a/both": "several images of one name (.jpg, .png)",
    }


def test_links_and_devices_are_no_members(tmp_path, prepare, png):
    path = write(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"x")])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("1.png")
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    prepared = prepare(WebDataset(), path)
    assert len(prepared.records()) == 1 and prepared.rejected() == []


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_truncated_file_gives_what_is_whole(tmp_path, keep, png):
    members = [
        (f"{i}.{ending}", data)
        for i in range(20)
        for ending, data in (("png", png()), ("txt", b"x"))
    ]
    whole = write(tmp_path / "a.tar", members).read_bytes()
    used = whole[: 40 * 1024]
    (tmp_path / "a.tar").write_bytes(used[: int(len(used) * keep) + 700])
    form = WebDataset()
    items = [item for unit in form.units(str(tmp_path / "a.tar")) for item in form.raws(unit)]
    assert len(items) - 1 >= int(20 * keep) - 1 and "broken" in next(
        i.reason for i in items if hasattr(i, "reason")
    )


@pytest.mark.parametrize("keep", [6 * 1024, 6 * 1024 + 100, "bad checksum"])
def test_where_a_header_cannot_be_read_the_rest_is_missed(tmp_path, keep, png):
    members = [
        (f"{i}.{ending}", data)
        for i in range(20)
        for ending, data in (("png", png()), ("txt", b"x"))
    ]
    path = write(tmp_path / "a.tar", members)
    data = path.read_bytes()
    path.write_bytes(
        data[: 6 * 1024] + b"?" + data[6 * 1024 + 1 :] if keep == "bad checksum" else data[:keep]
    )
    *records, last = WebDataset().raws(*WebDataset().units(str(path)))
    assert [record.id for record in records[:2]] == ["a/0", "a/1"] and len(records) == 3
    assert any(
        hasattr(item, "reason") and "broken from here on" in item.reason
        for item in (*records, last)
    )


def test_members_of_a_name_have_a_size_together(tmp_path, prepare, png, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 300)
    members = [
        ("0.png", png()),
        ("0.jpg", bytes(250)),
        ("0.txt", b"x"),
        ("1.png", png()),
        ("1.txt", b"y"),
    ]
    prepared = prepare(WebDataset(), write(tmp_path / "a.tar", members))
    assert [record.images for record in prepared.records()] == [(png(),)] * 2
    assert prepared.reasons() == {
        "0.jpg": "members of a name are too large together (at most 300 bytes)"
    }
