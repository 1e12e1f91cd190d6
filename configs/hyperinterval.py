"""Certified continual learning: boxes of weights from a hypernetwork, kept by a ledger.

Task:     two digits at a time, the first or the second (drawn by jaxcl; `:mnist` and its like read a folder with the
          four files of MNIST, --config.path=FOLDER has no effect on the drawn ones).
Claim:    what a task was certified for when it was learned holds for the networks at the end, whatever came later.
Command:  python -m jaxcl.main --config=configs/hyperinterval.py --workdir=runs/hyperinterval
          python -m jaxcl.main --config=configs/hyperinterval.py:universal --workdir=runs/universal
Parts:    (none) task networks · universal: one network · mnist, mnist_universal, permuted: at the sizes of the paper
Expected: experiments/hyperinterval/README.md
Source:   Krukowski et al., 2405.15444, and its published settings. Time: a minute on two CPU cores.
"""

import os

from ml_collections import ConfigDict

from jaxcl.data import scenarios

MNIST = os.environ.get("MNIST", "mnist")  # a folder with the four files
# part -> source, size of an image, adapter, widths, batch, steps, options of the method
PARTS = {
    "task": ("digits", 28, {"embedding": 24, "hidden": (32,), "gamma": 1.0}, (64, 64), 64, 300, {"beta": 0.01}),
    "universal": (
        "digits",
        28,
        {"embedding": 24, "hidden": (32,), "gamma": 10.0, "universal": True},
        (64, 64),
        64,
        300,
        {"beta": 0.0, "spread": 1.0},
    ),
    "mnist": ("mnist", 28, {"embedding": 72, "hidden": (75, 75), "gamma": 1.0}, (400, 400), 128, 300, {"beta": 0.01}),
    "mnist_universal": (
        "mnist",
        28,
        {"embedding": 24, "hidden": (100,), "gamma": 10.0, "universal": True},
        (400, 400),
        64,
        300,
        {"beta": 0.0, "spread": 1.0},
    ),
    "permuted": (
        "permuted",
        32,
        {"embedding": 24, "hidden": (100, 100), "gamma": 0.5},
        (1000, 1000),
        128,
        5000,
        {"beta": 0.01},
    ),
}


def get_config(part="task"):
    if part not in PARTS:
        raise ValueError(f"--config=configs/hyperinterval.py:{part}: no such part; choose from {', '.join(PARTS)}")
    data, side, adapter, hidden, batch, steps, method = PARTS[part]
    source = {"name": "images", "path": MNIST} if data != "digits" else {"name": "digits", "count": 1000}
    if data == "permuted":
        sources, stages = scenarios.permuted(source | {"pad": 2}, 10, steps=steps)
    else:
        sources, stages = scenarios.split(source, classes=10, groups=5, steps=steps)
    config = ConfigDict({"seed": 0})
    config.model = ConfigDict(
        {"name": "mlp", "inputs": side * side, "hidden": hidden, "classes": 10 if data == "permuted" else 2}
    )
    config.adapter = ConfigDict({"name": "hypernetwork", **adapter})
    config.method = ConfigDict({"name": "hyperinterval", "steps": steps, **method})
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": batch, "stages": stages})
    config.optim = ConfigDict({"name": "adam", "clip": None})
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.evaluation = ConfigDict({"every": steps, "rows": 10_000})
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    return config
