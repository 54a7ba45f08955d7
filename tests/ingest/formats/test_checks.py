import dataclasses
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.tasks import transcription
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.ingest.formats.base import Reject

TURN = Turn("Why?", ("So.",))


def record(*images: bytes, turns=(TURN,), lines=(), name="a") -> Record:
    return Record(name, "test", images, turns, lines)


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares a size, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_record_without_fault_stays_as_it_is(png):
    word = Word("Total", (0, 0, 2, 1))
    good = record(png(), png(1, 9_999), lines=(((word,),), ()))
    assert checks.check(good) == good
    words_alone = record(png(), turns=(), lines=(((word,),),))
    assert checks.check(words_alone) == words_alone


def test_answers_and_turns_without_text_are_left_out():
    mixed = record(turns=(Turn("a?", ("", "x", " ")), Turn("b?", ("\n",)), Turn("c?", ()), TURN))
    assert checks.check(mixed).turns == (Turn("a?", ("x",)), TURN)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"turns": ()}, "nothing to learn"),
        ({"turns": (Turn("a?", (" ",)),)}, "nothing to learn"),
        ({"turns": (Turn("a?", ("x" * 100_000,)),)}, "too long"),
        ({"turns": (Turn("é" * 40_000, ("x",)),)}, "too long"),
        ({"turns": (Turn("a?", ("\ud800",)),)}, "no valid Unicode"),
        ({"name": ""}, "id is empty"),
        ({"name": "x" * 2000}, "id is too long"),
        ({"name": "\udfff"}, "no valid Unicode"),
    ],
)
def test_texts(changes, reason):
    with pytest.raises(Reject, match=reason):
        checks.check(record(**changes))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known format"),
        (b"\0" * 1000, "no known format"),
        (bomb(60_000, 60_000), "too large"),
        (bomb(12_000, 8_000), "too large"),
        (bomb(100, 100), "cannot be decoded"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "kind that is not read",
        ),
    ],
)
def test_images(data, reason, recwarn):
    with pytest.raises(Reject, match=reason) as rejected:
        checks.check(record(data))
    assert "\n" not in str(rejected.value) and not recwarn


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_images_are_decoded_or_rejected(file_format):
    """Truncated anywhere and with bytes flipped: no other exception, and a reason that says the
    same at every call."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)).save(
        file, file_format
    )
    whole = file.getvalue()
    damaged = [whole[: len(whole) * i // 10] for i in range(10)]
    for at in range(0, min(len(whole), 400), 7):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    reasons = []
    for data in damaged * 2:
        try:
            checks.check(record(data))
            reasons.append("")
        except Reject as err:
            reasons.append(str(err))
    assert any(reasons) and reasons[: len(damaged)] == reasons[len(damaged) :]


def page_of_boxes(change=lambda x, y: (x, y), count=12) -> Record:
    """A page of black bars, and a word on each, whose corners are changed."""
    page = np.full((1400, 1000), 255, np.uint8)
    words = []
    for i in range(count):
        left, top = 100 + 60 * (i % 3), 310 + 80 * i
        page[top : top + 20, left : left + 200 : 2] = 0
        corners = sorted([change(left, top), change(left + 200, top + 20)])
        (x0, y0), (x1, y1) = corners
        words.append(Word("word", (x0, min(y0, y1), x1, max(y0, y1))))
    file = io.BytesIO()
    Image.fromarray(page).save(file, "PNG")
    return record(file.getvalue(), lines=((tuple(words),),))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda x, y: (x / 10, y / 14), "and these may be percent"),
        (lambda x, y: (x, y / 1.4), "and these may be thousandths"),
        (lambda x, y: (x, 1400 - y), "in its pixels"),  # from the lower left corner
        (lambda x, y: (x / 2, y / 2), "in its pixels"),  # of a page of half the size
        (lambda x, y: (y / 1.4, x), "in its pixels"),
    ],
)
def test_boxes_that_hold_nothing_are_told(change, hint):
    with pytest.raises(Reject, match=rf"words stand where nothing is drawn \(.*{hint}"):
        checks.check(page_of_boxes(change))


def test_boxes_that_hold_ink_are_kept():
    """Also somewhat beside it, and a few without any; of few words nothing is concluded."""
    good = page_of_boxes(lambda x, y: (x + 8, y + 8))
    assert checks.check(good) == good
    lost = tuple(Word("x", (800, 10 * i, 850, 10 * i + 8)) for i in range(3))
    some = dataclasses.replace(good, lines=((*good.lines[0], lost),))
    assert checks.check(some) == some
    few = page_of_boxes(lambda x, y: (x, 1400 - y), count=5)
    assert checks.check(few) == few


def test_answers_of_a_source():
    assert checks.answers_of(["a", None, 3, 2.5]) == ("a", "3", "2.5")
    assert checks.answers_of(None) == () and checks.answers_of("a") == ("a",)
    for wrong in ({"a": 1}, [["a"]], True, b"a"):
        with pytest.raises(Reject, match="answer is no text"):
            checks.answers_of(wrong)


def test_a_formula_in_a_text_of_a_list_warns_of_nothing():
    """Python 3.12 prints a warning for what is no escape; 3.11 has it, and hides it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checks.listed_texts(r"['\delta', 'b']") == [r"\delta", "b"]


def test_words_without_text_and_lines_without_words_are_left_out(png):
    """They would be taught as spaces, two between the words beside them, and as empty lines."""
    first, second = Word("a", (0, 0, 1, 1)), Word("b", (1, 0, 3, 1), (1.0, 3.0))
    blanks = [Word(text, (1, 1, 1, 1)) for text in ("", " ", "\t\u3000")]
    lines = ((first, blanks[0], second), (), tuple(blanks), (blanks[1], first))
    found = checks.check(record(png(), png(1, 9), lines=(lines, ((), (blanks[0],)))))
    assert found.lines == (((first, second), (first,)), ())
    assert transcription(found) == "a b\na"
    with pytest.raises(Reject, match="nothing to learn"):
        checks.check(record(png(), turns=(), lines=(((blanks[1],),),)))
    # Blanks in front of a line are the indentation of code.
    indented = record(png(), lines=(((Word("  a", (0, 0, 3, 1)),),),))
    assert checks.check(indented) == indented


@pytest.mark.parametrize("box", [(0, 1, 2, 1), (1, 0, 1, 2), (1, 1, 1, 1), (2, 0, 1, 1)])
def test_words_without_area_are_told(png, box):
    """Nothing could be drawn in them, and no patch would be taught what they say; a single one, as
    OCR gives a bar, is left out."""
    good = Word("good", (0, 0, 2, 1))
    kept = checks.check(record(png(), lines=(((good, Word("|", box)),),)))
    assert kept.lines == (((good,),),)
    lines = ((Word("good", (0, 0, 2, 1)), Word("flat", box), Word("flat", box)),)
    with pytest.raises(Reject) as rejected:
        checks.check(record(png(), png(), lines=((), lines)))
    reason = f"words have boxes without area (2 of 3 of image 1: 'flat' at {list(box)})"
    assert str(rejected.value) == reason
