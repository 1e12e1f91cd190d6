"""A convolutional network on images of the shape of CIFAR, two tasks: from a file to promises that are kept."""

import jax
import numpy as np
import pytest
import rl_small
import small

from jaxcl import folder
from jaxcl.data import scenarios

QUICK = True
SIDE, ROWS = 32, 64


def test_promises_for_colour_images(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(4 * ROWS) % 4
    tint = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 20]])[labels]
    images = np.clip(tint[:, None, None] + rng.normal(scale=40, size=(len(labels), SIDE, SIDE, 3)), 0, 255)
    np.savez(tmp_path / "colours.npz", images=images.astype(np.uint8), labels=labels)
    source = {"name": "images", "path": str(tmp_path / "colours.npz"), "held_out": 0.25}
    sources, stages = scenarios.split(source, classes=4, groups=2, steps=12)
    settings = {
        "label": "colours",
        "seed": 0,
        "model": {"name": "cnn", "inputs": (SIDE, SIDE, 3), "channels": (2,), "hidden": (), "classes": 2},
        "adapter": {"name": "hypernetwork", "embedding": 3, "hidden": (4,), "gamma": 0.02},
        "method": {"name": "hyperinterval", "select": 3, "aside": 0.2},
        "sources": sources,
        "stream": {"batch": 8, "stages": list(stages)},
        "optim": {"name": "adam", "clip": None},
        "schedule": {"name": "constant", "peak": 2e-2},
        "evaluation": {"every": 100, "rows": 32},
        "checkpoint": {"every_steps": 10**6, "every_minutes": None, "keep": 1},
        "tensorboard": False,
    }
    try:
        rl_small.run(settings, tmp_path / "run")
    finally:
        jax.config.update("jax_disable_most_optimizations", QUICK)
    found = [r for r in small.records(tmp_path / "run", "eval") if r["boundary"] is not None]
    last = found[-1]["certificate"]
    for t, name in enumerate(sources):
        learned = found[t + 1]["certificate"][name]
        assert learned["interval"] <= learned["affine"] <= learned["joint"]
        assert learned["promised"] <= last[name]["promised"] <= last[name]["deployed"]
        assert last[name]["deployed"] == pytest.approx(found[-1]["accuracy"][name], abs=1e-6)
        assert learned["affine_radius"] <= learned["radius"]
        assert t or learned["promised"] > 0.8  # two channels and twelve steps are too few for a second task
    assert folder.about(tmp_path / "run")["facts"]["unit"] == "rows"
