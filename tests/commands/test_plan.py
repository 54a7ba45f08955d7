"""`plan`: tables and JSON, exit status, bad input.

The tiny model, on CPU devices where libtpu is absent.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from alignvlm_jax import __main__ as main
from alignvlm_jax.plan import hardware

needs_libtpu = pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
KEYS = {
    "checkpoint",
    "stop_seconds",
    "stops_in_time",
    "minutes_lost",
    "num_slices",
    "num_devices",
    "fits",
    "peak_hbm_gib",
    "hbm_limit_gib",
    "num_chips",
    "mesh",
    "num_params",
    "step_tflops",
    "collectives",
}

CACHE = tempfile.TemporaryDirectory()

CONFIG = """
import ml_collections
from alignvlm_jax import config as config_lib
from alignvlm_jax import presets

def get_config(stages="one"):
    config = config_lib.default_config_dict()
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.image_token_id = 4
    config.data.update(dir="data", seq_len=192, max_tiles=2)
    config.optim.learning_rate = 2e-3
    config.train.num_steps = 1000
    config.name = "planned"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.train.batch_size = 64
    config.train.grad_accum_steps = 2
    config.mesh.fsdp, config.mesh.data = -1, -1
    if stages == "two":
        config.stages = ml_collections.ConfigDict({"first": {}, "second": {"train": {"trainable": ("llm/.*",)}}})
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "planned.py"
    path.write_text(textwrap.dedent(CONFIG))
    return path


def run(*args: str, libtpu: bool = True) -> subprocess.CompletedProcess:
    """In a process of its own: the number of CPU devices is fixed at the first use of jax."""
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == "
        "'libtpu' else f(n, *a); "
    )
    code = (
        f"{'' if libtpu else hide}from alignvlm_jax.__main__ import main; import sys; "
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "plan", *args],
        capture_output=True,
        text=True,
        # A fifth faster, and nothing of what is asked here depends on the programs' speed.
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1",
            # Not what another session compiled.
            "XDG_CACHE_HOME": CACHE.name,
        },
    )


def test_estimate_without_libtpu(config_file):
    done = run(f"--config={config_file}", "--topology=v5e:2x2", "--json", libtpu=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan.keys() >= KEYS
    assert plan["is_estimate"] and plan["fits"] is True
    # Not the eight CPU devices that the tests force.
    assert plan["num_chips"] == 4 and plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    # A row's activations, of 8 rows a chip, are more than all of this model's state.
    assert plan["peak_hbm_gib"] > 4 * (plan["param_gib"] + plan["optimizer_gib"])
    assert plan["collectives"]["all-gather"]["count"] > 0
    assert "ESTIMATE: libtpu is not installed" in done.stderr


@needs_libtpu
def test_tpu_plan_as_text_and_as_json(config_file):
    done = run(f"--config={config_file}", "--topology=v5e:2x4", "--mesh=1x4x2", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan.keys() >= KEYS
    assert not plan["is_estimate"]
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert 0 < plan["param_gib"] < plan["peak_hbm_gib"] < plan["hbm_limit_gib"] == 15.75
    assert sum(plan["step_tflops_by_part"].values()) == pytest.approx(plan["step_tflops"])
    assert plan["mfu"] == pytest.approx(plan["step_tflops"] / (8 * 197) / plan["step_seconds"])
    assert plan["chip_hours"] == pytest.approx(8 * 24 * plan["days"])
    seconds = plan["seconds"]
    parts = [*seconds["computing"].values(), seconds["exposed"], seconds["network_exposed"]]
    assert plan["step_seconds"] == pytest.approx(sum(parts)) and all(seconds["computing"].values())


@needs_libtpu
def test_two_slices(config_file):
    done = run(f"--config={config_file}", "--topology=v5e:2x2", "--num_slices=2", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["topology"] == "2 x v5e:2x2" and plan["num_chips"] == 8
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert plan["mfu"] == pytest.approx(plan["step_tflops"] / (8 * 197) / plan["step_seconds"])
    assert plan["chip_hours"] == pytest.approx(8 * 24 * plan["days"])
    seconds = plan["seconds"]
    parts = [*seconds["computing"].values(), seconds["exposed"], seconds["network_exposed"]]
    assert plan["step_seconds"] == pytest.approx(sum(parts)) and all(seconds["computing"].values())
    # Gradients, once a step in float32, each device the part that is its own.
    between = plan["collectives"]["between slices"]["gib"]
    assert plan["num_params"] * 4 / 4 / 2**30 < between < 2.5 * plan["num_params"] * 4 / 4 / 2**30
    assert "xla_tpu_enable_data_parallel_all_reduce_opt" in done.stderr


@needs_libtpu
def test_tpu7x_has_two_devices_a_chip(config_file):
    done = run(f"--config={config_file}", "--topology=tpu7x:2x2x1")
    assert done.returncode == 0, done.stderr
    assert "on tpu7x:2x2x1: 4 chips of 2 devices, mesh data 1, fsdp 8, tensor 1" in done.stdout
    assert "peak HBM a device" in done.stdout and "of 94.75 GiB: fits" in done.stdout
    assert "in time for GKE JobSet" in done.stdout


@needs_libtpu
def test_what_does_not_fit_has_status_3_and_says_what_to_change(config_file):
    done = run(
        f"--config={config_file}",
        "--topology=v5e:2x2",
        "--config.model.llm.vocab_size=8388608",
        "--config.model.remat=none",
    )
    assert done.returncode == 3, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "does not fit: --config.model.remat=full; --config.train.grad_accum_steps=16 (now 8 "
        "sequences at a time)"
    )
    assert "--topology=v5e:2x4" in last
    assert "too much" in done.stdout
    way_out = done.stdout.splitlines()[-2]
    assert re.match(r"would fit, by a rough idea: --topology=v5e:\w+ --mesh=\dx\d+x\d", way_out)
    assert "--config.model.remat=" in way_out


@needs_libtpu
def test_a_price_gives_costs_and_without_one_there_are_none(config_file):
    """And a second plan of the same program is not compiled again."""
    args = f"--config={config_file}", "--topology=v5e:2x4", "--mesh=1x4x2"
    free = run(*args)
    assert free.returncode == 0 and "\ncost " not in free.stdout
    assert "\ncost " in run(*args, "--price_per_chip_hour=3.5").stdout
    priced = run(*args, "--price_per_chip_hour=3.5", "--json")
    plan = json.loads(priced.stdout)
    assert plan["cost"] == pytest.approx(3.5 * plan["chip_hours"])


@needs_libtpu
def test_auto_tries_candidates_and_shows_the_fastest(config_file):
    """A second search compiles nothing, and comes to the same."""
    rows = ["--config.train.batch_size=4", "--config.train.grad_accum_steps=1"]
    # One key-value head, which no tensor axis divides: tests/plan/test_search.py tries other
    # meshes, uncompiled.
    heads = "--config.model.llm.num_kv_heads=1"
    args = f"--config={config_file}", "--topology=v5e:2x2", "--mesh=auto", "--json", heads, *rows
    done = run(*args)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    tried = [line for line in done.stderr.splitlines() if line.startswith("v5e:2x2")]
    assert len(tried) >= 2 and {line.split("tensor ")[1][0] for line in tried} == {"1"}
    assert "candidates; compiling 8 at most" in done.stderr and "min left" in done.stderr
    seconds = [float(re.search(r"([\d.e-]+) s a step", line)[1]) for line in tried]
    assert plan["step_seconds"] == pytest.approx(min(seconds), rel=0.01)
    began = time.monotonic()
    again = run(*args)
    assert json.loads(again.stdout) == plan
    assert time.monotonic() - began < 60


@needs_libtpu
def test_smallest(config_file):
    done = run(f"--config={config_file}", "--topology=v6e:smallest", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["topology"] == "v6e:2x2"


@needs_libtpu
def test_generation(config_file):
    """The batch is rounded up to the mesh; the cache holds keys and values of every slot in
    bfloat16."""
    args = (
        f"--config={config_file}",
        "--topology=v5e:2x4",
        "--mesh=1x4x2",
        "--generate",
        "--config.eval.batch_size=6",
    )
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["batch_size"] == 8 and plan["prompt_length"] == 192 and plan["max_new_tokens"] == 32
    assert plan["prefill_size"] == 4  # one on each device of fsdp
    layers = 3  # on a chip
    rows = 2
    heads = 1
    head_dim = 32
    assert plan["cache_gib"] == pytest.approx(
        2 * 2 * layers * rows * heads * head_dim * (192 + 32) / 2**30, rel=1e-4
    )
    assert (
        plan["param_gib"] + plan["cache_gib"]
        < plan["peak_hbm_gib"]
        < plan["hbm_limit_gib"]
        == 15.75
    )
    assert plan["fits"] is True and plan["is_estimate"] is False


@needs_libtpu
def test_generation_of_a_packed_stage_is_of_one_record(config_file):
    """Of 4 tiles of 32 tokens in a sequence a record has 2; 64 tokens are text."""
    done = run(
        f"--config={config_file}",
        "--topology=v5e:2x2",
        "--generate",
        "--config.data.packing=offline",
        "--config.data.max_tiles=4",
        "--config.data.record_tiles=2",
        "--config.eval.batch_size=64",
    )
    assert done.returncode == 0, done.stderr
    assert "batch 64 prompts of 128 tokens and 2 tiles, 16 a device; 32 new tokens" in done.stdout
    # 2 on each device, an eighth of its rows
    assert "\n8 prompts are read at a time" in done.stdout


@needs_libtpu
def test_generation_that_does_not_fit_has_status_3_and_says_what_to_change(config_file):
    done = run(
        f"--config={config_file}",
        "--topology=v5e:2x2",
        "--generate",
        "--config.eval.batch_size=1000000",
    )
    assert done.returncode == 3, done.stderr
    assert (
        "batch 1000000 prompts of 192 tokens and 2 tiles, 250000 a device; 32 new tokens"
        in done.stdout
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "does not fit: --config.eval.batch_size=500000 (now 250000 prompts a device); --mesh="
    )
    assert last.endswith("--topology=v5e:2x4")


BAD = {
    "generate_auto": (["--topology=v5e:2x4", "--generate", "--mesh=auto"], "--generate plans for "
                                                                           "one slice and mesh"),
    "generate_smallest": (["--topology=v5e:smallest", "--generate"], "--generate plans for one "
                                                                     "slice and mesh"),
    "generate_heads": (["--mesh=1x2x4", "--topology=v5e:2x4", "--generate"], "llm/blocks/attn/k/kernel"),
    "heads": (["--mesh=1x2x4", "--topology=v5e:2x4"], r"llm/blocks/attn/k/kernel"),
    "words": (["--mesh=1x4x2", "--topology=v5e:2x4", "--config.model.llm.vocab_size=129"], "129"),
    "batch": (["--mesh=8x1x1", "--topology=v5e:2x4", "--config.train.batch_size=12"], "a microbatch "
                                                                                      "of 6 "),
    "batch_below_data": (["--mesh=8x1x1", "--topology=v5e:2x4", "--config.train.batch_size=4"], "a microbatch of 2 "),
    "more_chips": (["--mesh=4x4x1", "--topology=v5e:2x4"], "does not fit 8 devices"),
    "topology": (["--topology=v5e:3x3"], "unknown topology 'v5e:3x3'; v5e slices: 2x2, 2x4"),
    "slices": (["--topology=v5e:2x4", "--num_slices=2", "--mesh=1x16x1"], "data 1 does not divide "
                                                                          "over 2 slices"),
    "gpu": (["--topology=h100:8"], "h100 is a GPU; there are plans for slices of v5e, v5p"),
    "generate_price": (["--topology=v5e:2x4", "--generate", "--price_per_chip_hour=2"],
                       "--price_per_chip_hour is of training"),
    "remat": (["--topology=v5e:2x4", "--config.model.remat=ful"], "did you mean 'full'"),
    "no_slices": (["--topology=v5e:smallest", "--num_slices=2"], "which looks for one slice"),
    "kind": (["--topology=v7:smallest"], "unknown kind of TPU 'v7'"),
    "mesh_text": (["--topology=v5e:2x4", "--mesh=4x2"], "--mesh is '4x2'"),
    "no_mesh_at_all": (["--topology=v5e:2x4", "--mesh=auto", "--config.train.batch_size=7",
                        "--config.train.grad_accum_steps=1"], "no mesh of 8 chips takes a batch "
                                                          "of 7 sequences"),
    "auto_slices": (["--topology=v5e:2x2", "--num_slices=3", "--mesh=auto"], "nearest that does: "
                                                                             "--config.train.batch_size=60"),
    "field": (["--topology=v5e:2x4", "--config.model.remta=full"], "did you mean 'remat'"),
    "stage": (["--topology=v5e:2x4", "--stage=third"], "--stage is 'third'; known: first, second"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_status_2(config_file, capsys, name):
    """Told before a compiler is asked, in seconds."""
    args, message = BAD[name]
    began = time.monotonic()
    assert (
        main.main(["plan", f"--config={config_file}{':two' if name == 'stage' else ''}", *args])
        == 2
    )
    assert time.monotonic() - began < 5
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("price", ["cheap", "-1", "0", "nan"])
def test_a_price_is_a_number(config_file, capsys, price):
    args = f"--config={config_file}", "--topology=v5e:2x4", f"--price_per_chip_hour={price}"
    with pytest.raises(SystemExit, match="2"):
        main.main(["plan", *args])
    assert f"'{price}' is no number above 0" in capsys.readouterr().err


def test_of_several_stages_one_is_named(config_file, capsys):
    assert main.main(["plan", f"--config={config_file}:two", "--topology=v5e:2x4"]) == 2
    assert "several stages: --stage=NAME, one of first, second" in capsys.readouterr().err
