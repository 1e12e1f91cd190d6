"""Small runs of five methods on four devices, for tests of several processes: two stages of few steps."""

import importlib
import os

import rl_small

from jaxcl.main import plain

# Rows are cut in two, and so are the parameters: sums over two devices are exact in any order, over four they are not.
MESH = {"data": 2, "tensor": 2}
MODEL = {"name": "mlp", "inputs": 784, "hidden": (8,), "classes": 2}
DIGITS = {
    "cpt": {"method": "cpt"},
    "mer": {"method": "mer(capacity=16, steps=2, gamma=0.3)"},
    "acil": {
        "method": "acil(every=1)",
        "adapter": {"name": "analytic", "width": 16},
        "model": {**MODEL, "output": "hidden"},
    },
    "hyperinterval": {
        "method": "hyperinterval",
        "adapter": {"name": "hypernetwork", "embedding": 4, "hidden": (8,)},
    },
}
METHODS = (*DIGITS, "soft rl")
ALL_LAYOUTS = bool(os.environ.get("JAXCL_ALL_LAYOUTS"))  # also what takes minutes


def settings(name, steps=2, saved=100):
    """Returns the config of a run of two stages of so many steps, with a checkpoint every `saved` of them."""
    if name == "soft rl":  # at the stop, answers of the next step wait: drawn from parameters that are gone
        return rl_small.config(
            mesh=MESH,
            stream__stages=[
                {"name": "three", "steps": steps, "mixture": {"three": 1.0}},
                {"name": "four", "steps": steps, "mixture": {"four": 0.7, "three": 0.3}},
            ],
            objective="grpo",
            rollout={"group": 4, "samples": 2, "modes": [], "ahead": True},
            evaluation={"every": 100, "rows": 4},
            checkpoint={"every_steps": saved},
        )
    found = plain(importlib.import_module("configs.split_digits").get_config())
    found["sources"] = {key: one | {"count": 32, "held_out": 16} for key, one in list(found["sources"].items())[:2]}
    found["stream"] = {"batch": 8, "stages": [{**one, "steps": steps} for one in found["stream"]["stages"][:2]]}
    found |= {"model": MODEL, "evaluation": {"every": 100, "rows": 8}, "checkpoint": {"every_steps": saved}}
    return found | {"mesh": MESH, "tensorboard": False} | DIGITS[name]
