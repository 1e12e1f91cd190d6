"""The three updates of ridge sums on a GPU or TPU: every form, plain XLA and torch, milliseconds and errors.

python -m experiments.benchmarks.ridge_gpu [--features=8192] [--batch=256] [--output=FILE]    (one accelerator)

Timed are --calls calls in place, one after the other, the median over --rounds with the forms in turn. `xla` is the
whole product in full float32 and one sum, as one writes it first; `library`, `kernel` and `plain` are forms of
jaxcl.kernels.ridge: what a GPU gets by itself, the Pallas kernel, and no kernel. torch runs if it is installed and sees
the GPU: float32 without TF32, grams in float64. Errors are those of the first 256 columns against float64, relative to
the largest number. Raw results go to results/ridge_DEVICE.json. Not measured on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import time

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import accelerator

FEATURES = flags.DEFINE_integer("features", 8192, "d")
BATCH = flags.DEFINE_integer("batch", 256, "rows of an update, and of the next batch; grams take 128 at a time")
ROUNDS = flags.DEFINE_integer("rounds", 7, "timings of every form")
CALLS = flags.DEFINE_integer("calls", 10, "calls per timing")
COLUMNS = 256  # that are checked


def forms() -> dict:
    """Functions (matrix, rows) -> new matrix, or (new matrix, products), by update and name."""
    import jax

    from jaxcl.kernels import ridge
    from jaxcl.kernels.ridge import reference

    found = {}
    for name in ("gram_update", "downdate", "stream"):
        asked = {"library": None, "kernel": True, "plain": False}
        own = {form: functools.partial(getattr(ridge, name), kernel=kernel) for form, kernel in asked.items()}
        for form, function in (own | {"xla": getattr(reference, name)}).items():
            found[name, form] = jax.jit(function, donate_argnums=0)
    return found


def peers() -> dict:
    """The same in torch, in place; empty without it."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.backends.cuda.matmul.allow_tf32 = False

    def stream(r, v, x):
        r.addmm_(v.T, v, alpha=-1)
        return r, x @ r

    return {
        ("gram_update", "torch"): lambda a, x: a.addmm_(x.T, x),
        ("downdate", "torch"): lambda r, v: r.addmm_(v.T, v, alpha=-1),
        ("stream", "torch"): stream,
    }


def operands(name: str, form: str) -> tuple:
    """Returns the matrix and the rows of a case, on the device, and what is exact of the first columns."""
    size, rows = FEATURES.value, min(BATCH.value, 128) if name == "gram_update" else BATCH.value
    rng = np.random.default_rng(0)
    v, x = (rng.standard_normal((rows, size), np.float32) / size**0.5 for _ in range(2))
    matrix, sign = np.eye(size, dtype=np.float32), 1 if name == "gram_update" else -1
    exact = np.eye(size, COLUMNS) + sign * v.T.astype(np.float64) @ v[:, :COLUMNS]
    inputs = (matrix, v, x) if name == "stream" else (matrix, v)
    if form == "torch":
        import torch

        wide = torch.float64 if name == "gram_update" else torch.float32
        return [torch.asarray(part, dtype=wide, device="cuda") for part in inputs], exact
    import jax

    from jaxcl.kernels.ridge import pair

    inputs = jax.device_put(inputs)
    return [pair.of(part) for part in inputs] if name == "gram_update" else list(inputs), exact


def wait(out, form: str) -> None:
    if form == "torch":
        import torch

        torch.cuda.synchronize()
    else:
        import jax

        jax.block_until_ready(out)


def seconds(function, form: str, inputs: list) -> float:
    """Returns the time of a call; the new matrix takes the place of the old one."""
    begin = time.perf_counter()
    for _ in range(CALLS.value):
        out = function(*inputs)
        inputs[0] = out[0] if isinstance(out, tuple) and not hasattr(out, "high") else out
    wait(inputs[0], form)
    return (time.perf_counter() - begin) / CALLS.value


def error(function, name: str, form: str) -> float:
    inputs, exact = operands(name, form)
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) and not hasattr(out, "high") else out
    columns = [np.asarray(part[:, :COLUMNS].tolist()) for part in (out if hasattr(out, "high") else (out,))]
    return float(np.abs(sum(columns) - exact).max() / np.abs(exact).max())


def main(_: list[str]) -> None:
    """Measures every update, prints a line per form and writes the raw results."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is to have room
    logging.set_verbosity(logging.ERROR)  # JAX tells of every backend that is not there
    import jax

    if jax.devices()[0].platform == "cpu":
        raise SystemExit("ridge_gpu measures an accelerator and found none; nothing was written")
    cases, inputs, found = {}, {}, []
    for (name, form), function in (forms() | peers()).items():
        row = {"update": name, "form": form, "seconds": []}
        found.append(row)
        try:
            row["error"] = error(function, name, form)
            inputs[name, form] = operands(name, form)[0]
            seconds(function, form, inputs[name, form])
            cases[name, form] = row, function
        except Exception as fault:  # out of memory, or not built for this device: the others are still measured
            row["failed"] = f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"
    for _ in range(ROUNDS.value):
        for key, (row, function) in cases.items():
            row["seconds"].append(seconds(function, key[1], inputs[key]))
    for row in found:
        line = row.get("failed") or f"{1e3 * statistics.median(row['seconds']):.3f} ms, error {row['error']:.1e}"
        print(f"{row['update']} d={FEATURES.value} b={BATCH.value}, {row['form']}: {line}", flush=True)
    accelerator.save("ridge", "ridge_gpu", found, {f.name: f.value for f in (FEATURES, BATCH, ROUNDS, CALLS)})


if __name__ == "__main__":
    app.run(main)
