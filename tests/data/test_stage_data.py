import dataclasses

import pytest

from alignvlm_jax.data import stage_data
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError


def test_each_split_is_opened_when_it_is_first_asked_for_and_once(demo_config, monkeypatch):
    read = []
    for owner, name in ((stage_data, "RecordSource"), (stage_data.index, "load")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *args, name=name, original=original: (
                read.append((name, *args)) or original(*args)
            ),
        )
    opened = StageData.open(demo_config.data, demo_config.model)
    folder = demo_config.data.dir
    assert read == []
    for split in ("train", "validation"):
        assert opened.records(folder, split) is opened.records(folder, split)
        assert opened.index(folder, split) is opened.index(folder, split)
        assert len(opened.records(folder, split)) == len(opened.index(folder, split))
    assert read == [
        (name, folder, split)
        for split in ("train", "validation")
        for name in ("RecordSource", "load")
    ]
    with pytest.raises(UserError, match=r"no shards of split 'trian'.*did you mean 'train'"):
        opened.records(folder, "trian")


def test_a_tokenizer_that_another_stage_has_is_not_read_but_has_to_fit(demo_config, monkeypatch):
    known = {}
    first = StageData.open(demo_config.data, demo_config.model, known)
    assert list(known) == [first.tokenizer_path]
    monkeypatch.setattr(stage_data.tokenizers, "load", None)
    second = StageData.open(demo_config.data, demo_config.model, known)
    assert second.tokenizer is first.tokenizer
    other = dataclasses.replace(demo_config.model, image_token_id=9)
    with pytest.raises(UserError, match="image_token_id is 9"):
        StageData.open(demo_config.data, other, known)


def test_the_tokenizer_must_fit_the_model(demo_config):
    small = dataclasses.replace(
        demo_config.model, llm=dataclasses.replace(demo_config.model.llm, vocab_size=64)
    )
    with pytest.raises(UserError, match=r"108 tokens.*vocab_size is 64"):
        stage_data.load_tokenizer(demo_config.data, small)
    with pytest.raises(UserError, match="image_token_id is 9"):
        other = dataclasses.replace(demo_config.model, image_token_id=9)
        stage_data.load_tokenizer(demo_config.data, other)
