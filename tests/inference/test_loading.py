"""A checkpoint on devices that are not those it was trained on, and the workdir that a path
names."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import renamed
from alignvlm_jax.data import chat_template
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, checkpoint_files, state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.weights import exported


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


@pytest.mark.parametrize("is_exported", [False, True])
def test_several_cpu_devices_read_no_programs_back(tmp_path, monkeypatch, is_exported):
    """Nor for an exported model, where the environment names a cache."""
    monkeypatch.setattr(exported, "is_exported", lambda path: is_exported)
    with loading.programs_kept(tmp_path):
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache


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


@pytest.fixture
def kept_run(trained_workdir, tmp_path) -> Path:
    """A workdir whose checkpoint was saved with its tokenizer, and whose data are gone."""
    config = loading.load_config(trained_workdir)
    with Checkpoints(trained_workdir / checkpoint.FOLDER, read_only=True) as checkpoints:
        model = vlm.VLM(config.model)
        mesh = mesh_lib.for_inference(config.mesh, config.model)
        params = checkpoints.restore_params(7, state.abstract_params(model, mesh))
        metadata = checkpoints.metadata(7)
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, dir="gone"))
    with Checkpoints(tmp_path / "run" / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            7,
            state.TrainState(np.int32(7), params, ()),
            position={"next_sequence": 56},
            metadata=metadata | {"config": config_lib.to_json((gone,))},
            metrics=None,
            tokenizer=StageData.open(config.data, config.model).tokenizer_files,
        )
    return tmp_path / "run"


def test_a_run_is_usable_when_it_was_moved_and_its_data_were_deleted(
    kept_run, trained_workdir, tmp_path, monkeypatch
):
    """A checkpoint alone, too, from another folder."""
    original = loading.load(trained_workdir, loading.load_config(trained_workdir))
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(kept_run / "checkpoints" / "7", tmp_path / "alone" / "7")
    moved.parent.mkdir()
    kept_run.rename(moved)
    monkeypatch.chdir(tmp_path / "alone" / "7")
    for path in (moved, Path("../../elsewhere/run"), Path(), Path("../7")):
        loaded = loading.load(path, loading.load_config(path))
        assert loaded.tokenizer.fingerprint == original.tokenizer.fingerprint
        assert chat_template.format_of(loaded.tokenizer) == chat_template.format_of(
            original.tokenizer
        )
        assert loaded.tokenizer.encode("a b") == original.tokenizer.encode("a b")
        assert (loaded.path / "metadata").is_dir()
    assert loading.workdir_of(Path()).resolve() == tmp_path / "alone"


def test_a_run_keeps_its_tokenizer_whatever_other_data_have(kept_run, tmp_path):
    """`--data` names pages to ask about: their folder's tokenizer numbers other words."""
    (tmp_path / "other").mkdir()
    SentencePieceTokenizer.train(tmp_path / "other" / "tokenizer.model", ["xyz zyx"])
    loaded = loading.load(kept_run, loading.load_config(kept_run, str(tmp_path / "other")))
    assert loaded.tokenizer.encode("a b") == loading.load(
        kept_run, loading.load_config(kept_run)
    ).tokenizer.encode("a b")
    assert loaded.config.data.dir == str(tmp_path / "other")


def test_a_damaged_tokenizer_is_told_by_its_checkpoint(kept_run):
    path = kept_run / "checkpoints" / "7" / "tokenizer" / "metadata"
    config = loading.load_config(kept_run)
    fields = json.loads(path.read_text())
    fields["tokenizer.model"] = fields["tokenizer.model"][::-1]
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"checkpoints/7 cannot be read .*checksum"):
        loading.load_tokenizer(kept_run, config.data, config.model)


def test_a_tokenizer_that_was_lost_is_missed(kept_run, trained_workdir):
    """Else another one, which lies where the data were, would be taken without a word."""
    shutil.rmtree(kept_run / "checkpoints" / "7" / "tokenizer")
    config = loading.load_config(kept_run, str(trained_workdir))
    with pytest.raises(UserError, match=r"checkpoints/7 cannot be read \(its tokenizer is missing"):
        loading.load_tokenizer(kept_run, config.data, config.model)


def test_images_in_memory_are_pages_as_files_are(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "page.png")
    for source in (rgb, Image.fromarray(rgb), tmp_path / "page.png", str(tmp_path / "page.png")):
        np.testing.assert_array_equal(np.asarray(loading.open_page(source)), rgb)
    gray = rgb[..., 0]
    for source in (gray, gray[..., None], Image.fromarray(gray)):
        np.testing.assert_array_equal(
            np.asarray(loading.open_page(source)), np.stack([gray] * 3, -1)
        )
    # Transparency is white, as in files.
    clear = np.concatenate([rgb, np.zeros((6, 4, 1), np.uint8)], -1)
    assert (np.asarray(loading.open_page(clear)) == 255).all()
    with pytest.raises(UserError, match="in memory has no page 2"):
        loading.open_page(rgb, 2)
    for wrong in (rgb.astype(np.float32), rgb[:0], rgb[0, 0], rgb[None]):
        with pytest.raises(UserError, match="is no image"):
            loading.open_page(wrong)
