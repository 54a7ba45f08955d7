"""The seconds of a step, told by its compiled program: what is computed, by component of the model,
and what is sent over the links.

The TPU's compiler estimates the cycles of every operation that it schedules, the time to read and
write HBM included; times the loops they stand in and over the chip's clock, these are seconds. Of
Pallas kernels it knows nothing: attention is counted by its shapes, at a stated fraction of the
peak. Collectives are those of `links`. One that runs beside computation costs what it takes longer
than the computation that it stands in; any other costs all of its time.
"""

import dataclasses
import math
from collections import Counter

from alignvlm_jax.plan import collectives, flops, hlo
from alignvlm_jax.plan.collectives import BETWEEN_SLICES
from alignvlm_jax.plan.hlo import Program, Run
from alignvlm_jax.plan.links import Links

REST = "optimizer and rest"
NAMES = {
    "vision": "vision encoder",
    "connector": "connector",
    "llm": "LLM decoder",
    "loss": "loss head",
    REST: REST,
}
"""How components are shown."""

KERNEL_UTILISATION = 0.5
"""Fraction of the peak that attention's kernel reaches at heads of LANES: an assumption. Narrower
heads leave columns of the matrix unit empty."""
LANES = 128
# Matmuls of each kernel over queries x keys: the forward pass has logits and the sum of values; the
# backward pass is two kernels, which both make the logits again.
_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class Timing:
    """The seconds of a step, by what they are spent on.

    `computing` is by component, Pallas kernels included; `attention` what these are of it. `sent`
    is what the links take, `exposed` what of it nothing hides; `network` the same of the network
    between slices.
    """

    computing: dict[str, float]
    attention: float
    sent: float
    exposed: float
    network: float
    network_exposed: float

    @property
    def step(self) -> float:
        """The seconds of a step."""
        return sum(self.computing.values()) + self.exposed + self.network_exposed

    def to_json(self) -> dict[str, object]:
        """Returns the seconds as plain values."""
        return dataclasses.asdict(self) | {"step": self.step}


def estimate(program: Program, links: Links) -> Timing:
    """Returns the seconds of a step of a program that was compiled for TPUs."""
    chip = links.topology.chip
    computing: dict[str, float] = dict.fromkeys((*flops.COMPONENTS, REST), 0.0)
    inside: Counter[str] = Counter()
    attention = 0.0
    for run in program.runs():
        if run.is_fused:  # What a fusion takes is told of the whole.
            continue
        seconds = run.times * run.op.cycles / (chip.ghz * 1e9)
        if kernel := _kernel_flops(run):
            # Over LANES: a narrower head fills only a part of the matrix unit.
            seconds = run.times * kernel / (chip.tflops * 1e12 * KERNEL_UTILISATION)
            attention += seconds
        computing[flops.component_of(run.scope) or REST] += seconds
        inside[run.computation] += seconds
    sent = {False: 0.0, True: 0.0}
    exposed = {False: 0.0, True: 0.0}
    beside: Counter[tuple[str, bool]] = Counter()
    for one in collectives.find(program):
        is_network = one.kind == BETWEEN_SLICES
        seconds = links.seconds(one)
        sent[is_network] += seconds
        if one.is_overlapped:
            beside[one.computation, is_network] += seconds
        else:
            exposed[is_network] += seconds
    # Collectives of a computation share the links, and the network is another.
    for (computation, is_network), seconds in beside.items():
        exposed[is_network] += max(seconds - inside[computation], 0.0)
    return Timing(computing, attention, sent[False], exposed[False], sent[True], exposed[True])


def _kernel_flops(run: Run) -> float:
    """FLOPs of a call of attention's kernel, as if its heads were LANES wide or a multiple; 0 of
    what is none."""
    if 'custom_call_target="tpu_custom_call"' not in run.op.rest:
        return 0.0
    matmuls = next((number for name, number in _MATMULS.items() if name in run.scope), 0)
    if not matmuls:
        return 0.0
    # "operand_layout_constraints={s8[1,19,19]{2,1,0}, ..., bf16[32,9728,64]{2,1,0}, ...}": the
    # first is the grid of blocks, and queries are the first of 3 axes or more that follow.
    shapes = hlo.arrays(run.op.rest.split("operand_layout_constraints=")[1].split("metadata=")[0])
    blocks = next(shape[-1] for dtype, shape in shapes if dtype == "s8")
    *batch, length, width = next(
        shape for dtype, shape in shapes if dtype != "s8" and len(shape) >= 3
    )
    whole = 2 * matmuls * math.prod(batch) * length**2 * LANES * math.ceil(width / LANES)
    # Of a causal mask the blocks above the diagonal are left out. The encoder sees all of a tile.
    is_causal = flops.component_of(run.scope) == "llm"
    return whole * ((blocks + 1) / (2 * blocks) if is_causal else 1.0)
