"""Certified continual learning: boxes of weights from a hypernetwork, kept by a ledger.

Task:     two digits at a time, is it the first or the second? Drawn digits, without a download; the parts that begin
          with mnist read the four files of MNIST in the folder $JAXCL_MNIST, or mnist.
Claim:    what a task was certified for when it was learned holds for the networks at the end, whatever came later.
Command:  python -m jaxcl.main --config=configs/hyperinterval.py --workdir=runs/hyperinterval
          python -m jaxcl.main --config=configs/hyperinterval.py:universal --workdir=runs/universal
Parts:    task         a network for every task          universal        one network for all tasks
          mnist        the first at the sizes of Krukowski et al., 2405.15444
          mnist_universal, mnist_published               the second: on fixed detectors, and at the published sizes
          permuted     permuted MNIST, ten tasks, at the published sizes (206 M parameters; hours on a CPU)
          PART,STEPS   other steps of a task; task,30 takes half a minute
Expected: experiments/hyperinterval/README.md; the first two take a minute each on two CPU cores.
"""

import os

from ml_collections import ConfigDict

from jaxcl.data import scenarios

MLP = {"name": "mlp", "inputs": 28 * 28, "classes": 2}
PATCHES = {"name": "patches", "side": 28, "filters": 2000, "classes": 2, "window": 12}
BOXES = {"embedding": 24, "hidden": (100,), "gamma": 10.0, "universal": True}
WIDE = {"beta": 0.0, "spread": 10.0, "cap": 3.0, "ease": 0.5}  # room for the tasks to come
# part -> model, adapter, options of the method, batch, steps of a task, peak learning rate
PARTS = {
    "task": (MLP | {"hidden": (64, 64)}, {"embedding": 24, "hidden": (32,)}, {}, 64, 300, 1e-3),
    "universal": (PATCHES, BOXES | {"fixed": ("^filters$",)}, WIDE, 64, 300, 3e-3),
    "mnist": (MLP | {"hidden": (400, 400)}, {"embedding": 72, "hidden": (75, 75)}, {}, 128, 300, 1e-3),
    "mnist_universal": (PATCHES, BOXES | {"fixed": ("^filters$",)}, WIDE, 64, 300, 3e-3),
    "mnist_published": (MLP | {"hidden": (400, 400)}, BOXES, WIDE, 64, 300, 1e-3),
    "permuted": (
        {"name": "mlp", "inputs": 32 * 32, "hidden": (1000, 1000), "classes": 10},
        {"embedding": 24, "hidden": (100, 100), "gamma": 0.5},
        {},
        128,
        5000,
        1e-3,
    ),
}


def mnist():
    """Returns the source of the four files of MNIST."""
    return {"name": "images", "path": os.environ.get("JAXCL_MNIST", "mnist")}


def get_config(text="task"):
    part, _, other = text.partition(",")
    if part not in PARTS or not (other or "1").isdecimal():
        raise ValueError(f"--config=configs/hyperinterval.py:{text}: is no PART or PART,STEPS of {', '.join(PARTS)}")
    model, adapter, method, batch, steps, peak = PARTS[part]
    steps = int(other or steps)
    drawn = part in ("task", "universal")
    source = {"name": "digits", "count": 1000} if drawn else mnist()
    if part == "permuted":
        sources, stages = scenarios.permuted(source | {"pad": 2}, 10, steps=steps)
    else:
        sources, stages = scenarios.split(source, classes=10, groups=5, steps=steps)
    config = ConfigDict({"seed": 0, "model": ConfigDict(model)})
    config.adapter = ConfigDict({"name": "hypernetwork", **adapter})
    config.method = ConfigDict({"name": "hyperinterval", **method})
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": batch, "stages": stages})
    config.optim = ConfigDict({"name": "adam", "clip": None})
    config.schedule = ConfigDict({"name": "constant", "peak": peak})
    config.evaluation = ConfigDict({"every": 10 * steps, "rows": 10_000})
    saves = {"background": part != "permuted"}  # the state of 206 M parameters is not to be held twice
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1, **saves})
    config.mesh = ConfigDict({"data": 1})
    return config
