"""What a stage needs on a machine that is not there: its real training step, compiled for a TPU
slice.

Without the TPU's compiler the same step is compiled for as many CPU devices: parameters, optimizer
state and FLOPs are exact then; memory and collectives are what the CPU's compiler makes of it, an
estimate.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from alignvlm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import collectives, flops, hlo, links, stopping, summaries, timing
from alignvlm_jax.plan.collectives import Communication
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.plan.links import Links
from alignvlm_jax.plan.padding import Used
from alignvlm_jax.plan.stopping import Stopping
from alignvlm_jax.plan.timing import Timing
from alignvlm_jax.train import optim, state, step

GIB = 2**30
ASSUMED_MFU = 0.4
"""Fraction of the peak that a step is taken to reach where no program of the TPU's tells its
time."""
PLANNED = ("topology", "config", "price_per_chip_hour", "used")
SECONDS_A_DAY = 24 * 60 * 60


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage on one slice or several.

    Bytes are those of one device, FLOPs those of the whole batch.

    `state_gib` is all that a checkpoint holds. `peak_hbm_gib` is None where the compiler gave up
    without a number; `is_estimate` where it was not the TPU's. `timing` is None where there is no
    program of the TPU's. No cost is known without a `price_per_chip_hour`, and what is
    padding not without the stage's data, which is `used`. `host_gib` is what lies in the host's
    memory for a device; the seconds that it takes to move it are in no plan.
    """

    topology: Topology
    config: Config
    mesh: dict[str, int]
    num_params: int
    num_trained: int
    param_gib: float
    optimizer_gib: float
    state_gib: float
    peak_hbm_gib: float | None
    fits: bool
    is_estimate: bool
    flops: dict[str, float]
    communication: dict[str, Communication]
    timing: Timing | None = None
    host_gib: float = 0.0
    price_per_chip_hour: float | None = None
    used: Used | None = None

    @property
    def step_seconds(self) -> float:
        """The seconds of a step: what the program tells, or else those at ASSUMED_MFU."""
        return self.timing.step if self.timing else self._ideal_seconds / ASSUMED_MFU

    @property
    def mfu(self) -> float:
        """The fraction of the chips' peak that a step reaches."""
        return self._ideal_seconds / self.step_seconds

    @property
    def useful_mfu(self) -> float | None:
        """The MFU without what is spent on padding; None where nobody knows how much is."""
        return self.used and self.mfu * self.used.of_flops(self.flops)

    @property
    def days(self) -> float:
        """The days that the stage's steps take."""
        return self.config.train.num_steps * self.step_seconds / SECONDS_A_DAY

    @property
    def chip_hours(self) -> float:
        """The chip-hours of the stage."""
        return 24 * self.days * self.topology.num_chips

    @property
    def cost(self) -> float | None:
        """What the stage costs, in the price's currency; None without a price."""
        return self.price_per_chip_hour and self.chip_hours * self.price_per_chip_hour

    @property
    def _ideal_seconds(self) -> float:
        return sum(self.flops.values()) / self.topology.peak_flops

    def stopping(self) -> Stopping:
        """Returns what checkpoints and stops cost."""
        return stopping.make(
            self.config.train, self.state_gib, self.topology.num_hosts, self.step_seconds
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        train = self.config.train
        chip = self.topology.chip
        stop = self.stopping()
        return {
            "config": self.config.name,
            "stage": self.config.stage,
            "topology": self.topology.name,
            "num_slices": self.topology.num_slices,
            "num_chips": self.topology.num_chips,
            "num_devices": self.topology.num_devices,
            "mesh": self.mesh,
            "batch_size": train.batch_size,
            "grad_accum_steps": train.grad_accum_steps,
            "seq_len": self.config.data.seq_len,
            "remat": self.config.model.remat,
            "grad_reduce_dtype": train.grad_reduce_dtype,
            "fits": self.fits,
            "is_estimate": self.is_estimate,
            "peak_hbm_gib": self.peak_hbm_gib,
            "hbm_limit_gib": chip.hbm_gib,
            "param_gib": self.param_gib,
            "optimizer_gib": self.optimizer_gib,
            "host_gib": self.host_gib,
            "num_params": self.num_params,
            "num_trained": self.num_trained,
            "step_tflops": sum(self.flops.values()) / 1e12,
            "step_tflops_by_part": {part: value / 1e12 for part, value in self.flops.items()},
            "collectives": {
                kind: {"count": communication.count, "gib": communication.bytes / GIB}
                for kind, communication in self.communication.items()
            },
            "num_steps": train.num_steps,
            "step_seconds": self.step_seconds,
            "seconds": self.timing.to_json() if self.timing else None,
            "mfu": self.mfu,
            "useful_mfu": self.useful_mfu,
            "used": self.used and self.used._asdict(),
            "sequences_per_second_a_host": train.batch_size
            / self.topology.num_hosts
            / self.step_seconds,
            "days": self.days,
            "chip_hours": self.chip_hours,
            "price_per_chip_hour": self.price_per_chip_hour,
            "cost": self.cost,
            "checkpoint": {
                "gib": self.state_gib,
                "gib_a_host": stop.gib_a_host,
                "seconds": stop.save,
                "assumed_gb_per_second_a_host": stopping.HOST_WRITE_GB,
            },
            "stop_seconds": stop.needed,
            "stops_in_time": stop.in_time,
            "minutes_lost": {"average": stop.lost_on_average / 60, "most": stop.lost_at_most / 60},
        }


def mesh_on(
    topology: Topology, mesh: MeshConfig, model: ModelConfig, train: TrainConfig | None
) -> MeshConfig:
    """Returns the mesh with the sizes of all its axes on slices; UserError where it does not fit
    them, or the batch or the model."""
    # By the slices planned for: devices that stand in for them know of none.
    sizes = mesh_lib.resolve_sizes(mesh, model, train, topology.num_devices, topology.num_slices)
    return MeshConfig(**sizes._asdict())


def check(config: Config, topology: Topology) -> None:
    """Raises UserError where the stage does not fit on slices. Nothing is compiled."""
    mesh = mesh_lib.abstract(
        config.mesh, config.model, config.train, topology.num_devices, topology.num_slices
    )
    # Called for what they raise: of weights that do not divide, and of patterns that no weight has.
    params = state.abstract_params(vlm.VLM(config.model), mesh, config.train, config.lora)
    state.trainable_paths(config.train, config.stage, params)


def start(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> Callable[[], Plan]:
    """Traces the training step for the devices of a slice, or for as many of another kind; returns
    what compiles it, in whatever thread, and gives the plan. What was compiled before is neither
    traced nor compiled again (`summaries`).

    Raises:
      UserError: the mesh does not fit the devices, the batch or the model.
    """
    resolved = mesh_on(topology, config.mesh, config.model, config.train)
    config = dataclasses.replace(config, mesh=resolved)
    name = summaries.key(config, topology, devices[0].platform)
    if known := summaries.load(name):
        plan = Plan(topology=topology, config=config, **_of_summary(known))
        return lambda: plan
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train, devices)) as mesh:
        # Lowered within the mesh: attention chooses its kernel by the platform of the mesh entered.
        abstract = state.abstract_state(model, config.train, tx, mesh, config.lora)
        lowered = step.lower_train_step(model, config, tx, abstract, mesh)
    trainable = state.trainable_paths(config.train, config.stage, abstract.params)
    sizes = {path: math.prod(x.shape) for path, x in state.flatten(abstract.params).items()}
    traced = Plan(
        topology=topology,
        config=config,
        mesh=dict(mesh.shape),
        num_params=sum(sizes.values()),
        num_trained=sum(sizes[path] for path in trainable),
        param_gib=gib_of_a_device(abstract.params),
        optimizer_gib=gib_of_a_device(abstract.opt_state),
        host_gib=gib_of_a_device(abstract.opt_state, on_host=True),
        state_gib=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        / GIB,
        peak_hbm_gib=None,
        fits=False,
        is_estimate=devices[0].platform != "tpu",
        # Of the plain program, whatever was compiled: what is computed twice does not count.
        flops=flops.step_flops(config, abstract.params),
        communication={},
    )

    def finish() -> Plan:
        compiled, peak_gib = compile_program(lowered, traced.is_estimate)
        program = hlo.parse(compiled.as_text() if compiled else "")
        on_links = Links(topology, links.coordinates(list(mesh.devices.flat)))
        is_timed = compiled is not None and not traced.is_estimate
        plan = dataclasses.replace(
            traced,
            peak_hbm_gib=peak_gib,
            fits=peak_gib is not None and peak_gib <= topology.chip.hbm_gib,
            communication=collectives.communication(collectives.find(program)),
            timing=timing.estimate(program, on_links) if is_timed else None,
        )
        summaries.save(name, _summary(plan))
        return plan

    return finish


def _summary(plan: Plan) -> dict[str, Any]:
    """A plan as plain values, without what it is the plan of."""
    values = {name: getattr(plan, name) for name in vars(plan) if name not in PLANNED}
    return values | {"timing": plan.timing and vars(plan.timing)}


def _of_summary(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan out of its summary."""
    sent = {kind: Communication(*one) for kind, one in values["communication"].items()}
    return values | {
        "communication": sent,
        "timing": values["timing"] and Timing(**values["timing"]),
    }


def state_gib(config: Config, topology: Topology) -> float:
    """Returns the GiB a device of parameters, optimizer state and gradients: less than that is
    never enough."""
    mesh = mesh_lib.abstract(
        config.mesh, config.model, config.train, topology.num_devices, topology.num_slices
    )
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    abstract = state.abstract_state(vlm.VLM(config.model), config.train, tx, mesh, config.lora)
    trainable = state.trainable_paths(config.train, config.stage, abstract.params)
    trained, _ = state.split(abstract.params, trainable)
    # Gradients have the shapes, dtypes and shardings of the parameters that are trained.
    return gib_of_a_device((abstract, trained))


def compile_program(
    lowered: jax.stages.Lowered, is_estimate: bool
) -> tuple[jax.stages.Compiled | None, float | None]:
    """Returns the program and the GiB that it needs on a device; where that is more than there is,
    no program and what the compiler says that it would need, if it does."""
    try:
        # In a thread of its own: a Ctrl-C would be heard only when it is done, minutes later.
        compiled = ThreadPoolExecutor(1).submit(lowered.compile).result()
    except jax.errors.JaxRuntimeError as err:
        # That a program does not fit is a result; all else is an error of ours.
        if "RESOURCE_EXHAUSTED" not in str(err):
            raise
        return None, _requested_gib(str(err))
    return compiled, _peak_gib(compiled, is_estimate)


def _peak_gib(compiled: jax.stages.Compiled, is_estimate: bool) -> float:
    memory = compiled.memory_analysis()
    if is_estimate:  # CPU's compiler counts no temporaries in the peak.
        # Outputs in the place of donated arguments are counted with these.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (memory.argument_size_in_bytes + new + memory.temp_size_in_bytes) / GIB
    # Not the sum: buffers that live at different times share memory.
    return memory.peak_memory_in_bytes / GIB


def _requested_gib(message: str) -> float | None:
    """The GiB that a program was refused, out of the compiler's message."""
    # "Used 20.10G of 15.75G hbm", or "(20.10G) exceeds".
    found = re.search(r"Used ([\d.]+)G of|\(([\d.]+)G\) exceeds", message)
    return float(found[1] or found[2]) if found else None


def gib_of_a_device(abstract: Any, *, on_host: bool = False) -> float:
    """Returns what a device holds of a tree of abstract arrays with shardings, or what its host
    holds of it for the device."""
    return (
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(abstract)
            if (x.sharding.memory_kind == state.HOST_MEMORY) is on_host
        )
        / GIB
    )
