"""How long a save holds up the step: states of 1.3 M and 100 M parameters with both moments, saved, and read again.

python -m experiments.reliability.saves [--workdir=FOLDER] [--sizes=small,100m] [--saves=3] [--out=FILE]

A save waits for the one before it, takes a checksum of every leaf, and copies the state to the host; threads write the
files, hash them and write the manifest. What the caller waits for is `blocked_s`; `whole_s` lasts until the manifest
is there. Between the saves of a run there is time to finish; here each is waited for before the next one's clock
starts. The restore checks hashes and checksums; then every leaf is compared with what was saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import train_step
from jaxcl import tree
from jaxcl.checkpoint import Checkpoints
from jaxcl.models import transformer
from jaxcl.types import TrainState

SHARE = 0.05


def state_of(preset, seed):
    """Returns a state of random bits, which no compression makes small: parameters and two moments in float32."""
    shapes = jax.eval_shape(transformer.make(preset=preset).init, jax.eval_shape(lambda: jax.random.key(0)))
    rng = np.random.default_rng(seed)
    parts = [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, x.dtype)), shapes) for _ in range(3)]
    return TrainState(jnp.int32(seed), parts[0], {"mu": parts[1], "nu": parts[2]}, ())


def measure(preset, saves, folder):
    """Returns sizes and times of one model."""
    state = jax.block_until_ready(state_of(preset, 1))
    blocked, busy, whole = [], [], []
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, saves + 1):
            began, cpu = time.perf_counter(), time.thread_time()
            checkpoints.save(step, state, {"step": step})
            blocked.append(time.perf_counter() - began)
            busy.append(time.thread_time() - cpu)
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
        began, cpu = time.perf_counter(), time.process_time()
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        restore = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), restored.state, state)
    files = [path for path in (folder / str(saves)).rglob("*") if path.is_file()]
    return {
        "parameters": tree.size(state.params),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "files": len(files),
        "file_bytes": sum(path.stat().st_size for path in files),
        "blocked_s": blocked,
        "blocked_thread_cpu_s": busy,
        "whole_s": whole,
        "restore": restore,
        "restored_equal": all(jax.tree.leaves(equal)),
        "least_period_s": max(blocked[1:] or blocked) / SHARE,
    }


def main():
    """Prints a line for each size and writes the raw results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/saves")
    parser.add_argument("--sizes", default="small,100m")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "saves.json"))
    options = parser.parse_args()
    record = {
        "command": f"python -m experiments.reliability.saves --saves={options.saves}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": train_step.machine(),
        "versions": {"jax": jax.__version__},
        "sizes": {},
    }
    for preset in options.sizes.split(","):
        folder = Path(options.workdir).absolute() / preset
        shutil.rmtree(folder, ignore_errors=True)
        found = record["sizes"][preset] = measure(preset, options.saves, folder)
        times = ", ".join(f"{value:.2f}" for value in found["blocked_s"])
        mib, whole, restore = found["state_bytes"] / 2**20, max(found["whole_s"]), found["restore"]["wall_s"]
        print(
            f"{preset}: {found['parameters']:,} parameters, {mib:,.0f} MiB; blocked {times} s; "
            f"whole {whole:.1f} s; restored in {restore:.1f} s, equal: {found['restored_equal']}; "
            f"under 5 % from a period of {found['least_period_s']:.0f} s on",
            flush=True,
        )
        shutil.rmtree(folder)
        record["load_average_after"] = train_step.machine()["load_average"]
        Path(options.out).parent.mkdir(exist_ok=True)
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
