"""Which mesh, microbatch, rematerialisation and chunk size a stage should have on a slice: the
likeliest are compiled, and the best taken."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import aot, flops, hardware
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.candidates import CHUNK_SIZES_MIB, SAFE, Candidate, Stage, Tried
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.train import state

Say = Callable[[str], None]
# An fsdp axis that leaves widths at least a tile of the chip's registers wide; copies along data.
NARROW = 16
# Beyond it a chip's shard of a matmul is too small to hide what it has to wait for.
MAX_TENSOR = 8
MAX_COMPILED = 8
MAX_MINUTES = 25
"""No compilation is begun that would likely end later than that after the first."""
MIN_SECONDS = 1.0
"""What takes less was no compilation."""
GIB_A_COMPILATION = 6
"""Memory of this machine, in GiB, that a compilation of the 8B stage takes."""


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
          say: is told a line of each plan, and of what is to come.

        Raises:
          UserError: there is no mesh for this model and batch.
        """
        held = self.held_gib()
        limit = self.topology.chip.hbm_gib
        for mesh in held:
            if held[mesh] > limit:
                say(
                    f"{_name(mesh)}: {held[mesh]:.1f} GiB of parameters, gradients and optimizer "
                    f"state of {limit} GiB"
                )
        fitting = {mesh: gib for mesh, gib in held.items() if gib <= limit}
        tried = Tried(self.topology, list(self._stage(fitting).candidates()) if fitting else [])
        self._compile_likeliest(tried, devices, say)
        if not any(plan.fits for plan in tried.plans.values()):
            # What needs the least memory, to fit or to say by how much it does not.
            least = self._least(min(held, key=held.__getitem__))
            config = self.config_of(least)
            if config not in [plan.config for plan in tried.plans.values()]:
                tried.plans[least] = aot.start(config, self.topology, devices)()
                say(_line(tried.plans[least]))
        return tried.best()

    def held_gib(self) -> dict[MeshConfig, float]:
        """Returns the meshes with the GiB a device of what is always held; UserError where there is
        no mesh."""
        return {
            mesh: aot.state_gib(self.config_of(self._least(mesh)), self.topology)
            for mesh in self.meshes()
        }

    def meshes(self, fsdp_sizes: Sequence[int] = (-1, NARROW)) -> Iterator[MeshConfig]:
        """Yields meshes that take the model and the batch: tensor 1, 2, 4, ...; fsdp as far as the
        widths divide (-1), or only NARROW, the rest along data. UserError where there is none."""
        found: list[MeshConfig] = []
        problem = ""
        tensor = 1
        while tensor <= min(MAX_TENSOR, self.topology.num_devices):
            for fsdp in fsdp_sizes:
                try:
                    mesh = self._resolved(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
                except UserError as err:  # What does not divide: heads or tokens, else the batch.
                    problem = problem or str(err)
                    continue
                if mesh not in found:
                    found.append(mesh)
                    yield mesh
            tensor *= 2
        if not found:
            # The first of them, without tensor, is what most models have.
            raise UserError(
                f"no mesh of {self.topology.num_chips} chips takes a batch of "
                f"{self.config.train.batch_size} sequences; {problem}"
            )

    def smallest_microbatches(self, mesh: MeshConfig) -> Config:
        """Returns the config that needs the least memory on a mesh but for its chunks: microbatches
        of one sequence a chip, and everything computed again in the backward pass that can be."""
        least = dataclasses.replace(
            self._least(mesh), chunk_size_mib=self.config.model.chunk_size_mib
        )
        return self.config_of(least)

    def config_of(self, one: Candidate) -> Config:
        """Returns the stage's config that computes as a candidate does."""
        config = self.config
        return dataclasses.replace(
            config,
            mesh=one.mesh,
            model=dataclasses.replace(
                config.model, remat=one.remat, chunk_size_mib=one.chunk_size_mib
            ),
            train=dataclasses.replace(config.train, grad_accum_steps=one.grad_accum_steps),
        )

    def _least(self, mesh: MeshConfig) -> Candidate:
        """The candidate of a mesh that needs the least memory."""
        sequences = self.config.train.batch_size // (mesh.data * mesh.fsdp)
        return Candidate(mesh, max(sequences, 1), "full", CHUNK_SIZES_MIB[-1])

    def _resolved(self, open_mesh: MeshConfig) -> MeshConfig:
        """The mesh with all its sizes; UserError where there is none."""
        # The whole batch at once: microbatches are chosen for the mesh, not the other way round.
        whole = dataclasses.replace(self.config.train, grad_accum_steps=1)
        mesh = aot.mesh_on(self.topology, open_mesh, self.config.model, whole)
        aot.check(self.smallest_microbatches(mesh), self.topology)
        return mesh

    def _stage(self, held: dict[MeshConfig, float]) -> Stage:
        """What rough ideas are made from."""
        config = self.config_of(self._least(next(iter(held))))
        mesh = mesh_lib.abstract(
            config.mesh,
            config.model,
            config.train,
            self.topology.num_devices,
            self.topology.num_slices,
        )
        params = state.abstract_params(vlm.VLM(config.model), mesh, config.train, config.lora)
        num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        by_component = flops.step_flops(config, params)
        return Stage(self.config, self.topology, by_component, num_params, held)

    def _compile_likeliest(self, tried: Tried, devices: Sequence[jax.Device], say: Say) -> None:
        """Compiles candidates, several at a time, until none that is left looks faster."""
        workers = _num_workers()
        began = time.monotonic()
        say(
            f"{len(tried.candidates):,} candidates; compiling {MAX_COMPILED} at most, {workers} at "
            f"a time, for {MAX_MINUTES} min at most"
        )
        slowest = 0.0
        pool = futures.ThreadPoolExecutor(workers)
        try:
            while len(tried.plans) < MAX_COMPILED:
                elapsed = time.monotonic() - began
                picked = tried.likeliest(min(workers, MAX_COMPILED - len(tried.plans)))
                if not picked or elapsed + slowest > 60 * MAX_MINUTES:
                    break
                for one in picked:
                    say(f"compiling {_describe(one)}, roughly {one.seconds:.2f} s a step")
                # Traced here, since a mesh is entered by thread; compiled in the pool.
                starts = [aot.start(self.config_of(one), self.topology, devices) for one in picked]
                for one, plan in zip(picked, pool.map(lambda start: start(), starts), strict=True):
                    tried.plans[one] = plan
                    say(_line(plan))
                took = time.monotonic() - began - elapsed
                # Plans that are on disk tell nothing of how long a compilation takes.
                slowest = max(slowest, took if took > MIN_SECONDS else 0.0)
                say(_progress(len(tried.plans), time.monotonic() - began, slowest, workers))
        finally:
            # Whoever interrupts a search does not wait for compilations, which take minutes.
            pool.shutdown(wait=False, cancel_futures=True)


def _num_workers() -> int:
    """How many compilations this machine has processors and memory for."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / aot.GIB
    return max(1, min(os.cpu_count() or 1, int(free / GIB_A_COMPILATION), 4))


def _progress(done: int, elapsed: float, slowest: float, workers: int) -> str:
    """How far the search is, and how long it takes at most."""
    rounds = math.ceil((MAX_COMPILED - done) / workers)
    left = max(60 * MAX_MINUTES - elapsed, 0.0)
    if slowest:
        left = min(rounds * slowest, left)
    return f"{done} compiled in {elapsed / 60:.1f} min, at most {left / 60:.0f} min left"


def _describe(one: Candidate) -> str:
    return (
        f"{_name(one.mesh)}, grad_accum_steps {one.grad_accum_steps}, remat {one.remat}, "
        f"chunk_size_mib {one.chunk_size_mib:g}"
    )


def would_fit(plan: Plan) -> tuple[Topology, Candidate] | None:
    """Returns what looks as if it would fit where a plan does not: the fastest on its slice, or
    else on the smallest larger one, by rough ideas that are corrected by what the plan needs; None
    where nothing does."""
    config = plan.config
    topology = plan.topology
    own = Candidate(
        config.mesh,
        config.train.grad_accum_steps,
        config.model.remat,
        config.model.chunk_size_mib,
    )
    held = {config.mesh: aot.state_gib(config, topology)}
    own = Stage(config, topology, plan.flops, plan.num_params, held).judged(own)
    factor = (plan.peak_hbm_gib or 1.1 * topology.chip.hbm_gib) / own.gib
    for larger in hardware.at_least(topology):
        search = Search(config, larger)
        try:
            held = search.held_gib()
        except UserError:  # No mesh there takes the batch.
            continue
        candidates = Stage(config, larger, plan.flops, plan.num_params, held).candidates()
        limit = SAFE * topology.chip.hbm_gib
        likely = [one for one in candidates if one.gib * factor <= limit]
        if likely:
            return larger, min(likely, key=lambda one: (one.seconds, one.gib))
    return None


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
            plan = aot.start(small, topology, devices_of(topology))()
            say(_line(plan))
            if plan.fits:
                return plan
    if plan is None:
        raise UserError(
            f"no {kind} slice up to {topology.name} holds the parameters of {config.name} "
            f"{config.stage}"
        )
    return plan


def _name(mesh: MeshConfig) -> str:
    return f"data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}"


def _line(plan: Plan) -> str:
    train = plan.config.train
    model = plan.config.model
    rows = train.batch_size // train.grad_accum_steps // (plan.mesh["data"] * plan.mesh["fsdp"])
    peak = "more than there is" if plan.peak_hbm_gib is None else f"{plan.peak_hbm_gib:.2f} GiB"
    verdict = f"{plan.step_seconds:.3g} s a step" if plan.fits else "does not fit"
    return (
        f"{plan.topology.name}  {_name(plan.config.mesh)}, {rows} sequences at a time, remat "
        f"{model.remat}, chunk_size_mib {model.chunk_size_mib:g}: {peak}, {verdict}"
    )
