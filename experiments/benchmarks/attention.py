"""Compares jaxcl's attention on a CPU with XLA's and torch's, alone and in training steps: CPU-seconds, one thread.

python -m experiments.benchmarks.attention --peer_python=PYTHON_WITH_TORCH [--run=NAMES] [--steps=PRESET:LENGTH,...]

The programs take turns, so that whatever else the machine does falls on all alike. XLA's is
`jax.nn.dot_product_attention`, torch's is `scaled_dot_product_attention` (a process of its own). Raw results go to
results/attention_cpu.json.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import sys
import time
from functools import partial
from typing import Any

from absl import app, flags

from experiments.benchmarks import train_step

HERE = pathlib.Path(__file__).resolve().parent
# rows, length, heads, key heads, width
CASES = {
    "long": (1, 2048, 8, 8, 64),
    "grouped": (4, 1024, 12, 4, 64),
    "short": (8, 256, 8, 8, 64),
    "small": (16, 256, 5, 5, 32),
}
RUN = flags.DEFINE_list("run", list(CASES), "names of the shapes to run")
STEPS = flags.DEFINE_list("steps", ["tiny:1024", "tiny:2048", "100m:1024", "100m:2048"], "training steps to run")
STEP_REPEATS = flags.DEFINE_integer("step_repeats", 3, "timed training steps of each side, after one not counted")
RESULT = flags.DEFINE_string("result", str(HERE / "results" / "attention_cpu.json"), "file of raw results")
TORCH = """
import json, sys, time, torch
torch.set_num_threads(1)
rows, length, heads, groups, width = json.loads(sys.argv[1])
q, k, v = (torch.randn(rows, h, length, width, requires_grad=True) for h in (heads, groups, groups))
w = torch.randn(rows, heads, length, width)
run = lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=heads != groups)
print(json.dumps({"torch": torch.__version__}), flush=True)
for _ in sys.stdin:
    begin = time.process_time()
    run(q.detach(), k.detach(), v.detach())
    middle = time.process_time()
    torch.autograd.grad((run(q, k, v) * w).sum(), (q, k, v))
    print(json.dumps([middle - begin, time.process_time() - middle]), flush=True)
"""


def xla(q, k, v, *, segments=None, window=None, implementation="auto"):
    """XLA's attention with the arguments of a layer of the model."""
    import jax

    if window is not None:
        raise ValueError("no preset here has a window")
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def seconds(run) -> float:
    """Returns the CPU-seconds of a call."""
    import jax

    begin = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - begin


def alone(name: str) -> dict:
    """Returns the CPU-seconds of (forward, forward and backward) and the temporaries of every side for one shape."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.attention import attention

    rows, length, heads, groups, width = CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (
        jax.random.normal(key, (rows, length, n, width))
        for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
    )
    inputs, sides, temporaries = ((q, k, v), (q, k, v, w)), {}, {}
    for side, function in (("jaxcl", attention), ("xla", xla)):
        loss = jax.grad(lambda q, k, v, w, function=function: jnp.sum(function(q, k, v) * w), (0, 1, 2))
        programs = [jax.jit(function).lower(q, k, v).compile(), jax.jit(loss).lower(q, k, v, w).compile()]
        temporaries[side] = [p.memory_analysis().temp_size_in_bytes for p in programs]
        sides[side] = programs
    torch = train_step.Side(
        [str(train_step.PEER_PYTHON.value), "-c", TORCH, json.dumps(CASES[name])], os.environ | train_step.ENVIRONMENT
    )
    repeats: dict[str, list] = {side: [] for side in (*sides, "torch")}
    for i in range(1 + train_step.REPEATS.value):
        taken: dict[str, Any] = {
            side: [seconds(lambda p=p, x=x: p(*x)) for p, x in zip(programs, inputs, strict=True)]
            for side, programs in sides.items()
        }
        taken["torch"] = torch.step()
        for side in repeats if i else ():
            repeats[side].append(taken[side])
    torch.close()
    low = {side: [min(x[i] for x in values) for i in (0, 1)] for side, values in repeats.items()}
    return {
        "rows, length, heads, key heads, width": CASES[name],
        "versions": {"jax": jax.__version__, **torch.about},
        "temporary_bytes": temporaries,
        "repeats": repeats,
        "cpu_s_min": low,
        "xla_over_jaxcl": low["xla"][1] / low["jaxcl"][1],
        "jaxcl_over_torch": low["jaxcl"][1] / low["torch"][1],
        "temporaries_jaxcl_over_xla": temporaries["jaxcl"][1] / temporaries["xla"][1],
    }


def training(preset: str, length: int) -> dict:
    """Returns the CPU-seconds of training steps of one preset with either attention, which share one state."""
    from unittest import mock

    import jax
    import jax.numpy as jnp

    from jaxcl import compose, losses, optim
    from jaxcl.models import presets, transformer
    from jaxcl.types import Batch

    rows = 4 if preset == "tiny" else 1
    model = transformer.make(preset=preset, max_length=length, remat="none" if preset == "tiny" else "full")
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, presets.fields(preset)["vocab"])
    one = jnp.ones_like(tokens)
    batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), one * 1.0, one, jnp.cumsum(one, axis=1) - 1, one[:, 0] - 1)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    method = compose.gradient_method({}, compose.Setting(model, optim.make(lr=1e-4), example, 1, losses.cross_entropy))
    key = jax.random.key(0)
    state = jax.jit(lambda: method.init(model.init(key)))()
    steps: dict[str, Any] = {}
    repeats: dict[str, list] = {"jaxcl": [], "xla": []}
    for side, function in (("jaxcl", transformer.attention), ("xla", xla)):
        with mock.patch.object(transformer, "attention", function):
            step = jax.jit(partial(method.step), donate_argnums=0)  # a function of its own: no trace is found again
            steps[side] = step.lower(state, batch, key).compile()
    for i in range(1 + STEP_REPEATS.value):
        for side, step in steps.items():
            begin = time.process_time()
            state, metrics = step(state, batch, key)
            jax.block_until_ready(state)
            if i:
                repeats[side].append({"cpu_s": time.process_time() - begin, "loss": float(metrics["loss"])})
    low = {side: min(x["cpu_s"] for x in values) for side, values in repeats.items()}
    return {
        "rows": rows,
        "temporary_bytes": {side: step.memory_analysis().temp_size_in_bytes for side, step in steps.items()},
        "repeats": repeats,
        "cpu_s_min": low,
        "xla_over_jaxcl": low["xla"] / low["jaxcl"],
    }


def main(argv: list[str]) -> None:
    """Measures every shape and step, prints a line each and writes the raw results."""
    if train_step.PEER_PYTHON.value is None:
        raise app.UsageError("give --peer_python, an interpreter that has torch")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # see train_step
    os.environ.update(train_step.ENVIRONMENT)
    train_step.allocator.keep_pages()
    results = {
        "command": " ".join(
            ["python -m experiments.benchmarks.attention --peer_python=PYTHON"]
            + [arg for arg in sys.argv[1:] if not arg.startswith("--peer_python")]
        ),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": train_step.machine(),
        "environment": train_step.ENVIRONMENT,
        "alone": {},
        "training": {},
    }
    for name in RUN.value:
        case = results["alone"][name] = alone(name)
        print(name, {side: [round(1e3 * x, 1) for x in low] for side, low in case["cpu_s_min"].items()}, flush=True)
        pathlib.Path(RESULT.value).write_text(json.dumps(results, indent=1) + "\n")
    for name in STEPS.value:
        preset, length = name.split(":")
        case = results["training"][name] = training(preset, int(length))
        print(name, {side: round(x, 3) for side, x in case["cpu_s_min"].items()}, flush=True)
        pathlib.Path(RESULT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
