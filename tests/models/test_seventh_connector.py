"""A connector that the package does not know: one file in a folder of a user's, and one line that
registers it. With options and a token count of its own it is configured, trained, counted, started
from an LLM, and answers questions."""

import dataclasses
import importlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from alignvlm_jax import config as config_lib
from alignvlm_jax.analysis import cost
from alignvlm_jax.benchmarks.runner import Runner
from alignvlm_jax.commands import config_flag
from alignvlm_jax.commands.work.train import EVALUATORS
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading, patch_tokens
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import flops
from alignvlm_jax.train import checkpoint, loop, restore, state, warm_start

FILE = '''
"""Every few patches in reading order become one token: the mean or the largest of them, and a linear map."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ConnectorConfig, LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.shapes import Array, Float


class Strided(Connector):
    """Its bias starts as the mean of the LLM's text embeddings."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Two, one of which has the name of another connector's and another type."""

        merged_columns: Literal["mean", "max"] = "mean"  # what the patches of a token become
        stride: int = 2  # patches of a token

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Options) -> int:
        return vision.num_patches // options.stride

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Options) -> None:
        if vision.num_patches % options.stride:
            raise UserError(f"config.model.connector.stride {options.stride} does not divide {vision.num_patches}")

    @staticmethod
    def init_from_llm(llm: dict[str, Any], options: Options) -> dict[str, Any]:
        return {"map": {"bias": llm["embed"]["table"].mean(0)}}

    @nn.compact
    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "tokens D"]:
        width = self.config.llm.width
        grouped = features.reshape(-1, self.options.stride, features.shape[-1])
        pooled = getattr(grouped, self.options.merged_columns)(1)
        shape = (features.shape[-1], width)
        return Einsum("NE,ED->ND", shape, ("vis_embed", "embed"), True, self.dtype, name="map")(pooled)
'''
CONFIG = """
from alignvlm_jax import config as config_lib

def get_config():
    config = config_lib.default_config_dict()
    config.model.vision.update(
        tile_height=32, tile_width=128, patch_height=16, patch_width=8,
        width=16, mlp_width=32, num_layers=1, num_heads=2,
    )
    config.model.llm.update(
        vocab_size=128, width=16, mlp_width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    config.model.image_token_id = 4
    config.data.update(seq_len=192, max_tiles=2, tasks={"transcribe": 0.5, "answer": 0.5})
    config.optim.learning_rate = 2e-3
    config.eval.splits = ("seen_fonts", "unseen_fonts")
    config.train.update(num_steps=2, batch_size=8, log_every=1, validation_sequences=8)
    config.optim.warmup_steps = 0
    config.eval.update(num_questions=4, batch_size=8, max_new_tokens=4)
    return config
"""
STRIDE = 4
PATCHES = 32


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """What a user does: writes the file, and registers it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "strided.py").write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(connectors.REGISTRY, "strided", importlib.import_module("strided").Strided)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory, data_dir) -> list[str]:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return [
        f"--config={path}",
        f"--config.data.dir={data_dir}",
        "--config.model.connector.name=strided",
    ]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, flags) -> Path:
    """A run of two steps."""
    path = tmp_path_factory.mktemp("run")
    stages, _ = config_flag.parse([*flags, f"--config.model.connector.stride={STRIDE}"])
    loop.train(stages, path, Console(file=io.StringIO()), EVALUATORS)
    return path


@pytest.fixture(scope="module")
def loaded(workdir) -> loading.Loaded:
    return loading.load(workdir, loading.load_config(workdir))


def test_its_options_are_read_and_checked(flags):
    [config], _ = config_flag.parse(
        [*flags, "--config.model.connectors.strided.merged_columns=max"]
    )
    assert config.model.connector == config_lib.connector("strided", merged_columns="max", stride=2)
    assert config.tokens_per_tile == PATCHES // 2
    assert config_lib.from_json(json.loads(json.dumps(config_lib.to_json((config,))))) == (config,)
    assert config.model.with_connector("h_reducer").connector == config_lib.connector(
        "h_reducer", merged_columns=4
    )
    for flag, message in {
        "stride=3": r"stride 3 does not divide 32",
        "stride=0": r"config\.model\.connector\.stride is 0; it must be at least 1",
        "merged_columns=min": r"config\.model\.connector\.merged_columns is 'min'; did you mean 'mean'",
        "strid=2": r"config\.model\.connector\.strid; did you mean 'stride'",
        "num_latents=2": r"num_latents is an option of perceiver, and config\.model\.connector\.name is 'strided'",
    }.items():
        with pytest.raises(UserError, match=message):
            config_flag.parse([*flags, f"--config.model.connector.{flag}"])


def test_it_is_trained(workdir, loaded):
    config = loaded.config
    assert config.model.connector == config_lib.connector("strided", stride=STRIDE)
    assert config.tokens_per_tile == PATCHES // STRIDE
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in steps if "loss" in line)
    model = vlm.VLM(config.model)
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        abstract = state.abstract_params(model, mesh)
        paths = {
            path
            for path in state.flatten(abstract)
            if path.startswith(("connector/", "llm/embed/"))
        }
        start = state.flatten(
            state.init_params(model, abstract, paths, jax.random.key(config.seed))
        )
    np.testing.assert_allclose(
        start["connector/map/bias"], start["llm/embed/table"].mean(0), rtol=1e-5, atol=1e-6
    )
    after = state.flatten(jax.tree.map(np.asarray, loaded.params))
    assert all(np.abs(after[path] - start[path]).max() > 1e-4 for path in paths)


def test_it_starts_from_an_llm_that_was_loaded(workdir, loaded):
    """All but itself is loaded; its bias is made of the loaded table, and the rest of it is
    initialised."""
    config = dataclasses.replace(
        loaded.config, train=dataclasses.replace(loaded.config.train, load=("llm/.*", "vision/.*"))
    )
    model = vlm.VLM(config.model)
    with (
        mesh_lib.use(mesh_lib.single_device()) as mesh,
        checkpoint.Checkpoints(workdir / checkpoint.FOLDER, read_only=True) as checkpoints,
    ):
        params = state.abstract_params(model, mesh)
        abstract = state.TrainState(jax.ShapeDtypeStruct((), "int32"), params, ())
        found = warm_start.read(config.train, abstract, checkpoints, 2)
        params, _ = warm_start.start_params(model, abstract, found, jax.random.key(1))
    ours = state.flatten(params)
    stored = state.flatten(restore.load_model(workdir, loaded.mesh)[2])
    np.testing.assert_array_equal(ours["llm/embed/table"], stored["llm/embed/table"])
    mean = np.asarray(stored["llm/embed/table"]).mean(0)
    np.testing.assert_allclose(ours["connector/map/bias"], mean, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(ours["connector/map/kernel"], stored["connector/map/kernel"])


def test_its_flops_are_counted(loaded):
    """Of its one matmul: forward, and a gradient of each side."""
    config = loaded.config
    tiles = loaded.config.train.batch_size * loaded.config.data.max_tiles
    forward = 2 * (PATCHES // STRIDE) * 16 * 16
    assert flops.connector_flops(config.model, num_tiles=5) == 5 * forward
    assert flops.step_flops(config, loaded.params)["connector"] == 3 * tiles * forward
    frozen = dataclasses.replace(config.train, trainable=("llm/.*",))
    assert (
        flops.step_flops(dataclasses.replace(config, train=frozen), loaded.params)["connector"]
        == tiles * forward
    )


def test_it_answers(workdir, loaded):
    predictions = Runner(loaded).evaluate("seen_fonts", blind=False)
    assert len(predictions.rows) == 4 and all(
        isinstance(row["prediction"], str) for row in predictions.rows
    )
    assert predictions.rows[0]["question"] and 0 <= predictions.mean("score") <= 1
    assert list((workdir / "predictions").iterdir())


def test_it_stands_among_the_others_in_an_analysis(loaded):
    found = cost.measure(loaded, ["strided", "mlp"], repeats=1)
    assert [one["connector"] for one in found["costs"]] == ["strided", "mlp"]
    strided, mlp = found["costs"]
    assert strided["tokens_per_page"] == mlp["tokens_per_page"] / STRIDE
    assert strided["gflops"] > 0 and strided["num_params"] == 16 * 16 + 16


def test_its_patches_are_not_read_as_words(loaded):
    with pytest.raises(
        UserError,
        match="connector 'strided' with stride 4 gives patches no distribution over words",
    ):
        patch_tokens.check(loaded.config.model)
