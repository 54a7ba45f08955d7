import itertools

import numpy as np
import pytest

from alignvlm_jax.data import images
from alignvlm_jax.synthetic import documents, fonts, pages, values

COUNT = 40


@pytest.fixture(scope="module")
def records(all_tables):
    return {
        split: [documents.render(3, split, i, all_tables) for i in range(COUNT)]
        for split in documents.SPLITS
    }


def gray(record) -> np.ndarray:
    return np.asarray(images.decode_image(record.images[0], record.id))[:, :, 0]


def test_a_document_depends_on_seed_split_and_index_alone(all_tables, records):
    assert documents.render(3, "train", 5, all_tables) == records["train"][5]
    others = [(4, "train", 5), (3, "validation", 5), (3, "train", 6)]
    assert all(
        documents.render(*other, all_tables).images != records["train"][5].images
        for other in others
    )


def test_pages_are_legible(records):
    for split, drawn in records.items():
        heights = {gray(record).shape for record in drawn}
        # One tile or two; what is evaluated has three lines or more, so never one.
        small = documents.SPLITS[split].small_fraction
        assert heights <= (
            {(64, 128), (32, 128)} if 0 < small < 1 else {(32, 128) if small else (64, 128)}
        )
        assert small or split == "train" or heights == {(64, 128)}
        for record in drawn:
            assert len(record.lines[0]) in ((2,) if gray(record).shape[0] == 32 else (3, 4))
            assert gray(record).max() == 255 and gray(record).min() < 150
    assert {record.source for drawn in records.values() for record in drawn} == {
        "form",
        "receipt",
        "table",
    }


@pytest.mark.parametrize("split", documents.SPLITS)
def test_words_lie_where_their_boxes_say(records, split):
    """Every word has ink in its box, and all ink that is not a rule lies in a box, up to three
    pixels of overhang aside: letters that lean reach over their neighbours."""
    for record in records[split]:
        ink = gray(record) < 160
        covered = np.zeros_like(ink)
        for word in (word for line in record.lines[0] for word in line):
            left, top, right, bottom = word.box
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= ink.shape[0]
            assert len(word.edges) == len(word.text) + 1 and (np.diff(word.edges) > 0).all()
            assert (word.edges[0], word.edges[-1]) == (left, right)
            box = np.s_[int(top) : int(bottom), int(left) : int(np.ceil(right))]
            assert ink[box].any()
            covered[int(top) : int(bottom), max(0, int(left) - 3) : int(np.ceil(right)) + 3] = True
        assert not (ink & ~covered).any(), record.id
        for line in record.lines[0]:
            assert all(
                before.box[2] < after.box[0] for before, after in itertools.pairwise(line)
            ), record.id


TEXT = "EgdB8 - 50.7"
CHANGES = ({}, {"stretch": 0.88}, {"stretch": 1.15}, {"slant": 0.2}, {"weight": 1.6})


@pytest.mark.parametrize("family", fonts.SEEN | fonts.UNSEEN)
def test_edges_enclose_the_characters(family):
    """What a character adds to a page lies between its edges, at the height of small letters,
    whatever the face and however it is stretched and slanted."""
    faces = (fonts.SEEN | fonts.UNSEEN)[family]
    for face, change in itertools.product(faces, CHANGES):
        style = pages.Style(face, 13, **change)
        drawn = [draw_text(TEXT[:i], style) for i in range(1, len(TEXT) + 1)]
        words = drawn[-1][1][0]
        top, bottom = int(words[0].box[1]), int(words[0].box[3])
        # Slanted letters reach over their edges far from the middle of the line.
        middle = np.s_[(2 * top + bottom) // 3 : (top + 2 * bottom) // 3]
        inks = [np.full((64, 128), 255), *(np.asarray(image, int) for image, _ in drawn)]
        edges = [pair for word in words for pair in itertools.pairwise(word.edges)]
        shown = [i for i, character in enumerate(TEXT) if character != " "]
        for (left, right), i in zip(edges, shown, strict=True):
            columns = np.flatnonzero((np.abs(inks[i + 1] - inks[i])[middle] > 60).any(0))
            assert not columns.size or (
                left - 2 <= columns.min() and columns.max() + 1 <= right + 2
            ), (face, change, TEXT[i])


def draw_text(text: str, style: pages.Style):
    rng = np.random.default_rng(0)
    return pages.draw(((text,),), [1], pages.Layout(), style, 64, rng)


def test_leaders_are_one_ellipsis(all_tables):
    """However many dots a page has, they are transcribed as three, which cover all of them."""
    layout = pages.Layout(align="right", leaders=True)
    style = pages.Style(fonts.SEEN["Roboto"][0], 12)
    rng = np.random.default_rng(0)
    image, lines = pages.draw(
        (("Tax", "12.50"), ("Account", "1234567")), [0, 1], layout, style, 32, rng
    )
    ink = np.asarray(image) < 160
    for tax, dots, value in lines:
        assert dots.text == "..." and len(dots.edges) == 4
        assert tax.box[2] < dots.box[0] and dots.box[2] < value.box[0]
        columns = ink[
            int(dots.box[1]) : int(dots.box[3]), round(tax.box[2]) + 1 : int(value.box[0])
        ]
        left, right = np.flatnonzero(columns.any(0))[[0, -1]] + round(tax.box[2]) + 1
        assert abs(dots.box[0] - left) <= 2 and abs(dots.box[2] - right) <= 3
    assert lines[0][1].box[2] - lines[0][1].box[0] > lines[1][1].box[2] - lines[1][1].box[0]


def test_every_question_is_answered_on_the_page(records):
    for drawn in records.values():
        for record in drawn:
            text = [" ".join(word.text for word in line) for line in record.lines[0]]
            assert record.turns and len({turn.question for turn in record.turns}) == len(
                record.turns
            )
            for turn in record.turns:
                assert any(turn.answers[0] in line for line in text)
                assert len(turn.answers[0]) >= 4


def test_tables_show_rows_of_the_real_tables(records, all_tables):
    """Every answer stands in the row of its key: what the pages say is true."""
    real = {
        (column, row[0], cell)
        for t in all_tables
        for row in t.rows
        for column, cell in zip(t.header, row, strict=True)
    }
    asked = 0
    for drawn in records.values():
        for turn in (turn for record in drawn if record.source == "table" for turn in record.turns):
            column, key = turn.question.removeprefix("What is the ").removesuffix("?").split(" of ")
            assert (column, key, turn.answers[0]) in real
            asked += 1
    assert asked > 50


def test_training_never_shows_a_value_of_evaluation(records):
    shown = {word.text for record in records["train"] for line in record.lines[0] for word in line}
    for split in (name for name, spec in documents.SPLITS.items() if spec.evaluation):
        for turn in (turn for record in records[split] for turn in record.turns):
            assert values.is_evaluation(turn.answers[0])
            assert turn.answers[0] not in shown
    for turn in (turn for record in records["train"] for turn in record.turns):
        assert not values.is_evaluation(turn.answers[0])


def test_unseen_fonts_and_layouts_are_unseen(monkeypatch, all_tables):
    """Each split of evaluation has fonts and layouts of the kind in its name."""
    pages_of = {split: [] for split in documents.SPLITS}
    draw = documents.pages.draw
    for split, drawn in pages_of.items():

        def spy(lines, rows, layout, style, height, rng, drawn=drawn):
            drawn.append((layout, style))
            return draw(lines, rows, layout, style, height, rng)

        monkeypatch.setattr(documents.pages, "draw", spy)
        for index in range(120 if split.startswith("train") else 30):
            documents.render(0, split, index, all_tables)
    family_of = {
        face: family for family, faces in (fonts.SEEN | fonts.UNSEEN).items() for face in faces
    }
    assert len(family_of) == sum(map(len, (fonts.SEEN | fonts.UNSEEN).values())) >= 30
    for split, drawn in pages_of.items():
        spec = documents.SPLITS[split]
        layouts = {layout for layout, _ in drawn}
        families = {family_of[style.face] for _, style in drawn}
        assert families <= set(fonts.UNSEEN if spec.unseen_fonts else fonts.SEEN)
        assert {documents.is_unseen(layout) for layout in layouts} == {spec.unseen_layouts}
        varied = {(style.stretch, style.slant, style.weight) for _, style in drawn}
        assert (len(varied) > 1) == spec.varied
    trained = pages_of["train"] + pages_of["train_small"]
    assert {family_of[style.face] for _, style in trained} == set(fonts.SEEN)
    # Training has each element of the unseen layouts, and not on one page.
    for layout, _ in pages_of["unseen_layouts"] + pages_of["unseen_fonts_and_layouts"]:
        for field in ("align", "leaders", "ruled", "title", "pitch"):
            value = getattr(layout, field)
            assert any(getattr(seen, field) == value for seen, _ in trained), (field, value)
    assert not set(fonts.SEEN) & set(fonts.UNSEEN)


def test_noise_changes_pixels_but_no_words(all_tables, records):
    clean = records["train"][0]
    noisy = documents.render(3, "train", 0, all_tables, noise=1.0)
    assert noisy.lines == clean.lines and noisy.turns == clean.turns
    difference = np.abs(gray(noisy).astype(int) - gray(clean))
    assert gray(noisy).shape == gray(clean).shape and difference.mean() > 3
    assert documents.render(3, "train", 0, all_tables, noise=1.0) == noisy
    milder = documents.render(3, "train", 0, all_tables, noise=0.2)
    assert np.abs(gray(milder).astype(int) - gray(clean)).mean() < difference.mean()


def test_no_noise_is_the_image_itself():
    image = images.Image.new("L", (8, 8), 200)
    assert documents.degrade(image, np.random.default_rng(0), 0.0) is image
