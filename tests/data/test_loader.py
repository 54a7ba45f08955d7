import collections
import dataclasses
import itertools
import pathlib
import re
import shutil
import zlib

import numpy as np
import pytest

from alignvlm_jax.config import SourceConfig
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data import loader, shards
from alignvlm_jax.data.examples import ExampleBuilder, Segment
from alignvlm_jax.errors import UserError
from tests.prepared import NUM_DOCUMENTS, write_shard

OTHER_ROWS = {"tasks": {"answer_and_transcribe": 1.0}, "use_overview": True, "seq_len": 160}


def change(config, part, **fields):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **fields)}
    )


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


KINDS = {
    "none": {},
    "plan": {"packing": "offline", "seq_len": 400, "max_tiles": 9, "record_tiles": 2},
    "mixture": {"sources": {"a": {"weight": 2.0}, "b": {"repeat": 0.3}}},
    "mixture, plan": {
        "sources": {"a": {}, "b": {"repeat": 1.6}}, "temperature": 2.0,
        "packing": "offline", "seq_len": 300, "max_tiles": 4, "loss_normalisation": "record",
    },
}  # fmt: skip


def of_kind(config, kind: str):
    fields = dict(KINDS[kind])
    if "sources" in fields:
        fields["sources"] = {
            name: SourceConfig(dir=config.data.dir, **source)
            for name, source in fields["sources"].items()
        }
    return change(config, "data", **fields)


@pytest.fixture(params=KINDS)
def any_config(request, demo_config):
    """Eight rows of 48 documents or more a step: epochs end within batches."""
    return of_kind(demo_config, request.param)


def checksum(config, split="train") -> str:
    rows = loader.TrainSequences(config, split)
    arrays = [row[name] for row in (rows[i] for i in [*range(32), 100]) for name in sorted(row)]
    return f"{zlib.crc32(b''.join(array.tobytes() for array in arrays)):08x}"


def test_rows_of_one_record_are_what_they_ever_were(demo_config):
    """Published numbers of the demonstration depend on every byte.

    Should a change be meant, measure them anew.
    """
    other = dataclasses.replace(change(demo_config, "data", **OTHER_ROWS), seed=3, stage="stage2")
    found = [checksum(demo_config), checksum(demo_config, "validation"), checksum(other)]
    assert found == ["9f49d723", "5597068d", "49e9bded"]


def test_batches_are_the_stacked_rows_in_order(demo_config):
    rows = loader.TrainSequences(demo_config, "train")
    batches = loader.TrainBatches(demo_config)
    for start in (0, 8):
        assert_equal(next(batches), loader.stack([rows[start + i] for i in range(8)]))
    assert batches.next_sequence == 16


def test_a_stage_ends_after_its_steps(demo_config):
    assert len(list(loader.TrainBatches(change(demo_config, "train", num_steps=3)))) == 3


def test_resuming_after_any_step_continues_exactly(any_config):
    config = change(any_config, "train", num_steps=5)
    straight = list(loader.TrainBatches(config))
    for step in range(5):
        resumed = loader.TrainBatches(config, start_sequence=8 * step)
        for batch, expected in zip(resumed, straight[step:], strict=True):
            assert_equal(batch, expected)
        assert resumed.next_sequence == 40


@pytest.mark.parametrize("num_threads, prefetch", [(1, 1), (4, 8)])
def test_threads_change_nothing(demo_config, num_threads, prefetch):
    other = change(demo_config, "data", num_threads=num_threads, prefetch=prefetch)
    for a, b in itertools.islice(
        zip(loader.TrainBatches(demo_config), loader.TrainBatches(other), strict=True), 4
    ):
        assert_equal(a, b)


def fractions(count: int) -> list[range]:
    """The rows of a batch of 8 that each of `count` processes feeds: every count-th, as hosts stand
    in a real mesh."""
    return [range(process, 8, count) for process in range(count)]


@pytest.mark.parametrize(
    "rows_of", [fractions(2), fractions(4), [[0, 1, 6, 7], [2, 3, 4, 5], [0, 1, 6, 7]]]
)
def test_the_global_batch_is_the_same_whatever_rows_a_process_feeds(any_config, rows_of):
    whole = loader.TrainBatches(any_config, start_sequence=8)
    parts = [loader.TrainBatches(any_config, start_sequence=8, local_rows=own) for own in rows_of]
    for _ in range(2):
        batch = next(whole)
        for own, part in zip(rows_of, parts, strict=True):
            assert_equal(next(part), {name: array[list(own)] for name, array in batch.items()})
    assert {part.next_sequence for part in parts} == {whole.next_sequence}


def numbered_parts(monkeypatch) -> None:
    """Every record becomes three tokens that are its number."""

    def segment(builder, record, task, rng):
        number = int(record.id.rsplit("-", 1)[1])
        return Segment(
            np.full(3, number, np.int32),
            np.ones(3, np.float32),
            {"tiles": np.zeros((0, 32, 128, 3))},
        )

    monkeypatch.setattr(ExampleBuilder, "segment", segment)


def test_every_record_is_seen_as_often_as_planned_whatever_the_number_of_processes(
    any_config, monkeypatch
):
    numbered_parts(monkeypatch)
    config = change(any_config, "train", num_steps=24)
    seen = collections.Counter()
    next_sequence = 0
    # Goes on twelve times, after one or several steps, with another number of processes.
    for count, steps in zip((1, 2, 4, 8, 4, 2) * 2, (1, 3, 2, 1, 2, 3) * 2, strict=True):
        parts = [
            loader.TrainBatches(config, start_sequence=next_sequence, local_rows=own)
            for own in fractions(count)
        ]
        for part, _ in itertools.product(parts, range(steps)):
            batch = next(part)
            starts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
            seen.update(batch["tokens"][starts].tolist())
        assert len({part.next_sequence for part in parts}) == 1
        next_sequence = parts[0].next_sequence
    rows = loader.TrainSequences(config, "train")
    planned = collections.Counter(
        pick.record % NUM_DOCUMENTS
        for row in range(next_sequence)
        for pick in rows.schedule.picks(row)
    )
    assert next_sequence == 192 and seen == planned and set(seen) == set(range(NUM_DOCUMENTS))


def spoil(folder: pathlib.Path, indices: range, split: str = "train") -> None:
    """Cuts the images of some documents off, below the header that tells their size."""
    source = shards.RecordSource(folder, split)
    paths = shards.shard_paths(folder, split)
    for shard, path in enumerate(paths):
        records = [
            dataclasses.replace(source[i], images=(source[i].images[0][:100],))
            if i in indices
            else source[i]
            for i in range(
                shard * NUM_DOCUMENTS // len(paths), (shard + 1) * NUM_DOCUMENTS // len(paths)
            )
        ]
        shards.write_shard(path, records)  # The index stays.


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_cannot_be_decoded_is_left_out_of_its_row_alone(demo_config, kind, tmp_path):
    shutil.copytree(demo_config.data.dir, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, range(7, 8))
    config = of_kind(change(demo_config, "data", dir=str(tmp_path)), kind)
    good = loader.TrainSequences(of_kind(demo_config, kind), "train")
    bad = loader.TrainSequences(config, "train")
    left_out = 0
    for row in range(80):
        picks = good.schedule.picks(row)
        if not any(pick.record % NUM_DOCUMENTS == 7 for pick in picks):
            assert_equal(bad[row], good[row])
            continue
        parts = [
            good.builder.segment(good._record(pick.record), pick.task, pick.rng)
            for pick in picks
            if pick.record % NUM_DOCUMENTS != 7
        ]
        left_out += len(picks) - len(parts)
        assert_equal(bad[row], good.builder.join(parts))
    batches = loader.TrainBatches(change(config, "data", max_unsupervised=1.0))
    for _ in range(10):
        next(batches)
    assert batches.num_unsupervised >= left_out > 0 and "record train-000007" in bad.problem


def test_too_many_unreadable_records_are_an_error_that_names_the_first(demo_config, tmp_path):
    shutil.copytree(demo_config.data.dir, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, range(10, 40))
    config = of_kind(change(demo_config, "data", dir=str(tmp_path)), "plan")
    with pytest.raises(
        UserError,
        match=r"\d+ of \d+ records cannot be read .*; the first: .* of record train-0000\d\d",
    ):
        list(loader.TrainBatches(config))


def test_an_index_of_other_records_is_found_out(demo_config, tmp_path):
    shutil.copytree(demo_config.data.dir, tmp_path, dirs_exist_ok=True)
    for path in shards.shard_paths(tmp_path, "train"):
        index = index_lib.read(index_lib.index_path(path))
        fewer = {task: np.minimum(tokens, 9) for task, tokens in index.text_tokens.items()}
        index_lib.write(index_lib.index_path(path), dataclasses.replace(index, text_tokens=fewer))
    config = of_kind(change(demo_config, "data", dir=str(tmp_path)), "plan")
    with pytest.raises(
        UserError, match=r"takes more of a row than its index says; `prepare --recount` mends it"
    ):
        list(loader.TrainBatches(config))


def test_planned_rows_are_full(demo_config):
    rows = loader.TrainSequences(of_kind(demo_config, "plan"), "train")
    end = rows.schedule.epoch_at(0).end
    used = sum((rows[row]["segment_ids"] > 0).sum() for row in range(end))
    assert used / (400 * end) == rows.schedule.counters(end)["packing_efficiency"] > 0.9
    assert sum(rows[row]["segment_ids"].max() for row in range(end)) == NUM_DOCUMENTS


def test_an_epoch_visits_every_record_once_and_the_next_in_another_order(demo_config):
    rows = loader.TrainSequences(demo_config, "train")
    size = NUM_DOCUMENTS
    epochs = [[rows.schedule.order[epoch * size + i] for i in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1] != list(range(size))


def test_records_share_a_sequence_as_far_as_they_fit(demo_config, monkeypatch):
    """Each of an epoch is in one, and what is left out is counted, with the numbers."""
    three = change(demo_config, "data", records_per_sequence=3, record_tiles=2, max_tiles=6)
    roomy = loader.TrainSequences(change(three, "data", seq_len=480), "train")
    single = loader.TrainSequences(demo_config, "train")
    picked = [pick.record for i in range(20) for pick in roomy.schedule.picks(i)]
    assert picked == [record for i in range(20) for record in roomy.schedule.records(i)]
    assert picked == [single.schedule.order[i] for i in range(60)]
    together = roomy[1]
    assert together["segment_ids"].max() == 3 and roomy.problem is None
    assert roomy.schedule.counters(20) == {"epoch": 60 / NUM_DOCUMENTS, "records": 60}
    # Whether one before can be read changes nothing of those after it.
    build = roomy.builder.segment
    bad = picked[3]

    def segment(builder, record, task, rng):
        if record.id == f"train-{bad:06d}":
            raise UserError("unreadable")
        return build(record, task, rng)

    monkeypatch.setattr(type(roomy.builder), "segment", segment)
    [_, second, third] = [segment.tokens for _, segment in full_segments(build, roomy, 1)]
    rest = [segment.tokens for _, segment in roomy.segments(1)]
    for tokens, expected in zip(rest, (second, third), strict=True):
        np.testing.assert_array_equal(tokens, expected)
    monkeypatch.undo()
    # Of three with room for two the last is left out, and counts as one that taught nothing.
    tight = change(three, "data", seq_len=300, max_unsupervised=1.0)
    batches = loader.TrainBatches(tight)
    batch = next(batches)
    left_out = 3 * len(batch["tokens"]) - loader.count_supervised(batch)
    assert batches.num_unsupervised == left_out > 0
    assert re.search(r"fit beside \d of config\.data\.records_per_sequence 3: \d+ of", why(tight))


def full_segments(build, rows, index):
    """The segments of a sequence, each of a record by itself."""
    picks = rows.schedule.picks(index)
    return [(i, build(rows._record(p.record), p.task, p.rng)) for i, p in enumerate(picks)]


def why(config) -> str:
    """Why the first record is left out that does not fit."""
    rows = loader.TrainSequences(config, "train")
    for index in range(8):
        rows.segments(index)
    return rows.problem


def test_seed_and_stage_change_the_rows(demo_config):
    first = next(loader.TrainBatches(demo_config))
    for other in (
        dataclasses.replace(demo_config, seed=1),
        dataclasses.replace(demo_config, stage="other"),
    ):
        assert not np.array_equal(next(loader.TrainBatches(other))["tokens"], first["tokens"])


def test_tasks_are_drawn_by_their_weights(demo_config):
    def fraction(tasks):
        rows = loader.TrainSequences(change(demo_config, "data", tasks=tasks), "train")
        read = rows.builder.tokenizer.encode("Read the page.")[0]
        return np.mean([(rows[i]["tokens"] == read).any() for i in range(120)])

    assert fraction({"transcribe": 1.0}) == 1 and fraction({"answer": 2.0, "transcribe": 0.0}) == 0
    assert 0.6 < fraction({"transcribe": 3.0, "answer": 1.0}) < 0.9
    with pytest.raises(UserError, match="did you mean 'transcribe'"):
        fraction({"transcrib": 1.0})


def test_too_many_rows_without_an_answer_are_an_error(demo_config):
    short = change(demo_config, "data", seq_len=68)
    with pytest.raises(UserError, match=r"8 of 8 records .*max_unsupervised is 0\.01"):
        next(loader.TrainBatches(short))
    next(loader.TrainBatches(change(short, "data", max_unsupervised=1.0)))
    # Their patches are there, and a stage that learns from these alone misses none.
    patches = loader.TrainBatches(change(short, "train", answer_weight=0.0))
    batch = next(patches)
    assert not batch["loss_weights"].any() and patches.num_unsupervised == 0
    assert (batch["patch_loss_weights"] > 0).any((1, 2)).all()
    # How many image tokens a page has whose blank patches have none is nowhere but in the message.
    unknown = change(short, "data", seq_len=12, blank_contrast=24)
    with pytest.raises(UserError, match=r"the first: record \S+ has no answer .* \d+ image tokens"):
        next(loader.TrainBatches(unknown))


def test_a_position_that_does_not_divide_is_an_error(demo_config):
    with pytest.raises(UserError, match="position 5"):
        loader.TrainBatches(demo_config, start_sequence=5)


def test_records_without_a_question_are_told_as_such(demo_config, data_dir, tokenizer, tmp_path):
    """A folder of pages with their words, trained on for answers without packing."""
    source = shards.RecordSource(data_dir, "train")
    records = [
        dataclasses.replace(source[i], turns=source[i].turns if i < 2 else ()) for i in range(20)
    ]
    write_shard(tmp_path / shards.shard_name("train", 0, 1), records, tokenizer)
    shutil.copy(data_dir / "tokenizer.model", tmp_path)
    config = change(demo_config, "data", dir=str(tmp_path), tasks={"answer": 1.0})
    reason = (
        r"by the index, text have 2 of 20 for answer, and packing offline leaves the others out"
    )
    with pytest.raises(UserError, match=reason):
        list(loader.TrainBatches(config))
