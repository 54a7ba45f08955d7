import dataclasses
import json
import re

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import lease
from alignvlm_jax.train import workdir
from tests.conftest import tiny_config

STAGES = (tiny_config(stage="align"), tiny_config(stage="read"))


def lock(folder, stages) -> None:
    """Locks a workdir, and leaves a checkpoint in it."""
    with workdir.lock(folder, stages):
        (folder / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
        storage.write_whole(folder / "checkpoints" / "3" / "file", "")


def test_a_workdir_takes_the_same_config_again(folder):
    lock(folder / "new" / "run", STAGES)
    before = (folder / "new" / "run" / "config.json").read_text()
    stored = config_lib.from_json(json.loads(before))
    assert tuple(dataclasses.replace(stage, run_id="") for stage in stored) == STAGES
    lock(folder / "new" / "run", STAGES)
    assert (folder / "new" / "run" / "config.json").read_text() == before


def test_a_workdir_from_before_a_decoder_had_options_takes_the_same_config_again(folder):
    lock(folder, STAGES)
    old = json.loads((folder / "config.json").read_text())
    for stage in old:
        for name in ("qkv_bias", "qk_norm", "no_rope_every"):
            del stage["model"]["llm"][name]
        for name in ("type", "attention_factor"):
            del stage["model"]["llm"]["rope_scaling"][name]
    (folder / "config.json").write_text(json.dumps(old))
    lock(folder, STAGES)


def test_another_config_is_refused_with_both_values(folder):
    lock(folder, STAGES)
    other = dataclasses.replace(STAGES[1], train=dataclasses.replace(STAGES[1].train, num_steps=9))
    with pytest.raises(
        UserError, match=r"config.stages.read.train.num_steps is 4 there and 9 here; take another"
    ) as refused:
        lock(folder, (STAGES[0], other))
    # How to go on all the same.
    assert f"--config.init_from={folder} " in str(refused.value)


def test_without_a_checkpoint_it_belongs_to_nobody(folder):
    with workdir.lock(folder, STAGES):
        (folder / "checkpoints" / "3.broken").mkdir(parents=True)
        storage.write_whole(folder / "checkpoints" / "3.broken" / "file", "")
    lock(folder, STAGES[:1])
    [stored] = config_lib.from_json(json.loads((folder / "config.json").read_text()))
    assert dataclasses.replace(stored, run_id="") == STAGES[0]
    with pytest.raises(UserError, match="belongs to another config"):
        lock(folder, STAGES)


def test_a_run_has_an_id_from_its_first_checkpoint_on(folder, tmp_path):
    """Which goes with it wherever it is resumed, and no other run has."""
    lock(folder, STAGES)
    with workdir.lock(folder, STAGES) as stages:
        first = {stage.run_id for stage in stages}
    assert len(first) == 1 and re.fullmatch("[0-9a-f]{8}", *first)
    stored = json.loads((folder / "config.json").read_text())
    assert {stage["run_id"] for stage in stored} == first
    with workdir.lock(tmp_path / "other", STAGES) as stages:
        assert {stage.run_id for stage in stages}.isdisjoint(first)
    theirs = json.loads((tmp_path / "other" / "config.json").read_text())
    assert workdir.differences(stored, theirs) == []
    # A run of an earlier version gets one when it goes on.
    for stage in stored:
        del stage["run_id"]
    storage.write_whole(folder / "config.json", json.dumps(stored))
    with workdir.lock(folder, STAGES) as stages:
        assert stages[0].run_id


def test_what_changes_no_result_may_change(folder):
    lock(folder, STAGES)
    stage = STAGES[0]
    other = dataclasses.replace(
        stage,
        mesh=dataclasses.replace(stage.mesh, data=8, fsdp=1, tensor=1),
        data=dataclasses.replace(stage.data, dir="moved", num_threads=7, prefetch=3),
        train=dataclasses.replace(stage.train, log_every=3, checkpoint_every=9, keep_checkpoints=5),
        eval=dataclasses.replace(stage.eval, num_questions=3),
    )
    lock(folder, (other, STAGES[1]))
    assert json.loads((folder / "config.json").read_text())[0]["data"]["dir"] == "moved"


def test_a_config_of_before_connectors_had_options_of_their_own_is_the_same(folder):
    """And what another connector would have changes no result."""
    lock(folder, STAGES)
    path = folder / "config.json"
    stages = json.loads(path.read_text())
    for stage in stages:
        del stage["model"]["connectors"]
        stage["model"]["connector"] |= {"num_latents": 16, "num_layers": 6}
    path.write_text(json.dumps(stages))
    lock(folder, STAGES)
    assert "num_latents" not in json.loads(path.read_text())[0]["model"]["connector"]
    stages[0]["model"]["connector"]["use_ln2"] = False
    path.write_text(json.dumps(stages))
    with pytest.raises(UserError, match=r"connector.use_ln2 is False there and True here"):
        lock(folder, STAGES)


def test_sources_may_move_but_not_change(folder):
    def mixed(**source):
        sources = {"a": config_lib.SourceConfig(**{"dir": "x", **source})}
        return (
            dataclasses.replace(
                STAGES[0], data=dataclasses.replace(STAGES[0].data, sources=sources)
            ),
        )

    lock(folder, mixed())
    lock(folder, mixed(dir="moved"))
    with pytest.raises(UserError, match=r"config.data.sources.a.weight is 1.0 there and 2.0 here"):
        lock(folder, mixed(weight=2.0))


@pytest.mark.parametrize("text", ["[{", "5", "[5]", '[{"seed": 1}]'])
def test_a_damaged_config_is_named(folder, text):
    lock(folder, STAGES)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged \("):
        lock(folder, STAGES)


def test_what_differs_in_all_stages_is_named_once(folder):
    lock(folder, STAGES)
    with pytest.raises(UserError) as error:
        lock(folder, tuple(dataclasses.replace(stage, seed=5) for stage in STAGES))
    assert "another config: config.seed is 0 there and 5 here; take another" in str(error.value)


def test_other_stages_are_refused(folder):
    lock(folder, STAGES)
    with pytest.raises(UserError, match=r"config.stages is align, read there and align here"):
        lock(folder, STAGES[:1])


def test_many_differences_are_counted(folder):
    lock(folder, STAGES)
    vision = dataclasses.replace(
        STAGES[0].model.vision, width=32, mlp_width=1, num_layers=3, num_heads=4, norm_eps=1.0
    )
    model = dataclasses.replace(STAGES[0].model, vision=vision)
    with pytest.raises(UserError, match=r"and 1 more; take"):
        lock(folder, tuple(dataclasses.replace(stage, model=model, seed=1) for stage in STAGES))


def test_two_runs_cannot_share_a_workdir(folder, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 8.0)  # The second waits for a renewal.
    monkeypatch.setattr(lease, "MARGIN_SECONDS", 1.0)
    expected = r"process \d+ on .* is training in .*; wait for it, or take another --workdir"
    with workdir.lock(folder, STAGES), pytest.raises(UserError, match=expected):
        lock(folder, STAGES)
    lock(folder, STAGES)


def test_a_task_without_weight_is_none(folder):
    lock(folder, STAGES)
    data = dataclasses.replace(STAGES[0].data, tasks={**STAGES[0].data.tasks, "read": 0.0})
    lock(folder, tuple(dataclasses.replace(stage, data=data) for stage in STAGES))
