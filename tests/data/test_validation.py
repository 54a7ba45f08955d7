import shutil

import pytest

from alignvlm_jax.config import SourceConfig
from alignvlm_jax.data import loader, validation
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.errors import UserError
from tests.data.test_loader import assert_equal, change, spoil
from tests.prepared import NUM_DOCUMENTS


def held_out(config) -> loader.TrainSequences:
    """The sequences of validation on the one source."""
    [sequences] = validation.by_source(config).values()
    return sequences


def builders(by_source) -> dict[str, ExampleBuilder]:
    """What sources are made into sequences by: the fields of data, vision and so on."""
    return {name: sequences.builder for name, sequences in by_source.items()}


def test_a_validation_split_that_cannot_be_read_is_an_error(demo_config, tmp_path):
    shutil.copytree(demo_config.data.dir, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, range(NUM_DOCUMENTS), "validation")
    config = change(demo_config, "data", dir=str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"nothing to validate on in split 'validation': cannot read image 0 of record",
    ):
        validation.ValidationBatches(held_out(config), 4, 8)
    # Of several processes one that has nothing is no reason to end.
    told = []
    validation.ValidationBatches(
        held_out(config),
        4,
        8,
        [2],
        lambda problem: told.append(problem) or [None, problem],
    )
    assert "cannot read image 0 of record" in told[0]


def test_a_source_of_which_nothing_was_held_out_is_no_part_of_validation(demo_config, tmp_path):
    shutil.copytree(demo_config.data.dir, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("validation-*"):
        path.unlink()
    held = {"a": SourceConfig(dir=demo_config.data.dir)}
    mixed = held | {"b": SourceConfig(dir=str(tmp_path))}
    both, alone = (
        validation.by_source(change(demo_config, "data", packing="offline", sources=sources))
        for sources in (mixed, held)
    )
    assert (
        builders(both) == builders(alone)
        and list(both) == ["a"]
        and both["a"].builder.data.folders == (demo_config.data.dir,)
    )
    nowhere = change(demo_config, "data", sources={"b": mixed["b"]})
    with pytest.raises(
        UserError,
        match=r"no shards of split 'validation' in .*prepare it again with --holdout=0\.1 "
        r"\(--holdout_by=page .*: --config\.data\.validation_split=train$",
    ):
        validation.by_source(nowhere)


def test_validation_counts_every_patch_and_all_of_a_source(demo_config):
    few = SourceConfig(dir=demo_config.data.dir, weight=0.0, cap=1)
    config = change(
        demo_config, "data", packing="offline", labelled_fraction=0.0, sources={"a": few}
    )
    whole = change(
        demo_config,
        "data",
        packing="offline",
        sources={"a": SourceConfig(dir=demo_config.data.dir)},
    )
    assert builders(validation.by_source(config)) == builders(validation.by_source(whole))


def test_validation_is_the_same_at_every_pass(demo_config):
    batches = validation.ValidationBatches(held_out(demo_config), 4, 10)
    first = list(batches)
    second = list(batches)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert a["tokens"].shape == (4, 160)
        assert_equal(a, b)
    assert len(list(validation.ValidationBatches(held_out(demo_config), 4, 1))) == 1


def test_a_process_decodes_its_own_rows_of_validation_alone(demo_config, monkeypatch):
    whole = list(validation.ValidationBatches(held_out(demo_config), 4, 10))
    read = []
    row_of = loader.TrainSequences.__getitem__
    monkeypatch.setattr(
        loader.TrainSequences, "__getitem__", lambda rows, i: read.append(i) or row_of(rows, i)
    )
    own = validation.ValidationBatches(held_out(demo_config), 4, 10, local_rows=[1, 3])
    assert read == [1]  # To see that there is something to validate on.
    read.clear()
    for mine, all_sequences in zip(own, whole, strict=True):
        assert_equal(mine, {name: array[[1, 3]] for name, array in all_sequences.items()})
    assert sorted(read) == [1, 3, 5, 7]


def test_batches_know_of_how_many_records_they_are(demo_config):
    """Of a few a loss says little about others; where there is room for more they come again."""
    few, all_of_them = (
        validation.ValidationBatches(held_out(demo_config), 4, count) for count in (4, 1000)
    )
    assert few.num_held == all_of_them.num_held == NUM_DOCUMENTS
    seen = {
        record for number in range(4) for record in held_out(demo_config).schedule.records(number)
    }
    assert few.num_records == len(seen) < NUM_DOCUMENTS == all_of_them.num_records
