import itertools

import numpy as np
import pytest

from alignvlm_jax.ingest.formats.pdf import spelling
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import table, text
from tests.ingest.formats.pdf.read_pdf import gray, texts, words

TABLE = [
    ["name", "size", "colour"],
    ["apple", "12 cm", "red"],
    ["pear", "9 cm", ""],
    ["plum", "4 cm", "deep\nblue"],
]
ROTATED = "".join(
    text(x, 30, string, matrix="0 1 -1 0")
    for x, string in ((60, "First line"), (90, "second, below"))
)
PAGES = {
    "plain": (
        {},
        text(20, 150, "Total: 12 gyp")
        + text(20, 100, "large", 40)
        + text(20, 60, "f\xe9e \xc5ngstr\xf6m"),
    ),
    "rotated": ({"page": "/Rotate 90"}, ROTATED),
    "upside_down": ({"page": "/Rotate 180"}, text(250, 100, "upright again", matrix="-1 0 0 -1")),
    "three_quarters": ({"page": "/Rotate 270"}, text(100, 150, "third turn", matrix="0 -1 1 0")),
    "cropped": (
        {"page": "/CropBox [30.5 20 250 180]"},
        text(60, 150, "inside") + text(260, 100, "outside"),
    ),
    "scaled": ({}, text(20, 100, "wide", 1, "30 0 0 15") + text(20, 50, "tall", 1, "10 0 0 30")),
    "sideways": (
        {},
        text(50, 20, "upwards", matrix="0 1 -1 0") + text(90, 150, "downwards", matrix="0 -1 1 0"),
    ),
    "table": ({}, table(20, 180, [80, 80, 80], TABLE)),
    "coloured": ({}, "1 0 0 rg " + text(20, 100, "red") + "0 0 1 rg " + text(80, 100, "blue")),
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("dpi", [72, 100, 150])
def test_words_lie_on_the_ink_and_all_ink_is_in_words(read, name, dpi):
    options, content = PAGES[name]
    (record,) = read([content], dpi, **options)
    dark = gray(record) < 160
    assert words(record)
    rest = dark.copy()
    for word in words(record):
        left, top, right, bottom = word.box
        inside = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
        assert dark[inside].any(), word
        # The box is no larger than the letters: ink reaches its sides, and it is a line high.
        columns = np.flatnonzero(dark[inside].any(0))
        assert (
            columns[0] <= 0.1 * (bottom - top) + 2
            and columns[-1] >= right - left - 0.1 * (bottom - top) - 3
        )
        rest[inside] = False
    assert not rest.any()


@pytest.mark.parametrize("name", ["plain", "rotated", "three_quarters", "scaled", "cropped"])
def test_edges_part_the_letters(read, name):
    options, content = PAGES[name]
    (record,) = read([content], 150, **options)
    dark = gray(record) < 100
    num_gaps = 0
    for word in words(record):
        assert len(word.edges) == len(word.text) + 1
        assert list(word.edges) == sorted(word.edges)
        assert (word.edges[0], word.edges[-1]) == pytest.approx(
            (word.box[0], word.box[2]), abs=0.02
        )
        rows = slice(int(word.box[1]), int(word.box[3]) + 1)
        for start, stop in itertools.pairwise(word.edges):
            assert dark[rows, int(start) : int(stop) + 1].any()
            num_gaps += not dark[rows, round(stop)].any()
    assert num_gaps > 0.6 * sum(len(word.text) for word in words(record))


def test_what_is_not_seen_is_not_read(read):
    content = (
        text(20, 150, "seen")
        + "1 g " + text(20, 120, "white") + "0 g "
        + text(20, 90, "covered") + "0 0 0 rg 10 80 100 30 re f\n"
        + text(150, 120, "invisible", operators="3 Tr")
        + text(280, 150, "cut off")
        + text(20, 40, "slanted", matrix="0.7 0.7 -0.7 0.7")
        + text(250, 60, "overturned", matrix="-1 0 0 -1")
        + text(150, 30, "mirrored", matrix="1 0 0 -1")
    )  # fmt: skip
    (record,) = read([content])
    # A letter is read where its middle is on the page.
    assert texts(record) == ["seen cut"]


def test_recognised_text_counts_where_only_the_scan_shows_it(read):
    """The word of the scan is drawn as boxes; its text is invisible, as is a second one on top of
    visible text."""
    scan = "".join(f"{x} 100 4 9 re f\n" for x in range(50, 80, 6))
    (record,) = read([scan + text(48, 100, "scan", 14, operators="3 Tr") + text(150, 100, "text")
                      + text(150, 100, "hidden", operators="3 Tr")])  # fmt: skip
    assert texts(record) == ["scan text"]


@pytest.mark.parametrize(
    ("codes", "differences", "expected"),
    [
        ("of\x1fce", "31 /ffi", "offfice"),
        ("\x1fne", "31 /fi", "fine"),
        ("cafe\x1f", "31 /acute", "cafe´"),
        ("a\x01b", "", "ab"),
        ("a\xa0b", "", "a b"),
    ],
)
def test_characters_become_what_is_seen(read, codes, differences, expected):
    font = (
        "/Encoding << /Type /Encoding /BaseEncoding /WinAnsiEncoding /Differences "
        f"[{differences}] >>"
    )
    (record,) = read([text(20, 100, codes)], font=font)
    assert texts(record) == [expected]
    for word in words(record):
        assert len(word.edges) == len(word.text) + 1


@pytest.mark.parametrize(
    ("meaning", "expected"),
    [
        ("FB03", ["affib"]),  # a ligature of Unicode: pdfium takes it apart
        ("FB06", ["astb"]),
        ("00660066", ["affb"]),  # one that its font takes apart
        ("00650301", ["aéb"]),  # a letter and its accent
        ("00AD", ["a-b"]),
        ("200B", ["ab"]),  # no width, and no meaning
        ("202E", ["ab"]),
        ("FFFD", None),
        ("E000", None),  # for private use
        ("D83D", None),  # half of a pair
        ("D83DDE00", ["a\U0001f600b"]),
        ("0003", None),  # a control character that is drawn
    ],
)
def test_unicode_of_a_glyph(read, meaning, expected):
    (found,) = read(
        [text(20, 100, "a*b") + text(20, 50, "more that can be read " * 3)], meanings={"*": meaning}
    )
    assert texts(found)[: -1 if expected is None else 1] == (expected or [])


def test_accents_join_their_letter_or_stand_alone(read):
    (record,) = read([text(20, 100, "ae*b * b")], meanings={"*": "0300"})
    assert texts(record) == ["aèb ` b"]
    assert [len(word.edges) for word in words(record)] == [4, 2, 2]


def test_what_one_glyph_shows_shares_its_width(read):
    (record,) = read([text(20, 100, "a*b", 40)], meanings={"*": "006600660069"})
    (word,) = words(record)
    assert word.text == "affib"
    widths = np.diff(word.edges)
    assert widths[1:4] == pytest.approx([widths[1]] * 3, abs=0.02) and widths[1] > 1


@pytest.mark.parametrize(
    ("pulled", "has_edges"), [("[(a) 700 (b) 0 (c)]", True), ("[(a) 1150 (b) 1150 (c)]", False)]
)
def test_letters_that_go_back(read, pulled, has_edges):
    """Kerning may put a letter left of the one before it; a script from right to left has no edges
    that rise."""
    (record,) = read([f"BT /F1 40 Tf 100 100 Td {pulled} TJ ET"])
    (word,) = words(record)
    assert sorted(word.text) == ["a", "b", "c"]
    assert (word.edges is not None) == has_edges
    if has_edges:
        assert list(word.edges) == sorted(word.edges)


HEBREW = {letter: f"{0x05D0 + i:04X}" for i, letter in enumerate("abcdefghijk")}


@pytest.mark.parametrize(
    "content",
    [
        # Drawn as it stands, from left to right, and letter by letter from the right.
        text(100, 100, "khg edba"),
        "".join(text(200 - 7 * i, 100, c) for i, c in enumerate("abde"))
        + "".join(text(165 - 7 * i, 100, c) for i, c in enumerate("ghk")),
    ],
)
def test_words_from_right_to_left_begin_at_the_right(read, content):
    (record,) = read([content], meanings=HEBREW)
    assert texts(record) == ["אבדה זחך"]
    first, second = words(record)
    assert first.box[0] > second.box[2] and first.edges is None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("םולש", "שלום"),
        ("5.2-ב", "ב-5.2"),
        ("ﻡ", "م"),
        ("שלום", None),  # its letters go to the left already
    ],
)
def test_words_that_are_stored_as_they_are_drawn_are_turned_round(stored, expected):
    sign = 1 if expected else -1
    places = [sorted((sign * 10 * i, sign * 10 * (i + 1))) for i in range(len(stored))]
    boxes = [(float(left), 0.0, float(right), 10.0) for left, right in places]
    glyphs = spelling.read_glyphs(stored, boxes, boxes, [False] * len(stored))
    assert "".join(glyph for glyph, _, _ in glyphs) == (expected or stored)


@pytest.mark.parametrize("matrix", ["0 1 -1 0", "0 -1 1 0"])
def test_words_up_or_down_the_page_do_not_fall_apart(read, matrix):
    """Browsers draw them letter by letter; pdfium sees as many lines."""
    sign = 1 if matrix.startswith("0 1") else -1
    widths = {" ": 278, "r": 333, "t": 278, "w": 722}
    y = 100 - 50 * sign
    content = text(100, 180, "upright text is most of this page, of course")
    for letter in "rotated now":
        content += text(60, y, letter, 12, matrix) if letter != " " else ""
        y += sign * 12 * widths.get(letter, 556) / 1000
    (record,) = read([content])
    assert [line for line in texts(record) if "upright" not in line] == ["rotated now"]


@pytest.mark.parametrize("step", [6.5, 8.0])
def test_letters_on_a_grid_are_words(read, step):
    """Listings put each letter in the middle of a box; pdfium sees spaces beside narrow ones."""
    line = "fill in.it = l.i;  if il"
    widths = {"i": 2.0, "l": 2.0, ".": 2.5, "f": 2.5, ";": 2.5, "t": 2.5, "=": 5.3, "n": 5.0}
    content = "".join(
        text(20 + step * i - widths[letter] / 2, 100, letter, 9)
        for i, letter in enumerate(line)
        if letter != " "
    )
    (record,) = read([content])
    assert texts(record) == [" ".join(line.split())]


def test_numbers_below_each_other_are_several(read):
    (record,) = read(["".join(text(50, 150 - 9 * i, str(i), 8) for i in range(5))])
    assert texts(record) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("Carn\xa8e", "Carnë"), ("na\xa8\xf5ve", "naïve"), ("x \xa8 y", "x ¨ y")],
)
def test_accents_that_are_drawn_over_letters_are_theirs(read, codes, expected):
    """As TeX does with its own fonts: the accent, back, and the letter."""
    content = ""
    x = 20.0
    for code in codes:
        content += text(x, 100, code)
        x += {
            "\xa8": 1.0 if expected != "x ¨ y" else 6.0,
            " ": 4.0,
            "\xf5": 3.4,
            "r": 4.0,
            "C": 8.7,
        }.get(code, 6.4)
    (record,) = read([content], font="/Encoding << /BaseEncoding /WinAnsiEncoding /Differences [245 /dotlessi] >>")  # fmt: skip
    assert texts(record) == [expected]


def test_arrows_of_a_font_are_no_words(read):
    page = make_pdf.pdf([text(20, 150, "6 ?") + text(20, 100, "Read this", font="F2")])
    assert texts(read(page)[0]) == ["6 ?", "Read this"]
    # A name as long as that of the font of text, so that all places in the file stay.
    arrows = page.replace(b"/BaseFont /Helvetica ", b"/BaseFont /LCIRCLE10 ", 1)
    assert texts(read(arrows)[0]) == ["Read this"]
