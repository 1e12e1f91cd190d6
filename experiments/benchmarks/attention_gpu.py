"""Speed, exactness and repeatability of the attention kernels on a Hopper GPU, beside jax.nn.dot_product_attention.

python -m experiments.benchmarks.attention_gpu [--lengths=2048,8192] [--output=FILE]        (one H100 or H200)

Rows of B * L = 16,384 tokens, H * K = 2048, bfloat16, heads of 64, 128 and 256: full, causal, and causal over documents
of 512 tokens. Timed is a chain of calls inside one program (each waits for the one before), the median over
--rounds with the implementations in turn. FLOPs: 4 B H K per pair that is seen (a causal row: half of L * L), 2.5 times
that backward, whatever an implementation computes. cuDNN has no segments: for documents it runs plain causal, and what
it is credited with are the FLOPs of the documents. Raw results go to results/attention_gpu_DEVICE.json.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import pathlib
import platform
import statistics
import sys
import time

from absl import app, flags, logging

HERE = pathlib.Path(__file__).resolve().parent
LENGTHS = flags.DEFINE_list("lengths", ["2048", "8192"], "tokens per row")
WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256"], "head dimensions")
ROUNDS = flags.DEFINE_integer("rounds", 7, "timings of every implementation")
CALLS = flags.DEFINE_integer("calls", 10, "calls per timing")
OUTPUT = flags.DEFINE_string("output", None, "file of raw results")
TOKENS, EMBED, DOCUMENT = 16384, 2048, 512
for name, whole in (("lengths", TOKENS), ("widths", EMBED)):
    flags.register_validator(
        name, lambda x, n=whole: all(i.isdigit() and int(i) and n % int(i) == 0 for i in x), f"divisors of {whole}"
    )


def implementations(mask: str, scale: float, segments) -> dict:
    """Functions (q, k, v) -> mixed with a derivative, by name."""
    import jax

    from jaxcl.kernels.attention import gpu, gpu_backward

    causal = mask != "full"
    options = {"causal": causal, "scale": scale}

    @jax.custom_vjp
    def own(q, k, v):
        return gpu.forward(q, k, v, segments, None, **options)[0]

    def fwd(q, k, v):
        mixed, lse = gpu.forward(q, k, v, segments, None, **options)
        return mixed, (q, k, v, mixed, lse)

    def bwd(saved, d_mixed):
        q, k, v, mixed, lse = saved
        return gpu_backward.backward(q, k, v, segments, None, None, mixed, lse, d_mixed, None, **options)

    own.defvjp(fwd, bwd)
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, scale=scale)
    found = {"own": own, "cudnn": functools.partial(plain, implementation="cudnn")}
    if segments is not None:
        found["own causal"] = implementations("causal", scale, None)["own"]
        same = segments[:, None, :, None] == segments[:, None, None, :]
        found["xla"] = functools.partial(plain, mask=same, implementation="xla")
    else:
        found["xla"] = functools.partial(plain, implementation="xla")
    return found


def chain(function, backward: bool):
    """A program of CALLS calls: forward, or forward and backward, each fed by one number of the one before.

    Fed by whole results the operands would soon be zeros, on which a GPU uses less power and runs faster.
    """
    import jax

    def once(q, k, v, d):
        if backward:
            mixed, pull = jax.vjp(function, q, k, v)
            made = mixed, *pull(d)
        else:
            made = (function(q, k, v),)
        made = jax.lax.optimization_barrier(made)  # all of it is made although one number is read
        return q.at[0, 0, 0, 0].set(sum(x[0, 0, 0, 0] for x in made))

    def run(q, k, v, d):
        return jax.lax.fori_loop(0, CALLS.value, lambda _, q: once(q, k, v, d), q)

    return jax.jit(run)


def seconds(program, arrays) -> float:
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return (time.perf_counter() - begin) / CALLS.value


def exact(function, arrays, mask: str, segments, scale: float) -> dict:
    """Largest errors of mixed, d_q, d_k, d_v against float64-like float32 HIGHEST on the first row, first two heads."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.attention import reference

    q, k, v, d = (x[:1, :2048, :2] for x in arrays)
    segments = None if segments is None else segments[:1, :2048]
    rule = functools.partial(reference.attention, segments=segments, causal=mask != "full", scale=scale)
    with jax.default_matmul_precision("highest"):
        want, pull = jax.vjp(jax.jit(rule), *(x.astype(jnp.float32) for x in (q, k, v)))
        want = (want, *pull(d.astype(jnp.float32)))
    got, pull = jax.vjp(jax.jit(function), q, k, v)
    got = (got, *pull(d))
    return {
        n: float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for n, a, b in zip(("mixed", "d_q", "d_k", "d_v"), got, want, strict=True)
    }


def repeatable(function, arrays) -> bool:
    """Whether ten runs of forward and backward agree in every bit."""
    import jax
    import numpy as np

    @jax.jit
    def both(q, k, v, d):
        mixed, pull = jax.vjp(function, q, k, v)
        return mixed, *pull(d)

    def bits():
        return [np.asarray(x).view(np.uint16) for x in jax.device_get(both(*arrays))]

    first = bits()
    return all(np.array_equal(a, b) for _ in range(9) for a, b in zip(first, bits(), strict=True))


def measure(width: int, length: int, mask: str) -> dict:
    """All implementations of one shape: milliseconds, TFLOP/s, errors, repeatability."""
    import jax
    import jax.numpy as jnp

    rows, heads = TOKENS // length, EMBED // width
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (rows, length, heads, width), jnp.bfloat16) for key in keys]
    document = jnp.arange(length, dtype=jnp.int32) // DOCUMENT + 1
    segments = jnp.tile(document[None], (rows, 1)) if mask == "packed" else None
    scale = 1 / math.sqrt(width)
    pairs = {"full": length, "causal": length / 2, "packed": min(DOCUMENT, length) / 2}[mask] * length * rows
    found = {"width": width, "length": length, "mask": mask, "results": {}}
    programs = {}
    for name, function in implementations(mask, scale, segments).items():
        try:
            compiled = [chain(function, backward) for backward in (False, True)]
            for program in compiled:
                seconds(program, arrays)
            small = implementations(mask, scale, None if segments is None else segments[:1, :2048])[name]
            entry = {"bit_equal": repeatable(function, arrays)}
            if "causal" not in name and not (mask == "packed" and name == "cudnn"):
                entry["errors"] = exact(small, arrays, mask, segments, scale)
            programs[name], found["results"][name] = compiled, entry
        except Exception as error:  # out of memory, or not built for this device: the others are still measured
            found["results"][name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    times = {name: ([], []) for name in programs}
    for _ in range(ROUNDS.value):
        for name, compiled in programs.items():
            for target, program in zip(times[name], compiled, strict=True):
                target.append(seconds(program, arrays))
    for name, (forward, both) in times.items():
        f, fb = statistics.median(forward), statistics.median(both)
        work = 4 * pairs * heads * width / 1e12
        found["results"][name] |= {
            "forward_s": forward,
            "forward_backward_s": both,
            "forward_tflops": work / f,
            "backward_tflops": 2.5 * work / max(fb - f, 1e-9),
        }
    return found


def main(_: list[str]) -> None:
    """Measures every shape, prints a line per implementation and writes the raw results."""
    logging.set_verbosity(logging.ERROR)  # JAX tells of every backend that is not there
    import jax
    import jaxlib

    device = jax.devices()[0]
    if not str(getattr(device, "compute_capability", "")).startswith("9."):
        raise SystemExit("attention_gpu measures a Hopper GPU and found none; nothing was written")
    found = []
    for width in map(int, WIDTHS.value):
        for length in map(int, LENGTHS.value):
            for mask in ("full", "causal", "packed"):
                found.append(measure(width, length, mask))
                for name, r in found[-1]["results"].items():
                    line = r.get("failed") or (
                        f"forward {r['forward_tflops']:.0f}, backward {r['backward_tflops']:.0f} TFLOP/s, "
                        f"bit-equal {r['bit_equal']}, errors {r.get('errors')}"
                    )
                    print(f"K={width} L={length} {mask}, {name}: {line}", flush=True)
    kind = "".join(c if c.isalnum() else "_" for c in device.device_kind.lower())
    target = pathlib.Path(OUTPUT.value or HERE / "results" / f"attention_gpu_{kind}.json")
    record = {
        "command": " ".join(["python -m experiments.benchmarks.attention_gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"device": device.device_kind, "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "results": found,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"raw results: {target}")


if __name__ == "__main__":
    app.run(main)
