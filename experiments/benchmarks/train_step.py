"""Compares one training step of jaxcl with Hugging Face Llama on torch: CPU-seconds, one thread each, interleaved.

python -m experiments.benchmarks.train_step --peer_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS

Both sides are separate processes that wait for a line and then take one step, so that whatever else the machine does
falls on both alike. Raw results go to results/train_step_cpu.json.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from absl import app, flags

from jaxcl import allocator

HERE = pathlib.Path(__file__).resolve().parent
# One thread each (and one core, see main).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}

PEER_PYTHON = flags.DEFINE_string("peer_python", None, "interpreter that has torch and transformers")
CASES = flags.DEFINE_list("cases", ["0.8m", "3m", "12m"], "names of the shapes to run")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed steps of each side and shape, after two that are not counted")
OUTPUT = flags.DEFINE_string("output", str(HERE / "results" / "train_step_cpu.json"), "file of raw results")
KEEP_PAGES = flags.DEFINE_bool("keep_pages", True, "both sides keep freed memory, as jaxcl.train does on a CPU")
WORKER = flags.DEFINE_string("worker", None, "internal: be the jaxcl side for this shape")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings and as many key heads as query heads, and its batch."""

    layers: int
    embed: int
    heads: int
    mlp: int
    vocab: int
    rows: int
    length: int


SHAPES = {
    "0.8m": Shape(layers=4, embed=128, heads=4, mlp=344, vocab=512, rows=16, length=256),
    "3m": Shape(layers=4, embed=256, heads=4, mlp=688, vocab=512, rows=16, length=256),
    "12m": Shape(layers=4, embed=512, heads=8, mlp=1376, vocab=512, rows=8, length=256),
}


def jaxcl_step(shape: Shape):
    """Returns a function that takes one step of the real method and returns its loss, and the versions."""
    import flax
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcl import compose, losses
    from jaxcl.models import transformer
    from jaxcl.types import Batch

    model = transformer.make(
        vocab=shape.vocab,
        layers=shape.layers,
        embed=shape.embed,
        heads=shape.heads,
        mlp=shape.mlp,
        tied=True,
        unroll=shape.layers,
    )
    tokens = jax.random.randint(jax.random.key(1), (shape.rows, shape.length), 0, shape.vocab)
    one = jnp.ones_like(tokens)
    batch = Batch(
        inputs=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        weights=jnp.ones(tokens.shape).at[:, -1].set(0.0),
        segments=one,
        positions=jnp.cumsum(one, axis=1) - 1,
        task=one[:, 0],
    )
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    setting = compose.Setting(model, optax.adamw(1e-3, weight_decay=0.01), example, 1, losses.cross_entropy)
    method = compose.gradient_method({}, setting)
    key = jax.random.key(0)
    state = jax.jit(lambda: method.init(model.init(key)))()
    step = jax.jit(method.step, donate_argnums=0).lower(state, batch, key).compile()

    def take() -> float:
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    versions = {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    return take, {"params": transformer.count(model), "versions": versions}


def serve(take, about: dict) -> None:
    """Prints `about`, then takes one step for every line on stdin and prints its loss, CPU-seconds and seconds."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = take()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"loss": loss, "cpu_s": cpu, "wall_s": wall}), flush=True)


class Side:
    """One of the two processes."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command, self.repeats = command, []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parents[1]
        )
        self.about = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)}: ended with status {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, environment: dict[str, str]) -> dict:
    """Returns the raw and the derived results of one shape."""
    ours = [sys.executable, "-m", "experiments.benchmarks.train_step", f"--worker={name}"]
    ours.append(f"--keep_pages={KEEP_PAGES.value}")
    told = json.dumps(dataclasses.asdict(SHAPES[name]) | {"keep_pages": KEEP_PAGES.value})
    peer = [PEER_PYTHON.value, str(HERE / "hf_train_step.py"), told]
    sides = {"jaxcl": Side(ours, environment), "torch": Side(peer, environment)}
    if sides["jaxcl"].about["params"] != sides["torch"].about["params"]:
        raise RuntimeError(f"not the same model: {sides['jaxcl'].about} and {sides['torch'].about}")
    for i in range(2 + REPEATS.value):
        for side in sides.values():
            result = side.step()
            if i >= 2:
                side.repeats.append(result)
    for side in sides.values():
        side.close()
    cpu = {key: [r["cpu_s"] for r in side.repeats] for key, side in sides.items()}
    return {
        "shape": dataclasses.asdict(SHAPES[name]),
        "params": sides["jaxcl"].about["params"],
        "versions": {key: side.about["versions"] for key, side in sides.items()},
        "repeats": {key: side.repeats for key, side in sides.items()},
        "cpu_s_min": {key: min(values) for key, values in cpu.items()},
        "cpu_s_median": {key: statistics.median(values) for key, values in cpu.items()},
        "ratio_of_minima": min(cpu["torch"]) / min(cpu["jaxcl"]),
        "ratio_of_medians": statistics.median(cpu["torch"]) / statistics.median(cpu["jaxcl"]),
    }


def machine() -> dict:
    """Returns what the numbers depend on besides the code."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = os.getloadavg()[0]
    return {"cpu": model, "cores": os.cpu_count(), "load_average": load, "python": platform.python_version()}


def main(argv: list[str]) -> None:
    if WORKER.value:
        if KEEP_PAGES.value:
            allocator.keep_pages()
        serve(*jaxcl_step(SHAPES[WORKER.value]))
        return
    if PEER_PYTHON.value is None:
        raise app.UsageError("give --peer_python, an interpreter that has torch and transformers")
    # XLA runs independent operations on one thread per core that it sees, whatever its flags say.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = {
        "command": f"python -m experiments.benchmarks.train_step --peer_python=PYTHON --cases={','.join(CASES.value)}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "environment": ENVIRONMENT | {k: v for k, v in os.environ.items() if k == "GLIBC_TUNABLES"},
        "keep_pages": KEEP_PAGES.value,
        "cases": {},
    }
    print(f"{'case':6} {'params':>10} {'jaxcl CPU-s':>12} {'torch CPU-s':>12} {'ratio':>6} {'of medians':>11}")
    output = pathlib.Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in CASES.value:
        case = results["cases"][name] = measure(name, os.environ | ENVIRONMENT)
        low = case["cpu_s_min"]
        print(
            f"{name:6} {case['params']:10,} {low['jaxcl']:12.3f} {low['torch']:12.3f} {case['ratio_of_minima']:6.2f} "
            f"{case['ratio_of_medians']:11.2f}",
            flush=True,
        )
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
