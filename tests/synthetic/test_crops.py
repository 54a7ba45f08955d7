import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record
from alignvlm_jax.synthetic import crops, fonts, snippets
from alignvlm_jax.synthetic.pages import Style

STYLE = Style(fonts.SEEN["Roboto"][0], 14)
LINES = ["Copying the quilt", "jumps (by) gypsy", "of 17 boxes", "PAGES and qualms"]


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def page(lines=LINES, seed: int = 0) -> Record:
    image, drawn = snippets.text(lines, STYLE, rng_of(seed))
    return of_image(image, drawn)


def of_image(image: Image.Image, drawn) -> Record:
    return Record("manual-0001", "pdf", (images.encode_png(image),), (), (drawn,))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Pages are black on white."""
    monkeypatch.setattr(snippets, "DEGRADED", 0.0)
    monkeypatch.setattr(snippets, "PLAIN", 1.0)


def all_crops(record: Record, count: int = 60) -> list[crops.Crop]:
    found = [crops.crop(record, rng_of(seed)) for seed in range(count)]
    return [one for one in found if one is not None]


def texts(lines) -> list[str]:
    return [" ".join(word.text for word in line) for line in lines]


def test_a_crop_is_lines_that_follow_each_other_and_no_ink_but_theirs():
    found = all_crops(page())
    assert {len(lines) for _, lines in found} == {1, 2, 3, 4}
    for image, lines in found:
        start = LINES.index(texts(lines)[0])
        assert texts(lines) == LINES[start : start + len(lines)]
        ink = np.asarray(image) < 200
        for left, top, right, bottom in (word.box for line in lines for word in line):
            inside = np.s_[int(top) - 1 : int(bottom) + 2, int(left) - 1 : int(right) + 2]
            assert ink[inside].any()
            ink[inside] = False
        assert not ink.any()
        assert all(word.edges[0] == word.box[0] for line in lines for word in line)


def test_another_column_is_not_cut_into():
    """Two columns that stand side by side, in reading order: no crop has words of both."""
    left, left_lines = snippets.text(LINES, STYLE, rng_of(0))
    right, right_lines = snippets.text([line.upper() for line in LINES], STYLE, rng_of(0))
    image = Image.new("L", (left.width + 10 + right.width, left.height), 255)
    image.paste(left)
    image.paste(right, (left.width + 10, 0))
    moved = tuple(
        tuple(crops._moved(word, -left.width - 10, 0) for word in line) for line in right_lines
    )
    found = all_crops(of_image(image, (*left_lines, *moved)))
    assert len(found) > 30
    for part, lines in found:
        # Margins may reach across the gap of 10 pixels, as far as it is white.
        assert part.width <= left.width + 20
        assert len({text == text.upper() for text in texts(lines) if text[0] not in "of"}) <= 1


def test_what_is_no_word_of_the_page_keeps_its_lines_out():
    record = page()
    image = images.decode_image(record.images[0], "").convert("L")
    speck = record.lines[0][1][0].box
    ImageDraw.Draw(image).ellipse([speck[2] + 1.5, speck[1] + 4, speck[2] + 3.5, speck[1] + 8], 0)
    found = all_crops(of_image(image, record.lines[0]))
    assert found and not any(LINES[1] in texts(lines) for _, lines in found)
    # The ink is a word's by then, but the record does not have it.
    fewer = (*record.lines[0][:2], record.lines[0][2][::2], record.lines[0][3])
    found = all_crops(dataclasses.replace(record, lines=(fewer,)))
    assert found and not any("of boxes" in texts(lines) for _, lines in found)
    # A word that is not drawn.
    ghost = dataclasses.replace(record.lines[0][0][0], box=(250.0, 4.0, 270.0, 18.0))
    blank = ImageChops.constant(image, 255)
    assert all_crops(of_image(blank, ((ghost,),))) == []


def test_rules_may_stand_in_a_crop():
    record = page()
    image = images.decode_image(record.images[0], "").convert("L")
    boxes = [line[0].box for line in record.lines[0]]
    y = round((boxes[0][3] + boxes[1][1]) / 2)
    ImageDraw.Draw(image).line([(0, y), (image.width, y)], fill=0)
    assert any(
        texts(lines)[:2] == LINES[:2] for _, lines in all_crops(of_image(image, record.lines[0]))
    )


def test_a_page_without_words_gives_none():
    assert crops.crop(of_image(Image.new("L", (90, 90), 255), ()), rng_of(0)) is None


def test_turned_words_are_passed_over():
    """Labels of axes stand in a record as lines of their own, without edges."""
    record = page()
    left, top, right, bottom = record.lines[0][0][0].box
    image = images.decode_image(record.images[0], "").convert("L")
    canvas = Image.new("L", (image.width + 60, image.height + 60), 255)
    canvas.paste(image, (60, 0))
    lines = [tuple(crops._moved(word, -60, 0) for word in line) for line in record.lines[0]]
    # "Copying" and "by", turned: of two letters the box says nothing.
    turned = []
    for at, word in ((4, record.lines[0][0][0]), (30, record.lines[0][1][1])):
        left, top, right, bottom = (round(side) for side in word.box)
        label = image.crop((left, top, right, bottom)).rotate(90, expand=True)
        canvas.paste(label, (at, 20))
        box = (float(at), 20.0, float(at + label.width), float(20 + label.height))
        turned.append((dataclasses.replace(word, text=word.text[:7], box=box, edges=None),))
    turned[1] = (dataclasses.replace(turned[1][0], text="by"),)
    found = all_crops(of_image(canvas, (turned[0], *lines[:2], turned[1], *lines[2:])))
    assert {text for _, part in found for text in texts(part)} == {*LINES}
    # Those of a record without any edges are known by their boxes alone.
    bare = [
        tuple(dataclasses.replace(word, edges=None) for word in line)
        for line in (turned[0], *lines)
    ]
    found = all_crops(of_image(canvas, tuple(bare)))
    assert {text for _, part in found for text in texts(part)} == {*LINES}


def test_lines_without_words_or_height_end_nothing():
    record = page()
    first, second, *others = record.lines[0]
    flat = tuple(dataclasses.replace(word, box=(*word.box[:3], word.box[1])) for word in second)
    lines = ((), first, flat, (), *others, ())
    found = all_crops(dataclasses.replace(record, lines=(lines,)))
    assert {text for _, part in found for text in texts(part)} == {*LINES} - {LINES[1]}
    assert crops.crop(dataclasses.replace(record, lines=(((),),)), rng_of(0)) is None
