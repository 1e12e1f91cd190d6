"""Compares the machine code of the Pallas kernels with what it was: no accelerator is needed, only its compiler.

python -m experiments.static.gates [--only=TEXT] [--jobs=N] [--update]     (five minutes of one core)

Figures are kept in golden.json by compiler and kernel. One that is more than 5 % worse fails, as does a kernel that is
lost, unknown, or does not compile (exit status 1). A compiler that is not installed, or has no figures yet, is SKIPPED
and says so, and so is a kernel that has figures of other compilers only. --update records what was found; --only takes
the programs whose name holds TEXT.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.static import machine_code

GOLDEN = Path(__file__).parent / "golden.json"
ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 0.05
MORE_IS_BETTER = ("mxu_percent", "hgmma_percent")
EXACT = ("hgmma_percent",)  # one product on old instructions is one too many
# Of the packages the last one names the compiler; JAX decides what it is given.
COMPILERS = {
    "tpu": ("jax", "libtpu"),
    "cuda": ("jax", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-nvvm", "nvidia-cuda-nvdisasm", "nvidia-cuda-nvcc"),
}
Figures = Mapping[str, Mapping[str, float]]  # by kernel and name


class Row(NamedTuple):
    """What is said of a kernel."""

    status: str  # ok, BETTER, WORSE, LOST, UNKNOWN, FAILED or SKIPPED
    kernel: str
    text: str

    @property
    def fails(self) -> bool:
        """Returns whether the gate is closed by it."""
        return self.status in ("WORSE", "LOST", "UNKNOWN", "FAILED")


def change(name: str, old: float, new: float) -> int:
    """Returns -1 if a figure is worse by more than the tolerance, 1 if better by more, else 0."""
    if name in MORE_IS_BETTER:
        old, new = -old, -new
    slack = 0.0 if name in EXACT else TOLERANCE * abs(old)
    return (new < old - slack) - (new > old + slack)


def compare(
    golden: Figures | None, found: Figures, failed: Mapping[str, str], elsewhere: Collection[str] = ()
) -> list[Row]:
    """Returns a row per kernel.

    Args:
      golden: what was recorded with this compiler; None = nothing was, and all is skipped.
      found: figures of the kernels that were compiled.
      failed: why the others were not, by kernel.
      elsewhere: kernels that were recorded with other compilers; they are no mistake.
    """
    rows = [Row("FAILED", kernel, why) for kernel, why in failed.items()]
    rows += [
        Row("LOST", kernel, "not compiled any more") for kernel in (golden or {}) if kernel not in {*found, *failed}
    ]
    for kernel, new in found.items():
        figures = ", ".join(f"{name} {value:g}" for name, value in new.items())
        if golden is None or (kernel not in golden and kernel in elsewhere):
            rows.append(Row("SKIPPED", kernel, figures))
        elif kernel not in golden:
            rows.append(Row("UNKNOWN", kernel, figures))
        else:
            old = golden[kernel]
            missing = sorted(old.keys() ^ new.keys())
            moves = {name: change(name, old[name], new[name]) for name in old if name in new}
            moved = [f"{name} {old[name]:g} -> {new[name]:g}" for name, way in moves.items() if way]
            status = "WORSE" if -1 in moves.values() or missing else "BETTER" if 1 in moves.values() else "ok"
            rows.append(
                Row(status, kernel, ", ".join([*moved, *(f"{x} on one side only" for x in missing)] or [figures]))
            )
    return rows


def compiler(platform: str) -> tuple[str | None, list[str]]:
    """Returns the name that a compiler has in golden.json (None: it is not installed), and the missing packages."""
    versions = {}
    for package in COMPILERS[platform]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    missing = [package for package, version in versions.items() if version is None]
    first, last = COMPILERS[platform][0], COMPILERS[platform][-1]
    return (None if missing else f"{first} {versions[first]}, {last} {versions[last]}"), missing


def build(program: str) -> tuple[Figures, dict[str, str]]:
    """Compiles a program in a process of its own; returns the figures of its kernels, or why there are none."""
    command = [sys.executable, "-m", "experiments.static.machine_code", program]
    whole = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # so that the last line is that of the error
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=whole, check=False)
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1]), {}
    last = (run.stderr.strip().splitlines() or [""])[-1][:300]
    return {}, dict.fromkeys(machine_code.names(program), f"status {run.returncode}: {last}")


def programs(platform: str, only: str = "") -> list[str]:
    """Returns the programs that a compiler has to compile."""
    cuda = platform == "cuda"
    return [name for name, x in machine_code.PROGRAMS.items() if (x.chip == "h200") == cuda and only in name]


def gate(platform: str, only: str, jobs: int, update: bool) -> list[Row]:
    """Compiles, compares and perhaps records what one compiler makes; prints and returns the rows."""
    wanted = programs(platform, only)
    name, missing = compiler(platform)
    if not wanted:
        return []
    if name is None:
        print(f"{platform}: SKIPPED, {', '.join(missing)} not installed: pip install 'jaxcl[aot]'", flush=True)
        return [Row("SKIPPED", kernel, "no compiler") for program in wanted for kernel in machine_code.names(program)]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known = golden.get(name)
    if only and known is not None:
        asked = {kernel for program in wanted for kernel in machine_code.names(program)}
        known = {kernel: figures for kernel, figures in known.items() if kernel in asked}
    found, failed = {}, {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for figures, reasons in pool.map(build, wanted):
            found |= figures
            failed |= reasons
    rows = compare(known, found, failed, {kernel for kernels in golden.values() for kernel in kernels})
    print(f"{platform}, {name}" + ("" if known is not None else ": SKIPPED, nothing was recorded; record it: --update"))
    for row in rows:
        print(f"  {row.status:8}{row.kernel:34} {row.text}", flush=True)
    if update and not failed:
        kept = golden.get(name, {}) if only else {}
        golden[name] = dict(sorted({**kept, **found}.items()))
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
        print(f"  recorded: {len(found)} kernels in {GOLDEN.relative_to(ROOT)}")
        rows = [Row("ok", row.kernel, "recorded") for row in rows if row.status != "LOST"]
    return rows


def main() -> int:
    """Runs both compilers and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.static.gates", description=__doc__)
    parser.add_argument("--only", default="", help="part of a program's name, as in 'attention v5p'")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--update", action="store_true", help="record what is found")
    options = parser.parse_args()
    if not any(programs(platform, options.only) for platform in COMPILERS):
        parser.error(f"--only={options.only}: no program; there are {', '.join(machine_code.PROGRAMS)}")
    rows = [row for x in COMPILERS for row in gate(x, options.only, options.jobs, options.update)]
    status = [row.status for row in rows]
    counts = {x: status.count(x) for x in dict.fromkeys(("ok", *status))}
    print(", ".join(f"{number} {word}" for word, number in counts.items()), end="")
    print("; more than 5 % better: record it with --update" if "BETTER" in status else "")
    return 1 if any(row.fails for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
