"""One ridge update: jaxcl in float32 and pairs of it against torch in float64, CPU-seconds.

Forms: jaxcl's recursion (R and W) and its moments (A and B in pairs of float32, without weights); torch's recursion as
it was published, the same in the best order of products, and plain sums of products.

python -m experiments.benchmarks.ridge --peer_python=PYTHON_WITH_TORCH [--cases 1024x64 2048x64 5000x256]

All are processes of their own that wait for a line and then take one update, so that whatever else the machine does
falls on all alike. Memory is the peak of the process above what it held with state and inputs. Raw results go to
results/ridge_cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks import train_step

HERE = Path(__file__).resolve().parent
OWN, PEER = ("recursion", "gram"), ("published", "ordered", "gram")
RATIOS = (
    ("torch published", "jaxcl recursion"),
    ("torch ordered", "jaxcl recursion"),
    ("torch published", "jaxcl gram"),
    ("torch gram", "jaxcl gram"),
)


def serve(case):
    """The jaxcl side: one update for every line on stdin."""
    import jax
    import jax.numpy as jnp

    from jaxcl.ridge import moments, recursion

    d, b, c = case["features"], case["rows"], case["classes"]
    if case["form"] == "gram":
        state, update = moments.empty(d, c), moments.add
    else:
        state, update = recursion.Inverse(jnp.eye(d) / case["gamma"], jnp.zeros((d, c))), recursion.update
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (b, d)))
    batch = x, jnp.arange(b, dtype=jnp.int32) % c, jnp.ones(b)
    step = jax.jit(update, donate_argnums=0).lower(state, *batch).compile()
    jax.block_until_ready((state, batch))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    temporary = step.memory_analysis().temp_size_in_bytes
    print(json.dumps({"versions": {"jax": jax.__version__}, "temporary_bytes": temporary}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        state = jax.block_until_ready(step(state, *batch))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
        print(json.dumps({"cpu_s": cpu, "wall_s": wall, "extra_bytes": extra}), flush=True)


def compare(case, peer_python, repeats):
    """Returns side -> figures of the updates that both sides took in turn, after one that is not counted."""
    own = [sys.executable, "-m", "experiments.benchmarks.ridge", "--worker"]
    peer = [peer_python, str(HERE / "torch_ridge.py")]
    commands = {
        f"{side} {form}": [*program, json.dumps(case | {"form": form})]
        for side, program, forms in (("jaxcl", own, OWN), ("torch", peer, PEER))
        for form in forms
    }
    sides = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[1],
            env=os.environ | train_step.ENVIRONMENT,
        )
        for name, command in commands.items()
    }
    table = {name: json.loads(side.stdout.readline()) | {"updates": []} for name, side in sides.items()}
    for n in range(repeats + 1):
        for name, side in sides.items():
            side.stdin.write("\n")
            side.stdin.flush()
            figures = json.loads(side.stdout.readline())
            if n:
                table[name]["updates"].append(figures)
    for side in sides.values():
        side.stdin.close()
        side.wait()
    for row in table.values():
        row["least_cpu_s"] = min(update["cpu_s"] for update in row["updates"])
    return table


def growth(cases, side):
    """Returns the least wall time of an update of 64 rows at twice the features over that at 1,024."""
    small, large = (min(update["wall_s"] for update in cases[name][side]["updates"]) for name in ("1024x64", "2048x64"))
    return large / small


def main():
    """Prints the table and writes the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python")
    parser.add_argument(
        "--cases", nargs="+", default=["1024x64", "2048x64", "5000x256"], help="features x rows of a batch"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(HERE / "results" / "ridge_cpu.json"))
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        serve(json.loads(options.worker))
        return
    if not options.peer_python:
        parser.error("give --peer_python, an interpreter that has torch")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    record = {
        "machine": train_step.machine(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m experiments.benchmarks.ridge --peer_python=PYTHON "
        f"--repeats={options.repeats} --cases {' '.join(options.cases)}",
        "cases": {},
    }
    for name in options.cases:
        d, b = map(int, name.split("x"))
        table = compare({"features": d, "rows": b, "classes": 100, "gamma": 0.1}, options.peer_python, options.repeats)
        ratios = {
            f"{over} / {under}": table[over]["least_cpu_s"] / table[under]["least_cpu_s"] for over, under in RATIOS
        }
        record["cases"][name] = table | {"ratios": ratios}
        for side, row in table.items():
            extra = max(update["extra_bytes"] for update in row["updates"]) / 2**20
            print(f"d={d} b={b} {side:16s} {row['least_cpu_s']:7.3f} CPU-s, {extra:7.1f} MiB above the state")
        for over, ratio in ratios.items():
            print(f"d={d} b={b} {over} = {ratio:.1f}", flush=True)
    if {"1024x64", "2048x64"} <= set(options.cases):
        record["twice_the_features"] = {
            side: growth(record["cases"], side) for side in ("jaxcl recursion", "torch published")
        }
        print(f"wall time, d=2048 over d=1024: {record['twice_the_features']}")
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
