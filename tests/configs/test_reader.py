"""`configs/reader.py`: its stages fit each other, the data and the hardware that it names."""

import json
import pathlib

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.configs import reader
from alignvlm_jax.synthetic import reader as data

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "config.json"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The folder of weights, whose config alone is looked at."""
    folder = tmp_path / "weights"
    folder.mkdir()
    stages = json.loads(GOLDEN.read_text())
    stages[-1]["model"]["llm"]["vocab_size"] = 2048
    stages[-1]["model"]["image_token_id"] = 2048
    (folder / "config.json").write_text(json.dumps(stages))
    monkeypatch.setattr(reader, "WEIGHTS", str(folder))
    return folder


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_stages_go_from_text_to_patches_to_both(weights, hardware):
    text, patches, both = config_lib.from_config_dict(reader.get_config(hardware))
    assert text.init_from == str(weights)
    # The vision encoder of the weights is another.
    assert text.train.load == ("llm/.*",) and patches.train.load == both.train.load == (".*",)
    assert not patches.train.answer_weight and not any("llm" in p for p in patches.train.trainable)
    assert text.train.visual_source == "oracle" and both.train.visual_source == "pixels"
    assert {stage.model.dtype for stage in (text, patches, both)} == {"bfloat16"}


def test_what_it_measures_and_cuts_is_what_its_data_set_has(weights):
    stage, *_ = config_lib.from_config_dict(reader.get_config())
    assert set(stage.eval.splits) == set(data.SPLITS) - {"train", "validation"}
    vision = stage.model.vision
    assert (vision.tile_height, vision.tile_width) == (
        data.VISION.tile_height,
        data.VISION.tile_width,
    )
    assert (stage.data.tiling, stage.data.tiles_of_a_record) == (
        data.TILES.tiling,
        data.TILES.max_tiles,
    )


def test_it_starts_from_the_weights_that_are_named(weights, tmp_path):
    other = weights.rename(tmp_path / "other")
    for stage in config_lib.from_config_dict(reader.get_config(f"gpu:{other}")):
        assert stage.init_from == str(other)


def test_other_hardware_and_missing_weights_are_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^reader:tpu is not known; there are reader:cpu and rea"):
        reader.get_config("tpu")
    monkeypatch.setattr(reader, "WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no config\.json: run `make weights`"):
        reader.get_config()
