"""What is kept of a compilation: found again by the same program alone."""

import dataclasses

import pytest

from alignvlm_jax.config import TrainConfig
from alignvlm_jax.plan import hardware, summaries
from tests.conftest import tiny_config

CONFIG = tiny_config(train=TrainConfig(batch_size=8))
V5E = hardware.parse_topology("v5e:2x2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_found_again_and_in_the_cache_folder(cache):
    name = summaries.key(CONFIG, V5E, "tpu")
    assert summaries.load(name) is None
    summaries.save(name, {"peak_hbm_gib": 1.5})
    assert summaries.load(summaries.key(CONFIG, V5E, "tpu")) == {"peak_hbm_gib": 1.5}
    assert [path.parent for path in cache.rglob("*.json")] == [cache / "alignvlm_jax" / "plans"]


def test_whatever_the_program_depends_on_changes_the_name(monkeypatch):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="dots"))
    names = [
        summaries.key(CONFIG, V5E, "tpu"),
        summaries.key(other, V5E, "tpu"),
        summaries.key(CONFIG, hardware.parse_topology("v5e:2x2", num_slices=2), "tpu"),
        summaries.key(CONFIG, V5E, "cpu"),
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_of_another=true")
    names.append(summaries.key(CONFIG, V5E, "tpu"))
    monkeypatch.setattr(summaries, "_versions", lambda: ("3.0", "jax 99"))
    names.append(summaries.key(CONFIG, V5E, "tpu"))
    monkeypatch.setattr(summaries, "_source", lambda: "another")
    names.append(summaries.key(CONFIG, V5E, "tpu"))
    assert len(set(names)) == len(names)


def test_the_source_is_that_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "one.py").write_text("a = 1\n")
    before = summaries._source.__wrapped__()
    (tmp_path / "ops" / "one.py").write_text("a = 2\n")
    assert summaries._source.__wrapped__() != before


def test_a_damaged_summary_is_none_and_a_folder_that_cannot_be_written_is_no_error(cache):
    folder = summaries.folder()
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text('{"peak')
    assert summaries.load("cut") is None
    folder.joinpath("cut.json").unlink()
    folder.rmdir()
    folder.write_text("a file in the folder's place")
    summaries.save("some", {})
    assert summaries.load("some") is None
