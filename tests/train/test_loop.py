"""Whole runs: two stages of four steps on the 2 x 2 x 2 mesh."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from alignvlm_jax.benchmarks.generation_eval import GENERATION
from alignvlm_jax.config import MeshConfig
from alignvlm_jax.data import prepared
from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import hardware
from alignvlm_jax.train import goodput, loop, step
from alignvlm_jax.train.validation import VALIDATION
from tests.conftest import random_batch
from tests.train import fake_run
from tests.train.fake_run import TOTAL, Batches

TIMES = (
    "run_id",
    "mfu",
    "useful_mfu",
    "steps_per_second",
    "data_wait_fraction",
    "train_seconds",
    "peak_memory_gib",
)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(workdir: Path) -> list[dict]:
    return [
        {
            name: value
            for name, value in line.items()
            if name not in TIMES and not name.startswith(goodput.PREFIX)
        }
        for line in lines(workdir)
    ]


def assert_same_run(workdir: Path, straight: Path) -> None:
    """Parameters and optimizer state bit for bit, and every logged number."""
    ours = fake_run.stored(workdir)
    theirs = fake_run.stored(straight)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert without_times(workdir) == without_times(straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The uninterrupted run. Every step function is traced once a stage."""
    traces = {"train": 0, "eval": 0}
    make_train_step = step.make_train_step
    make_eval_step = step.make_eval_step

    def counted(name, make):
        def make_counted(*args):
            inner = make(*args)

            # By its name: that of the program is part of what the compilation cache looks for.
            @functools.wraps(inner)
            def traced(*inputs):
                traces[name] += 1
                return inner(*inputs)

            return traced

        return make_counted

    workdir = tmp_path_factory.mktemp("straight")
    fake_run._COMPILED.clear()  # Of other files' runs: here the traces are counted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", counted("train", make_train_step))
        patch.setattr(step, "make_eval_step", counted("eval", make_eval_step))
        patch.setitem(hardware.KINDS, "cpu", "v5e")
        printed = fake_run.train(workdir)
    assert traces == {"train": 2, "eval": 2}
    (workdir / "printed.txt").write_text(printed)
    return workdir


def test_what_a_run_leaves_behind(straight):
    logged = lines(straight)
    training = [line for line in logged if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, TOTAL + 1))
    assert [line["stage"] for line in training] == ["text"] * 4 + ["pixels"] * 4
    assert [line["step"] for line in logged if "validation/answer_loss" in line] == [2, 4, 6, 8]
    assert all({*TIMES, "answer_loss", "token_accuracy", "learning_rate", "grad_norm", "skipped_steps"} <= set(line)
               for line in training)  # fmt: skip
    assert ["patch_loss" in line for line in training] == [False] * 4 + [True] * 4
    assert all(0 < line["mfu"] < 1e-3 for line in training)
    # The fake batches have padding behind their answers.
    assert all(0.1 < line["useful_mfu"] / line["mfu"] < 1 for line in training)
    # Of the step itself, though the batch of the next has been fetched by then.
    assert [line["records"] for line in training] == [8, 16, 24, 32] * 2
    assert [line["unsupervised_records"] for line in training] == list(range(1, TOTAL + 1))
    seconds = [line["train_seconds"] for line in training]
    assert seconds == sorted(seconds)
    # Stage ends for good, the newest, and step 6 or 8, whichever validated better.
    assert {"4", "8"} <= set(os.listdir(straight / "checkpoints"))
    assert any((straight / "tensorboard").iterdir())
    assert json.loads((straight / "config.json").read_text())[1]["stage"] == "pixels"


def test_a_batch_that_comes_after_the_step_before_has_ended_is_waited_for(tmp_path):
    def late(now: int, batch: dict) -> None:
        if now == 4:
            for array in jax.live_arrays():
                with contextlib.suppress(RuntimeError):  # Donated meanwhile.
                    array.block_until_ready()
            time.sleep(0.5)

    fake_run.train(tmp_path, Batches(late), configs=fake_run.stages()[:1])
    # The metrics of step 3 are read once step 4 has been sent off; those of a stage's first step at
    # once, and of a step that is validated before that.
    waited = {
        line["step"]: line["data_wait_fraction"] / line["steps_per_second"]
        for line in lines(tmp_path)
        if "loss" in line
    }
    assert waited[3] >= 0.5 > waited[1] + waited[2] + waited[4]


def test_a_stage_starts_from_the_one_before(straight):
    begin = fake_run.stored(straight, 4)
    end = fake_run.stored(straight, 8)
    embedding = next(name for name in begin if "params" in name and "'embed'" in name)
    assert np.abs(end[embedding] - begin[embedding]).max() < 0.05
    printed = (straight / "printed.txt").read_text()
    assert "│ llm       │ 11 / 5,200 │ -           │ -" in printed
    assert "│ vision    │ -          │ 21 / 5,392  │ 21 / 5,392" in printed


def test_killed_and_resumed_equals_uninterrupted(straight, tmp_path):
    command = [sys.executable, "-m", "tests.train.fake_run", str(tmp_path), "8"]
    killed = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    batches = Batches()
    printed = fake_run.train(tmp_path, batches)
    # The save of step 6 may or may not have been whole when the kill came.
    assert batches.served in ([7, 8], [5, 6, 7, 8])
    assert f"going on from {tmp_path}/checkpoints/6" in printed or batches.served[0] == 5
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(straight, tmp_path, number):
    with pytest.raises(loop.Stopped, match="stopped at step 3 of 8"):
        fake_run.train(tmp_path, Batches(fake_run.send(number, at=4)))
    assert (tmp_path / "checkpoints" / "3").is_dir()
    batches = Batches()
    fake_run.train(tmp_path, batches)
    assert batches.served == [4, 5, 6, 7, 8]
    assert_same_run(tmp_path, straight)


def test_a_run_that_goes_on_between_two_lines_logs_what_the_uninterrupted_one_does(tmp_path):
    configs = fake_run.stages(log_every=3)[:1]
    fake_run.train(tmp_path / "straight", configs=configs)
    for step_number in (2, 3):  # Before a line is due, and before its step.
        with pytest.raises(loop.Stopped, match=f"stopped at step {step_number - 1} of 4"):
            fake_run.train(
                tmp_path / "run",
                Batches(fake_run.send(signal.SIGTERM, at=step_number)),
                configs=configs,
            )
    fake_run.train(tmp_path / "run", configs=configs)
    assert without_times(tmp_path / "run") == without_times(tmp_path / "straight")
    assert all(line["steps_per_second"] > 0 for line in lines(tmp_path / "run") if "loss" in line)


class Stopping(list):
    """Validation batches of which one pass, counted from 1, brings a signal before its second
    batch."""

    def __init__(self, batches: list, which: int):
        super().__init__(batches)
        self._which = which
        self.passes = 0
        self.given = 0

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(super().__iter__()):
            if self.passes == self._which and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            self.given += 1
            yield batch


@pytest.mark.parametrize("when", [2, 4, 8])  # within a stage, at its end, at that of the run
def test_a_signal_while_validating_is_honoured_at_once_and_what_it_cut_short_comes_later(
    tmp_path, when
):
    def validation(which: int):
        batches = Stopping(
            [random_batch(fake_run.stages()[0], seed=seed) for seed in range(3)], which
        )
        return batches, lambda config, *_: batches

    _, straight = validation(0)
    fake_run.train(tmp_path / "straight", validation=straight)
    batches, stopped = validation(when // 2)
    with pytest.raises(loop.Stopped, match=f"stopped at step {when} of 8"):
        fake_run.train(tmp_path / "run", validation=stopped)
    # The signal is seen before the batch that follows it.
    assert batches.given == 3 * (when // 2 - 1) + 2
    assert (tmp_path / "run" / "checkpoints" / str(when)).is_dir()
    assert when not in [
        line["step"] for line in lines(tmp_path / "run") if "validation/answer_loss" in line
    ]
    # A second stop at the same place changes nothing.
    with pytest.raises(loop.Stopped, match=f"stopped at step {when} of 8"):
        fake_run.train(tmp_path / "run", validation=validation(1)[1])
    assert "done: 8 steps" in fake_run.train(tmp_path / "run", validation=straight)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    fake_run.train(tmp_path / "run", validation=straight)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_answers_that_a_stop_cut_short_come_after_the_validation_that_was_logged(tmp_path):
    stopping = {"at": 0}

    class Answers:
        """Stands in for `GenerationEval`; the score tells which parameters answered."""

        sample = "2 held-out questions"

        def run(self, params, eval_step, should_stop) -> dict[str, float] | None:
            stopping["at"] -= 1
            if stopping["at"] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            total = sum(float(jax.numpy.abs(x).sum()) for x in jax.tree.leaves(params))
            return None if should_stop() else {"generated/anls": total}

    answers = dataclasses.replace(GENERATION, open=lambda *_: Answers(), check=lambda *_: None)
    train = functools.partial(fake_run.train, kinds=(VALIDATION, answers))
    first, second = fake_run.stages()
    configs = (
        first,
        dataclasses.replace(second, train=dataclasses.replace(second.train, generate_every=2)),
    )
    train(tmp_path / "straight", configs=configs)
    stopping["at"] = 1
    with pytest.raises(loop.Stopped, match="stopped at step 6 of 8"):
        train(tmp_path / "run", configs=configs)
    assert lines(tmp_path / "run")[-1].keys() & {"validation/answer_loss"}
    train(tmp_path / "run", configs=configs)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert sum("generated/anls" in line for line in lines(tmp_path / "run")) == 2


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8" / "state" / "d")
    for other in (5, 6, 7):
        shutil.rmtree(workdir / "checkpoints" / str(other), ignore_errors=True)
    # A run that is complete would not look at its parameters: make it seem to end later.
    fake_run.rename(workdir / "checkpoints", 8, 7)
    batches = Batches()
    printed = fake_run.train(workdir, batches)
    assert "checkpoints/7 cannot be read" in printed and "7.broken, going on from step 4" in printed
    assert batches.served == [5, 6, 7, 8]
    assert_same_run(workdir, straight)


def test_a_checkpoint_under_another_name_is_not_gone_on_from(straight, tmp_path):
    for number, told in (
        (TOTAL + 3, f"of step {TOTAL + 3}, and this run ends at step {TOTAL}"),
        (TOTAL, "is of step 4: it"),
    ):
        workdir = tmp_path / str(number)
        shutil.copytree(straight, workdir)
        folder = workdir / "checkpoints"
        shutil.rmtree(folder / str(TOTAL))
        shutil.copytree(folder / "4", folder / str(number))
        with pytest.raises(UserError, match=told):
            fake_run.train(workdir)


@pytest.mark.parametrize("kept", [0, 3])
def test_lines_that_are_gone_are_told(straight, tmp_path, kept):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(TOTAL))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines(straight) if line["step"] <= kept)
    )
    newest = max(int(one.name) for one in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"ends at step {kept}, and the newest checkpoint is of step {newest}" in fake_run.train(
        tmp_path / "run"
    )
    assert "is lost" not in (straight / "printed.txt").read_text()


def test_two_broken_checkpoints_in_a_row_are_named_and_nothing_is_changed(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for other in (5, 6, 7):
        shutil.rmtree(workdir / "checkpoints" / str(other), ignore_errors=True)
    fake_run.rename(workdir / "checkpoints", 8, 7)
    for broken in ("4", "7"):
        shutil.rmtree(workdir / "checkpoints" / broken / "state" / "d")
    with pytest.raises(
        UserError, match=r"checkpoints/7 cannot be read [^\n]*checkpoints/4 cannot be read [^\n]*$"
    ):
        fake_run.train(workdir)
    assert {"4", "7"} <= set(os.listdir(workdir / "checkpoints"))


def test_other_data_are_refused(straight, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for other in (5, 6, 7, 8):
        shutil.rmtree(workdir / "checkpoints" / str(other), ignore_errors=True)
    monkeypatch.setattr(prepared, "_fingerprint", lambda *_: "other")
    with pytest.raises(
        UserError, match=r"was trained on data of fingerprint \w{8}, that of data is other"
    ):
        fake_run.train(workdir)


def test_a_stop_at_the_end_of_a_stage_is_honoured_before_the_next_compiles(
    straight, tmp_path, monkeypatch
):
    compiled = []
    compile_once = fake_run._COMPILE_STEPS
    monkeypatch.setattr(
        fake_run, "_COMPILE_STEPS", lambda *args: compiled.append(args) or compile_once(*args)
    )

    def validation(config, *_):
        return Stopping([random_batch(config)] * 2, which=2)  # that of step 4

    with pytest.raises(loop.Stopped, match="stopped at step 4 of 8"):
        fake_run.train(tmp_path, validation=validation)
    assert len(compiled) <= 1


def test_a_fault_in_a_later_stage_is_told_before_the_workdir_is_touched(tmp_path):
    first, second = fake_run.stages()
    for change, message in (
        (
            {"train": dataclasses.replace(second.train, trainable=("lm/.*",))},
            "'lm/.*' matches no parameter",
        ),
        (
            {"train": dataclasses.replace(second.train, load=("lm/.*",))},
            "config.train.load 'lm/.*' matches no",
        ),
        ({"mesh": MeshConfig(data=3, fsdp=1, tensor=1)}, "does not fit 8 devices"),
    ):
        with pytest.raises(UserError, match=message):
            fake_run.train(tmp_path / "run", configs=(first, dataclasses.replace(second, **change)))
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused(straight):
    with pytest.raises(UserError, match=r"config.train.batch_size is 8 there and 16 here"):
        fake_run.train(straight, configs=fake_run.stages(batch_size=16))


def test_a_finished_run_has_nothing_to_do(straight):
    before = (straight / "metrics.jsonl").read_text()
    printed = fake_run.train(straight)
    assert "done: 8 steps" in printed and "nothing was left to do" in printed
    assert (straight / "metrics.jsonl").read_text() == before


def test_too_many_steps_without_finite_gradient_stop_the_run(tmp_path):
    def poison(now: int, batch: dict) -> None:
        if now in (2, 3):
            batch["patch_label_weights"][:] = np.nan

    with pytest.raises(
        UserError, match=r"2 steps of stage 'text' .* last of them step 3; .*max_skipped_steps is 1"
    ):
        fake_run.train(tmp_path, Batches(poison))
    assert [line["skipped_steps"] for line in lines(tmp_path) if "loss" in line] == [0, 1]
    assert lines(tmp_path)[1]["grad_norm"] is None


def test_goes_on_with_another_mesh_in_another_run(straight, tmp_path):
    """`init_from` a workdir that was trained on 2 x 2 x 2, on a mesh of 8 x 1 x 1."""
    first = fake_run.stages(MeshConfig(data=8, fsdp=1, tensor=1))[0]
    first = dataclasses.replace(first, init_from=str(straight))
    with pytest.raises(loop.Stopped):
        fake_run.train(tmp_path, Batches(fake_run.send(signal.SIGTERM, at=2)), configs=(first,))
    # The first update has a learning rate of 0: the parameters are still those that were loaded.
    ours = fake_run.stored(tmp_path, 1)
    theirs = fake_run.stored(straight, 8)
    for name in ours:
        if "params" in name:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
