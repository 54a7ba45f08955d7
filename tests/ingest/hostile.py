"""Hostile inputs for every format, written into a folder among good ones. `SETS[FORMAT](folder,
is_hostile)` returns, by their names, a regular expression of the reason against each; `HANDLED`
where there is none, `EITHER` where damage may do no harm."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from tests.ingest.formats.ocr import make_ocr
from tests.ingest.formats.ocr.bad_ocr import BAD
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.test_checks import bomb

EITHER = ".*"
HANDLED = ""


def picture(file_format: str = "PNG", size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)).save(
        file, file_format
    )
    return file.getvalue()


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    """Truncated anywhere, and with bits flipped, by turns."""
    rng = np.random.default_rng(0)
    for number in range(count):
        at = int(rng.integers(len(data)))
        flipped = bytes([data[at] ^ (1 << int(rng.integers(8)))])
        yield data[:at] if number % 2 else data[:at] + flipped + data[at + 1 :]


def record(name: str, **changes) -> dict:
    return {
        "id": name,
        "turns": [{"question": "What?", "answers": [name]}],
        "images": ["good.png"],
    } | changes


def answered(answers: object) -> dict:
    return {"turns": [{"question": "What?", "answers": answers}]}


def word(text: object, box: object) -> dict:
    return {"lines": [[[{"text": text, "box": box}]]]}


IMAGES = {
    "empty": (b"", "no known format"),
    "zeros": (bytes(1000), "no known format"),
    "bomb": (bomb(60_000, 60_000), "too large"),
    "nothing inside": (bomb(100, 100), "cannot be decoded"),
    "strip": (picture(size=(1, 10_000)), HANDLED),
    "column": (picture(size=(10_000, 1)), HANDLED),
    "no picture": (b"Dear reader", "no known format"),
    "a PDF": (b"\n%PDF-1.4 and so on", "an image is a PDF"),
    "JPEG of another ending": (picture("JPEG"), HANDLED),
    "program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "kind that is not read",
    ),
    **{
        f"{file_format} {number}": (data, EITHER)
        for file_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")
        for number, data in enumerate(damaged(picture(file_format), 12))
    },
}

FIELDS: dict[str, tuple[dict, str]] = {
    "missing": ({"images": ["none.png"]}, "image is missing"),
    "folder": ({"images": ["."]}, "image is missing"),
    "device": ({"images": ["/dev/zero"]}, "outside of its folder"),
    "other file": ({"images": ["../../../../../../etc/passwd"]}, "outside of its folder"),
    "absolute": ({"images": ["/etc/passwd"]}, "outside of its folder"),
    "no UTF-8": ({"images": ["\udce9.png"]}, "no UTF-8"),
    "web": ({"images": ["https://example.com/1.png"]}, "neither local nor on gs://"),
    "bucket of another kind": ({"images": ["s3://mine/1.png"]}, "neither local nor on gs://"),
    "NUL": ({"images": ["a\0b.png"]}, "cannot be read"),
    "surrogate": ({"images": ["\ud800.png"]}, "no UTF-8"),
    "no name": ({"images": [""]}, "image is missing"),
    "number": ({"images": [3]}, "images is no list of texts|document is no text"),
    "no base64": ({"images": ["data:image/png;base64,?"]}, "no base64"),
    "base64 of nothing": ({"images": ["data:"]}, "no known format"),
    "base64": (
        {"images": ["data:image/png;base64," + base64.b64encode(picture()).decode()]},
        HANDLED,
    ),
    "many": ({"images": ["large.bmp"] * 300}, "cannot be read .*at most"),
    "no answer": (answered([]), "nothing to learn"),
    "empty answer": (answered([""]), "nothing to learn"),
    "blank answer": (answered([" \n"]), "nothing to learn"),
    "null answer": (answered([None]), "nothing to learn"),
    "null": (answered(None), "nothing to learn"),
    "long answer": (answered(["x" * 100_000]), "too long"),
    "object": (answered({"a": 1}), "answer is no text"),
    "truth": (answered([True]), "answer is no text"),
    "surrogate answer": (answered(["\udc00"]), "no valid Unicode"),
    "NUL answer": (answered(["a\0b"]), HANDLED),
    "no turns": ({"turns": []}, "nothing to learn"),
    "null turns": ({"turns": None}, "nothing to learn"),
    "text turns": ({"turns": "What?"}, "turns is no list"),
    "null question": ({"turns": [{"question": None, "answers": ["a"]}]}, "question is no text"),
    "long question": ({"turns": [{"question": "x" * 100_000, "answers": ["a"]}]}, "too long"),
    "empty id": ({"id": ""}, "id is empty"),
    "long id": ({"id": "x" * 2000}, "id is too long"),
    "path as id": ({"id": "../../../evil"}, HANDLED),
    "list id": ({"id": []}, "id is no text"),
    "list document": ({"document": []}, "document is no text"),
    "surrogate document": ({"document": "\ud800"}, HANDLED),
    "duplicate": ({"id": "good 0"}, "duplicate id"),
    "no box": (word("a", None), "lines are not"),
    "box of nothing": (word("a", [0, 0, float("nan"), 0]), "lines are not"),
    "box without end": (word("a", [0, 0, float("inf"), 0]), "lines are not"),
    "box turned round": (word("a", [5, 0, 1, 1]), "lines are not"),
    "box beyond numbers": (word("a", [0, 0, 10**400, 1]), "unforeseen OverflowError"),
    "box of everything": (word("a", [-1e30, -1e30, 1e30, 1e30]), HANDLED),
    "word of a number": (word(3, [0, 0, 1, 1]), "lines are not"),
    "words of other pages": ({"lines": [[], [], []]}, "another number of images"),
    "lines of text": ({"lines": "abc"}, "lines are not"),
}

LINES = {
    "no JSON": (b"{", "no JSON"),
    "half": (json.dumps(record("half")).encode()[:30], "no JSON"),
    "no object": (b"[1, 2]", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "deep": (b"[" * 100_000, "no JSON"),
    "long number": (b'{"id": ' + b"9" * 10_000 + b"}", "no JSON"),
    "invalid UTF-8": (b'{"id": "\xff\xfe"}', "invalid UTF-8"),
    "zeros": (bytes(64), "no JSON"),
    "binary": (picture().replace(b"\n", b""), "invalid UTF-8|no JSON"),
}


def jsonl(folder: Path, is_hostile: bool) -> dict[str, str]:
    """Writes a set with good and, where told, hostile records by turns; returns the hostile ones'
    reasons by name."""
    (folder / "good.png").write_bytes(picture())
    (folder / "large.bmp").write_bytes(picture("BMP", (1000, 1000)))
    hostile = {f"line {name}": (line, reason) for name, (line, reason) in LINES.items()}
    for number, (name, (data, reason)) in enumerate(IMAGES.items()):
        (folder / f"{number}.png").write_bytes(data)
        hostile[name] = json.dumps(record(name, images=[f"{number}.png"])).encode(), reason
    for name, (fields, reason) in FIELDS.items():
        hostile[f"fields {name}"] = json.dumps(record(f"fields {name}") | fields).encode(), reason
    lines = []
    for number, (line, _) in enumerate(hostile.values()):
        lines += [json.dumps(record(f"good {number}")).encode(), *([line] if is_hostile else [])]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    return {name: reason for name, (_, reason) in hostile.items()}


def tar(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type = kind
            member.linkname = target
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def webdataset(folder: Path, is_hostile: bool) -> dict[str, str]:
    pairs = [
        [(f"good {number}.png", picture()), (f"good {number}.txt", b"Page %d." % number)]
        for number in range(12)
    ]
    odd = {
        "../../evil.png": (picture(), "outside the tar file's folder"),
        f"{folder.parent}/evil.txt": (b"evil", "outside the tar file's folder"),
        "a/../../evil.txt": (b"evil", "outside the tar file's folder"),
        "no UTF-8.txt": (b"\xff\xfe", "without an image"),
        "long.txt": (bytes(2 << 20), "member is too large"),
        "alone.png": (picture(), "without a caption"),
        "evil.sh": (b"rm -r /", HANDLED),
        "empty": (b"", HANDLED),
    }
    members = []
    for number, pair in enumerate(pairs):
        members += pair
        if is_hostile and number < len(odd):
            name = list(odd)[number]
            members.append((name, odd[name][0]))
    (folder / "a.tar").write_bytes(tar(members))
    whole = tar(
        [
            ("x.png", picture()),
            ("x.txt", b"\xff"),
            ("y.png", b""),
            ("y.json", b"[" * 9999),
            ("y2.png", b"?"),
        ]
        * 3
    )
    hostile = {
        "zero bytes.tar": (b"", "broken"),
        "zeros.tar": (bytes(512), EITHER),
        "text.tar": (b"Dear reader" * 100, "broken"),
        "cut.tar.gz": (gzip.compress(whole, mtime=0)[:-100], "broken"),
        "link.tar": (tar([("x.png", b"")], tarfile.SYMTYPE, "/etc/passwd"), HANDLED),
        "hard link.tar": (tar([("x.png", b"")], tarfile.LNKTYPE, "../../evil"), HANDLED),
        "device.tar": (tar([("x.png", b"")], tarfile.CHRTYPE), HANDLED),
        "long header.tar": (header(3 << 30), "a header of 3,221,225,472 bytes"),
        "negative.tar": (header(-512), "a header of -512 bytes"),
        "no end mark.tar": (whole[: -(-whole.rindex(b"?") // 512) * 512], "no end mark"),
        **{
            f"damaged {number}.tar": (data, EITHER)
            for number, data in enumerate(damaged(whole, 24))
        },
    }
    return write_files(folder, hostile, is_hostile) | {
        name: reason for name, (_, reason) in odd.items()
    }


def header(size: int) -> bytes:
    """Of attributes that come before a member."""
    member = tarfile.TarInfo("x")
    member.type = tarfile.XHDTYPE
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def write_files(
    folder: Path, files: dict[str, tuple[bytes, str]], is_hostile: bool
) -> dict[str, str]:
    for name, (data, _) in files.items() if is_hostile else ():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


def parquet(folder: Path, is_hostile: bool) -> dict[str, str]:
    good = {
        "image": {"bytes": picture(), "path": None},
        "question": "What?",
        "answers": ["a"],
        "docId": 1,
    }
    rows = {
        "no image": ({"image": None}, "image is missing"),
        "no bytes": ({"image": {"bytes": None, "path": "none.png"}}, "image is missing"),
        "empty": ({"image": {"bytes": b"", "path": None}}, "image is missing"),
        "half": ({"image": {"bytes": picture()[:100], "path": None}}, "cannot be decoded"),
        "bomb": ({"image": {"bytes": bomb(60_000, 60_000), "path": None}}, "too large"),
        "no question": ({"question": None}, "question is no text"),
        "no answers": ({"answers": None}, "nothing to learn"),
        "null answers": ({"answers": [None]}, "nothing to learn"),
        "long": ({"answers": ["x" * 100_000]}, "too long"),
        "duplicate": ({"questionId": "good 1"}, "duplicate id"),
    }
    table = []
    for number, (name, (changes, _)) in enumerate(rows.items()):
        # Each with an answer of its own: copies are dropped.
        table.append(good | {"questionId": f"good {number}", "answers": [str(number)]})
        table += [good | {"questionId": name} | changes] if is_hostile else []
    pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet", row_group_size=5)
    file = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([good | {"questionId": f"other {number}"} for number in range(6)]),
        file,
    )
    hostile = {
        "zero bytes.parquet": (b"", "cannot be read"),
        "zeros.parquet": (bytes(1000), "cannot be read"),
        "a tar.parquet": (tar([("x.png", picture())]), "cannot be read"),
        **{
            f"damaged {number}.parquet": (data, EITHER)
            for number, data in enumerate(damaged(file.getvalue(), 20))
        },
    }
    return write_files(folder, hostile, is_hostile) | {
        name: reason for name, (_, reason) in rows.items()
    }


def pdf(folder: Path, is_hostile: bool) -> dict[str, str]:
    whole = make_pdf.pdf([make_pdf.text(20, 100, "good")])
    for name in ("good 0", "good 1"):
        page = make_pdf.pdf([make_pdf.text(20, 100, f"very {name}")])
        (folder / f"{name}.pdf").write_bytes(page)
    hostile = {
        "zero bytes.pdf": (b"", "no PDF"),
        "zeros.pdf": (bytes(1000), "no PDF"),
        "a picture.pdf": (picture(), "no PDF"),
        "password.pdf": (make_pdf.encrypted(), "password"),
        "large.pdf": (
            make_pdf.pdf([make_pdf.text(20, 100, "x")], size=(60_000, 60_000)),
            "page is too large",
        ),
        "bomb.pdf": (
            make_pdf.pdf([make_pdf.IMAGE], image=(60_000, 60_000, b"")),
            "image on a page is too large",
        ),
        "pages that are none.pdf": (
            whole.replace(b"/Count 1 ", b"/Count 9 "),
            "page that cannot be read",
        ),
        **{
            f"damaged {number}.pdf": (data, EITHER)
            for number, data in enumerate(damaged(whole, 30))
        },
    }
    return write_files(folder, hostile, is_hostile)


def chats(
    messages: str, role: str, content: str, evaluator: str, answerer: str
) -> Callable[[Path, bool], dict[str, str]]:
    """Sets of chats, in an array and in lines."""

    def write(folder: Path, is_hostile: bool) -> dict[str, str]:
        (folder / "good.png").write_bytes(picture())
        turns = [{role: evaluator, content: "What?"}, {role: answerer, content: "This."}]
        good = {"image": "good.png", messages: turns}
        bad = {
            "missing": (good | {"image": "none.png"}, "image is missing"),
            "web": (good | {"image": "http://example.com/a.png"}, "neither local"),
            "number": (good | {"image": 3}, "image is no path"),
            "no messages": ({"image": "good.png"}, "no list of messages"),
            "text": (good | {messages: "What?"}, "no list of messages"),
            "one who talks alone": (good | {messages: turns[1:]}, "do not alternate"),
            "null": (
                good | {messages: [turns[0], {role: answerer, content: None}]},
                "nothing to learn",
            ),
            "list": (
                good | {messages: [turns[0], {role: answerer, content: []}]},
                "nothing to learn",
            ),
        }
        for number, (fields, _) in enumerate(bad.values()):
            own = good | {messages: [turns[0], {role: answerer, content: f"{number}."}]}
            lines = [json.dumps(one) for one in (own, *([fields] if is_hostile else []))]
            (folder / f"{number} good.jsonl").write_text("\n".join(lines))
        whole = json.dumps([good] * 5).encode()
        ending = "json" if evaluator == "human" else "jsonl"
        files = {
            f"zero bytes.{ending}": (b"", HANDLED),
            f"zeros.{ending}": (bytes(100), "no JSON"),
            f"open.{ending}": (b'[{"image": "good.png", ', "no JSON"),
            f"deep.{ending}": (b'{"a":' * 50_000, "no JSON"),
            **{
                f"damaged {number}.{ending}": (data, EITHER)
                for number, data in enumerate(damaged(whole, 10))
            },
        }
        return write_files(folder, files, is_hostile) | {
            name: reason for name, (_, reason) in bad.items()
        }

    return write


def olmocr_bench(folder: Path, is_hostile: bool) -> dict[str, str]:
    def line(**changes) -> bytes:
        test = {"pdf": "good 0.pdf", "page": 1, "id": "a", "type": "present", "text": "good"}
        return json.dumps(test | changes).encode()

    whole = make_pdf.pdf([make_pdf.text(20, 100, "good")])
    pdfs = {
        "zero bytes": (b"", "no PDF"),
        "a picture": (picture(), "no PDF"),
        "password": (make_pdf.encrypted(), "password"),
        **{f"damaged {n}": (data, EITHER) for n, data in enumerate(damaged(whole, 5))},
    }
    lines = {
        "no JSON": (b"{", "no JSON"),
        "a list": (b"[1]", "no JSON object"),
        "no UTF-8": (line(id="b") + b"\xff", "invalid UTF-8"),
        "twice": (line(id="good 0"), "'good 0' came before"),
        "no such type": (line(id="c", type="presence"), "did you mean 'present'"),
        "another's key": (line(id="d", before="x"), "unknown key 'before' of a present test"),
        "no text": (line(id="e", text=None), "a present test has no text"),
        "an empty text": (line(id="f", text=""), "text of a test is empty"),
        "a number": (line(id="g", text=5), "text of a test is no str"),
        "a bool": (line(id="h", max_diffs=True), "max_diffs of a test is no int"),
        "no page": (line(id="i", page=0), "page 0"),
        "fewer than no edits": (line(id="j", max_diffs=-1), "max_diffs -1"),
        "no such file": (line(id="k", pdf="good 3.pdf"), "did you mean 'good "),
        "outside": (line(id="l", pdf="../good 0.pdf"), "pdfs/ has no '../good 0.pdf'"),
        "a page too many": (line(id="m", pdf="good 1.pdf", page=2), "has no page 2"),
    }
    (folder / "pdfs").mkdir()
    tests = [line(id=f"good {i}", pdf=f"good {i}.pdf") for i in range(2)]
    for i in range(2):
        (folder / "pdfs" / f"good {i}.pdf").write_bytes(whole)
    for name, (data, _) in pdfs.items() if is_hostile else ():
        (folder / "pdfs" / f"{name}.pdf").write_bytes(data)
    tests += [one for one, _ in lines.values()] if is_hostile else []
    (folder / "tests.jsonl").write_bytes(b"\n".join(tests))
    return {f"{name}.pdf-0001": reason for name, (_, reason) in pdfs.items()} | {
        name: reason for name, (_, reason) in lines.items()
    }


def images(folder: Path, is_hostile: bool) -> dict[str, str]:
    """Pages of their own with OCR of all kinds."""
    files = {"good.hocr": (make_ocr.hocr(), ""), "good too.xml": (make_ocr.alto(), "")}
    if is_hostile:
        files |= {name: found for name, found in BAD.items() if found[1]}
        files["none.txt"] = ("", "a scan: give OCR")
    for number, (name, (content, _)) in enumerate(files.items()):
        page = Image.new("L", (make_ocr.WIDTH, make_ocr.HEIGHT), 255)
        page.putpixel((number, 0), 0)
        # Of one name with two endings, two files of OCR would be meant for one page.
        stem = name.replace(".", " ")
        page.save(folder / f"{stem}.png")
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"{stem}.{name.rpartition('.')[2]}").write_bytes(data)
    return {name.replace(".", " "): reason for name, (_, reason) in files.items() if reason}


SETS = {
    "images": images,
    "jsonl": jsonl,
    "docdownstream": chats("messages", "role", "content", "user", "assistant"),
    "llava": chats("conversations", "from", "value", "human", "gpt"),
    "parquet": parquet,
    "webdataset": webdataset,
    "pdf": pdf,
    "olmocr_bench": olmocr_bench,
}
