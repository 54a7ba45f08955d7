import collections
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import images, shards, text_lines, tiling
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION, transcription
from alignvlm_jax.errors import UserError
from alignvlm_jax.synthetic import crops, demonstration, fonts, reader, snippets
from alignvlm_jax.synthetic.pages import Style

COUNT = 25
TRAIN = shards.shard_name("train", 0, 1)


@pytest.fixture(scope="module")
def draw(manuals):
    folders = str(manuals["source"]), str(manuals["unseen"])
    return lambda split, number, seed=3: reader.draw(seed, *folders, split, number)


@pytest.fixture(scope="module")
def records(draw):
    return {
        split: [draw(split, number) for number in range(4 * COUNT if split == "train" else COUNT)]
        for split in reader.SPLITS
    }


def arguments(manuals, **changes):
    folders = {name: str(folder) for name, folder in manuals.items()}
    return folders | {"num_train": 4, "num_eval": 2, "seed": 0} | changes


def test_a_record_depends_on_seed_split_and_number_alone(draw, records):
    assert draw("train", 5) == records["train"][5]
    others = [draw("train", 5, seed=4), draw("validation", 5), draw("train", 6)]
    assert all(other.images != records["train"][5].images for other in others)


def test_splits_have_their_kinds(records):
    kinds = {split: {record.source for record in drawn} for split, drawn in records.items()}
    assert kinds["train"] == kinds["validation"] == set(reader.MIXTURE)
    assert kinds["crops"] == {"crop"}
    assert kinds["tables"] == kinds["tables_unseen_faces"] == {"table"}
    assert kinds["random_unseen_faces"] == {"random"}
    counts = collections.Counter(record.source for record in records["train"])
    for kind, fraction in reader.MIXTURE.items():
        # Within three standard deviations of the number that is drawn.
        expected = fraction * len(records["train"])
        assert abs(counts[kind] - expected) <= 3 * math.sqrt(expected), (kind, counts)
    assert sum(reader.MIXTURE.values()) == pytest.approx(1)


def test_what_is_measured_is_of_other_pages(records):
    """Pages of --source are in lower case, those of --unseen in upper case."""
    for split, drawn in records.items():
        is_trained = split in ("train", "validation")
        for record in drawn:
            if record.source in ("crop", "natural", "shuffled"):
                text = transcription(record)
                assert text == (text.lower() if is_trained else text.upper())


def test_questions_are_about_what_the_image_shows(records):
    for record in (record for drawn in records.values() for record in drawn):
        if record.source == "text":
            continue
        if record.source != "table":
            [turn] = record.turns
            assert turn.question == TRANSCRIBE_QUESTION
            assert turn.answers == (transcription(record),) and turn.answers[0]
            num_lines = len(record.lines[0])
            assert num_lines == 1 or (
                num_lines <= crops.MAX_LINES
                and len(turn.answers[0]) <= crops.MAX_CHARACTERS + num_lines
            )
            continue
        words = [[word.text for word in line] for line in record.lines[0]]
        header, *rows = words
        assert 2 <= len(header) <= 3 and 2 <= len(rows) <= 4
        cells = [cell.lower() for row in words for cell in row]
        assert all(len({row[0] for row in rows}) == len(rows) for _ in rows)
        assert all(len(cell) >= 4 for cell in cells)
        assert 1 <= len(record.turns) <= reader.MAX_TURNS
        for turn in record.turns:
            found = [
                row[column]
                for row in rows
                for column in range(1, len(header))
                if turn.question == f"What is the {header[column]} of {row[0]}?"
            ]
            assert list(turn.answers) == found


def test_text_is_asked_for_without_a_page(records):
    drawn = [record for record in records["train"] if record.source == "text"]
    assert len(drawn) >= 3
    for record in drawn:
        assert not record.images and not record.lines
        [turn] = record.turns
        question, empty, *given = turn.question.split("\n")
        assert (question, empty, len(given)) == (reader.CONTINUE_QUESTION, "", reader.GIVEN_LINES)
        [answer] = turn.answers
        assert len(answer.split("\n")) == reader.CONTINUED_LINES and given[0] not in answer


def test_no_record_has_more_tiles_than_the_reader_takes(records):
    sizes = [
        len(
            tiling.tile_page(
                images.decode_image(r.images[0], r.id), reader.VISION, reader.TILES
            ).pixels
        )
        for drawn in records.values()
        for r in drawn
        if r.images
    ]
    assert min(sizes) >= 1 and crops.MAX_LINES < max(sizes) <= crops.MAX_TILES


def test_the_docs_say_what_is_drawn():
    docs = (Path(__file__).parents[2] / "docs/data.md").read_text()
    section = docs.split("## A reader's lines")[1].split("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| (\d+) % \|", section, re.MULTILINE)
    told = {kind: int(percent) / 100 for kind, percent in table}
    assert told == reader.MIXTURE
    assert f"up to {reader.MAX_TURNS} questions" in section
    assert f"a contrast up to {text_lines.CONTRAST} of 255" in section
    assert f"by more than {text_lines.CONTRAST} of 255 levels" in docs
    size = f"{reader.VISION.tile_height} x {reader.VISION.tile_width} pixels"
    assert f"{size}, at most {crops.MAX_TILES} a record" in " ".join(section.split())


def test_every_face_has_the_characters_that_are_drawn():
    """A face shows the same box for all that it lacks."""
    characters = [chr(c) for c in range(0x20, 0x2030) if reader.DRAWABLE.fullmatch(chr(c))]
    assert len(characters) > 180
    faces = [face for family in (fonts.SEEN | fonts.UNSEEN).values() for face in family]
    for font in (fonts.load(face, 20) for face in faces):
        lacking = bytes(font.getmask("\uffff"))
        assert not [
            c for c in characters if bytes(font.getmask(c)) == lacking or not font.getmask(c)
        ]


def test_random_strings_are_as_long_as_words():
    rng = np.random.default_rng(0)
    strings = [reader._string(3, rng) for _ in range(300)]
    assert {len(one) for one in strings} == {3}
    assert any(one.isdigit() for one in strings) and any(one.isupper() for one in strings)
    assert any(not one.isalnum() for one in strings)


def test_folders_that_do_not_serve_are_refused(manuals, tmp_path):
    with pytest.raises(UserError, match=r"--source=.*nosuch is no folder that `prepare` wrote"):
        reader.data_set(arguments(manuals, source=str(tmp_path / "nosuch"))).open()
    with pytest.raises(UserError, match=r"shares 1 of 1 documents with .* as source-train"):
        shutil.copytree(manuals["source"], tmp_path / "same")
        (tmp_path / "same" / shards.shard_name("validation", 0, 1)).unlink()
        reader.data_set(arguments(manuals, unseen=str(tmp_path / "same"))).open()
    with pytest.raises(UserError, match="no shards of split 'train'"):
        reader.data_set(arguments(manuals, source=str(manuals["unseen"]))).open()


def test_pages_without_words_are_refused(manuals, tmp_path):
    [page, *_] = shards.RecordSource(manuals["unseen"], "validation")
    wordless = type(page)("scan-0001", "pdf", page.images, ())
    shards.write_shard(tmp_path / shards.shard_name("validation", 0, 1), [page, wordless])
    (tmp_path / "prepare.json").write_text('{"format": "pdf"}')
    with pytest.raises(UserError, match="page scan-0001 of split validation has no words"):
        reader.data_set(arguments(manuals, unseen=str(tmp_path))).open()


@pytest.fixture
def folder(tmp_path):
    """A function that writes pages to a folder as `prepare` does."""

    def write(name, pages):
        (tmp_path / name).mkdir()
        shards.write_shard(tmp_path / name / shards.shard_name("validation", 0, 1), pages)
        (tmp_path / name / "prepare.json").write_text('{"format": "pdf"}')
        return str(tmp_path / name)

    return write


def faint(page, first: int, level: int):
    """The page with every third line, from `first` on, in a gray of this level."""
    levels = np.array(images.decode_image(page.images[0], page.id))
    for line in page.lines[0][first::3]:
        left, top, right, bottom = (round(side) for side in crops._around(line))
        part = levels[top - 2 : bottom + 2, left - 2 : right + 3]
        part[:] = level + part.astype(int) * (255 - level) // 255
    return dataclasses.replace(page, images=(images.encode_png(Image.fromarray(levels)),))


def underscored(page, style):
    """A form: fields with underscores to write on, at the end of every second line."""
    texts = [" ".join(word.text for word in line) for line in page.lines[0]]
    texts = [f"{text[:12]} ________________" if i % 2 else text for i, text in enumerate(texts)]
    image, lines = snippets.text(texts, style, np.random.default_rng(0))
    return dataclasses.replace(page, images=(images.encode_png(image),), lines=(lines,))


@pytest.mark.parametrize("change", ["faint", "underscored"])
def test_what_no_tile_shows_is_in_no_record(manuals, folder, monkeypatch, change):
    monkeypatch.setattr(snippets, "DEGRADED", 0.0)
    monkeypatch.setattr(snippets, "PLAIN", 1.0)
    source = shards.RecordSource(manuals["unseen"], "validation")
    style = Style(fonts.SEEN["Roboto"][0], 14)
    change = {
        "faint": lambda page: faint(page, 1, 255 - crops.CONTRAST - 8),
        "underscored": lambda page: underscored(page, style),
    }[change]
    changed = [change(source[number]) for number in range(len(source))]
    unseen = folder("changed", changed)
    drawn = [
        reader.draw(0, str(manuals["source"]), unseen, split, number)
        for split in ("crops", "natural")
        for number in range(COUNT)
    ]
    for record in drawn:
        page = images.decode_image(record.images[0], record.id)
        tiles = tiling.tile_page(page, reader.VISION, reader.TILES).crops
        assert len(text_lines.find(page))
        for word in (word for line in record.lines[0] for word in line):
            middle = [(a + b) / 2 for a, b in (word.box[::2], word.box[1::2])]
            assert ((tiles[:, :2] <= middle) & (middle <= tiles[:, 2:])).all(1).any(), word.text
    # What can be read of these pages still is.
    assert len({transcription(record) for record in drawn}) > COUNT


def test_pages_that_are_trained_on_are_found_under_any_name(manuals, folder):
    """In a folder above, or in a copy of the file, ids are others."""
    pages = shards.RecordSource(manuals["source"], "train")
    others = list(shards.RecordSource(manuals["unseen"], "validation"))
    smaller = images.decode_image(pages[2].images[0], "").reduce(2)
    copies = [
        dataclasses.replace(pages[1], id="above/source-train-0002"),
        dataclasses.replace(pages[2], id="copy-0003", images=(images.encode_png(smaller),)),
    ]
    match = (
        r"copies shares 2 of 3 documents with --source=.*source by their words, as 1 of 1 page of "
        r"above/source-train \(above/source-train-0002 is source-train-0002 there\)"
    )
    with pytest.raises(UserError, match=match):
        reader.data_set(arguments(manuals, unseen=folder("copies", [*others, *copies]))).open()
    # One page of many is about the licence of all books of a publisher.
    book = [dataclasses.replace(others[0], id=f"copy-{number:04d}") for number in range(4, 14)]
    reader.data_set(arguments(manuals, unseen=folder("book", [*book, copies[1]]))).open()
    # Of a few words, as of a page that says it is left blank, nothing is concluded.
    blank = dataclasses.replace(pages[1], lines=(pages[1].lines[0][:1],))
    source = folder("source", [blank])
    shutil.copy(f"{source}/{shards.shard_name('validation', 0, 1)}", f"{source}/{TRAIN}")
    unseen = folder("blank", [*others, dataclasses.replace(blank, id="blank-0001")])
    reader.data_set(arguments(manuals, source=source, unseen=unseen)).open()


def test_pages_of_which_nothing_fits_are_an_error(manuals, draw, monkeypatch):
    monkeypatch.setattr(reader, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(reader, "_fits", lambda *_: False)
    with pytest.raises(UserError, match=r"no crop of a page of .*unseen fits 12 tiles"):
        draw("crops", 0)


def test_pages_too_short_for_text_are_an_error(draw, monkeypatch):
    monkeypatch.setattr(reader, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(reader, "CONTINUED_LINES", 1000)
    monkeypatch.setitem(reader.SPLITS, "train", reader.Split({"text": 1.0}, "train"))
    with pytest.raises(UserError, match=r"^no page of .*source has the 1003 lines that a record"):
        draw("train", 0)


def test_other_pages_are_other_data(manuals, tmp_path):
    first = reader.data_set(arguments(manuals)).description
    assert json.loads(json.dumps(first)) == first
    other = shutil.copytree(manuals["source"], tmp_path / "source")
    (other / "prepare.json").write_text('{"format": "pdf", "listing": "00000001"}')
    second = reader.data_set(arguments(manuals, source=str(other))).description
    assert first["listing"] != second["listing"]


def test_missing_fonts_are_told(manuals, monkeypatch):
    monkeypatch.setattr(fonts, "PACKAGES", {"font_nosuch"})
    with pytest.raises(UserError, match="the reader's lines need package font_nosuch: pip install"):
        demonstration.check_packages("the reader's lines")
        reader.data_set(arguments(manuals)).open()
