"""What a compiled program consists of, read from its text: collectives, kernels, donated buffers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
PALLAS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2")  # targets that Pallas kernels are compiled to

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
# Between TPU slices, hosts exchange what the chips hand to them; what becomes of it is an attribute.
_NETWORK = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRIPS = re.compile(r"\bknown_trip_count\D*(\d+)")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


def read(text: str) -> dict[str, Any]:
    """Returns collectives, kernels and aliases of a module in HLO text, after optimisation.

    Loops are counted: what stands in the body of a loop runs as often as the loop does, as far as its condition
    compares with a constant. A collective that the compiler spreads over several fusions has one channel and counts
    once, even if it is under way during a loop.

    Returns:
      `collectives`: kind -> `sites` in the text, `times` per step, `bytes` per step and device (of the results);
      `between_slices`: the same of what a device sends to other slices, after sums inside of its own;
      `pallas`: kernel -> times; `custom_calls`: other target -> times; `aliased`: inputs whose buffer an output takes.
    """
    parts, entry = _computations(text)
    times = _times(parts, entry)
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    sends: dict[tuple[str, str], tuple[int, int]] = {}
    pallas: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for computation, lines in parts.items():
        count = times[computation]
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind in COLLECTIVES and count:
                channel = re.search(r"channel_id=(\d+)", line.rest)
                site = (kind, channel.group(1) if channel else f"{computation}/{line.name}")
                moved = (count, count * size(line.shape, largest=line.op.endswith("-start")))
                seen[site] = min(seen.get(site, moved), moved)
            elif line.op == "send" and count and (found := _NETWORK.search(line.rest)):
                site = (found.group(1).lower().replace("_", "-"), f"{computation}/{line.name}")
                sends[site] = (count, count * size(line.shape, largest=True))
            elif line.op == "custom-call" and count:
                target = re.search(r'custom_call_target="([^"]*)"', line.rest)
                name = target.group(1) if target else "unknown"
                if name in PALLAS:
                    pallas[_kernel(line)] += count
                else:
                    other[name] += count
    moves = {"collectives": _totals(seen), "between_slices": _totals(sends)}
    return {**moves, "pallas": dict(pallas), "custom_calls": dict(other), "aliased": _aliased(text)}


def _totals(seen: Mapping[tuple[str, str], tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Returns (kind, place) -> (times, bytes) as kind -> totals."""
    out: dict[str, dict[str, int]] = {}
    for (kind, _), (count, moved) in sorted(seen.items()):
        total = out.setdefault(kind, {"sites": 0, "times": 0, "bytes": 0})
        for key, value in (("sites", 1), ("times", count), ("bytes", moved)):
            total[key] += value
    return out


def sent(collectives: Mapping[str, Mapping[str, int]], group: int) -> float:
    """Returns the bytes that each device has to send at the least, by the best algorithm for a ring or torus.

    An array of S bytes is gathered by sending S (n - 1)/n, and summed by twice that (Patarasuk and Yuan, 2009).

    Args:
      collectives: of `read`; their bytes are those of the results, for a reduce-scatter 1/n of what is summed.
      group: n, the fewest devices that take part in one of them.
    """
    part = (group - 1) / group
    factors = {"all-reduce": 2 * part, "all-gather": part, "all-to-all": part, "reduce-scatter": group - 1}
    return sum(factors.get(kind, part if "all" in kind else 1.0) * one["bytes"] for kind, one in collectives.items())


def size(shape: str, *, largest: bool = False) -> int:
    """Returns the bytes of the arrays in a shape, or of the largest of them."""
    sizes = []
    for kind, dims in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind))
        sizes.append(math.prod(int(n) for n in dims.split(",") if n) * bits // 8)
    return (max if largest else sum)(sizes or [0])


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation, and the name of the entry."""
    parts: dict[str, list[Instruction]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            here = parts.setdefault(found.group(2), [])
            entry = found.group(2) if found.group(1) else entry
        elif here is not None and (found := _INSTRUCTION.match(line)):
            here.append(Instruction(*found.groups()))
    return parts, entry


def _times(parts: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """Returns how often every computation runs in one call of the program."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for computation, lines in parts.items():
        for line in lines:
            trips = _trips(line, parts) if line.op == "while" else 1
            names = _CALLED.findall(line.rest)
            names += [n.strip(" %") for group in _BRANCHES.findall(line.rest) for n in group.split(",")]
            calls[computation] += [(name, trips) for name in names if name in parts]
    order: list[str] = []

    def visit(name: str, done: set[str]) -> None:
        if name not in done:
            done.add(name)
            for child, _ in calls[name]:
                visit(child, done)
            order.append(name)

    visit(entry, set())
    times = dict.fromkeys(parts, 0) | {entry: 1}
    for name in reversed(order):  # callers before those they call
        for child, trips in calls[name]:
            times[child] += times[name] * trips
    return times


def _trips(line: Instruction, parts: dict[str, list[Instruction]]) -> int:
    """Returns how often a loop runs: the constant that its condition compares a counter from 0 with, or else 1."""
    if known := _TRIPS.search(line.rest):
        return int(known.group(1))
    name = re.search(r"condition=%?([\w.\-]+)", line.rest)
    lines = parts.get(name.group(1), []) if name else []
    constants = [x for x in lines if x.op == "constant" and x.shape.startswith("s32[]")]
    found = re.match(r"(\d+)\)", constants[0].rest) if len(constants) == 1 else None
    return int(found.group(1)) if found else 1


def _kernel(line: Instruction) -> str:
    """Returns the name of a Pallas kernel."""
    named = re.search(r'kernel_name\W+"?([\w.\-]+)', line.rest)
    return named.group(1) if named else re.sub(r"\.\d+$", "", line.name)


def _aliased(text: str) -> int:
    """Returns the number of inputs in the table of aliases at the head of a module."""
    head = text.split("\n", 1)[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, entry_computation_layout", head)
    return len(re.findall(r"\(\d+, ", found.group(1))) if found else 0
