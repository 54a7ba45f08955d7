"""What a run refuses before anything is compiled, beyond what tests/train/test_loop.py tries."""

import dataclasses
import types

import pytest

from alignvlm_jax.config import renamed
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import loop, preflight
from tests.conftest import tiny_config


def test_steps_that_are_not_compiled_run_on_one_device():
    config = tiny_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, jit=False))
    with pytest.raises(
        UserError, match=r"train\.jit is False and there are 8 devices: .*show it one"
    ):
        preflight.open_stages((config,))


@pytest.mark.parametrize("template", ["", "{{ messages }}"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_from_before_templates_does_not_go_on_by_one(template, is_old):
    run = types.SimpleNamespace(folder="runs/old")
    files = ChatFiles("tokenizer_config.json", template=template)
    opened = types.SimpleNamespace(tokenizer=types.SimpleNamespace(chat_files=files))
    old, new = next(iter(renamed.FIELDS.items()))
    group, _, name = (old if is_old else new).partition(".")
    metadata = {"config": [{"stage": "a", group: {name: 1}}]}
    if not (template and is_old):
        loop._check_chat(run, opened, metadata)
        return
    with pytest.raises(UserError, match=r"runs/old was trained .*, and tokenizer_config\.json has"):
        loop._check_chat(run, opened, metadata)
