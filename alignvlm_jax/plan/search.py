"""Which mesh, microbatch and rematerialisation a stage should have on a slice: tried with the
compiler, best taken."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import aot, hardware
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.hardware import Topology

Say = Callable[[str], None]
SAFE = 0.95  # Of the memory: where the size of a program is foretold from that of another.
# An fsdp axis that leaves widths at least a tile of the chip's registers wide; copies along data.
NARROW = 16
# Beyond it a chip's shard of a matmul is too small to hide what it has to wait for.
MAX_TENSOR = 8


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for the fastest way to train a stage on a slice or several."""

    config: Config
    topology: Topology

    def check(self) -> None:
        """Raises UserError where no mesh of these slices is for this model and batch.

        Nothing is compiled.
        """
        next(self.meshes())

    def best(self, devices: Sequence[jax.Device], say: Say) -> Plan:
        """Returns the plan that should be fastest of those that fit; where none does, the one that
        misses by the least.

        Args:
          devices: those of the slices, or as many of another kind.
          say: is told a line of each plan.

        Raises:
          UserError: there is no mesh for this model and batch.
        """
        tried: list[Plan] = []
        meshes = list(self.meshes())
        for mesh in meshes:
            tried += self._plans_of(mesh, devices, say)
        if not tried:
            # The state alone is too large on every mesh: one is compiled all the same, to say by
            # how much.
            tried = [aot.make(self.smallest_microbatches(meshes[-1]), self.topology, devices)]
        fitting = [plan for plan in tried if plan.fits]
        return (
            min(fitting, key=lambda plan: plan.step_seconds)
            if fitting
            else min(tried, key=lambda plan: plan.peak_hbm_gib or math.inf)
        )

    def meshes(self, fsdp_sizes: Sequence[int] = (-1, NARROW)) -> Iterator[MeshConfig]:
        """Yields meshes that take the model and the batch: tensor 1, 2, 4, ...; fsdp as far as the
        widths divide (-1), or only NARROW, the rest along data. UserError where there is none."""
        found: list[MeshConfig] = []
        tensor = 1
        while tensor <= min(MAX_TENSOR, self.topology.num_devices):
            for fsdp in fsdp_sizes:
                mesh = self._resolved(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
                if mesh and mesh not in found:
                    found.append(mesh)
                    yield mesh
            tensor *= 2
        if not found:
            llm = self.config.model.llm
            rows = self.config.train.batch_size
            raise UserError(
                f"no mesh of {self.topology.num_chips} chips takes a batch of {rows} rows, "
                f"{llm.num_heads} heads ({llm.num_kv_heads} of keys) and {llm.vocab_size} tokens; "
                "change config.train.batch_size"
            )

    def smallest_microbatches(self, mesh: MeshConfig) -> Config:
        """Returns the config that needs the least memory on a mesh: microbatches of one sequence a
        chip, and everything computed again in the backward pass that can be."""
        sequences = self.config.train.batch_size // (mesh.data * mesh.fsdp)
        return self._changed(mesh, max(sequences, 1), "full")

    def _changed(self, mesh: MeshConfig, grad_accum_steps: int, remat: str) -> Config:
        config = self.config
        return dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, grad_accum_steps=grad_accum_steps),
        )

    def _resolved(self, open_mesh: MeshConfig) -> MeshConfig | None:
        """The mesh with all its sizes, where there is one."""
        # The whole batch at once: microbatches are chosen for the mesh, not the other way round.
        whole = dataclasses.replace(self.config.train, grad_accum_steps=1)
        try:
            mesh = aot.mesh_on(self.topology, open_mesh, self.config.model, whole)
            aot.check(self.smallest_microbatches(mesh), self.topology)
        except UserError:  # What does not divide: heads or tokens over tensor, else the batch.
            return None
        return mesh

    def _plans_of(
        self, mesh: MeshConfig, devices: Sequence[jax.Device], say: Say
    ) -> Iterator[Plan]:
        """Yields plans of a mesh: from the one that needs the least memory on, ones that compute
        less twice and gather parameters less often."""
        small = self.smallest_microbatches(mesh)
        held = aot.state_gib(small, self.topology)
        limit = self.topology.chip.hbm_gib
        if held > limit:
            say(
                f"{_name(mesh)}: {held:.1f} GiB of parameters, gradients and optimizer state of "
                f"{limit} GiB"
            )
            return
        plan = aot.make(small, self.topology, devices)
        say(_line(plan))
        yield plan
        if not plan.fits:
            return
        # From the least memory to the most: where one does not fit, the next would not.
        for remat in ("full", "dots", "none"):
            # A guess by what the plan before took, and where it was too bold another by its own.
            for _ in range(2):
                steps = small.train.grad_accum_steps // _microbatch_size(plan, held)
                candidate = self._changed(mesh, steps, remat)
                # This has just been compiled.
                if candidate == plan.config:
                    break
                plan = aot.make(candidate, self.topology, devices)
                say(_line(plan))
                yield plan
                if plan.fits or plan.peak_hbm_gib is None:
                    break
            if not plan.fits:
                return


def smallest(
    config: Config, kind: str, devices_of: Callable[[Topology], Sequence[jax.Device]], say: Say
) -> Plan:
    """Returns the plan of the smallest slice of a kind of chip on which the stage fits, a
    sequence a chip at a time; where it fits on none, that of the largest slice that could be tried.

    Raises:
      UserError: there is no mesh for this model and batch, or no slice that holds its parameters.
    """
    plan = None
    for shape in hardware.CHIPS[kind].shapes:
        topology = hardware.parse_topology(f"{kind}:{shape}")
        search = Search(config, topology)
        try:
            meshes = list(search.meshes(fsdp_sizes=(-1,)))
        except UserError:
            if plan is None:
                raise
            return plan
        for mesh in meshes:
            small = search.smallest_microbatches(mesh)
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


def _microbatch_size(plan: Plan, held: float) -> int:
    """How many sequences a chip could take at a time, if each needs what one of `plan` does."""
    train = plan.config.train
    limit = plan.topology.chip.hbm_gib
    sequences = train.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    # What `plan` needs beside the state is that of sequences / grad_accum_steps sequences.
    of_one = max(plan.peak_hbm_gib - held, 1e-3) * train.grad_accum_steps / sequences
    fitting = (size for size in _divisors(sequences) if size * of_one <= SAFE * limit - held)
    return max(fitting, default=1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _name(mesh: MeshConfig) -> str:
    return f"data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}"


def _line(plan: Plan) -> str:
    train = plan.config.train
    rows = train.batch_size // train.grad_accum_steps // (plan.mesh["data"] * plan.mesh["fsdp"])
    peak = "more than there is" if plan.peak_hbm_gib is None else f"{plan.peak_hbm_gib:.2f} GiB"
    verdict = f"{plan.step_seconds:.2f} s a step" if plan.fits else "does not fit"
    return (
        f"{plan.topology.name}  {_name(plan.config.mesh)}, {rows} rows at a time, remat "
        f"{plan.config.model.remat}: {peak}, {verdict}"
    )
