"""What the page of rows shows is what the rows are."""

import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.ingest import statistics
from alignvlm_jax.report import examples_page
from tests import prepared as data_fixtures

all_tables = data_fixtures.all_tables
tokenizer = data_fixtures.tokenizer
data_dir = data_fixtures.data_dir
demo_config = data_fixtures.demo_config


@pytest.fixture
def config(demo_config):
    data = dataclasses.replace(
        demo_config.data,
        packing="offline",
        seq_len=512,
        max_tiles=6,
        record_tiles=2,
        tasks={"answer": 1.0},
    )
    return dataclasses.replace(demo_config, data=data)


def test_view_agrees_with_the_row(config):
    all_sequences = TrainSequences(config, "train")
    row = all_sequences[0]
    parts = all_sequences.segments(0)
    view = examples_page.view(0, parts, all_sequences.builder)
    assert len(view.segments) == row["segment_ids"].max() > 1
    assert view.packing_efficiency == (row["segment_ids"] > 0).mean()
    assert sum(segment.num_taught for segment in view.segments) == (row["loss_weights"] > 0).sum()
    tiles = [tile for segment in view.segments for tile in segment.tiles]
    for slot, uri in enumerate(tiles):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert np.array_equal(np.asarray(picture), row["tiles"][slot])
    assert not row["tiles"][len(tiles) :].any()
    for segment, (name, part) in zip(view.segments, parts, strict=True):
        assert segment.name == name
        assert sum(span.count for span in segment.spans) == segment.num_tokens == len(part.tokens)
        image_tokens = [span.count for span in segment.spans if span.kind == "image"]
        assert image_tokens == [len(segment.tiles) * config.model.tokens_per_tile]


def test_taught_text_is_the_answers(config):
    all_sequences = TrainSequences(config, "train")
    source = RecordSource(config.data.dir, "train")
    records = {record.id: record for record in map(source.__getitem__, range(len(source)))}
    view = examples_page.view(0, all_sequences.segments(0), all_sequences.builder)
    for segment in view.segments:
        answers = {turn.answers[0] for turn in records[segment.name].turns}
        assert {span.text for span in segment.spans if span.kind == "taught"} == answers


def test_page_is_one_file_with_all_rows(config, tmp_path):
    all_sequences = TrainSequences(config, "train")
    views = [
        examples_page.view(i, all_sequences.segments(i), all_sequences.builder) for i in range(3)
    ]
    found = statistics.collect(all_sequences.builder, config.data.dir, "train", 0.876)
    path = examples_page.build(views, found, tmp_path / examples_page.FILE)
    page = path.read_text()
    assert "packed sequences 87.6 % full" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    shown = html.unescape(page)
    taught = [
        span.text
        for view in views
        for one in view.segments
        for span in one.spans
        if span.kind == "taught"
    ]
    assert len(taught) > 10 and all(
        f'<span class="taught">{text}</span>' in shown for text in taught
    )
    assert [p.name for p in tmp_path.iterdir()] == [examples_page.FILE]
