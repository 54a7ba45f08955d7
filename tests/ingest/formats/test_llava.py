import json
import re

import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats import array, files
from alignvlm_jax.ingest.formats.base import Rejection
from alignvlm_jax.ingest.formats.messages import Llava


def conversation(number: int, image: str | None = "1.png") -> dict:
    said = [
        {"from": "human", "value": f"<image>\nWhat is {number}? é"},
        {"from": "gpt", "value": f"It is {number}."},
    ]
    return {"id": "same", "conversations": said} | ({"image": image} if image else {})


@pytest.fixture
def folder(tmp_path, png):
    (tmp_path / "1.png").write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_ranges(folder, prepare, monkeypatch, indent):
    monkeypatch.setattr(files, "UNIT_RECORDS", 3)
    path = folder / "llava.json"
    path.write_text(
        json.dumps([conversation(i) for i in range(10)], indent=indent, ensure_ascii=False)
    )
    assert len(Llava().units(str(path))) == 4
    records = prepare(Llava(), path).records()
    assert [record.turns for record in records] == [
        (Turn(f"What is {i}? é", (f"It is {i}.",)),) for i in range(10)
    ]


def test_lines_and_records_without_image(folder, prepare):
    path = folder / "llava.jsonl"
    blind = conversation(0, None)
    blind["conversations"][0]["value"] = "What is 1 + 1?"
    path.write_text("\n".join(json.dumps(one) for one in (blind, conversation(1))))
    assert [len(record.images) for record in prepare(Llava(), path).records()] == [0, 1]


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


WEIGHTLESS = {"from": "human", "value": "?", "weight": 0}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "1 image mark for 0 images"),
        ({"image": None}, "1 image mark for 0 images"),
        ({"image": []}, "1 image mark for 0 images"),
        (
            {"image_path": "1.png"},
            r"key 'image_path' names an image \(1.png\), and `image` is read",
        ),
        ({"image": ["1.png", "1.png"]}, "1 image mark for 2 images"),
        ({"images": ["1.png", "1.png"]}, "1 image mark for 2 images"),
        ({"image": "1.png", "images": ["1.png"]}, "image and images both"),
        ({"image": "1.png", "conversations": said("<image><image>Q", "A")}, "2 image marks for 1"),
        ({"image": "1.png", "conversations": said("Q", "<image> A")}, "1 image mark in an answer"),
        ({"image": "1.png", "conversations": [*said("Q", "A"), WEIGHTLESS]}, "has weight 0"),
        ({"file": "1.png", "conversations": said("Q", "A")}, "key 'file' names an image"),
        # Beside an image another one, also deep within.
        ({"image": "1.png", "image2": "2.png"}, r"key 'image2' names an image \(2.png\), and"),
        ({"image": "1.png", "extra": {"images": ["2.png"]}}, "key 'images' names an image .2.png"),
        ({"image": "1.png", "pages": [{"image_path": "2.png"}]}, "key 'image_path' names an image"),
        ({"image": "1.png", "b": {"c": ["2.mp4"]}}, "key 'c' names a video"),
        ({"meta": {"file": "1.png"}, "conversations": said("Q", "A")}, "key 'file' names an image"),
        (
            {"conversations": [said("Q")[0] | {"image": "1.png"}, said("Q", "A")[1]]},
            "key 'image' names an image",
        ),
        ({"image": {"path": "2.png"}}, r"an image is missing \(2.png\)"),
        ({"image": {"file": "1.png"}}, "image is no path"),
        ({"conversations": said("<img>1.png</img> Q", "A")}, "as it is not read .<img>1.png</img>"),
        ({"conversations": said("Q ![a](1.png)", "A")}, "an image in a question, as it is not"),
        ({"conversations": said("What is in <image 1>?", "A")}, "as it is not read .<image 1>"),
        ({"clip": "1.mp4", "conversations": said("Q", "A")}, "key 'clip' names a video"),
        (
            {"image": "1.png", "conversations": [{"role": "user", "content": "Q"}]},
            "is due; --format=docdownstream reads role and content",
        ),
    ],
)
def test_marks_and_images_that_disagree_are_rejected(folder, prepare, fields, reason):
    path = folder / "llava.jsonl"
    whole = {"conversations": said("<image>Q", "A")}
    path.write_text("\n".join(json.dumps(one) for one in (whole | fields, conversation(1))))
    prepared = prepare(Llava(), path)
    assert len(prepared.records()) == 1
    ((_, given),) = prepared.reasons().items()
    assert re.search(reason, given)


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_stand_where_their_marks_are(folder, prepare, png, key):
    for i in (1, 2, 3):
        (folder / f"{i}.png").write_bytes(png(shade=i))
    path = folder / "llava.jsonl"
    whole = {
        key: ["1.png", "2.png", "3.png"],
        "conversations": [
            {"from": "system", "value": " Read. "},
            *said("Compare <image> and <image>.", "Alike.", "And\n<image>", "No."),
        ],
    }
    path.write_text(json.dumps(whole))
    (record,) = prepare(Llava(), path).records()
    assert record.images == tuple(png(shade=i) for i in (1, 2, 3))
    assert [(turn.question, turn.image_offsets) for turn in record.turns] == [
        ("Compare  and .", (8, 13)),
        ("And", (3,)),
    ]
    assert (record.is_conversation, record.system) == (True, "Read.")


def test_a_last_question_without_an_answer_is_told_or_asked(folder, prepare):
    path = folder / "llava.jsonl"
    whole = {"image": "1.png", "conversations": said("<image>Q", "A", "Then?"), "system": "Read."}
    path.write_text(json.dumps(whole))
    prepared = prepare(Llava(), path)
    [record] = prepared.records()
    assert [turn.question for turn in record.turns] == ["Q"] and record.system == "Read."
    assert len(prepared.rejected()) == 1
    [unit] = Llava().units(str(path))
    [raw] = Llava().raws(unit)
    assert Llava().record(raw).turns[1] == Turn("Then?", ())


def test_of_a_conversation_nothing_follows_what_has_no_answer(folder, prepare, png):
    (folder / "2.png").write_bytes(png(shade=2))
    path = folder / "llava.jsonl"
    whole = {
        "image": ["1.png", "2.png"],
        "conversations": said("<image>Q", "A", "<image>It?", " ", "And it?", "B"),
    }
    path.write_text(json.dumps(whole))
    prepared = prepare(Llava(), path)
    (record,) = prepared.records()
    assert [turn.question for turn in record.turns] == ["Q"]
    assert record.images == (png(),)
    assert len(prepared.rejected()) == 2


@pytest.mark.parametrize(
    "beside",
    [
        {"image_path": "elsewhere/1.jpg"},
        {"source_file": "book.pdf"},
        {"image_url": "https://example.org/2.png"},
        {"caption": "the image\n2.png"},
        {"image": {"path": "1.png", "bytes": None}},
    ],
)
def test_where_an_image_is_from_may_stand_beside_it(folder, prepare, beside):
    path = folder / "llava.json"
    path.write_text(json.dumps([conversation(1) | beside]))
    (record,) = prepare(Llava(), path).records()
    assert len(record.images) == 1


def test_only_a_window_of_an_array_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(array, "CHUNK_BYTES", 64)
    largest = 0
    grow = array._Window.grow

    def watch(window, at):
        nonlocal largest
        largest = max(largest, len(window.text))
        return grow(window, at)

    monkeypatch.setattr(array._Window, "grow", watch)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": i, "text": "x" * 100} for i in range(500)]))
    (unit,) = array.units(str(path), "conversations")
    assert [value["conversations"] for _, value, _ in array.objects(unit, "conversations")] == list(
        range(500)
    )
    assert largest < 1000


@pytest.mark.parametrize("flipped", [b'"from"', b'"value"', b"}, {", b'"gpt"'])
def test_what_is_broken_ends_at_the_next_record(folder, monkeypatch, flipped):
    """The end of what is broken is found by the next record, not by the next message."""
    monkeypatch.setattr(array, "CHUNK_BYTES", 64)
    monkeypatch.setattr(array, "MAX_ELEMENT_BYTES", 1000)
    whole = [json.dumps(conversation(i)).encode() for i in range(6)]
    at = whole[2].index(flipped)
    whole[2] = whole[2][:at] + b"\x00" + whole[2][at + 1 :]
    path = folder / "llava.json"
    path.write_bytes(b"[" + b",\n".join(whole) + b"]")
    items = [item for unit in Llava().units(str(path)) for item in Llava().raws(unit)]
    assert [isinstance(item, Rejection) for item in items] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[]", b"{", b"null", b"[1, 2]", b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_array_of_objects_gives_no_records(folder, content):
    path = folder / "llava.json"
    path.write_bytes(content)
    items = [item for unit in Llava().units(str(path)) for item in Llava().raws(unit)]
    assert all(isinstance(item, Rejection) for item in items)
