"""Compiles a train step for a topology and says what it needs: memory, communication, kernels, arithmetic."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxcl import flops
from jaxcl.aot import hlo
from jaxcl.aot.abstract import Step
from jaxcl.aot.topology import Topology
from jaxcl.schema import UserError

GIB = 2**30
_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
_NUMBER = r"([\d.]+)([KMGT])"
# The two forms in which libtpu refuses a program.
_REFUSALS = (
    re.compile(rf"memory required for HLO temporaries \({_NUMBER}\) exceeds available HBM \({_NUMBER}\)"),
    re.compile(rf"Used {_NUMBER} of {_NUMBER} hbm", re.IGNORECASE),
)


class Failed(UserError):
    """The compiler refuses the program for a reason other than HBM."""


class Verdict(NamedTuple):
    """Whether a program fits, and by how much."""

    needed: float  # GiB per device
    available: float  # GiB per device
    details: dict[str, Any]  # of a program that was compiled: memory, collectives ...; empty if it was refused
    seconds: float  # of wall time, to lower and to compile

    @property
    def fits(self) -> bool:
        """Returns whether every device has enough memory."""
        return bool(self.details) and self.needed <= self.available

    @property
    def short(self) -> float:
        """Returns the GiB per device that are missing."""
        return max(self.needed - self.available, 0.0)


def examine(step: Step, topology: Topology) -> Verdict:
    """Returns what the compiler makes of a step.

    Raises:
      Failed: it is refused, and not for its need of HBM.
    """
    began, available = time.perf_counter(), topology.chip.hbm
    lowered = step.run.trace(step.state, step.batch).lower()
    try:
        compiled = lowered.compile()
    except Exception as error:  # every plugin has its own
        refused = refusal(str(error))
        if refused is None:
            text = " ".join(str(error).split())[:400]
            raise Failed(f"--topology={topology.name}: cannot be compiled, whatever the memory: {text}") from error
        return Verdict(*refused, {}, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    try:
        found = hlo.read(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())[:200]
        pair = "install the compiler that the extra `aot` names for this JAX"
        raise Failed(f"--topology={topology.name}: compiled, but not to be read ({text}); {pair}") from error
    known = memory(compiled.memory_analysis())
    leaves, aliased = len(jax.tree.leaves(step.state)), found.pop("aliased")
    details = {"memory_gib": known, **found, "donation": {"state_leaves": leaves, "aliased_inputs": aliased}}
    return Verdict(known["needed"], available, details, seconds)


def refusal(message: str) -> tuple[float, float] | None:
    """Returns GiB needed and available per device of a message of the compiler, or None if it is about other things."""
    for pattern in _REFUSALS:
        if found := pattern.search(message):
            needed, unit, available, other = found.groups()
            return float(needed) * _UNITS[unit.upper()], float(available) * _UNITS[other.upper()]
    return None


def memory(stats: Any) -> dict[str, float]:
    """Returns the GiB per device of a memory analysis; `needed` is what is reserved while the program runs."""
    known = {
        "arguments": stats.argument_size_in_bytes / GIB,
        "outputs": stats.output_size_in_bytes / GIB,
        "aliased": stats.alias_size_in_bytes / GIB,
        "temporaries": stats.temp_size_in_bytes / GIB,
        "code": stats.generated_code_size_in_bytes / GIB,
    }
    held = known["arguments"] + known["outputs"] - known["aliased"] + known["code"]
    known["peak"] = getattr(stats, "peak_memory_in_bytes", 0) / GIB  # 0: the compiler does not say
    # Buffers as they are laid out, or as they are alive: libtpu reports no temporaries for a small program.
    return known | {"needed": max(held + known["temporaries"], known["peak"] + known["code"])}


def floors(step: Step, topology: Topology, verdict: Verdict) -> dict[str, float]:
    """Returns lower bounds of the seconds of a step: what no schedule can beat.

    `compute`: the FLOPs of forward and backward pass at the peak of all devices. Recomputation (remat), attention of a
    method's further passes and communication come on top.
    `hbm`: every input is read once and every output written once.
    `links`: what the collectives must send, over all links of every chip at once.
    """
    facts, device = step.facts(), step.plan.mesh.devices.flat[0]
    out, peak = {}, flops.peak(device)
    if peak:
        out["compute_s"] = facts["flops_per_step"] / (peak * facts["devices"])
    if known := verdict.details.get("memory_gib"):
        out["hbm_s"] = (known["arguments"] + known["outputs"]) * GIB / topology.chip.bandwidth
    inside = facts["mesh"] | {"replica": facts["mesh"].get("replica", 1) // topology.slices}  # of one slice
    sizes = [size for size in inside.values() if size > 1]
    if topology.chip.links and sizes and "collectives" in verdict.details:
        out["links_s"] = hlo.sent(verdict.details["collectives"], min(sizes)) / topology.chip.links
    return out


def bounds(found: Mapping[str, float], remat: str | None) -> dict[str, float]:
    """Returns the model FLOPs utilisation that floors leave, between 0 and 1; nothing if they are not known.

    `overlapped`: communication and reading hide behind arithmetic, or the reverse, without rest.
    `in_turn`: all of the communication waits for the arithmetic and the reverse. What is measured lies below the first
    bound, and with it below what arithmetic at less than its peak leaves; it may lie above the second.

    Args:
      found: of `floors`.
      remat: `full` computes the forward pass twice: 8 FLOPs for each parameter and token in place of 6.
    """
    if not {"compute_s", "hbm_s", "links_s"} <= found.keys():
        return {}
    useful, links = found["compute_s"], found["links_s"]
    done = useful * (4 / 3 if remat == "full" else 1.0)
    return {"overlapped": useful / max(done, links, found["hbm_s"]), "in_turn": useful / (done + links)}
