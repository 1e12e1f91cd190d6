r"""An adapter goes on to the next corpus with the state of its optimiser, without it, and without it after a warm-up.

python -m experiments.adapters.handoff --workdir=runs/handoff

A small Llama learns prose; an adapter on it learns code, at a constant rate from its 20th step on; then headers, three
times from the same weights and on the same rows in the same order:

  with      a branch of the run: moments and step count of AdamW go on (python -m jaxcl.branch)
  without   a new run that starts from the exported adapter (config.adapter.checkpoint): moments begin at zero
  warm-up   the same, and the rate rises over 20 steps

Writes results/handoff.json: the loss of every step after the hand-off, and the held-out losses at the end.
"""

import datetime
import json
import platform
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from jaxcl import branch, metrics, train
from jaxcl.folder import about
from jaxcl.hf.__main__ import export, export_adapter

WORKDIR = flags.DEFINE_string("workdir", "runs/handoff", "Folder of the runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")
STEPS = flags.DEFINE_integer("steps", 60, "Steps of each phase of the adapter.")
OUTPUT = flags.DEFINE_string("output", "experiments/adapters/results/handoff.json", "Where the result goes.")
DOMAINS = ("prose", "code", "headers")
PEAK = 1e-3
CONSTANT = {"name": "constant", "peak": PEAK}


def config(seed, stages, **sections):
    """Returns the config of a run over these domains, all three of them evaluated."""
    return {
        "seed": seed,
        "model": {"name": "transformer", "preset": "small"},
        "tokenizer": {"name": "byte"},
        "sources": {d: {"name": "embedded", "domain": d, "max_bytes": 3_000_000} for d in DOMAINS},
        "packing": {"length": 256},
        "stream": {
            "batch": 16,
            "steps": STEPS.value,
            "stages": [{"name": d, "mixture": {d: 1.0}} for d in stages],
        },
        "optim": {"name": "adamw", "weight_decay": 0.0, "clip": 1.0},
        "schedule": {**CONSTANT, "warmup": 20},
        "evaluation": {"every": 20, "rows": 32},
        "mesh": {"data": 1},
        "tensorboard": False,
        **sections,
    }


def trained(settings, folder):
    """Trains unless it is trained already; ends the program where a signal stopped it."""
    status = train.run(settings, str(folder), final=False)
    if status or not about(folder)["finished"]:
        raise SystemExit(status)


def losses(folder, start):
    """Returns the training losses after `start`, and the last held-out losses."""
    records = list(metrics.read(folder / "metrics.jsonl"))
    curve = [r["loss"] for r in records if r["kind"] == "train" and r["step"] > start]
    return {"train": curve, "held_out": [r["loss"] for r in records if r["kind"] == "eval"][-1]}


def seed_of(root, seed):
    """Returns the three continuations of one seed."""
    model = {"checkpoint": str(root / "base")}
    words = {"name": "byte"}
    trained(config(seed, ["prose"], schedule={**CONSTANT, "peak": 3e-3, "warmup": 20}), root / "prose")
    if not (root / "base").exists():
        export(root / "prose", root / "base")
    lora = {"name": "lora", "rank": 8}
    trained(config(seed, ["code"], model=model, tokenizer=words, adapter=lora), root / "code")
    if not (root / "adapter").exists():
        export_adapter(root / "code", root / "adapter")
    if not (root / "with").exists():
        branch.make(root / "code", root / "with")
    trained(config(seed, ["code", "headers"], model=model, tokenizer=words, adapter=lora), root / "with")
    again = {"model": model, "tokenizer": words, "adapter": {"name": "lora", "checkpoint": str(root / "adapter")}}
    trained(config(seed, ["headers"], **again, schedule={**CONSTANT, "warmup": 0}), root / "without")
    trained(config(seed, ["headers"], **again), root / "warm-up")
    starts = {"with": STEPS.value, "without": 0, "warm-up": 0}
    return {name: losses(root / name, start) for name, start in starts.items()}


def main(_):
    found = [seed_of(Path(WORKDIR.value) / str(seed), seed) for seed in range(SEEDS.value)]
    table = {}
    for name in found[0]:
        curves = np.array([run[name]["train"] for run in found])  # [seeds, steps]
        ends = {d: [run[name]["held_out"][d] for run in found] for d in DOMAINS}
        table[name] = {
            "first 10 steps": curves[:, :10].mean(1).tolist(),
            "all steps": curves.mean(1).tolist(),
            "held out": ends,
        }
        print(name, *(f"{key} {np.mean(table[name][key]):.3f}" for key in ("first 10 steps", "all steps")), ends)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m experiments.adapters.handoff",
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "steps": STEPS.value,
        "table": table,
        "runs": found,
    }
    Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
