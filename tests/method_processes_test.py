"""Methods that are no sum of terms, on two processes: the losses and the bits of one process with two devices."""

import importlib

import pytest
import small
from processes import finish, start

from jaxcl.main import plain

METHODS = {
    "mer": {"method": "mer(capacity=16, steps=2, gamma=0.3)"},
    "acil": {
        "method": "acil(every=2)",
        "adapter": {"name": "analytic", "width": 32},
        "model": {"name": "mlp", "inputs": 784, "hidden": (16,), "classes": 2, "output": "hidden"},
    },
    "hyperinterval": {
        "method": "hyperinterval",
        "adapter": {"name": "hypernetwork", "embedding": 4, "hidden": (8,)},
        "model": {"name": "mlp", "inputs": 784, "hidden": (8,), "classes": 2},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def settings(name):
    found = plain(importlib.import_module("configs.split_digits").get_config())
    found["sources"] = {key: one | {"count": 32, "held_out": 16} for key, one in list(found["sources"].items())[:2]}
    found["stream"] = {"batch": 8, "stages": [{**one, "steps": 4} for one in found["stream"]["stages"][:2]]}
    found |= {"evaluation": {"every": 4, "rows": 16}, "checkpoint": {"every_steps": 4}, "mesh": {"data": 2}}
    return found | {"tensorboard": False} | METHODS[name]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(folder, tmp_path, name):
    config = small.write(settings(name), tmp_path / "config.py")
    folder.mkdir(exist_ok=True)
    for count in (1, 2):
        arguments = ("run", "none", f"--config={config}", f"--workdir={tmp_path / str(count)}")
        finish(start(*arguments, processes=count, devices=2 // count, env=small.environment(folder)))
    one, two = (small.outcome(tmp_path / str(count)) for count in (1, 2))
    assert [r["step"] for r in one["records"] if r["kind"] == "train"] == list(range(1, 9))
    assert two == one
