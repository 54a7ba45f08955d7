"""A checkpoint on devices that are not those it was trained on, and the workdir that a path
names."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import renamed
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.train import checkpoint_files


def test_parameters_are_those_saved_whatever_the_mesh(trained_workdir):
    config = loading.load_config(trained_workdir)
    as_trained = loading.load(trained_workdir, config)
    assert (as_trained.step, as_trained.data_parallel_size) == (7, 4)
    assert as_trained.path == trained_workdir / "checkpoints" / "7"
    assert as_trained.metadata["train_seconds"] == 12.5

    # Three ways do not fit eight devices; neither would a training batch of eight rows, which
    # nobody needs here.
    elsewhere = dataclasses.replace(
        config,
        mesh=config_lib.MeshConfig(data=3, fsdp=1, tensor=1),
        train=dataclasses.replace(config.train, batch_size=9),
    )
    spread = loading.load(as_trained.path, elsewhere)
    assert dict(spread.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    jax.tree.map(np.testing.assert_array_equal, as_trained.params, spread.params)


def test_the_data_folder_can_have_moved(trained_workdir):
    original = loading.load_config(trained_workdir)
    config = loading.load_config(trained_workdir, "elsewhere")
    assert config.data.dir == "elsewhere"
    assert dataclasses.replace(config, data=original.data) == original
    with pytest.raises(UserError, match=r"cannot read tokenizer elsewhere/tokenizer\.model"):
        loading.load(trained_workdir, config)


def test_the_config_is_that_of_the_parameters(trained_workdir, tmp_path):
    """The newest checkpoint still tells its config, of longer rows, but its parameters are gone."""
    older, newer = (tmp_path / "checkpoints" / step for step in ("7", "8"))
    for folder in (older, newer):
        shutil.copytree(trained_workdir / "checkpoints" / "7", folder)
    shutil.rmtree(newer / "state" / "d")
    metadata = newer / "metadata" / "metadata"
    fields = json.loads(metadata.read_text())
    fields["config"][0]["data"]["seq_len"] = 64
    fields["step"] = 8
    del fields[checkpoint_files.CHECKSUM]  # As in one from before there were any.
    metadata.write_text(json.dumps(fields))
    config = loading.load_config(tmp_path, str(trained_workdir))
    assert config.data.seq_len == 64
    loaded = loading.load(tmp_path, config)
    assert (loaded.step, loaded.config.data.seq_len) == (7, 48)
    assert loaded.config.data.dir == str(trained_workdir)


def test_workdir_of_a_workdir_and_of_a_checkpoint(trained_workdir, monkeypatch):
    assert loading.workdir_of(trained_workdir) == trained_workdir
    assert loading.workdir_of(trained_workdir / "checkpoints" / "7") == trained_workdir
    monkeypatch.chdir(trained_workdir / "checkpoints")
    assert loading.workdir_of(Path("7")).resolve() == trained_workdir.resolve()


def test_a_checkpoint_from_before_templates_keeps_the_format_it_was_trained_with(
    trained_workdir, monkeypatch
):
    """Its tokenizer's folder may have held a template, which nobody read."""
    path = next((trained_workdir / "checkpoints").iterdir())
    tokenizer = loading.load(path, loading.load_config(path)).tokenizer
    monkeypatch.setattr(tokenizer, "chat_files", ChatFiles("t", template="{{ messages }}"))
    monkeypatch.setattr(loading.stage_data, "load_tokenizer", lambda *_: tokenizer)
    loaded = loading.load(path, loading.load_config(path))
    assert loaded.tokenizer is tokenizer
    monkeypatch.setattr(renamed, "is_from_before", lambda stages: True)
    loaded = loading.load(path, loading.load_config(path))
    assert loaded.tokenizer.chat_files == ChatFiles(is_from_before=True)
    assert tokenizer.chat_files.template  # That of other models is left alone.
