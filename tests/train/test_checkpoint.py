"""Checkpoints of small arrays; nothing is compiled."""

import json
import re
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.config import MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import checkpoint, state
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
from tests.conftest import tiny_config

METADATA = {"layout_version": checkpoint.LAYOUT_VERSION, "train_seconds": 1.5}


def make_mesh(data: int, fsdp: int, tensor: int):
    return mesh_lib.make_mesh(tiny_config(mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor)))


def make_state(mesh, seed: int = 0) -> state.TrainState:
    rng = np.random.default_rng(seed)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    kernel, mu = (jax.device_put(rng.standard_normal((16, 64)).astype(np.float32), rows) for _ in range(2))
    scale = jax.device_put(rng.standard_normal(8).astype(np.float32), whole)
    params = {"llm": {"kernel": kernel}, "vision": {"norm": {"scale": scale}}}
    return state.TrainState(jax.device_put(np.int32(3), whole), params, ({"kernel": mu},))


def abstract(live: state.TrainState) -> state.TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), live)


def save(checkpoints: Checkpoints, step: int, live: state.TrainState, metrics: dict | None = None) -> None:
    checkpoints.save(step, live, next_row=8 * step, metadata=METADATA, metrics=metrics)
    checkpoints.wait()


def assert_equal(ours: state.TrainState, theirs: state.TrainState) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_saved_on_one_mesh_and_restored_on_another(tmp_path):
    live, elsewhere = make_state(make_mesh(2, 2, 2)), make_state(make_mesh(8, 1, 1), seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, live)
    with Checkpoints(tmp_path) as checkpoints:
        restored, next_row = checkpoints.restore(3, abstract(elsewhere))
        assert checkpoints.metadata(3) == METADATA
    assert next_row == 24
    assert_equal(restored, live)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(elsewhere), strict=True):
        assert ours.sharding == theirs.sharding


def test_the_saved_value_is_that_of_the_call_though_the_state_is_donated(tmp_path):
    live = make_state(make_mesh(2, 2, 2))
    before = jax.tree.map(np.array, live)
    step = jax.jit(lambda live: jax.tree.map(lambda x: x + 1, live), donate_argnums=0)
    step.lower(live).compile()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, live, next_row=8, metadata=METADATA, metrics=None)
        step(live)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(1, abstract(make_state(make_mesh(2, 2, 2))))[0], before)


def test_kept_are_the_newest_the_best_of_the_newest_stage_and_stage_ends(tmp_path):
    live = make_state(make_mesh(8, 1, 1))
    losses = {1: (0, 0.5), 2: (0, 0.1), 3: (0, 0.4), 4: (1, 0.9), 5: (1, 0.7), 6: None, 7: (1, 0.8), 8: (1, 0.75)}
    # Resumed after every save: which one was best has to be found on the disk.
    kept = []
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep=2, stage_ends=(3,)) as checkpoints:
            save(checkpoints, step, live, loss and {"stage": loss[0], "answer_loss": loss[1]})
            kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 5, 6, 7], [3, 5, 7, 8]]


def test_a_step_that_exists_is_not_overwritten(tmp_path):
    first, second = make_state(make_mesh(8, 1, 1)), make_state(make_mesh(8, 1, 1), seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, first)
        with pytest.raises(UserError, match="exists already"):
            save(checkpoints, 3, second)
        assert_equal(checkpoints.restore(3, abstract(first))[0], first)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no arrays": lambda folder: shutil.rmtree(folder / "state" / "d"),
    "half an array": lambda folder: cut_in_half(max(folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size)),
    "half a manifest": lambda folder: cut_in_half(folder / "state" / "manifest.ocdbt"),
    "no tree": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no data position": lambda folder: shutil.rmtree(folder / "data"),
    "half a data position": lambda folder: cut_in_half(folder / "data" / "metadata"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_broken_and_said_in_one_line(tmp_path, damage):
    live = make_state(make_mesh(8, 1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, live)
        save(checkpoints, 2, live)
    DAMAGES[damage](tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
        with pytest.raises(BrokenCheckpoint, match=r"checkpoint .*/2 cannot be read \([^\n]*\)$"):
            checkpoints.restore(2, abstract(live))
        assert checkpoints.set_aside(2) == tmp_path / "2.broken"
        assert checkpoints.latest() is None or checkpoints.latest() == 1
        save(checkpoints, 2, live)
        assert_equal(checkpoints.restore(2, abstract(live))[0], live)
    assert (tmp_path / "2.broken").is_dir()


def test_a_broken_checkpoint_is_set_aside_under_a_name_that_is_free(tmp_path):
    (tmp_path / "2.broken" / "old").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 2, make_state(make_mesh(8, 1, 1)))
        assert checkpoints.set_aside(2) == tmp_path / "2.broken.2"
        assert checkpoints.latest() is None
    assert (tmp_path / "2.broken" / "old").is_dir()


def test_too_little_memory_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", exhausted)
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
        with pytest.raises(UserError, match=r"/2: it takes 0.0 MB and 0.0 MB are free; step 1 stands$"):
            save(checkpoints, 2, live)
        assert_equal(checkpoints.restore(1, abstract(live))[0], live)


def test_a_save_that_fails_in_the_background_is_surfaced(tmp_path):
    mesh = make_mesh(8, 1, 1)
    small, large = (
        state.TrainState(jax.device_put(np.int32(3), sharding.replicated(mesh)), {"llm": {"kernel": kernel}}, ())
        for kernel in (
            jax.device_put(np.random.default_rng(0).random((8, size), np.float32), sharding.batch_sharding(mesh))
            for size in (8, 2**17)
        )
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"could not write checkpoint .*/2: [^\n]*; step 1 stands$"):
        try:
            with Checkpoints(tmp_path) as checkpoints:
                save(checkpoints, 1, small)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
                checkpoints.save(2, large, next_row=16, metadata=METADATA, metrics=None)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(1, abstract(small))[0], small)


def test_another_layout_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(make_mesh(8, 1, 1)), next_row=0, metadata={"layout_version": 99}, metrics=None)
        checkpoints.wait()
        with pytest.raises(UserError, match="layout 99; this version reads layout 1"):
            checkpoints.metadata(1)


def test_a_model_is_loaded_from_workdir_and_from_step(trained_workdir):
    for path in (trained_workdir, trained_workdir / checkpoint.FOLDER / "7"):
        config, model, params, step = checkpoint.load_model(path, make_mesh(8, 1, 1))
        assert (step, model.config) == (7, config.model)
        assert {"vision", "connector", "llm"} == params.keys()
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    assert checkpoint.load_config(trained_workdir) == config


@pytest.mark.parametrize("path", ["", "checkpoints/6", "nowhere"])
def test_a_path_without_a_checkpoint_is_an_error_that_says_what_is_wanted(tmp_path, path):
    with pytest.raises(UserError, match="it must be a workdir with checkpoints/ in it, or one checkpoints/STEP"):
        checkpoint.load_model(tmp_path / path, make_mesh(8, 1, 1))


def test_a_broken_newest_checkpoint_is_passed_over_when_a_model_is_loaded(trained_workdir, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained_workdir / checkpoint.FOLDER, workdir / checkpoint.FOLDER)
    shutil.copytree(workdir / checkpoint.FOLDER / "7", workdir / checkpoint.FOLDER / "8")
    shutil.rmtree(workdir / checkpoint.FOLDER / "8" / "state" / "d")
    assert checkpoint.load_model(workdir, make_mesh(8, 1, 1))[-1] == 7
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "/8 cannot be read" in message
    shutil.rmtree(workdir / checkpoint.FOLDER / "7" / "state")
    with pytest.raises(UserError, match="/7 cannot be read"):
        checkpoint.load_model(workdir, make_mesh(8, 1, 1))
    assert "/7 cannot be read" not in capsys.readouterr().err  # There is none before it.
    with pytest.raises(UserError, match="/8 cannot be read"):
        checkpoint.load_model(workdir / checkpoint.FOLDER / "8", make_mesh(8, 1, 1))
    assert capsys.readouterr().err == ""


def test_metadata_tells_where_a_checkpoint_came_from():
    config = tiny_config(stage="align")
    metadata = checkpoint.describe((config,), config, train_seconds=2.0, answer_loss=0.5)
    assert json.loads(json.dumps(metadata))["config"][0]["stage"] == metadata["stage"] == "align"
    assert metadata["libraries"]["jax"] == jax.__version__
    assert re.fullmatch("unknown|[0-9a-f]{40}(-dirty)?", metadata["git"])


def test_where_there_is_no_git_the_launch_scripts_name_the_commit(tmp_path, monkeypatch):
    """In an image and on a rented host the metadata said "unknown", of the very runs that matter."""
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "alignvlm_jax" / "train" / "checkpoint.py"))
    (tmp_path / "alignvlm_jax" / "train").mkdir(parents=True)
    config = tiny_config(stage="align")

    def commit() -> str:
        checkpoint._git_hash.cache_clear()
        return checkpoint.describe((config,), config, train_seconds=2.0, answer_loss=0.5)["git"]

    assert commit() == "unknown"
    (tmp_path / "COMMIT").write_text("abc-dirty\n")
    assert commit() == "abc-dirty"
    monkeypatch.setenv("ALIGNVLM_COMMIT", "def")
    assert commit() == "def"
    checkpoint._git_hash.cache_clear()
