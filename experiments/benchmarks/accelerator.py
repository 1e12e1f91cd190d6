"""Tokens per second and model FLOPs utilisation of the 100m and 1b presets on this machine's accelerators.

python -m experiments.benchmarks.accelerator [--presets=100m,1b] [--rows=8] [--output=FILE]

bfloat16 compute over float32 masters, AdamW with clipping, the method of --method, rows of --length tokens that are
full and not packed. The batch is cut over all devices (fsdp). Timed are --steps steps after two that are not counted,
each waited for. FLOPs per token follow the PaLM convention (`jaxcl.flops.per_token`), which does not count what is
computed again in the backward pass. Raw results go to results/accelerator_DEVICE.json.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import statistics
import sys
import time

from absl import app, flags, logging

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = flags.DEFINE_list("presets", ["100m", "1b"], "names of shapes in jaxcl.models.presets")
ROWS = flags.DEFINE_integer("rows", 8, "rows per device and step")
LENGTH = flags.DEFINE_integer("length", 2048, "tokens per row")
STEPS = flags.DEFINE_integer("steps", 20, "timed steps")
REMAT = flags.DEFINE_string("remat", "full", "policy, see jaxcl.models.transformer.make")
METHOD = flags.DEFINE_string("method", "reptile(every=10, keep=0.5)", "as config.method")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the computation")
OUTPUT = flags.DEFINE_string("output", None, "file of raw results")


def measure(preset: str) -> dict:
    """Returns the seconds of every step of one preset and what follows from them."""
    import jax
    import jax.numpy as jnp

    from jaxcl import compose, flops, losses, mesh, optim, tree
    from jaxcl.models import presets, transformer
    from jaxcl.types import Batch

    devices = mesh.make(data=1, fsdp=-1)
    model = transformer.make(preset=preset, compute_dtype=DTYPE.value, remat=REMAT.value)
    shape = presets.fields(preset)
    rows = ROWS.value * devices.size
    tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH.value), 0, shape["vocab"])
    one = jnp.ones_like(tokens)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)
    batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), weights, one, jnp.cumsum(one, axis=1) - 1, one[:, 0] - 1)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    setting = compose.Setting(model, optim.make(lr=1e-4, clip=1.0), example, 1, losses.cross_entropy)
    method = compose.make(METHOD.value, setting)
    key = jax.random.key(0)

    def create():
        return method.init(model.init(key))

    abstract = jax.eval_shape(create)
    shardings = mesh.state_shardings(devices, model.axes, abstract)
    state = jax.jit(create, out_shardings=shardings)()
    batch = mesh.place(devices, jax.tree.map(jax.device_get, batch))
    out = (shardings, mesh.replicated(devices))
    begin = time.perf_counter()
    step = jax.jit(method.step, out_shardings=out, donate_argnums=0).lower(state, batch, key).compile()
    compiled_s, seconds = time.perf_counter() - begin, []
    for _ in range(2 + STEPS.value):
        begin = time.perf_counter()
        state, metrics = step(state, batch, key)
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    params, width = tree.size(abstract.params), shape["heads"] * shape["head_dim"]
    products = params if shape.get("tied") else params - shape["vocab"] * shape["embed"]
    cost = flops.per_token(products, shape["layers"], LENGTH.value, width)
    speed = tokens.size / statistics.median(seconds[2:])
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "preset": preset,
        "params": params,
        "rows": rows,
        "length": LENGTH.value,
        "loss": loss,
        "compile_s": compiled_s,
        "step_s": seconds[2:],
        "tokens_per_s": speed,
        "flops_per_token": cost,
        "model_tflops_per_s_per_device": speed * cost / devices.size / 1e12,
        "mfu": flops.utilisation(speed, cost, devices.size, flops.peak(jax.devices()[0])),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def save(name: str, command: str, results: list[dict], options: dict) -> None:
    """Writes raw results with machine, versions, date and command to --output or results/NAME_DEVICE.json."""
    import jax
    import jaxlib

    device = jax.devices()[0]
    kind = "".join(c if c.isalnum() else "_" for c in device.device_kind.lower())
    target = pathlib.Path(OUTPUT.value or HERE / "results" / f"{name}_{kind}.json")
    record = {
        "command": " ".join([f"python -m experiments.benchmarks.{command}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"devices": f"{jax.device_count()} x {device.device_kind}", "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "options": options,
        "results": results,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"raw results: {target}")


def main(_: list[str]) -> None:
    """Measures every preset, prints a line each and writes the raw results."""
    logging.set_verbosity(logging.ERROR)  # JAX tells of every backend that is not there
    found = []
    for preset in PRESETS.value:
        found.append(measure(preset))
        r = found[-1]
        share = "peak of this device not known" if r["mfu"] is None else f"{100 * r['mfu']:.1f} % MFU"
        print(f"{preset}: {r['tokens_per_s']:,.0f} tokens/s, {r['model_tflops_per_s_per_device']:.2f} TFLOP/s, {share}")
    save("accelerator", "accelerator", found, {f.name: f.value for f in (REMAT, METHOD, DTYPE)})


if __name__ == "__main__":
    app.run(main)
