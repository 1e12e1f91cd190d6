r"""HyperInterval on sequences of permuted and of rotated images: ten tasks of ten digits, and thirty.

Parts:    permuted   ten orders of the pixels of MNIST
          rotated    MNIST turned by 0, 10, ..., 90 degrees
          stress     thirty orders of the pixels of drawn digits, 14 pixels wide, without a download
Arms:     task       a small network for every task
          universal  one network for all tasks on fixed detectors, with room for later ones
          plain      the same detectors without boxes
          pull ...   of the stress: the strength beta that holds earlier boxes back, beside the ledger
Command:  JAXCL_MNIST=mnist python -m jaxcl.main --config=configs/hyperinterval_protocols.py:rotated \
              --workdir=runs/rotated
          python -m experiments.hyperinterval.claims runs/rotated --out=FILE
Expected: experiments/hyperinterval/README.md; two CPU-minutes an arm, the universal one a half.

A network of 784-64-64-10 for a task has 55,000 weights; the published one of 2,000,000 is the part permuted of
configs/hyperinterval.py.
"""

from ml_collections import ConfigDict

from configs import hyperinterval
from jaxcl.data import scenarios

MLP = {"name": "mlp", "inputs": 28 * 28, "hidden": (64, 64), "classes": 10}
SMALL = {"name": "mlp", "inputs": 14 * 14, "hidden": (32,), "classes": 10}
PATCHES = hyperinterval.PATCHES | {"classes": 10}
TASK = {"name": "hypernetwork", "embedding": 24, "hidden": (32,)}
UNIVERSAL = {"name": "hypernetwork", **hyperinterval.BOXES, "fixed": ("^filters$",)}
DRAWN = {"name": "digits", "count": 500, "held_out": 128, "size": 14}


def sequence(part):
    """Returns sources, stages and the network of a task."""
    images = {"name": "images", "path": hyperinterval.MNIST}
    if part == "stress":
        return *scenarios.permuted(DRAWN, 30, steps=100), SMALL
    if part == "permuted":
        return *scenarios.permuted(images, 10, steps=300), MLP
    return *scenarios.rotated(images, 10, 10.0, steps=300), MLP


def get_config(part="stress"):
    if part not in ("permuted", "rotated", "stress"):
        raise ValueError(f"--config=configs/hyperinterval_protocols.py:{part}: no such part; see its first lines")
    sources, stages, model = sequence(part)
    config = ConfigDict({"seed": 0, "model": ConfigDict(model), "adapter": ConfigDict(TASK)})
    config.method = ConfigDict({"name": "hyperinterval"})
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": 64, "stages": stages})
    config.optim = ConfigDict({"name": "adam", "clip": None})
    config.schedule = ConfigDict({"name": "constant", "peak": 3e-3})
    config.evaluation = ConfigDict({"every": 10**6, "rows": 512})
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    wide = (("model", PATCHES), ("adapter", UNIVERSAL), ("method", {"name": "hyperinterval", **hyperinterval.WIDE}))
    plain = (("model", PATCHES), ("adapter", None), ("method", "cpt"), ("optim.frozen", ("^filters$",)))
    arms = {"task": (), "universal": wide, "plain": plain}
    if part == "stress":
        arms = {f"pull {one:g}": (("method.beta", one),) for one in (0.01, 0.001, 0.0)}
    config.seeds, config.control = (0,), next(iter(arms))
    config.variants = tuple(ConfigDict({"label": label, "set": change}) for label, change in arms.items())
    return config
