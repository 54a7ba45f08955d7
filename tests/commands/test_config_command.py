"""`config`: the resolved stages with their comments, and docs/config.md."""

import pathlib
import re

import pytest

from alignvlm_jax import __main__ as program
from alignvlm_jax.commands import config as command
from alignvlm_jax.config import describing

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = """
from alignvlm_jax import config as config_lib
from alignvlm_jax import presets

def get_config(lacking=""):
    config = config_lib.default_config_dict()
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    if lacking != "llm":
        config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.image_token_id = 4
    config.data.update(dir="data/mine", seq_len=192, max_tiles=2)
    config.data.sources = {"pages": {"dir": "data/pages", "repeat": 2.0}}
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 8
    config.stages = {
        "align": {"train": {"num_steps": 5}},
        "answer": {"train": {"num_steps": 7, "trainable": ("llm/.*", "connector/.*", "vision/blocks/.*")}},
    }
    return config
"""


@pytest.fixture
def flag(tmp_path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path}/config.py"


def show(capsys, *argv: str) -> dict[str, list[str]]:
    """The lines of each group."""
    assert program.main(["config", *argv]) == 0
    head, *groups = capsys.readouterr().out.rstrip("\n").split("\n\n")
    return {"": head.splitlines()} | {
        name: lines for name, *lines in (group.splitlines() for group in groups)
    }


def test_what_all_stages_share_stands_once(flag, capsys):
    groups = show(capsys, flag)
    assert groups[""][0] == "2 stages: align, answer"
    assert [name for name in groups if "stages" in name] == [
        "config.stages.align",
        "config.stages.answer",
    ]
    assert any(line.startswith("* learning_rate = 0.001 ") for line in groups["config.optim"])
    train = "\n".join(groups["config.train"])
    assert "* batch_size = 8 " in train and "  grad_accum_steps = 1 " in train
    assert "num_steps" not in train and "trainable" not in train


def test_stages_show_where_they_differ(flag, capsys):
    groups = show(capsys, flag)
    align = groups["config.stages.align"]
    answer = groups["config.stages.answer"]
    assert align[0].startswith("* train.num_steps = 5 ") and align[0].endswith(
        "# Steps of the optimizer."
    )
    assert align[1].startswith("  train.trainable = ('.*',) ")
    # Explained above.
    assert answer == [
        "* train.num_steps = 7",
        "* train.trainable = ('llm/.*', 'connector/.*', 'vision/blocks/.*')",
    ]


def test_every_field_is_shown_with_its_comment(flag, capsys):
    assert program.main(["config", flag]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    told = " ".join(line.partition("#")[2].strip() for line in lines)
    for field in describing.fields().values():
        # The title of each stage, and of each source; and options of the connector chosen alone.
        is_of_another = re.match(r"model\.connectors\.(?!align)", field.path)
        if field.path not in ("stage", "data.sources") and not is_of_another:
            assert (
                f" {field.path.rpartition('.')[2]} = " in printed or f" {field.path} = " in printed
            ), field.path
            assert field.comment in told, field.path
    assert max(map(len, lines)) <= command.WIDTH


def test_each_source_is_shown(flag, capsys):
    groups = show(capsys, flag)
    lines = groups["config.data.sources.pages"]
    assert lines[0].startswith("* dir = 'data/pages' ") and lines[1].startswith("  weight = 1.0 ")
    assert lines[2].startswith("* repeat = 2.0 ")


def test_one_stage_is_shown_whole(flag, capsys, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace("config.stages =", "unused ="))
    groups = show(capsys, flag, "--config.train.num_steps=9")
    assert groups[""][0] == "1 stage: train" and "  stage = 'train' " in "\n".join(groups["config"])
    assert groups["config.train"][0].startswith("* num_steps = 9 ")


@pytest.mark.parametrize(
    ("suffix", "override", "message"),
    [
        (":llm", "--config.seed=1", 'config.model.llm.{vocab_size, width, mlp_width, num_layers, '
         'num_heads, num_kv_heads, head_dim} (usually set_preset(config.model.llm, '
         'presets.LLM["..."]))'),
        ("", "--config.train.batch_sise=9", "config.train.batch_sise; did you mean 'batch_size'?"),
        ("", "--config.model.remat=ful", "config.model.remat is 'ful'; did you mean 'full'?"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_one_line(flag, capsys, suffix, override, message):
    assert program.main(["config", flag + suffix, override]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


@pytest.mark.parametrize("argv", [[], ["--markdown", "--config=configs/demo.py"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["config", *argv])
    assert error.value.code == 2


def test_the_committed_reference_is_what_is_generated(capsys):
    assert program.main(["config", "--markdown"]) == 0
    committed = (REPOSITORY / "docs" / "config.md").read_text()
    assert committed == capsys.readouterr().out, (
        "run: python -m alignvlm_jax config --markdown > docs/config.md"
    )
    assert (
        committed.count("**must be given**")
        == len([field for field in describing.fields().values() if field.default is None]) + 1
    )
