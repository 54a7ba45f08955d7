"""A folder in numbers: distributions against the records themselves, rejected records by reason."""

import json

import numpy as np
import pytest

from alignvlm_jax.data import shards
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
