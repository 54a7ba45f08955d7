import dataclasses
import itertools
import zlib

import numpy as np
import pytest

from alignvlm_jax.data import pipeline
from alignvlm_jax.errors import UserError
from tests.data.conftest import NUM_DOCUMENTS


OTHER_ROWS = {"tasks": {"answer_and_transcribe": 1.0}, "use_overview": True, "row_length": 160}


def change(config, part, **fields):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def plan(config, **fields):
    """`config` with planned rows that have room for a few documents."""
    return change(config, "data", packing="plan", row_length=400, max_tiles=5, record_tiles=2, **fields)


def checksum(config, split="train") -> str:
    rows = pipeline.TrainRows(config, split)
    arrays = [row[name] for row in (rows[i] for i in [*range(32), 100]) for name in sorted(row)]
    return f"{zlib.crc32(b''.join(array.tobytes() for array in arrays)):08x}"


def test_rows_of_one_record_are_what_they_ever_were(demo_config):
    """Published numbers of the demonstration depend on every byte. Should a change be meant, measure them anew."""
    assert checksum(demo_config) == "a28426d9" and checksum(demo_config, "validation") == "90a0f2e8"
    other = dataclasses.replace(change(demo_config, "data", **OTHER_ROWS), seed=3, stage="stage2")
    assert checksum(other) == "6a8d43ad"


def test_batches_are_the_stacked_rows_in_order(demo_config):
    rows = pipeline.TrainRows(demo_config, "train")
    batches = pipeline.TrainBatches(demo_config)
    for start in (0, 8):
        assert_equal(next(batches), pipeline.stack([rows[start + i] for i in range(8)]))
    assert batches.next_row == 16


def test_a_stage_ends_after_its_steps(demo_config):
    assert len(list(pipeline.TrainBatches(change(demo_config, "train", num_steps=3)))) == 3


def test_resuming_continues_exactly(demo_config):
    batches = pipeline.TrainBatches(demo_config)
    for _ in range(3):
        next(batches)
    resumed = pipeline.TrainBatches(demo_config, start_row=batches.next_row)
    for _ in range(2):
        assert_equal(next(resumed), next(batches))


@pytest.mark.parametrize("num_threads, prefetch", [(1, 1), (4, 8)])
def test_threads_change_nothing(demo_config, num_threads, prefetch):
    other = change(demo_config, "data", num_threads=num_threads, prefetch=prefetch)
    for a, b in itertools.islice(zip(pipeline.TrainBatches(demo_config), pipeline.TrainBatches(other), strict=True), 4):
        assert_equal(a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(demo_config, count):
    whole = pipeline.TrainBatches(demo_config, start_row=8)
    parts = [
        pipeline.TrainBatches(demo_config, start_row=8, process_index=p, process_count=count) for p in range(count)
    ]
    for _ in range(2):
        local = [next(part) for part in parts]
        assert_equal(next(whole), {name: np.concatenate([part[name] for part in local]) for name in local[0]})
    assert {part.next_row for part in parts} == {whole.next_row}


def test_an_epoch_visits_every_record_once_and_the_next_in_another_order(demo_config):
    rows = pipeline.TrainRows(demo_config, "train")
    size = NUM_DOCUMENTS
    epochs = [[rows.schedule.order[epoch * size + i] for i in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1] != list(range(size))


def test_seed_and_stage_change_the_rows(demo_config):
    first = next(pipeline.TrainBatches(demo_config))
    for other in (dataclasses.replace(demo_config, seed=1), dataclasses.replace(demo_config, stage="other")):
        assert not np.array_equal(next(pipeline.TrainBatches(other))["tokens"], first["tokens"])


def test_tasks_are_drawn_by_their_weights(demo_config):
    def share(tasks):
        rows = pipeline.TrainRows(change(demo_config, "data", tasks=tasks), "train")
        read = rows._tokenizer.encode("Read the page.")[0]
        return np.mean([(rows[i]["tokens"] == read).any() for i in range(120)])

    assert share({"transcribe": 1.0}) == 1 and share({"answer": 2.0, "transcribe": 0.0}) == 0
    assert 0.6 < share({"transcribe": 3.0, "answer": 1.0}) < 0.9
    with pytest.raises(UserError, match="did you mean 'transcribe'"):
        share({"transcrib": 1.0})


def test_too_many_rows_without_an_answer_are_an_error(demo_config):
    short = change(demo_config, "data", row_length=68)
    with pytest.raises(UserError, match=r"8 of 8 records .*max_unsupervised is 0\.01"):
        next(pipeline.TrainBatches(short))
    next(pipeline.TrainBatches(change(short, "data", max_unsupervised=1.0)))


def test_validation_is_the_same_at_every_call(demo_config):
    first, second = (pipeline.validation_batches(demo_config, 4, 10) for _ in range(2))
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert a["tokens"].shape == (4, 144)
        assert_equal(a, b)
    assert len(pipeline.validation_batches(demo_config, 4, 1)) == 1


def test_positions_and_processes_that_do_not_divide_are_errors(demo_config):
    with pytest.raises(UserError, match="3 processes"):
        pipeline.TrainBatches(demo_config, process_count=3)
    with pytest.raises(UserError, match="position 5"):
        pipeline.TrainBatches(demo_config, start_row=5)


def test_the_tokenizer_must_fit_the_model(demo_config):
    small = dataclasses.replace(demo_config.model, llm=dataclasses.replace(demo_config.model.llm, vocab_size=64))
    with pytest.raises(UserError, match=r"108 tokens.*vocab_size is 64"):
        pipeline.load_tokenizer(dataclasses.replace(demo_config, model=small))
    with pytest.raises(UserError, match="image_token_id is 9"):
        pipeline.load_tokenizer(change(demo_config, "model", image_token_id=9))
