"""Compiles the programs of the README one after another, or prints the table of those that are there.

python -m experiments.aot.table [--compile]     (hours of one core; results that exist are kept)
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
POD = "--config=configs/pod.py:"
SMALL = ("--config.model.preset=100m", "--config.packing.length=2048", "--config.stream.batch=64")
# Compiled when the attention was plain XLA with whole rows of scores, before there were kernels: kept to compare.
PLAIN = ("1b_v5e_plain", "8b_v5e_plain", "1b_v5p_plain", "8b_v5p_plain")
# Compiled before the vocabulary's kernels were cut over a mesh, with blocks of logits in XLA: kept to compare.
BLOCKS = ("8b_v5e_blocks", "1b_v5p_blocks", "8b_v5p_blocks", "search_v5e_blocks")
HEAD = (
    "| program | topology | parameters, rows x tokens | GiB needed of | fits | arguments + temporaries "
    "| collectives | donated | floor, ms | compiled in s |"
)
PROGRAMS = {
    "1b_v5e": ("--topology=v5e:16x16", f"{POD}1b"),
    "8b_v5e": ("--topology=v5e:16x16", f"{POD}8b"),
    "1b_v5p": ("--topology=v5p:8x8x4", f"{POD}1b"),
    "8b_v5p": ("--topology=v5p:8x8x4", f"{POD}8b"),
    "70b_v5p": ("--topology=v5p:8x8x4", f"{POD}70b"),
    "1b_h200": ("--topology=h200:8", f"{POD}1b"),
    "1b_h200_kernel": ("--topology=h200:8", f"{POD}1b", "--config.model.attention=kernel"),
    "8b_h200": ("--topology=h200:32", f"{POD}8b"),
    "oversize_v5e": (
        *("--topology=v5e:16x16", f"{POD}8b", "--config.packing.length=8192", "--config.stream.batch=1024"),
        *("--config.model.remat=none", "--quick"),
    ),
    "knobs_v5e": ("--topology=v5e:2x2", f"{POD}1b", *SMALL, "--config.model.remat=none"),
    "search_v5e": ("--topology=v5e:2x2", f"{POD}1b", *SMALL, "--search=microbatches"),
}


def row(name: str) -> str:
    """Returns the line of one program."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return f"| {name} | not compiled | | | | | | | | |"
    found = json.loads(path.read_text())
    if found.get("interrupted"):
        return f"| {name} | interrupted | | | | | | | | |"
    shape = f"{found['parameters'] / 1e9:.2f} B, {found['rows_per_step']:,} x {found['length']:,}"
    need = f"{found['needed_gib']:.2f} of {found['available_gib']:.2f}"
    if "memory_gib" not in found:
        return f"| {name} | {found['topology']} | {shape} | {need} | refused | | | | | |"
    memory, calls = found["memory_gib"], found["collectives"]
    kinds = ", ".join(f"{kind} {n['times']} ({n['bytes'] / 2**30:.2f})" for kind, n in calls.items())
    donated = "all" if found["donation"]["aliased_inputs"] >= found["donation"]["state_leaves"] else "NOT all"
    verdict = "yes" if found["fits"] else "no"
    floor = f"{found['floors']['compute_s'] * 1e3:,.0f}"
    parts = f"{memory['arguments']:.2f} + {memory['temporaries']:.2f}"
    seconds = f"{found['seconds']:.0f}"
    cells = (name, found["topology"], shape, need, verdict, parts, kinds, donated, floor, seconds)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Compiles, if asked to, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    if parser.parse_args().compile:
        for name, flags in PROGRAMS.items():
            path = RESULTS / f"{name}.json"
            if not path.exists():
                subprocess.run([sys.executable, "-m", "jaxcl.aot", *flags, f"--out={path}"], check=False)
    print("\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(row, (*PROGRAMS, *BLOCKS, *PLAIN))]))


if __name__ == "__main__":
    main()
