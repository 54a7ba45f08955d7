"""What blind means, and going on after a stop; a script answers, not a model."""

import dataclasses
import types

import numpy as np
import pytest

from alignvlm_jax.benchmarks import predictions, runner
from alignvlm_jax.benchmarks.questions import choose_questions
from alignvlm_jax.config import Config
from alignvlm_jax.data import images, shards, stage_data
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Turn
from tests.scripted_sampler import ScriptedSampler


@pytest.fixture
def make_runner(trained_workdir, tmp_path):
    """A runner of 7 questions, 4 at a time on 4 devices, in a new workdir, and its sampler."""
    trained = runner.loading.load_config(trained_workdir)
    evaluation = dataclasses.replace(trained.eval, num_questions=7)
    tokenizer = stage_data.load_tokenizer(trained.data, trained.model)

    def make(answer: str = "Ann", stop_at: int = -1, config: Config = trained, **changes):
        def says(number: int) -> str:
            if number == stop_at:
                raise KeyboardInterrupt
            return answer

        sampler = ScriptedSampler(tokenizer, says, 4)
        fields = {
            "path": tmp_path / "checkpoints" / "7",
            "step": 7,
            "metadata": {"train_seconds": 12.5},
        }
        fields |= {
            "data_parallel_size": 4,
            "config": config,
            "tokenizer": tokenizer,
            "builder": ExampleBuilder.of(config, tokenizer),
            "sampler": lambda: sampler,
            "variables": {},
        } | changes
        fields["path"].mkdir(parents=True, exist_ok=True)
        return runner.Runner(types.SimpleNamespace(**fields), evaluation), sampler

    return make


def test_blind_rows_differ_in_pixels_alone(trained_workdir):
    config = runner.loading.load_config(trained_workdir)
    tokenizer = stage_data.load_tokenizer(config.data, config.model)
    builder = ExampleBuilder.of(config, tokenizer)
    record = shards.RecordSource(config.data.dir, "seen_fonts")[0]
    blind = runner.blank(record)
    assert images.decode_image(blind.images[0], "").getextrema() == ((255, 255),) * 3
    assert not blind.lines
    asked, guessed = (builder.prompt(page, "Who?") for page in (record, blind))
    for name in ("tokens", "positions", "segment_ids"):
        np.testing.assert_array_equal(asked[name], guessed[name])
    num_tiles = (
        asked["tokens"] == tokenizer.special_tokens["<image>"]
    ).sum() // config.model.tokens_per_tile
    assert (guessed["tiles"][:num_tiles] == 255).all()
    assert not (asked["tiles"][:num_tiles] == 255).all()


def test_rows_are_scored_and_prompts_of_one_size_have_one_shape(make_runner, tmp_path):
    evaluator, sampler = make_runner("Anna")
    result = evaluator.evaluate("seen_fonts", blind=False)
    assert [batch["tokens"].shape for batch in sampler.batches] == [(4, 32)] * 2
    assert len(result.rows) == 7
    assert [row["record"] for row in result.rows] == [0, 1, 2, 3, 4, 0, 1]
    assert {row["kind"] for row in result.rows} == {"form", "table"}
    for row in result.rows:
        assert row["prediction"] == "Anna" and row["is_cut"] is False
        assert (row["score"], row["exact"]) == (
            (1.0, 1.0) if row["question"] == "Who?" else (0.0, 0.0)
        )
    assert result == predictions.read(tmp_path / "predictions" / "seen_fonts.jsonl")
    assert result.header["prompt"] == "<s><image><user>QUESTION<assistant>"
    assert (result.header["split"], result.header["blind"], result.header["step"]) == (
        "seen_fonts",
        False,
        7,
    )


def test_prompts_are_not_padded_to_rows_of_many_records(make_runner, trained_workdir):
    evaluator, sampler = make_runner("Anna")
    evaluator.evaluate("seen_fonts", blind=False)
    packed = {"packing": "offline", "seq_len": 11_520, "max_tiles": 35, "record_tiles": 2}
    trained = runner.loading.load_config(trained_workdir)
    config = dataclasses.replace(trained, data=dataclasses.replace(trained.data, **packed))
    other, other_sampler = make_runner("Anna", step=8, config=config)
    other.evaluate("seen_fonts", blind=False)
    # Nor is the cache.
    assert other_sampler.length == 64
    for ours, batch in zip(sampler.batches, other_sampler.batches, strict=True):
        np.testing.assert_array_equal(batch["tokens"], ours["tokens"])
        np.testing.assert_array_equal(batch["tiles"], ours["tiles"])


def test_prompts_have_room_for_earlier_turns_that_are_spelled(make_runner, trained_workdir):
    trained = runner.loading.load_config(trained_workdir)
    data = dataclasses.replace(trained.data, text_unit="letter", seq_len=2048)
    evaluator, _ = make_runner(config=dataclasses.replace(trained, data=data))
    record = shards.RecordSource(trained.data.dir, "seen_fonts")[0]
    turns = tuple(Turn("What is the total of it?", ("of the pages " * 60,)) for _ in range(2))
    record = dataclasses.replace(record, turns=turns, is_conversation=True)
    asked = choose_questions([record], None)
    builder = evaluator._builder_of(asked)
    assert builder.data.seq_len < data.seq_len
    for question in asked:
        builder.prompt(record, question.chat_turn(), question.before)


def test_a_stopped_evaluation_goes_on_and_a_finished_one_is_kept(make_runner, tmp_path):
    whole = make_runner()[0].evaluate("seen_fonts", blind=True)
    (tmp_path / "predictions" / "seen_fonts_blind.jsonl").unlink()

    evaluator, _ = make_runner(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate("seen_fonts", blind=True)
    assert not (tmp_path / "predictions" / "seen_fonts_blind.jsonl").exists()

    evaluator, sampler = make_runner()
    assert evaluator.evaluate("seen_fonts", blind=True) == whole
    assert len(sampler.batches) == 1
    assert evaluator.evaluate("seen_fonts", blind=True) == whole
    assert len(sampler.batches) == 1


@pytest.mark.parametrize("change", [{"step": 8}, {"metadata": {"train_seconds": 12.6}}])
def test_another_checkpoint_is_asked_anew(make_runner, change):
    make_runner("Ann")[0].evaluate("unseen_fonts", blind=False)
    evaluator, sampler = make_runner("Bob", **change)
    assert {row["prediction"] for row in evaluator.evaluate("unseen_fonts", blind=False).rows} == {
        "Bob"
    }
    assert len(sampler.batches) == 2


def test_other_pages_are_asked_anew(make_runner, trained_workdir):
    """The same questions, drawn otherwise: only `prepare`'s arguments tell."""
    make_runner("Ann")[0].evaluate("unseen_fonts", blind=False)
    (trained_workdir / "prepare.json").write_text('{"noise": 1.0}')
    try:
        evaluator, sampler = make_runner("Bob")
        assert {
            row["prediction"] for row in evaluator.evaluate("unseen_fonts", blind=False).rows
        } == {"Bob"}
    finally:
        (trained_workdir / "prepare.json").unlink()
    assert len(sampler.batches) == 2
