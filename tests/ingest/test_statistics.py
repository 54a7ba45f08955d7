"""A folder in numbers: distributions against the records themselves, rejected records by reason."""

import dataclasses
import json

import numpy as np
import pytest

from alignvlm_jax import presets
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data import packing, shards
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import staging, statistics
from tests.prepared import NUM_DOCUMENTS


def test_distributions_are_those_of_the_records(demo_config, data_dir, tokenizer):
    found = statistics.collect(
        ExampleBuilder.of(demo_config, tokenizer), str(data_dir), "train", 0.5
    )
    assert found.num_records == NUM_DOCUMENTS and found.packing_efficiency == 0.5
    source = shards.RecordSource(data_dir, "train")
    records = [source[i] for i in range(len(source))]
    texts = [
        "\n".join(" ".join(word.text for word in line) for line in record.lines[0])
        for record in records
    ]
    # <s>, the turn's two marks, the end.
    lengths = [len(tokenizer.encode(TRANSCRIBE_QUESTION + text)) + 4 for text in texts]
    mean, median, _, most, count, total = found.distributions["text tokens, transcribe"]
    assert (count, most, total) == (NUM_DOCUMENTS, max(lengths), sum(lengths))
    assert mean == pytest.approx(np.mean(lengths), abs=0.06) and median == pytest.approx(
        np.median(lengths), abs=0.6
    )
    tiles = np.array(found.distributions["tiles a record"])
    slots = demo_config.model.tokens_per_tile
    assert found.distributions["row tokens, transcribe"][-1] == total + tiles[-1] * slots
    assert found.distributions["image width, pixels"][3] == 128
    assert found.facts["Same content twice"] == "0 records"
    assert found.rejected == {}


def test_tiles_by_text_lines_are_not_counted_as_a_grid(demo_config, data_dir, tokenizer):
    data = dataclasses.replace(demo_config.data, tiling="lines")
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    found = statistics.collect(builder, str(data_dir), "train", None)
    assert found.facts["Tiles of a record"] == "at most 2, by its text lines"
    assert "text tokens, transcribe" in found.distributions and not found.advice
    assert not [name for name in found.distributions if "tiles" in name or "row" in name]


def test_image_tokens_of_which_blank_patches_have_none_are_not_counted(
    demo_config, data_dir, tokenizer
):
    data = dataclasses.replace(demo_config.data, blank_contrast=24)
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    found = statistics.collect(builder, str(data_dir), "train", None)
    assert found.facts["Rows"].endswith("32 image tokens each, less those of blank patches")
    assert "tiles a record" in found.distributions and not found.advice
    assert not [name for name in found.distributions if "row" in name]


def test_tokens_of_texts_that_are_spelled_are_not_counted(demo_config, data_dir, tokenizer):
    data = dataclasses.replace(demo_config.data, text_unit="letter")
    builder = ExampleBuilder.of(dataclasses.replace(demo_config, data=data), tokenizer)
    found = statistics.collect(builder, str(data_dir), "train", None)
    assert found.facts["Tokens counted by"].endswith(", before texts are spelled")
    assert "tiles a record" in found.distributions and found.advice
    assert not [name for name in found.distributions if "row" in name]


def test_rejected_by_reason_whatever_is_of_one_record(tmp_path):
    reasons = [
        "too long (120,000 bytes)",
        "too long (7 bytes)",
        *(f"no image ({name}.png)" for name in "abc"),
        "broken",
    ]
    lines = [
        json.dumps({"id": str(i), "source": "x", "reason": reason})
        for i, reason in enumerate(reasons)
    ]
    (tmp_path / staging.REJECTED).write_text("\n".join(lines) + "\n")
    found = statistics.rejected(tmp_path)
    assert list(found.items()) == [("no image", 3), ("too long", 2), ("broken", 1)]


def test_rare_reasons_are_summed(tmp_path):
    names = [f"reason {'x' * n}" for n in range(1, statistics.MAX_REASONS + 4)]
    text = "".join(json.dumps({"reason": name}) + "\n" for name in names)
    (tmp_path / staging.REJECTED).write_text(text)
    found = statistics.rejected(tmp_path)
    assert found["other reasons"] == 3 and sum(found.values()) == len(names)


def test_without_an_index_the_message_says_what_to_call(demo_config, tokenizer, tmp_path):
    builder = ExampleBuilder.of(demo_config, tokenizer)
    with pytest.raises(UserError, match="no shards of split 'train'"):
        statistics.collect(builder, str(tmp_path), "train", None)


def known(lengths, size=(64, 128)) -> index_lib.Index:
    """The index of records of these text tokens, with an image each."""
    lengths = np.array(lengths, np.int32)
    nothing = np.zeros_like(lengths)
    count = len(lengths)
    return index_lib.Index(
        {"transcribe": lengths, "answer": nothing, "answer_and_transcribe": lengths},
        np.array([size] * count, np.int32),
        np.arange(count + 1),
        np.arange(count, dtype=np.uint64),
        "",
    )


@pytest.fixture
def advice(demo_config, tokenizer, monkeypatch):
    """A function of an index and of fields of data that returns the advice by its title."""

    def of(found: index_lib.Index, vision=None, **fields):
        monkeypatch.setattr(index_lib, "load", lambda *args: found)
        data = dataclasses.replace(demo_config.data, **fields)
        model = dataclasses.replace(demo_config.model, vision=vision or demo_config.model.vision)
        config = dataclasses.replace(demo_config, data=data, model=model)
        builder = ExampleBuilder.of(config, tokenizer)
        found = statistics.collect(builder, "folder", "train", None)
        return {one.title: one for one in found.advice}

    return of


def test_other_lengths_are_measured_on_a_sample(advice, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 700, 500)
    found = known(lengths)
    # Half have text for the other task.
    found.text_tokens["answer"] = np.where(np.arange(500) % 2, 90, 0).astype(np.int32)
    offline = {"packing": "offline", "max_tiles": 4, "record_tiles": 2, "seq_len": 1000}
    offline["tasks"] = {"transcribe": 0.7, "answer": 0.3}
    rows = advice(found, **offline)["Length of packed sequences"].rows
    # Those of all records, which are fewer than a sample.
    assert rows[0] == ("1,000", "4", "77.5%", "2.0", "0")
    assert rows[1] == ("512", "3", "67.3%", "1.0", "165")
    assert rows[5] == ("2,944", "12", "78.4%", "6.0", "0")
    sizes = []
    original = statistics.lengths.measure

    def measure(index, *args):
        sizes.append(len(index))
        return original(index, *args)

    monkeypatch.setattr(statistics.lengths, "measure", measure)
    monkeypatch.setattr(statistics, "MAX_PLANNED", 100)
    advice(found, **offline)
    # All of them once, for the distributions.
    assert sizes[0] == 500 and set(sizes[1:]) == {100}


def test_the_length_that_packs_best_is_named(advice):
    """Records of 100 tokens with their 64 image tokens: two of three quarters of a sequence."""
    offline = {"packing": "offline", "max_tiles": 4, "record_tiles": 2, "tasks": {"transcribe": 1}}
    found = advice(known([576] * 120), seq_len=1000, **offline)["Length of packed sequences"]
    first, *others = found.rows
    assert first == ("1,000", "4", "64.0%", "1.0", "0")
    rows = {row[0]: row for row in others}
    # The fullest holds a whole number of them: the plan of such sequences says so.
    plan = packing.plan(np.full(120, 640), np.full(120, 2), 640 * 2, 6, [0], 0)
    assert len(plan.offsets) - 1 == 60 and rows["1,280"][2:] == ("100.0%", "2.0", "0")
    assert "data.seq_len=1280 data.max_tiles=6 packs best: 100.0%" in found.conclusion
    # Half as long, each record would be cut: that is as full, and no advice.
    assert rows["512"][2:] == ("100.0%", "1.0", "120")
    best = advice(known([576] * 120), seq_len=1280, **offline)["Length of packed sequences"]
    assert best.conclusion == "data.seq_len=1280 packs as well as any"
    assert "Length of packed sequences" not in advice(known([9] * 9), tasks={"transcribe": 1})
    assert "Length of packed sequences" not in advice(known([0] * 9), **offline, seq_len=1000)


def test_tiles_that_waste_less_are_named(advice):
    a4 = known([9] * 5, (1169, 827))
    vision = presets.VISION["siglip_so400m_14_384"]
    fields = {"use_overview": True, "max_tiles": 10, "seq_len": 16_000}
    found = advice(a4, vision, **fields)["Tiles"]
    assert found.rows[0] == ("378 × 378", "10", "7,290", "25.9%", "0.97")
    assert found.conclusion == (
        "26% of its image tokens lie on no page; data.max_tiles=9 model.vision.tile_height=322 "
        "model.vision.tile_width=448 shows the pages in the same detail with 9% fewer, 5% of them "
        "on no page; an encoder that is loaded has to take tiles of another shape"
    )
    # Of one shape each number of tiles that makes a difference stands there once.
    assert len({row[0] + row[2] for row in found.rows}) == len(found.rows)
    fewer = advice(a4, vision, **fields | {"max_tiles": 7})["Tiles"]
    assert fewer.rows[0] == ("378 × 378", "7", "5,103", "6.9%", "0.91")
    assert "no other tiles" in fewer.conclusion
    text_only = dataclasses.replace(
        a4, image_sizes=np.zeros((0, 2), np.int32), image_starts=np.zeros(6, np.int64)
    )
    assert not advice(text_only, vision, **fields)
