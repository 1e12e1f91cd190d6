"""What Reptile, stream replay, the guard and data loading cost beside a plain train step, in processor seconds.

python -m experiments.benchmarks.overhead [--steps=60] [--out=experiments/benchmarks/results/overhead_cpu.json]

All variants are built from the same quickstart config and stepped in turn, round after round, so that a drift of the
machine hits all of them alike. A figure is the ratio of the sums over rounds, so that meta-updates, which take place in
one step of ten, count in full; its standard error is that of the mean difference between rounds.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import flax
import jax
import optax

from jaxcl import allocator, main, program, train

sys.path.insert(0, str(Path(__file__).parents[2]))
from configs import quickstart
from experiments.benchmarks import train_step

REPTILE = "reptile(every=10, keep=0.5)"
VARIANTS = {  # name -> (method, replay fraction, guard)
    "plain": ("cpt", 0.0, None),
    "replay 25 %": ("cpt", 0.25, None),
    "reptile": (REPTILE, 0.0, None),
    "guard": ("cpt", 0.0, {}),
    "device reservoir 25 %": ("er(capacity=256, fraction=0.25)", 0.0, None),
}


def build(method, fraction, guard):
    """Returns the program of one variant, at the second stage so that there is something to replay."""
    config = main.plain(quickstart.get_config())
    config["method"], config["guard"] = method, guard
    config["stream"]["replay"]["fraction"] = fraction
    return program.build(**train.split(config)[1])


def measure(steps):
    """Returns the processor seconds of each step of every variant, and those of loading its batch."""
    programs = {name: build(*options) for name, options in VARIANTS.items()}
    states = {name: made.create() for name, made in programs.items()}
    spent = {name: {"step": [], "load": []} for name in programs}
    first = next(iter(programs.values())).stream.boundaries[0]
    for i in range(steps + 2):  # two rounds to compile and to warm up
        for name, made in programs.items():
            begin = time.process_time()
            batch = jax.block_until_ready(made.place(first + i))
            loaded = time.process_time()
            states[name], _ = made.step(states[name], batch)
            jax.block_until_ready(states[name])
            if i >= 2:
                spent[name]["load"].append(loaded - begin)
                spent[name]["step"].append(time.process_time() - loaded)
    return spent


def main_():
    """Prints the table and writes the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "overhead_cpu.json"))
    options = parser.parse_args()
    allocator.keep_pages()
    spent = measure(options.steps)
    plain = spent["plain"]["step"]
    table = {}
    for name, figures in spent.items():
        beyond = [(a - b) / statistics.mean(plain) for a, b in zip(figures["step"], plain, strict=True)]
        row = {"beyond_plain": statistics.mean(beyond), "standard_error": statistics.stdev(beyond) / len(beyond) ** 0.5}
        row["loading"] = statistics.mean(figures["load"]) / statistics.mean(plain)
        table[name] = row
        error, load = 100 * row["standard_error"], 100 * row["loading"]
        print(f"{name:24s} {100 * row['beyond_plain']:+6.2f} ± {error:.2f} % of a step, loading {load:4.1f} %")
    record = {
        "machine": train_step.machine(),
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python -m experiments.benchmarks.overhead --steps={options.steps}",
        "summary": table,
        "processor_seconds": spent,
    }
    target = Path(options.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main_()
