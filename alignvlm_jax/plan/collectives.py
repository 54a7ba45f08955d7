"""What a compiled program sends between devices: collectives, read from its text.

The TPU's compiler makes loops of permutes out of a gather and the matmul that it feeds, or spreads
a gather over fusions, to overlap them. Of a collective across slices it leaves the part within each
slice to the links, and sends the rest over the data-centre network, by transfers of the host, which
are told apart as BETWEEN_SLICES.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from alignvlm_jax.plan import hlo
from alignvlm_jax.plan.hlo import Op, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
BETWEEN_SLICES = "between slices"


class Communication(NamedTuple):
    """How often, and how much a device takes part in, in bytes of the larger side of each."""

    count: int
    bytes: int


class Collective(NamedTuple):
    """A collective: how often it runs, and bytes of the larger side of one run.

    `group` are the devices that take part together, of the first of its groups; () are all. One
    that `is_overlapped` runs beside what its `computation` computes.
    """

    kind: str
    times: int
    bytes: int
    group: tuple[int, ...]
    is_overlapped: bool
    computation: str


def find(program: Program) -> list[Collective]:
    """Returns the collectives that run."""
    # What the compiler spreads over the fusions which it overlaps appears in each of them, under
    # one chain's name.
    found: dict[tuple[str, str], Collective] = {}
    for number, run in enumerate(program.runs()):
        op = run.op
        kind = BETWEEN_SLICES if _is_between_slices(op) else op.opcode.removesuffix("-start")
        if kind not in (*KINDS, BETWEEN_SLICES):
            continue
        chain = re.search(r'chain_id="(\d+)"', op.rest)
        is_overlapped = run.is_fused or op.opcode != kind
        size = _bytes(op, program.computations[run.computation])
        one = Collective(kind, run.times, size, _group(op.rest), is_overlapped, run.computation)
        key = kind, chain[0] if chain else str(number)
        found[key] = min(found.get(key, one), one, key=lambda each: each.times * each.bytes)
    return list(found.values())


def communication(found: Iterable[Collective]) -> dict[str, Communication]:
    """Returns for each kind that occurs what is sent in one run of the program."""
    totals: dict[str, Communication] = {}
    for kind in (*KINDS, BETWEEN_SLICES):
        if parts := [one for one in found if one.kind == kind]:
            totals[kind] = Communication(
                sum(one.times for one in parts), sum(one.times * one.bytes for one in parts)
            )
    return totals


def _is_between_slices(op: Op) -> bool:
    return op.opcode == "send" and '"xla_megascale_runtime"' in op.rest


def _bytes(op: Op, ops: dict[str, Op]) -> int:
    """Returns the bytes of a collective: the larger of what goes in and what comes out."""
    if op.opcode.endswith("-start") and op.opcode != "all-reduce-start":
        # (operands, results, and what only the runtime looks at)
        return max(hlo.sizes(op.type), default=0)
    if op.opcode == "send":
        return max(hlo.sizes(op.type), default=0)  # beside it, what only the runtime looks at
    sent = sum(sum(hlo.sizes(ops[name].type)) for name in op.operands if name in ops)
    return max(sum(hlo.sizes(op.type)), sent)


def _group(attributes: str) -> tuple[int, ...]:
    """Returns the devices of a collective's first group, () where that cannot be told."""
    # {{0,1},{2,3}}, of permutes pairs of a source and a target.
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    # [4,2]<=[2,4]T(1,0): 8 numbers in a shape, transposed, cut into groups of 2.
    if iota := re.search(
        r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape = [int(size) for size in iota[2].split(",")]
        axes = [int(axis) for axis in iota[3].split(",")] if iota[3] else None
        numbers = np.arange(np.prod(shape)).reshape(shape).transpose(axes).ravel()
        return tuple(numbers[: int(iota[1])].tolist())
    # mesh['a'=4,'b'=2] {'a'}: along the axes named.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        axis_sizes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        along = re.findall(r"'(\w+)'", mesh[2])
        numbers = np.arange(np.prod([int(size) for _, size in axis_sizes]))
        grid = numbers.reshape([int(size) for _, size in axis_sizes])
        index = tuple(slice(None) if name in along else 0 for name, _ in axis_sizes)
        return tuple(grid[index].ravel().tolist())
    return ()
