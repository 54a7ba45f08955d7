import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import config_flag
from alignvlm_jax.errors import UserError

CONFIG = """
from alignvlm_jax import config as config_lib
from alignvlm_jax import presets

def get_config(connector="align"):
    config = config_lib.default_config_dict()
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.image_token_id = 4
    config.data.update(dir="data/mine", seq_len=192, max_tiles=2)
    config.train.batch_size = 32
    if connector == "lacking":
        connector = "align"
    else:
        config.optim.learning_rate = 2e-3
    config.model.connector.name = connector
    config.stages = {
        "align": {"train": {"num_steps": 3, "batch_size": 4}},
        "read": {"train": {"num_steps": 5}},
    }
    return config
"""


@pytest.fixture
def flag(tmp_path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path}/config.py"


def test_overrides_reach_the_stages_that_do_not_set_the_field(flag):
    stages, rest = config_flag.parse(
        [flag + ":mlp", "--config.train.batch_size=64", "--config.optim.eps=1", "--workdir=x"]
    )
    assert rest == ["--workdir=x"]
    assert [stage.stage for stage in stages] == ["align", "read"]
    assert [stage.train.batch_size for stage in stages] == [4, 64]
    assert all(stage.optim.eps == 1.0 and stage.model.connector.name == "mlp" for stage in stages)


def test_one_stage_can_be_changed_in_a_field_that_it_does_not_set(flag):
    stages, _ = config_flag.parse(
        [
            flag,
            "--config.stages.read.optim.learning_rate=1",
            "--config.stages.read.train.trainable=('llm/.*',)",
        ]
    )
    assert [stage.optim.learning_rate for stage in stages] == [2e-3, 1.0]
    assert [stage.train.trainable for stage in stages] == [(".*",), ("llm/.*",)]


def test_one_stage_can_be_given_what_the_base_lacks(flag):
    with pytest.raises(UserError, match=r"stage 'align' lacks config\.optim\.learning_rate;"):
        config_flag.parse([flag + ":lacking"])
    rates = [
        "--config.stages.align.optim.learning_rate=1",
        "--config.stages.read.optim.learning_rate=0.5",
    ]
    stages, _ = config_flag.parse([flag + ":lacking", *rates])
    assert [stage.optim.learning_rate for stage in stages] == [1.0, 0.5]
    with pytest.raises(UserError, match=r"learning_rate is a number, and .fast. is none"):
        config_flag.parse([flag + ":lacking", "--config.stages.align.optim.learning_rate=fast"])


def test_a_value_may_follow_after_a_space(flag):
    argv = ["--config", flag.split("=")[1], "--config.seed", "3", "--workdir", "x"]
    stages, rest = config_flag.parse(argv)
    assert stages[0].seed == 3
    assert rest == ["--workdir", "x"]


def test_a_mixture_is_replaced_whole(flag):
    stages, _ = config_flag.parse([flag, "--config.data.tasks={'answer': 2.0}"])
    assert stages[0].data.tasks == {"answer": 2.0}


def test_options_of_the_connector_chosen(flag):
    """Wherever the name stands, in the file or in a flag before or after."""
    use = ["--config.model.connector.use_ln2=False", "--config.model.connector.ln2_gain_init=4"]
    stages, _ = config_flag.parse([flag, *use])
    assert stages[0].model.connector == config_lib.connector(use_ln2=False, ln2_gain_init=4.0)
    latents = [
        "--config.model.connector.num_latents=3",
        "--config.model.connectors.perceiver.num_layers=2",
    ]
    for argv in (
        [f"{flag}:perceiver", *latents],
        [flag, "--config.model.connector.name=perceiver", *latents],
        [flag, *latents, "--config.model.connector.name=perceiver"],
    ):
        stages, _ = config_flag.parse(argv)
        wanted = config_lib.connector("perceiver", num_latents=3, num_layers=2)
        assert [stage.model.connector for stage in stages] == [wanted, wanted]


def test_an_option_of_the_connector_in_one_stage(flag):
    stages, _ = config_flag.parse([flag, "--config.stages.read.model.connector.embed_grad=stop"])
    assert [stage.model.connector.embed_grad for stage in stages] == ["live", "stop"]


def test_without_a_config_there_are_no_stages():
    assert config_flag.parse(["--workdir=x"]) == (None, ["--workdir=x"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.optim.learning_rat=1",
            r"unknown config field config.optim.learning_rat; did you mean 'learning_rate'",
        ),
        (
            "--config.optm.eps=1",
            r"unknown config field config.optm.eps; did you mean 'config.optim.eps'",
        ),
        (
            "--config.stages.read.train.num_step=1",
            r"stages.read.train.num_step; did you mean 'num_steps'",
        ),
        ("--config.stages.reed.train.num_steps=1", r"stages: align, read"),
        ("--config.seed.more=1", r"unknown config field config.seed.more"),
        (
            "--config.train.num_steps=9",
            r"config.train.num_steps changes nothing, .* config.stages.align.train.num_steps",
        ),
        (
            "--config.train.batch_size=many",
            r"config.train.batch_size is a whole number, and 'many' is none",
        ),
        ("--config.train.batch_size=1.5", r"is a whole number, and '1.5' is none"),
        ("--config.optim.learning_rate=fast", r"learning_rate is a number, and 'fast' is none"),
        ("--config.data.use_overview=maybe", r"is one of true and false, and 'maybe' is none"),
        ("--config.train.batch_size=0", r"config.train.batch_size"),
        ("--config.model.connector.w2_init=lmhead", r"did you mean 'lm_head'"),
        (
            "--config.model.connector.w2_int=lm_head",
            r"config.model.connector.w2_int; did you mean 'w2_init'",
        ),
        ("--config.model.connector.use_ln2=2", r"config.model.connector.use_ln2"),
        ("--config.model.connector.name=algin", r"connector.name is 'algin'; did you mean 'align'"),
        (
            "--config.model.connector.num_latents=3",
            r"num_latents is an option of perceiver, and config.model.connector.name is 'align'; leave it out, or set "
            r"config.model.connectors.perceiver.num_latents",
        ),
        (
            "--config.model.connectors.perceiver.num_latent=3",
            r"num_latent; did you mean 'num_latents'",
        ),
    ],
)
def test_wrong_overrides_are_errors_of_one_line(flag, override, message):
    with pytest.raises(UserError, match=message) as error:
        config_flag.parse([flag, override])
    assert "\n" not in str(error.value)


def test_a_config_file_that_is_missing_or_fails_is_an_error_of_one_line(flag, tmp_path):
    with pytest.raises(UserError, match=r"no config file 'nowhere.py'"):
        config_flag.parse(["--config=nowhere.py"])
    with pytest.raises(UserError, match=r"no config file ''"):
        config_flag.parse(["--config="])
    (tmp_path / "other.py").write_text("def get_config():\n    return unknown_name\n")
    with pytest.raises(UserError, match=r"other.py failed: name 'unknown_name' is not defined"):
        config_flag.parse([f"--config={tmp_path}/other.py"])
    with pytest.raises(UserError, match=r"failed: .*positional argument") as error:
        config_flag.parse([f"--config={tmp_path}/other.py:argument"])
    assert "\n" not in str(error.value)


def test_a_task_that_has_no_weight_yet_can_be_given_one(flag):
    stages, _ = config_flag.parse([flag, "--config.stages.align.data.tasks.transcribe=1"])
    assert [dict(stage.data.tasks) for stage in stages] == [{"transcribe": 1.0}, {"answer": 1.0}]
    stages, _ = config_flag.parse(
        [flag, "--config.data.tasks.transcribe=0.5", "--config.data.tasks.answer=0"]
    )
    assert all(stage.data.tasks == {"transcribe": 0.5, "answer": 0.0} for stage in stages)
    with pytest.raises(UserError, match=r"config\.data\.tasks\.trancribe; did you mean"):
        config_flag.parse([flag, "--config.data.tasks.trancribe=1"])


def test_a_task_that_all_stages_replace_is_named_in_one(tmp_path):
    text = CONFIG.replace('"train": {"num_steps"', '"data": {"tasks": {}}, "train": {"num_steps"')
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match=r"name one, as config\.stages\.align\.data\.tasks\.answer"):
        config_flag.parse([f"--config={tmp_path}/config.py", "--config.data.tasks.answer=1"])
