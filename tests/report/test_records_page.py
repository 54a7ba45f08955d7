"""What the page of records shows is what the records and their labels are."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from alignvlm_jax.data import images
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.report import records_page
from tests import prepared as data_fixtures

all_tables = data_fixtures.all_tables
tokenizer = data_fixtures.tokenizer
data_dir = data_fixtures.data_dir
demo_config = data_fixtures.demo_config


def record(**changes) -> Record:
    """A page of two lines, with ink where its words are."""
    image = Image.new("L", (128, 64), 255)
    lines = (
        (Word("Total:", (0, 2, 48, 14), None, 0.9), Word("<12.5>", (56, 2, 104, 14))),
        (Word("city", (0, 34, 32, 46), None, 0.3),),
    )
    for line in lines:
        for word in line:
            for x in range(int(word.box[0]), int(word.box[2]), 4):
                ImageDraw.Draw(image).line((x, word.box[1], x, word.box[3]), fill=0)
    turns = (
        Turn("What is the total?", ("none", "TOTAL <12.5>")),
        Turn("Which </script> town?", ("Bern",)),
    )
    fields = {"id": "a/b-1", "source": "test", "turns": turns, "lines": (lines,)}
    return Record(**fields | {"images": (images.encode_png(image),)} | changes)


@pytest.fixture
def config(demo_config):
    return dataclasses.replace(
        demo_config, data=dataclasses.replace(demo_config.data, min_contrast=16)
    )


def build(views, config, path):
    has_labels = config.train.patch_token_weight > 0
    heading = records_page.Heading("folder", "train", "stage2", has_labels)
    return records_page.build(views, heading, config.model.vision, path)


def pages_of(path) -> list[dict]:
    found = re.findall(r'data-page="([^"]*)"', path.read_text())
    return [json.loads(html.unescape(one)) for one in found]


def test_words_labels_and_answers_are_drawn(config, tokenizer, tmp_path):
    builder = ExampleBuilder.of(config, tokenizer)
    view = records_page.view(record(), builder)
    assert [turn.is_found for turn in view.turns] == [True, False]
    path = build([view], config, tmp_path / records_page.FILE)
    [page] = pages_of(path)
    assert page["words"][1] == [[56, 2, 104, 14], "<12.5>", 1, None]
    assert page["words"][2] == [[0, 34, 32, 46], "city", 2, 0.3]
    # The second answer is the one that stands there: words 0 and 1 of question 1.
    assert page["answers"] == [[1, 0], [1, 1]]
    tiles = builder.tile_pages(record())
    arrays = builder.patch_labels(record(), tiles)
    taught = arrays["patch_loss_weights"] > np.float32(config.data.blank_weight)
    assert len([patch for patch in page["patches"] if patch[1]]) == taught.sum()
    box, weight, is_overview, tokens = page["patches"][0]
    assert box == [0, 0, 8, 16] and weight == 1 and not is_overview
    assert tokens[0][0] in "Total" and sum(share for _, share in tokens) == pytest.approx(1, 0.02)
    assert sum(view.fractions.values()) == pytest.approx(1) and view.padding == 0
    assert view.fractions["text"] == pytest.approx(taught.mean())
    text = path.read_text()
    # What comes from a document ends no script and no attribute.
    assert "Which </script>" not in text and "&lt;/script&gt; town?" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert str(view) == "a/b-1: 1 image, 3 words, 2 questions, 1 answered by words of the page"


def test_what_is_too_low_to_be_read_is_told_from_what_is_blank(config, tokenizer, tmp_path):
    low = dataclasses.replace(config, data=dataclasses.replace(config.data, min_token_height=13))
    builder = ExampleBuilder.of(low, tokenizer)
    view = records_page.view(record(), builder)
    assert set(view.fractions) == {"blank", "nothing"} and view.fractions["nothing"] > 0.2
    [page] = pages_of(build([view], low, tmp_path / "a.html"))
    assert page["patches"] and not any(weight for _, weight, *_ in page["patches"])


def test_a_stage_without_labels_says_so(config, tokenizer, tmp_path):
    none = dataclasses.replace(
        config, train=dataclasses.replace(config.train, patch_token_weight=0.0)
    )
    view = records_page.view(record(), ExampleBuilder.of(none, tokenizer))
    path = build([view], none, tmp_path / "a.html")
    assert pages_of(path)[0]["patches"] == [] and view.fractions == {"nothing": 1}
    assert "it trains none" in path.read_text()


def test_the_overview_of_several_pages_is_told_apart(config, tokenizer, tmp_path):
    data = dataclasses.replace(config.data, max_tiles=6, use_overview=True)
    several = dataclasses.replace(config, data=data)
    one = record()
    both = dataclasses.replace(one, images=one.images * 2, lines=one.lines * 2)
    view = records_page.view(both, ExampleBuilder.of(several, tokenizer))
    pages = pages_of(build([view], several, tmp_path / "a.html"))
    assert len(pages) == 2 and pages[0] == pages[1]
    assert {is_overview for _, _, is_overview, _ in pages[0]["patches"]} == {0, 1}


def test_records_without_images_or_words(config, tokenizer, tmp_path):
    builder = ExampleBuilder.of(config, tokenizer)
    views = [
        records_page.view(record(images=(), lines=()), builder),
        records_page.view(record(lines=(), turns=()), builder),
    ]
    text = build(views, config, tmp_path / "a.html").read_text()
    assert "No image." in text and "No questions." in text


@pytest.mark.parametrize("text", ["A/B", "TEST", "total: <12", "bern", "which"])
def test_records_are_found_by_what_they_say(text):
    assert records_page.has_text(record(), text) and not records_page.has_text(record(), "zurich")
