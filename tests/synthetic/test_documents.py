import itertools

import numpy as np
import pytest

from alignvlm_jax.data import images
from alignvlm_jax.synthetic import documents, pages, values

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
        assert split not in ("seen_fonts", "unseen_fonts", "validation") or heights == {(64, 128)}
        for record in drawn:
            assert len(record.lines[0]) in ((2, 3, 4) if gray(record).shape[0] == 32 else (3, 4))
            assert gray(record).max() == 255 and gray(record).min() < 120
    assert {record.source for drawn in records.values() for record in drawn} == {
        "form",
        "receipt",
        "table",
    }


@pytest.mark.parametrize("split", documents.SPLITS)
def test_words_lie_where_their_boxes_say(records, split):
    """Every word has ink in its box, and all ink that is not a rule lies in a box, a pixel of
    overhang aside."""
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
            covered[int(top) : int(bottom), max(0, int(left) - 1) : int(np.ceil(right)) + 1] = True
        assert not (ink & ~covered).any(), record.id
        for line in record.lines[0]:
            assert all(
                before.box[2] < after.box[0] for before, after in itertools.pairwise(line)
            ), record.id


def test_edges_separate_the_characters(records):
    """A monospaced or not, the ink of "1" lies between its own edges: its neighbours' columns stay
    out."""
    found = 0
    for record in records["train"]:
        ink = gray(record) < 160
        for word in (word for line in record.lines[0] for word in line):
            for i, character in enumerate(word.text):
                if character in ".:-":
                    columns = ink[
                        int(word.box[1]) : int(word.box[3]),
                        round(word.edges[i]) : round(word.edges[i + 1]),
                    ]
                    assert 0 < columns.sum() <= 12, (record.id, word.text)
                    found += 1
    assert found > 20


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
    for split in ("validation", "seen_fonts", "unseen_fonts"):
        for turn in (turn for record in records[split] for turn in record.turns):
            assert values.is_evaluation(turn.answers[0])
            assert turn.answers[0] not in shown
    for turn in (turn for record in records["train"] for turn in record.turns):
        assert not values.is_evaluation(turn.answers[0])


def test_unseen_fonts_and_layouts_are_unseen(monkeypatch, all_tables):
    assert len(pages.SEEN) >= 7 and not set(pages.SEEN) & set(pages.UNSEEN)
    styles = {split: set() for split in ("train", "seen_fonts", "unseen_fonts")}
    draw = documents.pages.draw
    for split, used in styles.items():

        def spy(lines, rows, style, height, rng, used=used):
            used.add((style.family, style.align))
            return draw(lines, rows, style, height, rng)

        monkeypatch.setattr(documents.pages, "draw", spy)
        for index in range(150):
            documents.render(0, split, index, all_tables)
    families, aligns = (
        {split: {style[i] for style in used} for split, used in styles.items()} for i in (0, 1)
    )
    assert families["train"] == families["seen_fonts"] == set(pages.SEEN)
    assert families["unseen_fonts"] == set(pages.UNSEEN)
    assert not aligns["train"] & aligns["unseen_fonts"]


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
