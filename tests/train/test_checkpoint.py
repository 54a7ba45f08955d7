"""Checkpoints of small arrays; nothing is compiled."""

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import storage
from alignvlm_jax.config import MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import checkpoint, checkpoint_reading, state
from alignvlm_jax.train import restore as restore_lib
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
from tests.conftest import tiny_config
from tests.parallel import joined
from tests.pod import slices
from tests.train import fake_run

METADATA = {"layout_version": checkpoint.LAYOUT_VERSION, "train_seconds": 1.5}


def make_mesh(data: int, fsdp: int, tensor: int):
    return mesh_lib.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor), tiny_config().model, None
    )


def make_state(mesh, seed: int = 0) -> state.TrainState:
    rng = np.random.default_rng(seed)
    rows = sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    kernel, mu = (
        jax.device_put(rng.standard_normal((16, 64)).astype(np.float32), rows) for _ in range(2)
    )
    scale = jax.device_put(rng.standard_normal(8).astype(np.float32), whole)
    params = {"llm": {"kernel": kernel}, "vision": {"norm": {"scale": scale}}}
    return state.TrainState(jax.device_put(np.int32(3), whole), params, ({"kernel": mu},))


def abstract(live: state.TrainState) -> state.TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), live)


def save(
    checkpoints: Checkpoints, step: int, live: state.TrainState, metrics: dict | None = None
) -> None:
    checkpoints.save(
        step, live, position={"next_sequence": 8 * step}, metadata=METADATA, metrics=metrics
    )
    checkpoints.wait()


def assert_equal(ours: state.TrainState, theirs: state.TrainState) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_saved_on_one_mesh_and_restored_on_another(folder):
    live = make_state(make_mesh(2, 2, 2))
    elsewhere = make_state(make_mesh(8, 1, 1), seed=1)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 3, live)
    with Checkpoints(folder) as checkpoints:
        restored, position = checkpoints.restore(3, abstract(elsewhere))
        metadata = checkpoints.metadata(3)
        assert len(metadata.pop("run_id")) == 32 and metadata == METADATA | {"step": 3}
    assert position["next_sequence"] == 24
    assert_equal(restored, live)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(elsewhere), strict=True):
        assert ours.sharding == theirs.sharding


def test_the_saved_value_is_that_of_the_call_though_the_state_is_donated(tmp_path):
    live = make_state(make_mesh(2, 2, 2))
    before = jax.tree.map(np.array, live)
    step = jax.jit(lambda live: jax.tree.map(lambda x: x + 1, live), donate_argnums=0)
    step.lower(live).compile()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, live, position={"next_sequence": 8}, metadata=METADATA, metrics=None)
        step(live)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(1, abstract(make_state(make_mesh(2, 2, 2))))[0], before)


def test_kept_are_the_newest_the_best_of_the_newest_stage_and_stage_ends(folder):
    live = make_state(make_mesh(8, 1, 1))
    losses = {
        1: (0, 0.5),
        2: (0, 0.1),
        3: (0, 0.4),
        4: (1, 0.9),
        5: (1, 0.7),
        6: None,
        7: (1, 0.8),
        8: (1, 0.75),
    }
    # Resumed after every save: which one was best has to be found on the disk.
    kept = []
    for step, loss in losses.items():
        with Checkpoints(folder, keep=2, stage_ends=(3,)) as checkpoints:
            save(checkpoints, step, live, loss and {"stage": loss[0], "answer_loss": loss[1]})
            kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 5, 6, 7], [3, 5, 7, 8]]


def test_a_step_that_exists_is_not_overwritten(folder):
    first = make_state(make_mesh(8, 1, 1))
    second = make_state(make_mesh(8, 1, 1), seed=1)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 3, first)
        with pytest.raises(UserError, match="exists already"):
            save(checkpoints, 3, second)
        assert_equal(checkpoints.restore(3, abstract(first))[0], first)


def cut_in_half(path: storage.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def largest(folder: storage.Path) -> storage.Path:
    """The file with most of the arrays."""
    names = [name for name in storage.files_below(folder) if "/d/" in name]
    return max((folder / name for name in names), key=lambda path: len(path.read_bytes()))


DAMAGES = {
    "no arrays": lambda folder: storage.remove_tree(folder / "state" / "d"),
    "half an array": lambda folder: cut_in_half(largest(folder)),
    "half a manifest": lambda folder: cut_in_half(folder / "state" / "manifest.ocdbt"),
    "no tree": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "half a tree": lambda folder: cut_in_half(folder / "state" / "_METADATA"),
    "no data position": lambda folder: storage.remove_tree(folder / "data"),
    "half a data position": lambda folder: cut_in_half(folder / "data" / "metadata"),
    "no state": lambda folder: storage.remove_tree(folder / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_broken_and_said_in_one_line(folder, damage):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1, live)
        save(checkpoints, 2, live)
    DAMAGES[damage](folder / "2")
    damaged = {
        name: (folder / "2" / name).read_bytes() for name in storage.files_below(folder / "2")
    }
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
        with pytest.raises(BrokenCheckpoint, match=r"checkpoint .*/2 cannot be read \([^\n]*\)$"):
            checkpoints.restore(2, abstract(live))
        assert checkpoints.quarantine(2) == folder / "2.broken"
        assert checkpoints.latest() is None or checkpoints.latest() == 1
        save(checkpoints, 2, live)
        assert_equal(checkpoints.restore(2, abstract(live))[0], live)
    # Also after the next start, which clears what was not finished.
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
    assert damaged == {
        name: (folder / "2.broken" / name).read_bytes()
        for name in storage.files_below(folder / "2.broken")
    }


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "a\\b"])
def test_a_name_that_orbax_takes_for_a_pattern_is_refused(tmp_path, bucket_folder, name):
    for folder in (tmp_path / name, bucket_folder / name):
        with pytest.raises(
            UserError, match=r"has .* in it, which no checkpoint can be written below"
        ):
            Checkpoints(folder)
    Checkpoints(tmp_path / name, read_only=True)  # As where a folder was renamed since.


def test_what_follows_a_hash_is_no_part_of_a_url(tmp_path, bucket_folder):
    for read_only in (False, True):
        with pytest.raises(UserError, match="has # in it"):
            Checkpoints(bucket_folder / "lr#1", read_only=read_only)
    with Checkpoints(tmp_path / "lr#1") as checkpoints:
        save(checkpoints, 1, make_state(make_mesh(8, 1, 1)))
        assert (
            checkpoints.restore(1, abstract(make_state(make_mesh(8, 1, 1))))[1]["next_sequence"]
            == 8
        )


def test_a_checkpoint_under_another_name_is_refused(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 4, make_state(make_mesh(8, 1, 1)))
    for name in storage.files_below(folder / "4"):
        (folder / "6" / name).parent.mkdir(parents=True, exist_ok=True)
        storage.copy_file(folder / "4" / name, folder / "6" / name)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps() == [4, 6] and checkpoints.metadata(4)["step"] == 4
        with pytest.raises(UserError, match="/6 is of step 4: it was copied or renamed"):
            checkpoints.metadata(6)


def test_a_numbered_folder_that_is_no_checkpoint_is_moved_away(tmp_path, capfd):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, live)
        save(checkpoints, 2, live)
    (tmp_path / "2" / "commit_success.txt").unlink()
    for name in ("7", "007", "１２"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        for step in (2, 3):
            save(checkpoints, step, live)
        assert checkpoints.steps() == [2, 3]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"2", "3", "2.broken", "7.broken", "007.broken", "１２.broken"}
    assert (tmp_path / "7.broken" / "mine").read_text() == "mine"
    assert "2 is no whole checkpoint: moved to " in capfd.readouterr().err


def test_a_flipped_bit_is_never_read_as_other_values(tmp_path):
    """In every file of a checkpoint: it is read as it was written, or found broken."""
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(tmp_path / "right") as checkpoints:
        save(checkpoints, 1, live)
    rng = random.Random(0)
    broken = set()
    for name in storage.files_below(tmp_path / "right"):
        for _ in range(2):
            shutil.copytree(tmp_path / "right", tmp_path / "wrong", dirs_exist_ok=True)
            content = bytearray((tmp_path / "wrong" / name).read_bytes())
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                (tmp_path / "wrong" / name).write_bytes(content)
            with Checkpoints(tmp_path / "wrong", read_only=True) as checkpoints:
                try:
                    restored, position = checkpoints.restore(1, abstract(live))
                    metadata = checkpoints.metadata(1)
                except BrokenCheckpoint:
                    broken.add(name.split("/")[1])
                    continue
            assert_equal(restored, live)
            assert (position["next_sequence"], metadata["train_seconds"]) == (
                8,
                METADATA["train_seconds"],
            ), name
    assert broken >= {"data", "metadata", "state"}


def test_a_broken_checkpoint_is_set_aside_under_a_name_that_is_free(folder):
    (folder / "2.broken").mkdir(parents=True)
    storage.write_whole(folder / "2.broken" / "old", "")
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 2, make_state(make_mesh(8, 1, 1)))
        assert checkpoints.quarantine(2) == folder / "2.broken.2"
        assert checkpoints.latest() is None
    assert (folder / "2.broken" / "old").exists()


def test_too_little_memory_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._handlers["metadata"], "restore", exhausted)
        with pytest.raises(MemoryError):
            checkpoints.metadata(1)


def test_what_a_kill_left_half_written_is_not_seen_and_cleared(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, make_state(make_mesh(8, 1, 1)))
    left = tmp_path / "2.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        save(checkpoints, 5, make_state(make_mesh(8, 1, 1)))
    assert not left.exists()


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stand(tmp_path, monkeypatch):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, live)
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(
            UserError, match=r"/2: it takes 0.0 MB and 0.0 MB are free; step 1 stands$"
        ):
            save(checkpoints, 2, live)
        assert_equal(checkpoints.restore(1, abstract(live))[0], live)


def test_a_save_that_fails_in_the_background_is_surfaced(tmp_path):
    mesh = make_mesh(8, 1, 1)
    small, large = (
        state.TrainState(
            jax.device_put(np.int32(3), sharding.replicated(mesh)), {"llm": {"kernel": kernel}}, ()
        )
        for kernel in (
            jax.device_put(
                np.random.default_rng(0).random((8, size), np.float32),
                sharding.batch_sharding(mesh),
            )
            for size in (8, 2**17)
        )
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"could not write checkpoint .*/2: [^\n]*; step 1 stands$"):
        try:
            with Checkpoints(tmp_path) as checkpoints:
                save(checkpoints, 1, small)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
                checkpoints.save(
                    2, large, position={"next_sequence": 16}, metadata=METADATA, metrics=None
                )
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(1, abstract(small))[0], small)


def test_another_layout_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1,
            make_state(make_mesh(8, 1, 1)),
            position={"next_sequence": 0},
            metadata={"layout_version": 99},
            metrics=None,
        )
        checkpoints.wait()
        with pytest.raises(UserError, match="layout 99; this version reads layout 1"):
            checkpoints.metadata(1)


def test_a_model_is_loaded_from_workdir_and_from_step(trained_workdir):
    for path in (trained_workdir, trained_workdir / checkpoint.FOLDER / "7"):
        config, model, params, step = restore_lib.load_model(path, make_mesh(8, 1, 1))
        assert (step, model.config) == (7, config.model)
        assert {"vision", "connector", "llm"} == params.keys()
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    assert restore_lib.load_config(trained_workdir) == config


@pytest.mark.parametrize("path", ["", "checkpoints/6", "nowhere"])
def test_a_path_without_a_checkpoint_is_an_error_that_says_what_is_wanted(tmp_path, path):
    with pytest.raises(
        UserError, match="it must be a workdir with checkpoints/ in it, or one checkpoints/STEP"
    ):
        restore_lib.load_model(tmp_path / path, make_mesh(8, 1, 1))


def test_a_broken_newest_checkpoint_is_passed_over_when_a_model_is_loaded(
    trained_workdir, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(trained_workdir / checkpoint.FOLDER, workdir / checkpoint.FOLDER)
    fake_run.rename(workdir / checkpoint.FOLDER, 7, 8)
    shutil.copytree(
        trained_workdir / checkpoint.FOLDER, workdir / checkpoint.FOLDER, dirs_exist_ok=True
    )
    shutil.rmtree(workdir / checkpoint.FOLDER / "8" / "state" / "d")
    assert restore_lib.load_model(workdir, make_mesh(8, 1, 1))[-1] == 7
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "/8 cannot be read" in message
    shutil.rmtree(workdir / checkpoint.FOLDER / "7" / "state")
    with pytest.raises(UserError, match="/7 cannot be read"):
        restore_lib.load_model(workdir, make_mesh(8, 1, 1))
    assert "/7 cannot be read" not in capsys.readouterr().err  # There is none before it.
    with pytest.raises(UserError, match="/8 cannot be read"):
        restore_lib.load_model(workdir / checkpoint.FOLDER / "8", make_mesh(8, 1, 1))
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_older_than_its_newest(
    trained_workdir, tmp_path, capsys
):
    """A run that goes on has superseded what was the newest when it was looked for."""
    shutil.copytree(trained_workdir, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (step,) = Checkpoints(folder, read_only=True).steps()
    tried = []

    def read(checkpoints: Checkpoints, candidate: int) -> int:
        tried.append(candidate)
        if candidate == step:
            fake_run.rename(folder, step, step + 2)
            raise BrokenCheckpoint("no such file")
        return candidate

    assert restore_lib.read_newest(tmp_path / "run", read) == step + 2
    assert tried == [step, step + 2] and capsys.readouterr().err == ""


def test_a_checkpoint_is_named_from_inside_its_folder(trained_workdir, monkeypatch):
    (step,) = Checkpoints(trained_workdir / "checkpoints", read_only=True).steps()
    monkeypatch.chdir(trained_workdir / "checkpoints" / str(step))
    assert restore_lib.read_newest(storage.path("."), lambda checkpoints, found: found) == step


def test_metadata_tells_where_a_checkpoint_came_from():
    config = tiny_config(stage="align")
    metadata = checkpoint.describe((config,), config, train_seconds=2.0, answer_loss=0.5)
    assert json.loads(json.dumps(metadata))["config"][0]["stage"] == metadata["stage"] == "align"
    assert metadata["libraries"]["jax"] == jax.__version__
    assert re.fullmatch("unknown|[0-9a-f]{40}(-dirty)?", metadata["git"])


def test_where_folders_cannot_be_renamed_checkpoints_commit_by_a_file(tmp_path, unrenamed):
    live = make_state(make_mesh(8, 1, 1))
    for step in (1, 2, 3):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            save(checkpoints, step, live)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    # A kill while one is written, or removed: it lies in its place, and is none.
    (tmp_path / "3" / "commit_success.txt").unlink()
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2]
    assert (tmp_path / "3").exists()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
        assert not (tmp_path / "3").exists() and (tmp_path / "notes").exists()
        save(checkpoints, 3, live)
        assert_equal(checkpoints.restore(3, abstract(live))[0], live)
        cut_in_half(tmp_path / "3" / "data" / "metadata")
        with pytest.raises(BrokenCheckpoint):
            checkpoints.restore(3, abstract(live))
        assert checkpoints.quarantine(3) == tmp_path / "3.broken"
        assert checkpoints.steps() == [2]
        save(checkpoints, 3, live)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert (tmp_path / "3.broken" / "state" / "_METADATA").exists()


def test_where_folders_can_be_renamed_nothing_of_the_users_is_cleared(tmp_path):
    (tmp_path / "7").mkdir(parents=True)
    (tmp_path / "7" / "mine").write_text("x")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
    assert (tmp_path / "7.broken" / "mine").exists()


EIO = OSError(errno.EIO, os.strerror(errno.EIO), "/mount/x")
STORAGE_FAULTS = [
    EIO,
    TimeoutError("timed out"),
    ValueError('UNAVAILABLE: Error reading "checkpoints/2/d/x": HTTP response code: 503'),
    ValueError('INTERNAL: Error reading local file "/x": [OS error 5: EIO Input/output error]'),
]


@pytest.mark.parametrize("fault", STORAGE_FAULTS, ids=[str(fault)[:20] for fault in STORAGE_FAULTS])
def test_a_fault_of_the_storage_is_tried_again(tmp_path, monkeypatch, fault):
    live = make_state(make_mesh(8, 1, 1))
    monkeypatch.setattr(checkpoint_reading, "PAUSES", (0.0, 0.0))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 2, live)
        faults = [fault, fault]
        original = checkpoints._handlers["state"].restore

        def failing(*args, **kwargs):
            if faults:
                raise ValueError("cannot restore") from faults.pop()
            return original(*args, **kwargs)

        monkeypatch.setattr(checkpoints._handlers["state"], "restore", failing)
        assert_equal(checkpoints.restore(2, abstract(live))[0], live)
        faults += [fault] * 3
        with pytest.raises(
            UserError,
            match=r"/2 could not be read now \([^\n]*\); it stays as it is: call again when",
        ):
            checkpoints.restore(2, abstract(live))
        assert checkpoints.steps() == [2]


def test_no_permission_is_no_damage(bucket, bucket_folder):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(bucket_folder) as checkpoints:
        save(checkpoints, 2, live)
        with (
            bucket.faulty(status=403, names="/d/"),
            pytest.raises(UserError, match="/2 could not be read now"),
        ):
            checkpoints.restore(2, abstract(live))
        assert_equal(checkpoints.restore(2, abstract(live))[0], live)


def test_another_model_is_no_damage(folder):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 2, live)
        wider = abstract(live)
        kernel = wider.params["llm"]["kernel"]
        wider.params["llm"]["kernel"] = jax.ShapeDtypeStruct(
            (16, 128), kernel.dtype, sharding=kernel.sharding
        )
        expected = (
            r"/2 holds another model: params/llm/kernel is \[16, 64\] there and \[16, 128\] here"
        )
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(2, wider)
        wider.params["llm"]["extra"] = wider.params["llm"].pop("kernel")
        for restore in (
            lambda: checkpoints.restore(2, wider),
            lambda: checkpoints.restore_params(2, wider.params),
        ):
            with pytest.raises(
                UserError, match="/2 holds another model: it has no params/llm/extra"
            ):
                restore()
        assert checkpoints.steps() == [2]


def test_the_run_is_known_over_its_resumes(folder):
    ids = []
    for step in (1, 2):
        with Checkpoints(folder, keep=2) as checkpoints:
            save(checkpoints, step, make_state(make_mesh(8, 1, 1)))
            ids.append(checkpoints.metadata(step)["run_id"])
    assert ids[0] == ids[1]


def test_an_interrupt_leaves_no_hook_behind(tmp_path):
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path):
        raise KeyboardInterrupt
    assert sys.unraisablehook is before


LOGGING = """
import logging, sys
import numpy as np
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import TrainState
from alignvlm_jax import storage
logging.getLogger("absl").addHandler(logging.FileHandler(sys.argv[1] + "/log"))
logging.getLogger("absl").setLevel(logging.INFO)
with Checkpoints(storage.path(sys.argv[1]) / "checkpoints") as checkpoints:
    state = TrainState(np.int32(1), {"llm": {"kernel": np.ones(3, np.float32)}}, ())
    checkpoints.save(1, state, position={"next_sequence": 0}, metadata={"layout_version": 1}, metrics=None)
logging.getLogger("absl").warning("ours")
"""


def test_orbax_logs_to_files_and_not_to_the_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().count("\n") > 10
    assert [
        line for line in done.stderr.splitlines() if "ours" not in line
    ] == [] and "ours" in done.stderr


SAVING = """
import os, sys
import numpy as np
from alignvlm_jax import storage
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import TrainState
with Checkpoints(storage.path(sys.argv[1]), keep=1) as checkpoints:
    for step in (1, 2, 3):
        params = {"llm": {"kernel": np.full((256, 256), step, np.float32), "scale": np.full(9, step, np.float32)}}
        state = TrainState(np.int32(step), params, ())
        checkpoints.save(step, state, position={"next_sequence": step}, metadata={"layout_version": 1}, metrics=None)
        checkpoints.wait()
        print(step, flush=True)
"""


def wholeness(folder) -> list[int]:
    """The steps that are there, each read and found right."""
    shapes = {
        "llm": {
            "kernel": jax.ShapeDtypeStruct((256, 256), np.float32),
            "scale": jax.ShapeDtypeStruct((9,), np.float32),
        }
    }
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with Checkpoints(folder) as checkpoints:
        for step in checkpoints.steps():
            params = checkpoints.restore_params(step, shapes)
            assert all((np.asarray(x) == step).all() for x in jax.tree.leaves(params))
            assert checkpoints.metadata(step)["layout_version"] == 1
        return checkpoints.steps()


@pytest.mark.parametrize("moment", [1, 9, 16, 22, 30])
def test_a_kill_in_a_save_on_a_bucket_leaves_it_whole_or_absent(bucket, bucket_folder, moment):
    """Killed before the change number `moment` of those that follow the first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(bucket_folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    changes = itertools.count(1)

    def kill(method: str, names: str) -> None:
        if method in ("POST", "DELETE") and next(changes) == moment:
            process.kill()
            process.wait()

    bucket.hook = kill
    try:
        process.wait(timeout=60)
    finally:
        bucket.hook = lambda method, names: None
        process.kill()
    steps = wholeness(bucket_folder)
    assert steps in ([1], [1, 2], [2], [2, 3], [3])


ALONE = """
import os, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from alignvlm_jax import storage
from alignvlm_jax.train import checkpoint_reading
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
checkpoint_reading.PAUSES = ()
with Checkpoints(storage.path(sys.argv[1]), read_only=True) as checkpoints:
    if sys.argv[3] == "1":
        def failing(*args, **kwargs):
            raise OSError(5, "Input/output error", "/mount")
        checkpoints._handlers["state"].restore = failing
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"llm": {"scale": jax.ShapeDtypeStruct((9,), np.float32, sharding=device)}}
    try:
        print("read", np.asarray(checkpoints.restore_params(3, wanted)["llm"]["scale"])[0], flush=True)
    except Exception as err:
        print(type(err).__name__, flush=True)
    os._exit(0)
"""


def test_a_process_that_cannot_read_does_not_hold_up_the_others(tmp_path):
    """Each is told, and tells; nobody waits at a barrier for one that has failed."""
    subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    address = f"127.0.0.1:{slices.free_port()}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(tmp_path), address, str(i)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [lines.splitlines()[-1] for lines in said] == ["read 3.0", "TryAgainError"]


FAILING_SAVE = """
import resource, types
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from alignvlm_jax import __main__ as program, storage
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import TrainState

def command(argv):
    distributed.initialize(argv)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    noise = jax.jit(lambda: jax.random.normal(jax.random.key(0), (2, 1 << 20)), out_shardings=rows)()
    with Checkpoints(storage.path(os.environ["FOLDER"])) as checkpoints:
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        state, metadata = TrainState(np.int32(1), {"x": noise}, ()), {"layout_version": 1}
        checkpoints.save(1, state, position={"next_sequence": 0}, metadata=metadata, metrics=None)
        while True:
            checkpoints.check()
            exchange.from_main(0)
            time.sleep(0.1)

sys.modules["alignvlm_jax.commands.train"] = types.SimpleNamespace(main=command)
program.leave_with(program.main(["train"]))
"""


def test_a_host_that_cannot_write_its_part_ends_all_soon(tmp_path):
    """The others wait at orbax's barriers for its part, for minutes, and it waited there for
    them."""
    done = joined.run(FAILING_SAVE, 2, tmp_path, FOLDER=str(tmp_path / "checkpoints"))
    assert [one.returncode for one in done] == [1, 1], done
    assert "process 1 of 2 (" in done[0].stderr and "could not write checkpoint" in done[0].stderr
