"""The search for a layout, by a compiler that is told how much memory a row takes."""

import dataclasses
import threading
import time
import types
from collections.abc import Callable

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import aot, hardware, printing, search
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.candidates import POLICIES, Candidate, Stage
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.plan.search import Search
from alignvlm_jax.plan.timing import Timing
from tests.conftest import tiny_config

CONFIG = tiny_config(train=config_lib.TrainConfig(batch_size=32))
PAPER = tiny_config(
    model=dataclasses.replace(
        tiny_config().model,
        llm=dataclasses.replace(tiny_config().model.llm, width=4096, num_heads=8, num_kv_heads=8),
        vision=dataclasses.replace(tiny_config().model.vision, width=1152, num_heads=16),
    ),
    train=config_lib.TrainConfig(batch_size=256),
)
V5E = hardware.parse_topology("v5e:2x2")
HELD = 1.0  # GiB
SECONDS = {"full": 4.0, "attention+qkv": 3.6, "dots": 3.3, "attention+qkv+mlp": 3.2, "none": 3.0}
"""Of a step of the fake compiler, and half a second more for each microbatch."""


@pytest.fixture
def compiler(monkeypatch):
    """Sets the GiB of a row by remat policy; returns the plans that were made."""
    made: list[Plan] = []

    def set_up(
        a_row: Callable[[str], float], seconds: Callable[[str], float] = SECONDS.__getitem__
    ) -> list[Plan]:
        def start(
            config: config_lib.Config, topology: Topology, devices: object
        ) -> Callable[[], Plan]:
            mesh = dataclasses.asdict(config.mesh)
            steps = config.train.grad_accum_steps
            remat = config.model.remat
            rows = config.train.batch_size // steps // (mesh["data"] * mesh["fsdp"])
            peak = HELD + rows * a_row(remat)
            plan = Plan(
                topology=topology, config=config, mesh=mesh, num_params=1, num_trained=1, param_gib=0.0,
                optimizer_gib=0.0, state_gib=0.0, peak_hbm_gib=peak, fits=peak <= topology.chip.hbm_gib,
                is_estimate=False, flops={"vision": 1e15, "llm": 1e16}, communication={},
                timing=Timing({"llm": seconds(remat) + steps / 2}, 0.0, 0.0, 0.0, 0.0, 0.0),
            )  # fmt: skip
            made.append(plan)
            return lambda: plan

        monkeypatch.setattr(aot, "start", start)
        monkeypatch.setattr(aot, "state_gib", lambda config, topology: HELD)
        monkeypatch.setattr(search, "_num_workers", lambda: 2)
        return made

    return set_up


def best(say: Callable[[str], None] = lambda line: None) -> Plan:
    return Search(CONFIG, V5E).best((), say)


def microbatch(plan: Plan) -> int:
    """Rows of a device at a time."""
    return plan.config.train.batch_size // plan.config.train.grad_accum_steps // plan.mesh["fsdp"]


def test_all_rows_at_once_where_they_fit(compiler):
    compiler(lambda remat: 0.1)
    plan = best()
    assert (plan.config.model.remat, plan.config.train.grad_accum_steps) == ("none", 1)


def test_few_are_compiled_and_none_twice(compiler):
    """Of 2 meshes x 4 microbatches x 5 policies; 4 devices along tensor do not divide 2 key-value
    heads."""
    made = compiler(lambda remat: 0.1)
    best()
    assert len(made) == len({repr(plan.config) for plan in made}) <= search.MAX_COMPILED
    assert {plan.mesh["tensor"] for plan in made} <= {1, 2}


def test_less_is_computed_twice_with_fewer_rows_at_a_time(compiler):
    """8 rows a chip: "full" takes 4 at a time, "dots" and what is alike 2, "none" not one."""
    gib = {"full": 3.0, "attention+qkv": 6.0, "dots": 6.0, "attention+qkv+mlp": 6.0, "none": 20.0}
    made = compiler(gib.__getitem__)
    plan = best()
    fitting = [other for other in made if other.fits]
    assert plan.timing.step == min(other.timing.step for other in fitting)
    assert microbatch(plan) <= (4 if plan.config.model.remat == "full" else 2)


def test_by_time_and_not_by_flops(compiler):
    """A program that computes everything twice may be the faster one."""
    compiler(lambda remat: 0.1, lambda remat: 1.0 if remat == "full" else 9.0)
    assert best().config.model.remat == "full"


def test_where_nothing_fits_the_nearest_miss_is_shown(compiler):
    compiler(lambda remat: 30.0)
    plan = best()
    assert not plan.fits and plan.config.model.remat == "full"


def test_progress_and_what_is_left_are_told(compiler):
    compiler(lambda remat: 0.1)
    lines = []
    best(lines.append)
    assert "candidates; compiling 8 at most, 2 at a time, for 25 min at most" in lines[0]
    assert any(line.endswith("min left") and "compiled in" in line for line in lines)


def test_plans_that_are_known_promise_nothing(compiler):
    """They come at once; what is left may have to be compiled."""
    compiler(lambda remat: 0.1)
    lines = []
    best(lines.append)
    left = [line for line in lines if line.endswith("min left")]
    assert left and all(line.endswith(f"at most {search.MAX_MINUTES} min left") for line in left)


def test_an_interrupted_search_does_not_wait_for_what_compiles(compiler, monkeypatch):
    compiler(lambda remat: 0.1)
    compiling = threading.Event()
    released = threading.Event()
    made = iter(range(100))

    def interrupt() -> None:
        compiling.wait(20)
        raise KeyboardInterrupt

    def compile_slowly() -> None:
        compiling.set()
        released.wait(20)

    def start(*args: object) -> Callable[[], None]:
        return compile_slowly if next(made) else interrupt

    monkeypatch.setattr(aot, "start", start)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        best()
    waited = time.monotonic() - began
    released.set()
    assert waited < 10


def test_a_program_compiles_beside_the_thread_that_hears_of_interrupts():
    threads = []
    memory = types.SimpleNamespace(peak_memory_in_bytes=2**30)

    def compile_() -> object:
        threads.append(threading.current_thread())
        return types.SimpleNamespace(memory_analysis=lambda: memory)

    assert aot.compile_program(types.SimpleNamespace(compile=compile_), False)[1] == 1.0
    assert threads != [threading.main_thread()]


def test_no_compilation_is_begun_that_would_end_too_late(compiler, monkeypatch):
    """Where two take 20 minutes, two more would take longer than there is."""
    made = compiler(lambda remat: 0.1)
    clock = iter(range(0, 10**9, 10 * 60))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    best()
    assert len(made) == 2


def test_meshes_and_remat_policies_and_chunk_sizes_vary():
    """On 64 chips, of the 8B model's widths: fsdp 64, and data 4 x fsdp 16."""
    stage = Stage(
        PAPER,
        hardware.parse_topology("v5p:4x4x4"),
        {"vision": 1e15, "connector": 1e15, "llm": 1e17, "loss": 1e15},
        10**9,
        dict.fromkeys(Search(PAPER, hardware.parse_topology("v5p:4x4x4")).meshes(), HELD),
    )
    found = list(stage.candidates())
    assert {(one.mesh.data, one.mesh.fsdp) for one in found} >= {(1, 64), (4, 16)}
    assert {one.remat for one in found} == set(POLICIES)
    assert {one.grad_accum_steps for one in found} >= {1, 2, 4}
    # Rough ideas: what is computed once is faster and needs more memory, and so are larger chunks.
    by = {(one.mesh, one.grad_accum_steps, one.remat, one.chunk_size_mib): one for one in found}
    for one in found:
        if one.remat == "full":
            other = by[one.mesh, one.grad_accum_steps, "none", one.chunk_size_mib]
            assert other.seconds < one.seconds and other.gib > one.gib


def test_copies_are_preferred_to_gathers_over_a_whole_cube():
    """Which the compiler makes all-reduces; on v5e:8x8 it does not."""
    by_slice = {}
    for name in ("v5p:4x4x4", "v5e:8x8"):
        topology = hardware.parse_topology(name)
        flops = {"vision": 1e15, "connector": 1e15, "llm": 1e17, "loss": 1e15}
        meshes = {MeshConfig(data=data, fsdp=64 // data): HELD for data in (1, 4)}
        stage = Stage(PAPER, topology, flops, 9 * 10**9, meshes)
        whole, copies = (stage.judged(Candidate(mesh, 1, "full", 64)) for mesh in meshes)
        by_slice[name] = copies.seconds < whole.seconds
    assert by_slice == {"v5p:4x4x4": True, "v5e:8x8": False}


@pytest.mark.parametrize("num_slices", [1, 2])
def test_nothing_hides_gathers_over_whole_cubes(num_slices):
    """Of each of several slices, too, which hold copies."""
    topology = hardware.parse_topology("v5p:4x4x4", num_slices)
    flops = {"vision": 1e15, "connector": 1e15, "llm": 1e17, "loss": 1e15}
    mesh = MeshConfig(data=num_slices, fsdp=64)
    stage = Stage(PAPER, topology, flops, 9 * 10**9, {mesh: HELD})
    one = Candidate(mesh, 1, "full", 64)
    gathers, sums = stage._sent(one)
    assert stage.judged(one).seconds > stage._computing(one) + sums + gathers


def test_what_is_saved_by_name_follows_from_its_sizes():
    """Between "full" and "none", in time and in memory; "attention" spares the kernels alone, and
    saves [H, h] of a token and [E] of a patch."""
    topology = hardware.parse_topology("v5p:4x4x4")
    mesh = next(Search(PAPER, topology).meshes())
    stage = Stage(
        PAPER, topology, {"vision": 0, "connector": 0, "llm": 1e17, "loss": 0}, 1, {mesh: HELD}
    )
    order = ("full", "attention", "attention+qkv", "attention+qkv+mlp", "none")
    found = [stage.judged(Candidate(mesh, 1, remat, 64)) for remat in order]
    assert [one.gib for one in found] == sorted(one.gib for one in found)
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
    llm, vision, data = PAPER.model.llm, PAPER.model.vision, PAPER.data
    rows = 256 // (mesh.data * mesh.fsdp)
    of_tokens = data.seq_len * llm.num_layers * llm.num_heads * llm.head_dim
    of_patches = data.max_tiles * vision.num_patches * vision.num_layers * vision.width
    saved = 2 * rows * (of_tokens + of_patches) / aot.GIB
    assert found[1].gib - found[0].gib == pytest.approx(saved)


def test_a_plan_tells_of_the_types_and_places_of_what_is_kept(compiler):
    compiler(lambda remat: 0.1)
    plan = best()
    train = dataclasses.replace(plan.config.train, num_steps=1000)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=train))
    assert ", gradients of kernels summed in bfloat16\n" in printing.text(plan)
    assert "on the host" not in printing.text(plan)
    offloaded = dataclasses.replace(plan, host_gib=1.05)
    assert "\non the host a chip 1.05 GiB of optimizer, sent there" in printing.text(offloaded)
    assert offloaded.to_json()["host_gib"] == 1.05


def test_smallest_slice(compiler):
    compiler(lambda remat: 10.0)
    assert search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None).topology == V5E


def test_no_slice_is_large_enough(compiler):
    """Nor can 32 rows be laid over 256 chips: the largest that was tried is shown."""
    compiler(lambda remat: 30.0)
    plan = search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None)
    assert not plan.fits and plan.topology.name == "v5e:8x8"


def test_no_slice_holds_the_parameters(compiler, monkeypatch):
    compiler(lambda remat: 1.0)
    monkeypatch.setattr(aot, "state_gib", lambda config, topology: 100.0)
    with pytest.raises(UserError, match="no mesh of 128 chips takes a batch of 32 sequences"):
        search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None)


def test_meshes_tried_are_the_most_sharded_and_a_narrow_one(compiler):
    """A batch of 256 rows on 512 chips: no mesh without tensor; widths of 4,096 and 1,152 take
    128."""
    found = [
        dataclasses.astuple(mesh)
        for mesh in Search(PAPER, hardware.parse_topology("v5p:8x8x8")).meshes()
    ]
    assert found == [(2, 128, 2), (16, 16, 2), (1, 128, 4), (8, 16, 4), (1, 64, 8), (4, 16, 8)]


def test_data_lies_across_slices(compiler):
    made = compiler(lambda remat: 0.1)
    Search(PAPER, hardware.parse_topology("v5e:4x4", num_slices=2)).best((), lambda line: None)
    assert {plan.mesh["data"] % 2 for plan in made} == {0}
