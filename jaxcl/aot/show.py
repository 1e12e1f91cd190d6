"""What was found, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 15


def gib(value: float) -> str:
    """Returns GiB in the unit that fits their size."""
    for factor, unit, digits in ((1, "GiB", 2), (2**10, "MiB", 1), (2**20, "KiB", 1)):
        if value * factor >= 0.1:
            return f"{value * factor:,.{digits}f} {unit}"
    return f"{value * 2**30:,.0f} B"


def duration(seconds: float) -> str:
    """Returns seconds in the unit that fits their size."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.2f} {unit}"
    return f"{seconds * 1e9:,.2f} ns"


def count(value: float) -> str:
    """Returns a large number in short: 1.2 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:,.0f}"


def line(name: str, text: str) -> str:
    """Returns a line of the table."""
    return f"  {name:<{WIDTH}} {text}"


def table(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of one program: the JSON that is written, in words."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in result["mesh"].items()) or "one device"
    several = f", {result['slices']} slices" if result.get("slices", 1) > 1 else ""
    out = [
        f"{result['config']} on {result['topology']}{several}: {result['devices']} x {result['device']}",
        line("model", f"{count(result['parameters'])} parameters, {count(result['trained_parameters'])} trained"),
        line("mesh", mesh),
        line("step", _step(result)),
    ]
    out += _program(result) if "memory_gib" in result else []
    for name, seconds in result["floors"].items():
        out.append(line("floor", f"{duration(seconds)} a step from {WORDS[name]}"))
    if bound := result.get("mfu_bound"):
        text = f"at most {bound['overlapped']:.0%}, all communication hidden; {bound['in_turn']:.0%} with none hidden"
        out.append(line("utilisation", text))
    out += [line("note", note) for note in result["notes"]]
    out.append(line("compiler", f"{result['seconds']:.0f} s" if "memory_gib" in result else "refuses the program"))
    if result["fits"]:
        left = result["available_gib"] - result["needed_gib"]
        share = result["needed_gib"] / result["available_gib"]
        part = f"{share:.0%}" if share >= 0.01 else "less than 1%"
        out.append(f"fits: {gib(result['needed_gib'])} of {gib(result['available_gib'])} ({part}), {gib(left)} free")
    else:
        missing = result["needed_gib"] - result["available_gib"]
        out.append(
            f"does not fit: needs {gib(result['needed_gib'])} on each device, has {gib(result['available_gib'])}, "
            f"{gib(missing)} short"
        )
    return out


WORDS = {
    "compute_s": "arithmetic at peak",
    "hbm_s": "reading inputs and writing outputs once",
    "links_s": "sending over all links at once",
}


def _step(result: Mapping[str, Any]) -> str:
    """Returns what one step takes in; a row of a table is one token."""
    rows, length, passes = result["rows_per_step"], result["length"], result["microbatches"]
    text = f"{rows:,} rows" if length == 1 else f"{rows:,} rows of {length:,} tokens"
    total = "" if length == 1 else f"{count(result['tokens_per_step'])} tokens, "
    return f"{text} in {passes} {'pass' if passes == 1 else 'passes'}: {total}{result['flops_per_step']:.3g} FLOPs"


def _program(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of what the compiler made."""
    memory = result["memory_gib"]
    parts = [f"{name} {gib(memory[name])}" for name in ("arguments", "outputs", "aliased", "temporaries", "code")]
    out = [line("memory", ", ".join(parts[:3])), line("", ", ".join(parts[3:]))]
    if memory["peak"]:
        out.append(line("", f"peak of live buffers {gib(memory['peak'])}"))
    for kind, found in result["collectives"].items():
        out.append(line(kind, f"{found['times']:,} a step at {found['sites']} places, {gib(found['bytes'] / 2**30)}"))
    for kind, found in result.get("between_slices", {}).items():
        text = f"{kind}, {found['times']:,} a step at {found['sites']} places"
        out.append(line("between slices", f"{text}, {gib(found['bytes'] / 2**30)} from each device"))
    kernels = ", ".join(f"{name} x {times}" for name, times in result["pallas"].items())
    out.append(line("Pallas kernels", kernels or f"none: {result.get('no_kernel') or 'the compiler left none'}"))
    donated = result["donation"]
    whole = donated["aliased_inputs"] >= donated["state_leaves"]
    text = "the whole state" if whole else "NOT the whole state"
    out.append(line("donated", f"{text}: {donated['aliased_inputs']} of {donated['state_leaves']} arrays"))
    return out


def knob(found: Mapping[str, Any]) -> str:
    """Returns the line of a change that was tried."""
    if "failed" in found:
        verdict = f"fails: {found['failed'][:60]}"
    elif "needed_gib" not in found:
        verdict = "not tried"
    else:
        left = found["available_gib"] - found["needed_gib"]
        verdict = f"fits, {gib(left)} free" if found["fits"] else f"{gib(-left)} short"
    return line(found["name"], f"{verdict}  {found['flags']}")
