"""The trace of a few steps: which steps, where, by whom, and that a run does not depend on it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import hooks
from alignvlm_jax.train.hooks import Profiler, profile_range
from tests.conftest import tiny_config


def stages(*profiles: str) -> list[config_lib.Config]:
    """Stages of four steps each."""
    config = tiny_config()
    return [
        dataclasses.replace(config, train=dataclasses.replace(config.train, profile=text))
        for text in profiles
    ]


def run_steps(folder, steps: range | None, numbers: range, process: int = 0) -> list[str]:
    """Runs steps as the loop does, reading each after the next has been sent off; returns what is
    said."""
    said: list[str] = []
    step = jax.jit(lambda x: (x @ x) / 100)
    x = jnp.ones((64, 64))
    with Profiler(folder, steps, process, said.append) as profiler:
        profiler.resume(numbers.start - 1)
        for number in numbers:
            wait = x.block_until_ready
            with profiler.step(number, wait):
                x = step(x)
            profiler.after_step(number, x.block_until_ready)
    return said


def traced_steps(path, tmp_path: Path) -> list[int]:
    """The numbers of the steps that a trace names."""
    local = tmp_path / "read.xplane.pb"
    local.write_bytes(path.read_bytes())
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(local)).planes:
        for line in plane.lines:
            found += [
                dict(event.stats)["step_num"] for event in line.events if event.name == "train"
            ]
    return found


def test_the_steps_asked_for_are_traced_and_no_others(folder, tmp_path):
    said = run_steps(folder, range(3, 6), range(1, 9))
    session = folder / "profile" / "plugins" / "profile" / "steps-3-6"
    assert {path.name for path in session.iterdir()} >= {"host-0.xplane.pb"}
    assert traced_steps(session / "host-0.xplane.pb", tmp_path) == [3, 4, 5]
    assert said == [f"profile of steps 3 to 5: {folder / 'profile'}"]


def test_steps_before_and_the_last_one_are_waited_for(tmp_path):
    waited = []
    with Profiler(tmp_path, range(2, 4), 0, lambda text: None) as profiler:
        for number in range(1, 6):
            with profiler.step(number, lambda number=number: waited.append(f"before {number}")):
                pass
            profiler.after_step(number, lambda number=number: waited.append(f"after {number}"))
    assert waited == ["before 2", "after 3"]


def test_every_process_has_a_file_of_its_own(tmp_path):
    for process in (0, 1):
        run_steps(tmp_path, range(2, 3), range(1, 4), process)
    names = {
        path.name for path in (tmp_path / "profile" / "plugins" / "profile" / "steps-2-3").iterdir()
    }
    assert {"host-0.xplane.pb", "host-1.xplane.pb"} <= names


def test_nothing_is_traced_unasked(tmp_path):
    assert run_steps(tmp_path, None, range(1, 4)) == []
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_done_already_are_told(tmp_path):
    said = run_steps(tmp_path, range(3, 6), range(5, 9))
    assert said[0] == "config.train.profile: steps up to 4 are done already; traces steps 5 to 5"
    session = tmp_path / "profile" / "plugins" / "profile" / "steps-5-6"
    assert traced_steps(session / "host-0.xplane.pb", tmp_path) == [5]
    said = run_steps(tmp_path / "other", range(3, 6), range(6, 9))
    assert said == ["config.train.profile: steps up to 5 are done already; traces nothing"]
    assert not (tmp_path / "other").exists()


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path):
    said = run_steps(tmp_path, range(3, 6), range(1, 5))
    assert said == [f"profile of steps 3 to 4 (the run ended after step 4): {tmp_path / 'profile'}"]
    session = tmp_path / "profile" / "plugins" / "profile" / "steps-3-5"
    assert traced_steps(session / "host-0.xplane.pb", tmp_path) == [3, 4]


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("no folder")
    said = run_steps(tmp_path, range(2, 3), range(1, 4))
    assert len(said) == 1 and said[0].startswith("the profile of steps 2 to 2 cannot be written: ")
    assert run_steps(tmp_path / "other", range(2, 3), range(1, 4))[0].startswith("profile of")


def test_a_full_disk_on_the_way_is_told(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "copy_file", fail)
    (said,) = run_steps(tmp_path, range(2, 3), range(1, 4))
    assert "No space left on device" in said


def test_names_of_hosts_may_have_dots():
    assert [
        hooks.ending(name) for name in ("t1v-n.c.x.xplane.pb", "a.b.trace.json.gz", "a.b.json")
    ] == [
        ".xplane.pb",
        ".trace.json.gz",
        ".json",
    ]


@pytest.mark.parametrize(
    ("text", "steps"), [("1:2", range(1, 2)), ("3:9", range(3, 9)), ("8:9", range(8, 9))]
)
def test_steps_are_counted_over_the_run(text, steps):
    assert profile_range(stages(text, text)) == profile_range(stages("", text)) == steps


def test_no_profile_is_the_default():
    assert profile_range(stages("", "")) is None
    assert config_lib.TrainConfig().profile == ""


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("0:3", "1:3"), ("5:20", "5:9"), ("9:12", "8:9"), ("100:105", "8:9"), ("0:1", "1:2")],
)
def test_steps_that_the_run_does_not_have_are_refused(text, nearest):
    with pytest.raises(
        UserError, match=rf"'{text}', and the run has steps 1 to 8: .* nearest: '{nearest}'"
    ):
        profile_range(stages(text, text))


def test_stages_cannot_ask_for_different_steps():
    with pytest.raises(
        UserError, match=r"config.train.profile is '1:2' and '3:4' in different stages"
    ):
        profile_range(stages("1:2", "3:4"))


@pytest.mark.parametrize("text", ["100", "5:5", "7:3", "a:b", "1:2:3", "-1:3", "1-3", " 1:3"])
def test_a_form_that_is_none_is_refused_with_the_config(text):
    with pytest.raises(
        UserError, match=r"config.train.profile is '.*'; it must be FIRST:END"
    ) as error:
        config_lib.check(*stages(text))
    assert "\n" not in str(error.value)
