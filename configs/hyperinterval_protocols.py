r"""HyperInterval on sequences of permuted and of rotated images: ten tasks of ten digits, and thirty.

Parts:    permuted   ten orders of the pixels of MNIST
          rotated    MNIST turned by 0, 10, ..., 90 degrees
          stress     thirty orders of the pixels of drawn digits, 14 pixels wide, without a download
Arms:     task       a small network for every task
          universal  one network for all tasks on fixed detectors, with room for later ones
          plain      the same detectors without boxes
          pull ...   of the stress: the strength beta that holds earlier boxes back, beside the ledger; *wide* has ten
                     times the radius, and was the first that was tried
Command:  JAXCL_MNIST=mnist python -m jaxcl.main --config=configs/hyperinterval_protocols.py:rotated \
              --workdir=runs/rotated
          python -m experiments.hyperinterval.claims runs/rotated --out=FILE
Expected: experiments/hyperinterval/README.md, with the time of each part.

A network of 784-100-100-10 for a task has 90,000 weights; the published one of 2,000,000 is the part permuted of
configs/hyperinterval.py.
"""

from ml_collections import ConfigDict

from configs import hyperinterval
from jaxcl.data import scenarios

MLP = {"name": "mlp", "inputs": 28 * 28, "hidden": (100, 100), "classes": 10}
SMALL = {"name": "mlp", "inputs": 14 * 14, "hidden": (32,), "classes": 10}
PATCHES = hyperinterval.PATCHES | {"classes": 10}
TASK = {"name": "hypernetwork", "embedding": 24, "hidden": (50, 50), "gamma": 0.1}
FEW = TASK | {"hidden": (32,)}  # for the small network
UNIVERSAL = {"name": "hypernetwork", **hyperinterval.BOXES, "fixed": ("^filters$",)}
DRAWN = {"name": "digits", "count": 500, "held_out": 128, "size": 14}


def sequence(part):
    """Returns sources, stages and the network of a task."""
    images = hyperinterval.mnist()
    if part == "stress":
        return *scenarios.permuted(DRAWN, 30, steps=100), SMALL
    if part == "permuted":
        return *scenarios.permuted(images, 10, steps=200), MLP
    return *scenarios.rotated(images, 10, 10.0, steps=200), MLP


def get_config(part="stress"):
    if part not in ("permuted", "rotated", "stress"):
        raise ValueError(f"--config=configs/hyperinterval_protocols.py:{part}: no such part; see its first lines")
    sources, stages, model = sequence(part)
    config = ConfigDict({"seed": 0, "model": ConfigDict(model)})
    config.adapter = ConfigDict(FEW if part == "stress" else TASK)
    config.method = ConfigDict({"name": "hyperinterval", "beta": 0.001})
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": 64, "stages": stages})
    config.optim = ConfigDict({"name": "adam", "clip": None})
    config.schedule = ConfigDict({"name": "constant", "peak": 3e-3})
    config.evaluation = ConfigDict({"every": 10**6, "rows": 1000})
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    wide = (("model", PATCHES), ("adapter", UNIVERSAL), ("method", {"name": "hyperinterval", **hyperinterval.WIDE}))
    plain = (("model", PATCHES), ("adapter", None), ("method", "cpt"), ("optim.frozen", ("^filters$",)))
    arms = {"task": (), "universal": wide, "plain": plain}
    if part == "stress":
        wide = (("adapter.gamma", 1.0), ("method.beta", 0.01))
        arms = {"pull 0": (("method.beta", 0.0),), "pull 0.001": (), "wide, pull 0.01": wide}
    config.seeds, config.control = (0,), next(iter(arms))
    config.variants = tuple(ConfigDict({"label": label, "set": change}) for label, change in arms.items())
    return config
