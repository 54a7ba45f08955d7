"""What could be chosen for a stage on a slice, and a rough idea of how long a step of each would
take and how much memory it would need: so that few have to be compiled.

Its numbers only order candidates and leave out those that are far off; what a search reports comes
from the compiler. Each that was compiled corrects the others (`search`).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp

from alignvlm_jax.config import Config, LLMConfig, MeshConfig, VisionConfig
from alignvlm_jax.plan import hardware
from alignvlm_jax.plan.aot import GIB, Plan
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.plan.timing import KERNEL_UTILISATION, LANES

CHUNK_SIZES_MIB = (1024, 512, 256, 64)
"""Sizes of vocabulary chunks that are tried, the fastest first: a chunk reads and writes the sums
of all rows, however few columns it has."""
MATMUL_UTILISATION = 0.75  # Of the peak, by large matmuls.
GAIN = 0.02
"""Fraction of a step by which what was not compiled has to look faster than the best that was."""
SAFE = 0.9
"""Fraction of the memory that a rough idea may come to before anything was compiled."""
POLICIES = ("none", "attention+qkv+mlp", "dots", "attention+qkv", "full")
"""Remat policies that are tried: others that save by name lie close to one of these."""
# Fraction of a forward pass that the backward pass computes again, and what of the results of a
# layer's matmuls is saved for it, in memory: without a policy also what lies between them. Of what
# is saved by name both follow from its sizes.
_AGAIN = {"none": 0.0, "dots": 0.1, "full": 1.0}
_SAVED = {"none": 3.5, "dots": 1.0, "full": 0.0}
# Bytes that a chunk of the vocabulary moves for each entry of a row: forward the row in bfloat16,
# and a float32 sum, read and written; backward the row, its gradient, and such a sum.
_ROW_BYTES = (2 + 8) + (2 + 2 + 8)
# And for each of its logits: float32 logits and their gradients, written and read, forward and
# backward, and in bfloat16 what the matmuls are given.
_LOGIT_BYTES = (8 + 4) + (8 + 8 + 4 + 6)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to compute a stage's step; `seconds` and `gib` are the rough idea, of a step and of a
    device."""

    mesh: MeshConfig
    grad_accum_steps: int
    remat: str
    chunk_size_mib: float
    seconds: float = math.inf
    gib: float = math.inf


@dataclasses.dataclass(frozen=True)
class Stage:
    """What of a stage the rough idea is made from: FLOPs of a step by component, the number of its
    parameters, and GiB of state and gradients a device by mesh."""

    config: Config
    topology: Topology
    flops: Mapping[str, float]
    num_params: int
    held_gib: Mapping[MeshConfig, float]

    def candidates(self) -> Iterator[Candidate]:
        """Yields what can be chosen: meshes, microbatches, remat policies, and chunk sizes."""
        for mesh in self.held_gib:
            sequences = self.config.train.batch_size // (mesh.data * mesh.fsdp)
            for rows in _divisors(sequences):
                for remat in POLICIES:
                    for chunk in self._chunk_sizes(mesh, rows):
                        yield self.judged(Candidate(mesh, sequences // rows, remat, chunk))

    def judged(self, one: Candidate) -> Candidate:
        """Returns a candidate with the rough idea of its seconds and GiB."""
        return dataclasses.replace(one, seconds=self._seconds(one), gib=self._gib(one))

    def _chunk_sizes(self, mesh: MeshConfig, rows: int) -> Sequence[float]:
        """Chunk sizes that differ; the config's own alone where it takes the vocabulary whole."""
        if self.config.model.vocab_impl == "plain":
            return (self.config.model.chunk_size_mib,)
        # One that holds all rows of a device is as good as a larger one.
        whole = _mib(self._vocabulary_rows(rows), self.config.model.llm.vocab_size / mesh.tensor)
        larger = [size for size in CHUNK_SIZES_MIB if size > whole]
        return (*larger[-1:], *(size for size in CHUNK_SIZES_MIB if size <= whole))

    def _vocabulary_rows(self, rows: int) -> int:
        """Rows of the larger of the head and what the connector makes of patches."""
        data = self.config.data
        patches = data.max_tiles * self.config.model.vision.num_patches
        return rows * max(data.seq_len, patches)

    def _rows(self, one: Candidate) -> int:
        mesh = one.mesh
        return self.config.train.batch_size // one.grad_accum_steps // (mesh.data * mesh.fsdp)

    def _seconds(self, one: Candidate) -> float:
        computing = self._computing(one)
        gathers, sums = self._sent(one)
        if len(self.topology.sizes) == 3 and one.mesh.fsdp == self.topology.devices_a_slice:
            # Over all chips of a cube the TPU compiler makes all-reduces of gathers: twice the
            # bytes, and nothing runs beside them.
            return computing + 2 * gathers + sums
        return computing + max(gathers - computing, 0.0) + sums

    def _computing(self, one: Candidate) -> float:
        """Seconds of what the chips compute."""
        chip = self.topology.chip
        again, runs_kernels = self._again(one.remat)
        attention = self._attention_flops()
        towers = (1 + again / 3) * (self.flops["vision"] + self.flops["llm"] - attention)
        peak = self.topology.peak_flops
        # Kernels make the logits of the backward pass twice: 9 matmuls for the 6 that count.
        width = self.config.model.llm.head_dim
        kernels = attention * (9 + 2 * runs_kernels) / 6
        kernels *= LANES * math.ceil(width / LANES) / width / KERNEL_UTILISATION
        vocabulary = self.flops["connector"] + self.flops["loss"]
        llm = self.config.model.llm
        columns = one.chunk_size_mib * 2**20 / (4 * self._vocabulary_rows(self._rows(one)))
        columns = min(columns, llm.vocab_size / one.mesh.tensor)
        # A logit of ALIGN has two matmuls of the LLM's width, of 6 FLOPs an entry.
        logits = vocabulary / self.topology.num_devices / (12 * llm.width)
        moved = logits * (_ROW_BYTES * llm.width / columns + _LOGIT_BYTES)
        return (
            (towers / MATMUL_UTILISATION + kernels) / peak
            # ALIGN makes one of its 7 matmuls twice, the loss one of 4.
            + vocabulary * 5 / 4 / MATMUL_UTILISATION / peak
            + moved / (chip.hbm_gb * 1e9)
        )

    def _again(self, remat: str) -> tuple[float, bool]:
        """What of the towers' forward pass is computed again, and whether kernels run again: no
        other policy saves what they do."""
        if remat in _AGAIN:
            return _AGAIN[remat], remat != "none"
        llm = self.config.model.llm
        saved = _llm_sizes(llm)
        # A weight is a multiplication of each token; attention's output has no weights.
        weights = {"attention": 0, "qkv": llm.width * saved["qkv"], "mlp": llm.width * saved["mlp"]}
        whole = sum(weights.values()) + llm.width * (saved["attention"] + llm.mlp_width)
        names = remat.split("+")
        return 1 - sum(weights[name] for name in names) / whole, "attention" not in names

    def _attention_flops(self) -> float:
        """Of the decoder's attention, as they count: half of all pairs, forward and backward."""
        llm = self.config.model.llm
        pairs = self.config.train.batch_size * self.config.data.seq_len**2
        return 6 * llm.num_layers * pairs * llm.num_heads * llm.head_dim

    def _sent(self, one: Candidate) -> tuple[float, float]:
        """Seconds of the links for gathers, which run beside the computation, and for sums."""
        mesh = one.mesh
        wrapped = sum(2 if wraps else 1 for wraps in self.topology.wraps)
        link = self.topology.chip.link_gb * 1e9 / (2 * len(self.topology.sizes))
        bandwidth = link * wrapped
        parameters = self.num_params / mesh.tensor
        # In bfloat16, for the forward and for the backward pass of every microbatch.
        apart = (mesh.fsdp - 1) / mesh.fsdp
        gathers = one.grad_accum_steps * 2 * 2 * parameters * apart / bandwidth
        entry = jnp.dtype(self.config.train.grad_reduce_dtype).itemsize
        sums = one.grad_accum_steps * entry * parameters * apart / bandwidth
        # Over data once, in float32, of the part that is a device's own; slices have the network.
        between = self.topology.num_slices
        copies = mesh.data // between
        own = 4 * parameters / mesh.fsdp
        sums += 2 * own * (copies - 1) / copies / bandwidth
        sums += 2 * own * (between - 1) / between / (hardware.NETWORK_GB * 1e9)
        # Two sums of all activations a layer along tensor, forward and backward, on one axis.
        llm = self.config.model.llm
        tokens = self._rows(one) * one.grad_accum_steps * self.config.data.seq_len
        split = (mesh.tensor - 1) / mesh.tensor
        sums += 4 * llm.num_layers * 2 * 2 * tokens * llm.width * split / (2 * link)
        return gathers, sums

    def _gib(self, one: Candidate) -> float:
        """GiB of a device."""
        model = self.config.model
        llm = model.llm
        vision = model.vision
        rows = self._rows(one)
        tokens = rows * self.config.data.seq_len
        patches = rows * self.config.data.max_tiles * vision.num_patches
        heads = 2 * (llm.num_heads + llm.num_kv_heads) * llm.head_dim
        wide = (3 * llm.mlp_width + heads) / one.mesh.tensor
        hidden = 5 * vision.width + 2 * vision.mlp_width / one.mesh.tensor
        if one.remat in _SAVED:
            saved = _SAVED[one.remat] * (llm.width + wide)
            vision_saved = _SAVED[one.remat] * hidden
        else:
            names = one.remat.split("+")
            saved = sum(_llm_sizes(llm)[name] for name in names) / one.mesh.tensor
            vision_saved = sum(_vision_sizes(vision)[name] for name in names) / one.mesh.tensor
        activations = 2 * tokens * llm.num_layers * (llm.width + saved)
        activations += 2 * patches * vision.num_layers * (vision.width + vision_saved)
        # Of the layer at work, with gradients; and of the vocabulary: two matrices in bfloat16, a
        # device's shards of their float32 gradients, and a few chunks.
        working = 2 * tokens * 2 * (wide + 2 * llm.width)
        entries = llm.vocab_size * llm.width / one.mesh.tensor
        vocabulary = (4 + 8 / one.mesh.fsdp) * entries
        chunks = 4 * one.chunk_size_mib * 2**20
        return self.held_gib[one.mesh] + (activations + working + vocabulary + chunks) / GIB


class Tried:
    """Candidates, and the plans of those that were compiled, by which the rough ideas of the others
    are corrected."""

    def __init__(self, topology: Topology, candidates: list[Candidate]):
        self.candidates = candidates
        self.plans: dict[Candidate, Plan] = {}
        self._limit = topology.chip.hbm_gib

    def best(self) -> Plan:
        """Returns the fastest plan that fits, or the one that misses by the least."""
        fitting = {one: plan for one, plan in self.plans.items() if plan.fits}
        if fitting:
            return fitting[min(fitting, key=self._compiled_seconds)]
        return min(self.plans.values(), key=lambda plan: plan.peak_hbm_gib or math.inf)

    def likeliest(self, count: int) -> list[Candidate]:
        """Returns the candidates to compile next, corrected: those that look fastest of the ones
        that look as if they fit, no two of one mesh, remat and microbatch; none where none looks
        faster than the best."""
        corrected = [self._corrected(one) for one in self.candidates if one not in self.plans]
        known = {_kind(one) for one, plan in self.plans.items() if plan.fits}
        fits = [self._compiled_seconds(one) for one, plan in self.plans.items() if plan.fits]
        enough = min(fits, default=math.inf) * (1 - GAIN)
        limit = self._limit * (1 if self.plans else SAFE)
        found: dict[tuple, Candidate] = {}
        for one in sorted(corrected, key=lambda one: (one.seconds, one.gib)):
            if one.gib <= limit and one.seconds < enough and _kind(one) not in known:
                found.setdefault(_kind(one), one)
        # Under its own idea a plan is known by.
        originals = {_identity(one): one for one in self.candidates}
        return [originals[_identity(one)] for one in list(found.values())[:count]]

    def _corrected(self, one: Candidate) -> Candidate:
        """A candidate with seconds and GiB times what those of the same remat policy came to. Of a
        policy that was not compiled yet the rough idea stands, unless others were faster than
        theirs: it may be what its idea says."""
        if not self.plans:
            return one
        seconds, gib = self._ratios(one.remat)
        if seconds:
            return dataclasses.replace(
                one,
                seconds=one.seconds * sum(seconds) / len(seconds),
                gib=one.gib * max(gib),
            )
        seconds, gib = self._ratios()
        return dataclasses.replace(
            one, seconds=one.seconds * min(1.0, *seconds), gib=one.gib * max(gib)
        )

    def _ratios(self, remat: str = "") -> tuple[list[float], list[float]]:
        """Seconds and GiB of what was compiled of a policy, or at all, by their rough ideas."""
        alike = [one for one in self.plans if one.remat == remat or not remat]
        seconds = [self._compiled_seconds(one) / one.seconds for one in alike]
        # What did not fit, by an amount that is not known, took at least a tenth too much.
        gib = [(self.plans[one].peak_hbm_gib or 1.1 * self._limit) / one.gib for one in alike]
        return seconds, gib

    def _compiled_seconds(self, one: Candidate) -> float:
        plan = self.plans[one]
        return plan.timing.step if plan.timing else one.seconds


def _llm_sizes(llm: LLMConfig) -> dict[str, int]:
    """Numbers that a token has, in a layer, of what a policy can save by name."""
    return {
        "attention": llm.num_heads * llm.head_dim,
        "qkv": (llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim,
        "mlp": 2 * llm.mlp_width,
    }


def _vision_sizes(vision: VisionConfig) -> dict[str, int]:
    """The same of a patch."""
    return {"attention": vision.width, "qkv": 3 * vision.width, "mlp": vision.mlp_width}


def _kind(one: Candidate) -> tuple:
    return one.mesh, one.grad_accum_steps, one.remat


def _identity(one: Candidate) -> tuple:
    return *_kind(one), one.chunk_size_mib


def _mib(rows: int, columns: float) -> float:
    return 4 * rows * columns / 2**20


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
