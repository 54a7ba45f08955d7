"""What a compiled program sends between devices: collectives by kind, read from its text.

A collective in a loop counts as often as the loop runs: layers, parts of a batch and blocks are
loops. The TPU's compiler also makes loops of permutes out of a gather and the matmul that it
feeds, to overlap them. Of a collective across slices it leaves the part within each slice to the
links, and sends the rest over the data-centre network, by transfers of the host, which are told
apart as BETWEEN_SLICES.
"""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
BETWEEN_SLICES = "between slices"
# Of all others the first number in the name is the bits: f32, s8, f8e4m3fn.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


class Communication(NamedTuple):
    """How often, and how much a device takes part in, in bytes of the larger side of each."""

    count: int
    bytes: int


class _Op(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


# "ENTRY %main.5 (p0: f32[8]) -> f32[8] {"; without ENTRY it is a computation that others call.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "  ROOT %add.3 = f32[8]{0} add(%a, %b), metadata=..." is name, type, opcode, and what follows "(".
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
# "bf16[8,128]" in a type; "pred[]" is a scalar.
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
# "calls=%fused.2", "to_apply=%add", and of "called_computations={%a, %b}" the first.
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations=\{|branch_computations=\{)=?%?([\w.\-]+)"
)


def communication(hlo: str) -> dict[str, Communication]:
    """Returns for each kind that occurs what is sent in one run of the program."""
    computations, entry = _parse(hlo)
    # What the compiler spreads over the fusions which it overlaps appears in each of them, under
    # one chain's name.
    found: dict[tuple[str, str], Communication] = {}

    def walk(name: str, times: int) -> None:
        ops = computations.get(name, {})
        for op in ops.values():
            kind = BETWEEN_SLICES if _is_between_slices(op) else op.opcode.removesuffix("-start")
            if kind in (*KINDS, BETWEEN_SLICES):
                chain = re.search(r'chain_id="(\d+)"', op.rest)
                key = kind, chain[0] if chain else f"{name} {op.name} {len(found)}"
                once = Communication(times, times * _bytes(op, ops))
                found[key] = min(found.get(key, once), once)
            if op.opcode == "while":
                condition, body = (
                    re.search(rf"{what}=%?([\w.\-]+)", op.rest)[1] for what in ("condition", "body")
                )
                walk(
                    body,
                    times * _trips(op, computations.get(condition, {}), computations.get(body, {})),
                )
            else:
                for called in _CALLED.findall(op.rest):
                    walk(called, times)

    walk(entry, 1)
    totals = {
        kind: [part for (its_kind, _), part in found.items() if its_kind == kind]
        for kind in (*KINDS, BETWEEN_SLICES)
    }
    return {
        kind: Communication(sum(part.count for part in parts), sum(part.bytes for part in parts))
        for kind, parts in totals.items()
        if parts
    }


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Op]], str]:
    """Operations by name by computation, and the name of the computation that is run."""
    computations: dict[str, dict[str, _Op]] = {}
    entry = ""
    current = {}
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif op := _OP.match(line):
            current[op[1]] = _Op(*op.groups())
    return computations, entry


def _trips(loop: _Op, condition: dict[str, _Op], body: dict[str, _Op]) -> int:
    """How often a loop runs that counts up from 0; 1 where that cannot be told."""
    # "known_trip_count":{"n":"12"}
    if known := re.search(r'known_trip_count.*?"n":"(\d+)"', loop.rest):
        return int(known[1])
    compares = [
        op for op in condition.values() if op.opcode == "compare" and "direction=LT" in op.rest
    ]
    constants = {op.name: int(op.rest.split(")")[0]) for op in condition.values() if _is_number(op)}
    for compare in compares:
        counter, bound = re.findall(r"%?([\w.\-]+)", compare.rest.split(")")[0])[:2]
        index = re.search(r"index=(\d+)", condition[counter].rest) if counter in condition else None
        if bound in constants and index:
            return max(constants[bound] // _step(body, index[1]), 1)
    return 1


def _step(body: dict[str, _Op], index: str) -> int:
    """Returns by how much a loop's counter grows: 1, or more where the compiler unrolled it."""
    counters = {
        op.name
        for op in body.values()
        if op.opcode == "get-tuple-element" and f"index={index}," in f"{op.rest},"
    }
    constants = {op.name: int(op.rest.split(")")[0]) for op in body.values() if _is_number(op)}
    last = list(body.values())[-1]
    operands = re.findall(r"%([\w.\-]+)", last.rest.split(")")[0])
    new = (
        body.get(operands[int(index)])
        if last.opcode == "tuple" and len(operands) > int(index)
        else None
    )
    if new is None or new.opcode != "add":
        return 1
    names = re.findall(r"%([\w.\-]+)", new.rest.split(")")[0])
    steps = [constants[name] for name in names if name in constants]
    return steps[0] if steps and counters & set(names) else 1


def _is_between_slices(op: _Op) -> bool:
    return op.opcode == "send" and '"xla_megascale_runtime"' in op.rest


def _is_number(op: _Op) -> bool:
    return op.opcode == "constant" and re.match(r"-?\d+\)", op.rest) is not None


def _bytes(op: _Op, ops: dict[str, _Op]) -> int:
    """Returns the bytes of a collective: the larger of what goes in and what comes out."""
    if op.opcode.endswith("-start") and op.opcode != "all-reduce-start":
        # (operands, results, and what only the runtime looks at)
        return max(_sizes(op.type), default=0)
    if op.opcode == "send":
        return max(_sizes(op.type), default=0)  # (what is sent, and what only the runtime looks at)
    operands = re.findall(r"%([\w.\-]+)", op.rest.split(")")[0])
    return max(
        sum(_sizes(op.type)), sum(sum(_sizes(ops[name].type)) for name in operands if name in ops)
    )


def _sizes(type_text: str) -> list[int]:
    """Bytes of each array of a type."""
    return [
        math.prod(int(size) for size in dims.split(",") if size)
        * (BITS.get(dtype) or _bits(dtype))
        // 8
        for dtype, dims in _ARRAY.findall(type_text)
    ]


def _bits(dtype: str) -> int:
    return int(re.search(r"\d+", dtype)[0])
