"""Time and peak host memory of reading a checkpoint: jaxcl beside transformers.from_pretrained, on one machine.

python -m experiments.benchmarks.hf_import --peer_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS
python -m experiments.benchmarks.hf_import --preset=llama3-8b --repeats=1      ours alone, at 8 B parameters

A random model in bfloat16 is written to a temporary folder and read by fresh processes in turn, into bfloat16 arrays on
the CPU. Reported: seconds from before the call until all arrays are there (imports excluded), and the highest resident
memory of the process. Raw results go to results/hf_import_cpu.json.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
PEER = flags.DEFINE_string("peer_python", None, "interpreter that has torch and transformers")
PRESET = flags.DEFINE_string("preset", "llama3.2-1b", "shape of the model, see jaxcl/models/presets.py")
REPEATS = flags.DEFINE_integer("repeats", 3, "timed readings of each side, after one that is not counted")
OUTPUT = flags.DEFINE_string("output", str(HERE / "results" / "hf_import_cpu.json"), "file of raw results")
FOLDER = flags.DEFINE_string("folder", None, "where the checkpoint is written, and removed afterwards")
READ = flags.DEFINE_string("read", None, "internal: read this folder")

TORCH = """
import json, sys, time
import torch, transformers
highest = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
base = highest()
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
seconds = time.perf_counter() - began
# Reads every byte, as a mapped file is not in memory before that.
total = sum(float(p.float().sum()) for p in model.parameters())
peak = highest()
touched = time.perf_counter() - began
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
print(json.dumps({"seconds": seconds, "touched_s": touched, "base_kib": base, "peak_kib": peak, "versions": versions}))
"""


def highest() -> int:
    """Returns the highest resident memory of this process in KiB; unlike ru_maxrss without that of its parent."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def read(folder: str) -> None:
    """Reads a folder and prints what it took."""
    import jax
    import ml_dtypes

    from jaxcl.hf import read as hf
    from jaxcl.models import transformer
    from jaxcl.models.config import resolve

    jax.devices()
    base = highest()
    began = time.perf_counter()
    config = resolve(hf.fields(folder))
    shapes = jax.eval_shape(transformer.from_config(config).init, jax.random.key(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), shapes)
    params = jax.block_until_ready(hf.load(folder, config, abstract))
    seconds = time.perf_counter() - began
    total = sum(float(leaf.ravel()[0]) for leaf in jax.tree.leaves(params))
    peak = highest()
    told = {"seconds": seconds, "touched_s": time.perf_counter() - began, "base_kib": base, "peak_kib": peak}
    print(json.dumps(told | {"sum": total, "versions": {"jax": jax.__version__}}))


def write(folder: pathlib.Path, preset: str) -> int:
    """Writes a random checkpoint and returns its bytes; one tensor is in memory at a time."""
    import ml_dtypes
    import numpy as np

    from jaxcl.hf import axes, families
    from jaxcl.hf.write import Writer
    from jaxcl.models import transformer

    config = transformer.shape(preset=preset)
    described = families.config(config, {})
    rng, total = np.random.default_rng(0), 0
    import jax

    model = transformer.from_config(config)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    }
    with Writer(folder) as out:
        for entry in families.entries(families.family(described, "config.json"), config):
            layered = "{}" in entry.tensor
            shape = axes.their_shape(axes.parse(entry.axes), shapes[entry.path][layered:])
            for layer in range(config.layers if layered else 1):
                tensor = (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
                out.add(entry.tensor.format(layer), tensor)
                total += tensor.nbytes
        out.json("config.json", described | {"dtype": "bfloat16"})
    return total


def measure(command: list[str]) -> dict:
    """Returns what a reading process prints."""
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    if run.returncode:
        raise SystemExit(f"{command[0]}: status {run.returncode}\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(_) -> None:
    if READ.value:
        read(READ.value)
        return
    root = pathlib.Path(tempfile.mkdtemp(dir=FOLDER.value))
    try:
        size = write(root / "model", PRESET.value)
        sides = {"jaxcl": [sys.executable, "-m", "experiments.benchmarks.hf_import", f"--read={root / 'model'}"]}
        if PEER.value:
            sides["transformers"] = [PEER.value, "-c", TORCH, str(root / "model")]
        raw: dict[str, list[dict]] = {name: [] for name in sides}
        for i in range(REPEATS.value + 1):
            for name, command in sides.items():
                told = measure(command)
                if i or REPEATS.value == 1:
                    raw[name].append(told)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    gib = 2**20
    summary = {
        name: {
            "seconds": statistics.median(told["seconds"] for told in runs),
            "touched_s": statistics.median(told["touched_s"] for told in runs),
            "peak_gib": max(told["peak_kib"] for told in runs) / gib,
            "above_imports_gib": max(told["peak_kib"] - told["base_kib"] for told in runs) / gib,
        }
        for name, runs in raw.items()
    }
    command = ["--peer_python=PYTHON" if arg.startswith("--peer_python") else arg for arg in sys.argv[1:]]
    about = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "command": command}
    result = {"preset": PRESET.value, "checkpoint_bytes": size, "summary": summary, "raw": raw, **about}
    pathlib.Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"checkpoint_gib": size / 2**30, **summary}, indent=1))


if __name__ == "__main__":
    app.run(main)
