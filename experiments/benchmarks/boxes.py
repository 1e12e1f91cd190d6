"""Boxes, generators and Adam for the wide last layer of a hypernetwork: CPU-seconds and temporary memory.

python -m experiments.benchmarks.boxes [--rounds=5] [--peer_python=PYTHON]

Float32, one core; the two sizes are those of interval training on Split MNIST and on Permuted MNIST, with 100 numbers
per row, 5 boxes and 24 generators. "plain" is what one writes first: |V| formed, automatic differentiation; for Adam it
is the gradient in blocks, stored, and `optax.adam`. Forms run in turn, round after round; seconds are the least of the
rounds. The peer is torch in an interpreter of its own (named by --peer_python), with the same formulas and autograd,
after the rounds of JAX. Temporaries are those of `memory_analysis` of the compiled program.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

from jaxcl import allocator
from jaxcl.kernels import boxes
from jaxcl.kernels.boxes import blocks

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.benchmarks import train_step

SIZES = {"split": 475_202, "permuted": 2_036_010}
WIDTH, BOXES, GENERATORS = 100, 5, 24
PEER = """
import json, sys, time, torch
torch.set_num_threads(1)
N, K, T, S, rounds = map(int, sys.argv[1:])
make = lambda *s: torch.randn(*s)
V, b, c, r, G = make(N, K), make(N), make(T, K), make(T, K).abs(), make(S, K)
dC, dR, d = make(T, N), make(T, N), make(N)
for x in (V, b, c, r, G):
    x.requires_grad_(True)

def affine():
    torch.autograd.grad((torch.addmm(b, c, V.t()), r @ V.abs().t()), (V, b, c, r), (dC, dR))

def row_sums():
    torch.autograd.grad((V @ G.t()).abs().sum(1), (V, G), d)

found = {}
for name, f in (("affine", affine), ("row_sums", row_sums)):
    seconds = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        f()
        seconds.append(time.process_time() - begin)
    found[name] = seconds[1:]
print(json.dumps({"torch": torch.__version__, "processor_seconds": found}))
"""


def plain_affine(weight, bias, centre, radius):
    """The definition, differentiated by JAX."""
    return centre @ weight.T + bias[None], radius @ jnp.abs(weight).T


def plain_row_sums(weight, generators):
    """The definition, differentiated by JAX."""
    return jnp.sum(jnp.abs(weight @ generators.T), 1)


def stored(weight, first, second, centre, radius, d_centre, d_radius):
    """Adam by optax with the gradient of V as an array."""
    d_weight = blocks.affine_backward(blocks.CACHE, weight, centre, radius, d_centre, d_radius)[0]
    tx = optax.adam(1e-3)
    state = (optax.ScaleByAdamState(jnp.int32(0), first, second), optax.EmptyState())
    change, state = tx.update(d_weight, state)
    return optax.apply_updates(weight, change), state[0].mu, state[0].nu


def both_passes(function, operands, cotangents):
    """Returns the results and the cotangents of all operands."""
    out, pull = jax.vjp(function, *operands)
    return out, pull(cotangents)


def cases(rows):
    """Returns name -> (function, arguments, how many of them are replaced by its results)."""
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = [(rows, WIDTH), (rows,), (BOXES, WIDTH), (BOXES, WIDTH), (GENERATORS, WIDTH)]
    shapes += [(BOXES, rows), (BOXES, rows), (rows,)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    weight, bias, centre, radius, generators, d_centre, d_radius, d_sums = arrays
    radius = jnp.abs(radius)
    box = ((weight, bias, centre, radius), (d_centre, d_radius))
    many = ((weight, generators), d_sums)
    step = (centre, radius, d_centre, d_radius)
    update = functools.partial(boxes.update, lr=1e-3, count=0)
    return {
        "affine plain": (functools.partial(both_passes, plain_affine), box, 0),
        "affine": (functools.partial(both_passes, boxes.affine), box, 0),
        "row_sums plain": (functools.partial(both_passes, plain_row_sums), many, 0),
        "row_sums": (functools.partial(both_passes, boxes.row_sums), many, 0),
        "update plain": (stored, step, 3),
        "update": (update, step, 3),
    }, weight


def measure(rows, rounds):
    """Returns name -> figures."""
    made, weight = cases(rows)
    table, steps, states = {}, {}, {}
    for name, (function, x, held) in made.items():
        states[name] = [weight] * held
        compiled = jax.jit(function, donate_argnums=tuple(range(held))).lower(*states[name], *x).compile()
        steps[name] = compiled
        temporary = compiled.memory_analysis().temp_size_in_bytes
        table[name] = {"temporary_bytes": temporary, "processor_seconds": []}
    state = [weight + 0, jnp.zeros_like(weight), jnp.zeros_like(weight)]
    for i in range(rounds + 1):  # the first one warms up
        for name, (_, x, held) in made.items():
            begin = time.process_time()
            out = jax.block_until_ready(steps[name](*state[:held], *x))
            if i:
                table[name]["processor_seconds"].append(time.process_time() - begin)
            if held:
                state = list(out)
            del out
    return table


def peer(python, rows, rounds):
    """Returns the figures of torch at one size."""
    command = [python, "-c", PEER, *map(str, (rows, WIDTH, BOXES, GENERATORS, rounds))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    """Prints the tables and writes the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer_python", help="an interpreter that has torch; without it there is no peer")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "boxes_cpu.json"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    allocator.keep_pages()
    record = {
        "machine": train_step.machine(),
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python -m experiments.benchmarks.boxes --rounds={options.rounds}"
        + (" --peer_python=PYTHON" if options.peer_python else ""),
        "load_average": os.getloadavg(),
        "shape": {"width": WIDTH, "boxes": BOXES, "generators": GENERATORS, "dtype": "float32"},
        "sizes": {},
    }
    for size, rows in SIZES.items():
        table = measure(rows, options.rounds)
        if options.peer_python:
            found = peer(options.peer_python, rows, options.rounds)
            record["versions"]["torch"] = found["torch"]
            table |= {f"{name} torch": {"processor_seconds": x} for name, x in found["processor_seconds"].items()}
        for name, row in table.items():
            base = min(table[f"{name.split()[0]} plain"]["processor_seconds"])
            row["least_seconds"] = min(row["processor_seconds"])
            row["of_plain"] = row["least_seconds"] / base
            memory = f", {row['temporary_bytes'] / 2**20:7.1f} MiB" if "temporary_bytes" in row else ""
            print(f"{size:9s}{name:16s} {row['least_seconds']:6.3f} CPU-s = {row['of_plain']:.2f} of plain{memory}")
        record["sizes"][size] = {"rows": rows, "forms": table}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
