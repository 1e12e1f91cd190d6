"""Saved by two processes, continued by one and by four: each method's run ends as if it had never been interrupted.

One group of processes makes the runs of several methods, as most of a start is the same for all of them.
"""

import importlib
import json
import shutil

import processes
import pytest
import small

from jaxcl.main import plain

# Four devices, of which pairs hold the same rows: sums over two are exact in any order, over four they are not.
MESH = {"data": 2, "expert": 2}
STOP, TOTAL = 3, 4  # after the first task has been closed
MODEL = {"name": "mlp", "inputs": 784, "hidden": (8,), "classes": 2}
METHODS = {
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


def settings(name):
    """Returns the config of a run of two tasks of two steps."""
    found = plain(importlib.import_module("configs.split_digits").get_config())
    found["sources"] = {key: one | {"count": 32, "held_out": 16} for key, one in list(found["sources"].items())[:2]}
    found["stream"] = {"batch": 8, "stages": [{**one, "steps": 2} for one in found["stream"]["stages"][:2]]}
    found |= {"model": MODEL, "evaluation": {"every": 100, "rows": 8}, "checkpoint": {"every_steps": 100}, "mesh": MESH}
    return found | {"tensorboard": False} | METHODS[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns workdirs: method -> layout."""
    folder = tmp_path_factory.getbasetemp() / "small"
    folder.mkdir(exist_ok=True)
    place = tmp_path_factory.mktemp("elastic")
    configs = {name: settings(name) for name in METHODS}

    def make(layout, count, devices, step, *, straight=False):
        workdirs = {name: str(place / layout / name) for name in METHODS}
        table = [(configs[name], workdir, step) for name, workdir in workdirs.items()]
        if straight:
            table += [(configs[name], str(place / "straight" / name), 0) for name in METHODS]
        path = place / f"{layout}.json"
        path.write_text(json.dumps(table))
        env = small.environment(folder)
        statuses = processes.run("elastic", path, processes=count, devices=devices, env=env)
        assert statuses == [[0] * len(table)] * count

    make("two", 2, 2, STOP)
    for layout in ("one", "four"):
        shutil.copytree(place / "two", place / layout)
    make("one", 1, 4, 0, straight=True)
    make("four", 4, 1, 0)
    return {name: {one: place / one / name for one in ("two", "one", "four", "straight")} for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_save_and_one_or_four_go_on(runs, name):
    found = runs[name]
    assert small.checkpoint(found["two"])[0] == STOP
    assert small.events(found["two"]) == [(STOP, "stopped")]
    outcomes = {layout: small.outcome(found[layout]) for layout in ("one", "four", "straight")}
    steps = [r["step"] for r in outcomes["straight"]["records"] if r["kind"] == "train"]
    assert steps == list(range(1, TOTAL + 1))
    for layout in ("one", "four"):
        assert (STOP, "restore") in small.events(found[layout])
        assert outcomes[layout] == outcomes["straight"]
