"""A compiled program as its text tells it: which operations run, and how often.

An operation in a loop runs as often as the loop does: layers, microbatches and chunks are loops.
Of the branches of a conditional one runs: the costliest stands for all.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Of all others the first number in the name is the bits: f32, s8, f8e4m3fn.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}

# "ENTRY %main.5 (p0: f32[8]) -> f32[8] {"; without ENTRY it is a computation that others call.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "  ROOT %add.3 = f32[8]{0} add(%a, %b), metadata=..." is name, type, opcode, and what follows "(".
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
# "bf16[8,128]" in a type; "pred[]" is a scalar.
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
# "calls=%fused.2", "to_apply=%add", "called_computations={%a, %b}".
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
# "branch_computations={%a, %b}"; of a predicate "true_computation=%a, false_computation=%b".
_BRANCHES = re.compile(
    r"(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"[\w.\-]+")


class Op(NamedTuple):
    """An operation; `rest` is its operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def scope(self) -> str:
        """The names of the modules and functions that it was traced in, "" where they are lost."""
        return _first(r'op_name="([^"]*)"', self.rest)

    @property
    def cycles(self) -> int:
        """Cycles of the chip's clock, as the TPU's compiler estimates them; 0 where it does not: of
        collectives and Pallas kernels, and of what runs beside others."""
        return int(_first(r'"estimated_cycles":"(\d+)"', self.rest) or 0)

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


class Run(NamedTuple):
    """An operation, the computation that it stands in, and how often it runs in one run of the
    program; `scope` is that of the innermost operation around it that has one, and `is_fused` is
    whether it is a part of another one: of a fusion, of what runs beside others, of a reduction.
    """

    op: Op
    computation: str
    times: int
    scope: str
    is_fused: bool


class Program(NamedTuple):
    """Operations by name by computation, and the name of the computation that is run."""

    computations: dict[str, dict[str, Op]]
    entry: str

    def runs(self) -> Iterator[Run]:
        """Yields every operation that runs."""
        yield from self._runs(self.entry, 1, "", False)

    def _runs(self, name: str, times: int, scope: str, is_fused: bool) -> Iterator[Run]:
        for op in self.computations.get(name, {}).values():
            here = op.scope or scope
            yield Run(op, name, times, here, is_fused)
            if op.opcode == "while":
                body = _first(r"body=%?([\w.\-]+)", op.rest)
                yield from self._runs(body, times * self.trips(op), here, is_fused)
                continue
            inner = is_fused or op.opcode not in ("call", "conditional")
            for called in _names(_CALLED, op.rest):
                yield from self._runs(called, times, here, inner)
            branches = [
                list(self._runs(branch, times, here, inner))
                for branch in _names(_BRANCHES, op.rest)
            ]
            yield from max(branches, key=_cost, default=[])

    def trips(self, loop: Op) -> int:
        """Returns how often a loop runs that counts up from 0; 1 where that cannot be told."""
        # "known_trip_count":{"n":"12"}
        if known := _first(r'known_trip_count.*?"n":"(\d+)"', loop.rest):
            return int(known)
        condition, body = (
            self.computations.get(_first(rf"{what}=%?([\w.\-]+)", loop.rest), {})
            for what in ("condition", "body")
        )
        compares = [
            op for op in condition.values() if op.opcode == "compare" and "direction=LT" in op.rest
        ]
        constants = _numbers(condition)
        for compare in compares:
            counter, bound = _NAME.findall(compare.rest.split(")")[0].replace("%", ""))[:2]
            read = condition[counter].rest if counter in condition else ""
            index = _first(r"index=(\d+)", read)
            if bound in constants and index:
                return max(constants[bound] // _step(body, int(index)), 1)
        return 1


def parse(text: str) -> Program:
    """Returns the program of a text, as `Compiled.as_text` gives it."""
    computations: dict[str, dict[str, Op]] = {}
    entry = ""
    last = ""
    current: dict[str, Op] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
            last = ""
        elif op := _OP.match(line):
            last = op[1]
            current[last] = Op(*op.groups())
        elif line == "}":
            last = ""
        elif last:
            # Attributes of a kernel run over several lines.
            current[last] = current[last]._replace(rest=f"{current[last].rest} {line}")
    return Program(computations, entry)


@functools.lru_cache(maxsize=4096)  # The same few types stand in thousands of operations.
def sizes(type_text: str) -> tuple[int, ...]:
    """Returns the bytes of each array of a type."""
    return tuple(
        math.prod(shape) * (BITS.get(dtype) or _bits(dtype)) // 8
        for dtype, shape in arrays(type_text)
    )


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each array of a type."""
    return [
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(type_text)
    ]


def _bits(dtype: str) -> int:
    return int(_first(r"(\d+)", dtype))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _names(pattern: re.Pattern[str], text: str) -> list[str]:
    return [name for found in pattern.findall(text) for name in _NAME.findall(found)]


def _cost(runs: list[Run]) -> tuple[int, int]:
    """By which the costliest of several branches is chosen: cycles, then bytes of all results."""
    return (
        sum(run.times * run.op.cycles for run in runs),
        sum(run.times * sum(sizes(run.op.type)) for run in runs),
    )


def _numbers(computation: dict[str, Op]) -> dict[str, int]:
    """Integer constants by name."""
    return {
        op.name: int(op.rest.split(")")[0])
        for op in computation.values()
        if op.opcode == "constant" and re.match(r"-?\d+\)", op.rest)
    }


def _step(body: dict[str, Op], index: int) -> int:
    """Returns by how much a loop's counter grows: 1, or more where the compiler unrolled it."""
    counters = {
        op.name
        for op in body.values()
        if op.opcode == "get-tuple-element" and f"index={index}," in f"{op.rest},"
    }
    constants = _numbers(body)
    last = list(body.values())[-1]
    operands = last.operands
    new = body.get(operands[index]) if last.opcode == "tuple" and len(operands) > index else None
    if new is None or new.opcode != "add":
        return 1
    steps = [constants[name] for name in new.operands if name in constants]
    return steps[0] if steps and counters & set(new.operands) else 1
