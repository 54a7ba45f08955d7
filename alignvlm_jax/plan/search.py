"""Which mesh, microbatch and rematerialisation a stage should have on a slice: tried with the
compiler, best taken."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import aot, collectives, hardware
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.hardware import Topology

Say = Callable[[str], None]
SAFE = 0.95  # Of the memory: where the size of a program is foretold from that of another.
# An fsdp axis that leaves widths at least a tile of the chip's registers wide; copies along data.
NARROW = 16
# A device sends over the data-centre network: 50 Gbit/s a chip of v5p (cloud.google.com/tpu/docs).
NETWORK_GB = 6.25
# Beyond it a chip's shard of a matmul is too small to hide what it has to wait for.
MAX_TENSOR = 8


def best(config: Config, topology: Topology, devices: Sequence[jax.Device], say: Say) -> Plan:
    """Returns the plan of the layout that should be fastest of those that fit; where none does, the
    one that misses by the least.

    Raises:
      UserError: there is no mesh for this model and batch.
    """
    tried: list[Plan] = []
    meshes = list(_meshes(config, topology))
    for mesh in meshes:
        tried += _plans_of(config, mesh, topology, devices, say)
    if not tried:
        tried = [aot.make(_smallest_microbatches(config, meshes[-1]), topology, devices)]
    fitting = [plan for plan in tried if plan.fits]
    return (
        min(fitting, key=seconds)
        if fitting
        else min(tried, key=lambda plan: plan.peak_hbm_gib or math.inf)
    )


def check(config: Config, topology: Topology) -> None:
    """Raises UserError where no mesh of these slices is for this model and batch.

    Nothing is compiled.
    """
    next(_meshes(config, topology))


def smallest(
    config: Config, kind: str, devices_of: Callable[[Topology], Sequence[jax.Device]], say: Say
) -> Plan:
    """Returns the plan of the smallest slice of a kind of chip on which the stage fits, a row a
    chip at a time; where it fits on none, that of the largest slice that could be tried.

    Raises:
      UserError: there is no mesh for this model and batch, or no slice that holds its parameters.
    """
    plan = None
    for shape in hardware.CHIPS[kind].shapes:
        topology = hardware.parse_topology(f"{kind}:{shape}")
        try:
            meshes = list(_meshes(config, topology, fsdp_sizes=(-1,)))
        except UserError:
            if plan is None:
                raise
            return plan
        for mesh in meshes:
            small = _smallest_microbatches(config, mesh)
            if aot.state_gib(small, topology) > topology.chip.hbm_gib:
                continue
            plan = aot.make(small, topology, devices_of(topology))
            say(_line(plan))
            if plan.fits:
                return plan
    if plan is None:
        raise UserError(
            f"no {kind} slice up to {topology.name} holds the parameters of {config.name} "
            f"{config.stage}"
        )
    return plan


def seconds(plan: Plan) -> float:
    """Returns an estimate of a step's seconds, to compare layouts: the model's FLOPs and those made
    twice at half of the peak, and then, as if nothing overlapped, what is sent over the links."""
    again = {"none": 0.0, "dots": 0.1, "full": 1.0}[plan.config.model.remat]
    forward = (plan.flops["vision"] + plan.flops["llm"]) / 3
    computing = (sum(plan.flops.values()) + again * forward) / (plan.topology.peak_flops / 2)
    return computing + sum(_wire_seconds(plan, kind) for kind in plan.communication)


def _wire_seconds(plan: Plan, kind: str) -> float:
    sent = plan.communication[kind].bytes
    if kind == collectives.BETWEEN_SLICES:
        return sent / (NETWORK_GB * 1e9)
    # A ring passes every byte of a sum on twice: once to add it up, once to hand it round.
    return sent * (2 if kind == "all-reduce" else 1) / (plan.topology.chip.link_gb * 1e9)


def _meshes(
    config: Config, topology: Topology, fsdp_sizes: Sequence[int] = (-1, NARROW)
) -> Iterator[MeshConfig]:
    """Tensor 1, 2, 4, ...; fsdp as far as the widths divide, or only NARROW, the rest along
    data."""
    found: list[MeshConfig] = []
    tensor = 1
    while tensor <= min(MAX_TENSOR, topology.num_devices):
        for fsdp in fsdp_sizes:
            open_mesh = MeshConfig(data=-1, fsdp=fsdp, tensor=tensor)
            if (mesh := _resolved(config, open_mesh, topology)) and mesh not in found:
                found.append(mesh)
                yield mesh
        tensor *= 2
    if not found:
        llm = config.model.llm
        rows = config.train.batch_size
        raise UserError(
            f"no mesh of {topology.num_chips} chips takes a batch of {rows} rows, {llm.num_heads} "
            f"heads ({llm.num_kv_heads} of keys) and {llm.vocab_size} tokens; change "
            "config.train.batch_size"
        )


def _resolved(config: Config, open_mesh: MeshConfig, topology: Topology) -> MeshConfig | None:
    """The mesh with all its sizes, where there is one."""
    whole = aot.with_parallelism(config, open_mesh, 1, "full")
    try:
        sizes = mesh_lib.resolve_sizes(
            whole.mesh, whole.model, whole.train, topology.num_devices, topology.num_slices
        )
        mesh = MeshConfig(**sizes._asdict())
        aot.check(_smallest_microbatches(config, mesh), topology)
    except UserError:  # Heads or tokens that do not divide over tensor, or the batch over the rest.
        return None
    return mesh


def _smallest_microbatches(config: Config, mesh: MeshConfig) -> Config:
    """The layout that needs the least memory on a mesh: one row a chip at a time, everything
    computed twice."""
    rows = config.train.batch_size // (mesh.data * mesh.fsdp)
    return aot.with_parallelism(config, mesh, max(rows, 1), "full")


def _plans_of(
    config: Config, mesh: MeshConfig, topology: Topology, devices: Sequence[jax.Device], say: Say
) -> Iterator[Plan]:
    """From the layout that needs the least memory to ones that compute less twice and gather
    parameters less often."""
    small = _smallest_microbatches(config, mesh)
    held = aot.state_gib(small, topology)
    limit = topology.chip.hbm_gib
    if held > limit:
        say(
            f"{_name(mesh)}: {held:.1f} GiB of parameters, gradients and optimizer state of "
            f"{limit} GiB"
        )
        return
    plan = aot.make(small, topology, devices)
    say(_line(plan))
    yield plan
    if not plan.fits:
        return
    for remat in ("full", "dots", "none"):
        # A guess by what the plan before took, and where it was too bold another by its own plan.
        for _ in range(2):
            candidate = aot.with_parallelism(
                config, mesh, small.train.grad_accum_steps // _microbatch_size(plan, held), remat
            )
            if candidate == plan.config:
                break
            plan = aot.make(candidate, topology, devices)
            say(_line(plan))
            yield plan
            if plan.fits or plan.peak_hbm_gib is None:
                break
        if not plan.fits:
            return


def _microbatch_size(plan: Plan, held: float) -> int:
    """How many rows a chip could take at a time, if each needs what one of `plan` does."""
    train = plan.config.train
    limit = plan.topology.chip.hbm_gib
    rows = train.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    a_row = max(plan.peak_hbm_gib - held, 1e-3) * train.grad_accum_steps / rows
    return max((size for size in _divisors(rows) if size * a_row <= SAFE * limit - held), default=1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _name(mesh: MeshConfig) -> str:
    return f"data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}"


def _line(plan: Plan) -> str:
    train = plan.config.train
    rows = train.batch_size // train.grad_accum_steps // (plan.mesh["data"] * plan.mesh["fsdp"])
    peak = "more than there is" if plan.peak_hbm_gib is None else f"{plan.peak_hbm_gib:.2f} GiB"
    verdict = f"{seconds(plan):.1f} s a step" if plan.fits else "does not fit"
    return (
        f"{plan.topology.name}  {_name(plan.config.mesh)}, {rows} rows at a time, remat "
        f"{plan.config.model.remat}: {peak}, {verdict}"
    )
