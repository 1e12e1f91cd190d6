"""Cross-entropy and mixture over a vocabulary, by blocks against whole logits: CPU-seconds and temporary memory.

python -m experiments.benchmarks.vocabulary [--tokens=2048 --vocab=32768 --width=256]

Forward and backward in float32. All variants run in turn, round after round, in one process on one core; seconds are
the least of the rounds. Temporaries are those of `memory_analysis` of the compiled program.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from jaxcl import allocator
from jaxcl.kernels import vocabulary
from jaxcl.kernels.vocabulary import reference

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.benchmarks import train_step


def naive(hidden, head, targets):
    """Log-probabilities as one writes them first, with automatic differentiation."""
    logp = jax.nn.log_softmax(hidden @ head)
    return jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0], None


def cases(chunks):
    """Returns name -> function of (hidden, head, targets) that returns a number to differentiate."""

    def cross_entropy(function):
        return lambda hidden, head, targets: -function(hidden, head, targets)[0].sum()

    def mixture(function):
        return lambda hidden, head, targets: (function(hidden, head, head.T, temperature=0.5)[0] ** 2).sum()

    made = {"cross_entropy naive": cross_entropy(naive), "mixture naive": mixture(reference.mixture)}
    made["cross_entropy logits kept"] = cross_entropy(reference.cross_entropy)
    for chunk in chunks:
        blocks = functools.partial(vocabulary.cross_entropy, chunk=chunk)
        made[f"cross_entropy chunk {chunk}"] = cross_entropy(blocks)
        made[f"mixture chunk {chunk}"] = mixture(functools.partial(vocabulary.mixture, chunk=chunk))
    return made


def measure(options):
    """Returns name -> figures."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (options.tokens, options.width))
    head = jax.random.normal(keys[1], (options.width, options.vocab)) * options.width**-0.5
    x = hidden, head, jax.random.randint(keys[2], (options.tokens,), 0, options.vocab)
    table, steps = {}, {}
    for name, function in cases(options.chunks).items():
        steps[name] = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*x).compile()
        table[name] = {"temporary_bytes": steps[name].memory_analysis().temp_size_in_bytes, "processor_seconds": []}
    for i in range(options.rounds + 1):  # the first one warms up
        for name, step in steps.items():
            begin = time.process_time()
            jax.block_until_ready(step(*x))
            if i:
                table[name]["processor_seconds"].append(time.process_time() - begin)
    return table


def main():
    """Prints the table and writes the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"tokens": 2048, "vocab": 32768, "width": 256, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "vocabulary_cpu.json"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    allocator.keep_pages()
    table = measure(options)
    for name, row in table.items():
        base = table[f"{name.split()[0]} naive"]
        seconds, least = min(row["processor_seconds"]), min(base["processor_seconds"])
        row |= {"least_seconds": seconds, "of_naive": seconds / least}
        row["temporary_of_naive"] = row["temporary_bytes"] / base["temporary_bytes"]
        print(
            f"{name:28s} {seconds:6.3f} CPU-s = {row['of_naive']:.2f} of naive, "
            f"{row['temporary_bytes'] / 2**20:6.1f} MiB = {row['temporary_of_naive']:.3f}"
        )
    record = {
        "machine": train_step.machine(),
        "versions": {"jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python -m experiments.benchmarks.vocabulary --rounds={options.rounds} "
        f"--chunks {' '.join(map(str, options.chunks))}",
        "shape": {"tokens": options.tokens, "vocab": options.vocab, "width": options.width, "dtype": "float32"},
        "forms": table,
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
