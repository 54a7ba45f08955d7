"""Text lines of drawn pages, whose lines are known."""

import os

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignvlm_jax.data import text_lines

TEXT = (
    "every page has lines of text which ascend and go deep by jumping quickly over lazy dogs "
    "and fixed boxes with glyphs of all heights "
)


class Page:
    """A page that knows the boxes of the ink of its lines, in the order in which they are drawn."""

    def __init__(self, width: int = 850, height: int = 600, color="white"):
        self.image = Image.new("RGB", (width, height), color)
        self.pen = ImageDraw.Draw(self.image)
        self.lines: list[tuple[int, int, int, int]] = []

    def write(self, x, y, text, size=14, style="", is_same_line=False, **options):
        """Writes text whose baseline begins at (x, y)."""
        path = os.path.join(matplotlib.get_data_path(), f"fonts/ttf/DejaVuSans{style}.ttf")
        font = ImageFont.truetype(path, size)
        self.pen.text((x, y), text, options.get("fill", "black"), font, anchor="ls")
        box = self.pen.textbbox((x, y), text, font, anchor="ls")
        if is_same_line:
            last = self.lines.pop()
            box = (*np.minimum(last[:2], box[:2]), *np.maximum(last[2:], box[2:]))
        self.lines.append(box)

    def paragraph(self, x, y, num_lines, width=650, pitch=20, size=14):
        """Writes lines that are about as wide, and the last one half."""
        for number in range(num_lines):
            end = width if number < num_lines - 1 else width / 2
            text = (TEXT * 3)[number * 17 :][: int(end / size / 0.6)]
            self.write(x, y + number * pitch, text.strip(), size)


def check(page: Page, slack: float = 2) -> np.ndarray:
    """Holds what is found to the lines that were drawn; returns the boxes."""
    found = text_lines.find(page.image)
    assert found.dtype == np.int32 and len(found) == len(page.lines)
    ink = np.array(page.lines)
    # The last levels of a stroke are no ink.
    assert (found[:, :2] <= ink[:, :2] + slack).all() and (found[:, 2:] >= ink[:, 2:] - slack).all()
    middles = (ink[:, 1] + ink[:, 3]) / 2
    inside = (found[:, None, 1] < middles) & (middles < found[:, None, 3])
    inside &= (found[:, None, 0] < ink[:, 0] + 9) & (ink[:, 2] - 9 < found[:, None, 2])
    assert (inside == np.eye(len(found), dtype=bool)).all()
    return found


def test_paragraphs_and_lines_of_one_height():
    page = Page()
    page.paragraph(90, 60, 6)
    page.write(90, 190, "a sea area, no man seen soon")
    page.paragraph(90, 230, 9)
    found = check(page)
    heights = found[:, 3] - found[:, 1]
    # That without ascenders and descenders is no lower, and stands on its baseline as they do.
    assert np.ptp(heights) <= 3
    assert abs((found[6] - found[5])[1] - (190 - 160)) <= 3


@pytest.mark.parametrize("shift", [0, 7, 10, 13])
def test_columns_are_read_one_after_the_other(shift):
    page = Page()
    page.write(90, 40, "A title over both of the columns, as wide as both of them are together", 18)
    page.paragraph(90, 80, 14, width=310)
    page.paragraph(440, 80 + shift, 20, width=310)
    check(page)


@pytest.mark.parametrize("padding", [3, 8])
def test_a_row_of_a_ruled_table_is_a_line(padding):
    page = Page()
    page.paragraph(90, 40, 3)
    pitch = 14 + 2 * padding
    rows = [("name", "city", "sum"), ("Jones", "Berlin", "1,250"), ("Gray", "Oslo", "17.50")] * 2
    top = 120
    for number, row in enumerate(rows):
        y = top + number * pitch + padding + 11
        for column, text in enumerate(row):
            page.write(100 + 200 * column, y, text, is_same_line=column > 0)
    bottom = top + len(rows) * pitch
    for x in (90, 290, 490, 690):
        page.pen.line([(x, top), (x, bottom)], "black", 1)
    for number in range(len(rows) + 1):
        page.pen.line([(90, top + number * pitch), (690, top + number * pitch)], "black", 1)
    page.paragraph(90, bottom + 40, 3)
    check(page)


def test_vertical_rules_do_not_join_lines():
    page = Page()
    for number in range(12):
        page.write(120, 60 + 24 * number, TEXT[number * 9 :][:12].strip())
    for x in (90, 95, 400):
        page.pen.line([(x, 30), (x, 500)], "black", 3)
    check(page)


def test_a_cell_beside_one_of_two_lines_is_not_cut_through():
    page = Page()
    page.paragraph(90, 40, 6)
    page.write(100, 191, "package")
    page.write(330, 191, "18062", is_same_line=True)
    page.write(400, 182, "basic package which has dumps,")
    page.write(400, 198, "in octal and hexadecimal digits")
    page.paragraph(90, 240, 3)
    check(page)


@pytest.mark.parametrize("pitch", [13, 14, 15])
def test_tight_lines_that_touch_are_told_apart(pitch):
    page = Page()
    page.paragraph(90, 60, 12, pitch=pitch)
    check(page, slack=5)


def test_a_word_and_a_blank_page():
    page = Page(200, 100)
    page.write(50, 50, "word")
    check(page)
    assert text_lines.find(Image.new("RGB", (850, 1100), "white")).shape == (0, 4)
    assert text_lines.find(Image.new("RGB", (3, 2), "black")).shape == (0, 4)
    ruled = Page()
    ruled.pen.line([(50, 50), (800, 50)], "black", 2)
    ruled.pen.line([(50, 560), (800, 560)], "black", 1)
    assert text_lines.find(ruled.image).shape == (0, 4)


@pytest.mark.parametrize(
    "box, ink, shift",
    [
        ((225,) * 3, "black", 0),
        ((225,) * 3, "black", 30),
        ((250, 240, 200), (0, 0, 160), 7),
        ((30, 40, 90), "white", 7),
    ],
)
def test_a_box_behind_code_is_no_ink(box, ink, shift):
    page = Page()
    page.paragraph(90, 60, 3)
    page.pen.rectangle([80 + shift, 130, 760 - shift, 262 + shift % 4], fill=box)
    for number in range(6):
        page.write(120, 150 + 20 * number, f"$ run --step={number} of_all_{number}", fill=ink)
    page.paragraph(90, 300, 3)
    found = check(page)
    # What is left of the sides of a dark box may make a line wider, and no higher.
    assert np.ptp(found[:, 3] - found[:, 1]) <= 3


@pytest.mark.parametrize("size", [40, 48, 60, 72])
@pytest.mark.parametrize("text", ["E", "TITLE", "EFFECT"])
def test_large_letters_are_not_cut_through(text, size):
    """Between its bars a large E has as little ink as the row between two lines, and its stem is as
    long as the rule between two cells."""
    page = Page()
    page.write(60, 90, text, size)
    page.paragraph(90, 150, 8)
    check(page)


def test_headings_of_other_sizes():
    page = Page()
    page.write(90, 60, "THE FELT LIFE", 48)
    page.write(90, 110, "1    Reading of pages", 28, "-Bold")
    page.paragraph(90, 150, 8)
    page.write(90, 340, "1.1    Figures", 20)
    page.paragraph(90, 370, 4)
    page.write(90, 480, "1 A footnote in smaller type, grey on white.", 10)
    check(page)


def test_dots_and_accents_belong_to_their_lines():
    page = Page()
    for number, text in enumerate(
        ["ÄÖÜ ÉÀÊ", "ii ji", "é ü ö ñ", "= : ; ÷", "a_b_c_", "ÄÉ", "ç ş ü", "no i", "Ěšč", "..."]
    ):
        page.write(90, 60 + 22 * number, text)
    page.paragraph(90, 300, 8)
    check(page)


def test_a_figure_is_a_line_beside_those_of_its_text():
    page = Page()
    page.paragraph(90, 40, 4)
    texture = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    page.image.paste(Image.fromarray(texture), (90, 130))
    page.lines.append((90, 130, 290, 280))
    page.paragraph(330, 150, 7, width=400)
    page.paragraph(90, 320, 4)
    check(page)


def test_larger_and_smaller_pages_have_the_same_lines():
    page = Page()
    page.paragraph(90, 60, 10)
    for factor in (0.7, 2, 3):
        size = round(850 * factor), round(600 * factor)
        found = text_lines.find(page.image.resize(size, Image.Resampling.LANCZOS))
        assert len(found) == 10
        np.testing.assert_allclose(found / factor, text_lines.find(page.image), atol=4)
