"""What a run refuses before anything is compiled, beyond what tests/train/test_loop.py tries."""

import dataclasses
import pathlib
import re

import pytest

from alignvlm_jax.config import renamed
from alignvlm_jax.data import shards
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import preflight, restore
from tests.conftest import tiny_config


def test_steps_that_are_not_compiled_run_on_one_device():
    config = tiny_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, jit=False))
    with pytest.raises(
        UserError, match=r"train\.jit is False and there are 8 devices: .*show it one"
    ):
        preflight.open_stages((config,))


def test_a_stage_that_a_cpu_would_take_minutes_a_step_for_is_told(demo_config, monkeypatch, capsys):
    preflight.open_stages((demo_config,))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(preflight, "CPU_FLOPS", 1e5)
    preflight.open_stages((demo_config, dataclasses.replace(demo_config, stage="more")))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith(": --config=trial is made for it\n")
    assert re.search(r"step of stage '\w+' takes minutes on this machine's CPU, about \d+ ", line)


def test_a_stage_of_words_is_refused_pages_without_them(demo_config, tmp_path, monkeypatch):
    """One that knows some of them is told by `max_unsupervised`."""
    knows = set()
    read = shards.RecordSource.__getitem__

    def without_words(source, index):
        record = read(source, index)
        return record if index in knows else dataclasses.replace(record, lines=())

    monkeypatch.setattr(shards.RecordSource, "__getitem__", without_words)
    patches = {"answer_weight": 0.0, "trainable": ("vision/.*", "connector/.*")}
    config = dataclasses.replace(
        demo_config, train=dataclasses.replace(demo_config.train, **patches)
    )
    with pytest.raises(
        UserError, match=r"stage 'train' learns from the words .*answer_weight 0\), and none of "
    ):
        preflight.open_stages((config,))
    knows |= set(range(100))
    assert preflight.open_stages((config,))
    knows.clear()
    assert preflight.open_stages((demo_config,))


def test_pages_whose_words_are_too_small_to_be_read_are_told(demo_config, capsys):
    """As an A4 page that is one tile, of which a run would learn nothing, without a word."""
    preflight.open_stages((demo_config,))
    assert capsys.readouterr().err == ""
    vision = dataclasses.replace(
        demo_config.model.vision, tile_height=16, tile_width=16, patch_height=8, patch_width=8
    )
    model = dataclasses.replace(demo_config.model, vision=vision)
    small = dataclasses.replace(demo_config, model=model)
    preflight.open_stages((small,))
    told = capsys.readouterr().err
    assert re.search(
        r"stage 'train': words in \S+ are [0-4]\.\d pixels high in its tiles, and below 5 few can "
        r"be read: config\.data\.record_tiles is \d+, of 16 x 16 pixels\n",
        told,
    )
    blind = dataclasses.replace(small.train, visual_source="oracle", trainable=("llm/.*",))
    preflight.open_stages((dataclasses.replace(small, train=blind),))
    assert capsys.readouterr().err == ""


def test_the_seconds_of_a_step_grow_with_its_tokens(monkeypatch):
    """SmolLM2 and DINOv2 on two cores: one tile and 1,024 tokens take seconds, a batch of long
    sequences takes minutes."""
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 2)
    sizes = {"llm/all": 135_000_000, "vision/all": 22_000_000, "connector/all": 700_000}
    trained = {"connector/all"}
    trial = {"llm": 1_024, "vision": 256, "connector": 256}
    documents = {name: 8 * count for name, count in trial.items()}
    seconds = [
        preflight._cpu_seconds(sizes, trained, trial),
        8 * preflight._cpu_seconds(sizes, trained, documents),
    ]
    assert 5 < seconds[0] < 30 and preflight.LONG_STEP_SECONDS < 300 < seconds[1]


@pytest.mark.parametrize("template", ["", "{{ messages }}"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_from_before_templates_does_not_go_on_by_one(template, is_old):
    files = ChatFiles("tokenizer_config.json", template=template)
    old, new = next(iter(renamed.FIELDS.items()))
    group, _, name = (old if is_old else new).partition(".")
    metadata = {"config": [{"stage": "a", group: {name: 1}}]}
    if not (template and is_old):
        restore.check_chat(pathlib.Path("runs/old"), files, metadata)
        return
    with pytest.raises(UserError, match=r"runs/old was trained .*, and tokenizer_config\.json has"):
        restore.check_chat(pathlib.Path("runs/old"), files, metadata)
