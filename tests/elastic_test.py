"""Saved by two processes, continued by one and by four: each method's run ends as if it had never been interrupted.

One group of processes makes all runs, as most of a start is the same for all of them.
"""

import importlib
import json
import shutil

import processes
import pytest
import rl_small
import small

from jaxcl.main import plain

# Four devices, of which pairs hold the same rows: sums over two are exact in any order, over four they are not.
MESH = {"data": 2, "expert": 2}
STOP, TOTAL = 3, 4  # after the first task has been closed
DIGITS = {
    "acil": {
        "method": "acil(every=1)",
        "adapter": {"name": "analytic", "width": 16},
        "model": {"name": "mlp", "inputs": 784, "hidden": (8,), "classes": 2, "output": "hidden"},
    },
    "hyperinterval": {
        "method": "hyperinterval",
        "adapter": {"name": "hypernetwork", "embedding": 4, "hidden": (8,)},
        "model": {"name": "mlp", "inputs": 784, "hidden": (8,), "classes": 2},
    },
}
METHODS = ("cpt", "mer", "soft rl", *DIGITS)
SHORT = {
    "evaluation": {"every": 100, "rows": 8},
    "checkpoint": {"every_steps": 100, "every_minutes": None},
    "mesh": MESH,
}


def settings(name, folder):
    """Returns the config of a run of two tasks of two steps."""
    if name in DIGITS:
        found = plain(importlib.import_module("configs.split_digits").get_config())
        found["sources"] = {key: one | {"count": 32, "held_out": 16} for key, one in list(found["sources"].items())[:2]}
        found["stream"] = {"batch": 8, "stages": [{**one, "steps": 2} for one in found["stream"]["stages"][:2]]}
        return found | DIGITS[name] | SHORT | {"tensorboard": False}
    if name == "soft rl":
        stages = [{"name": one, "steps": 2, "mixture": {one: 1.0}} for one in ("three", "four")]
        found = rl_small.config(stream__stages=stages, rollout={"group": 4, "samples": 2, "modes": []}, **SHORT)
        return found
    method = {"cpt": "cpt", "mer": "mer(capacity=16, steps=2, gamma=0.3)"}[name]
    found = small.config(folder, method=method, stream__steps=2, **SHORT)
    found["stream"]["stages"] = found["stream"]["stages"][:2]
    del found["guard"]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns workdirs: method -> layout."""
    folder = tmp_path_factory.getbasetemp() / "small"
    place = tmp_path_factory.mktemp("elastic")
    configs = {name: settings(name, folder) for name in METHODS}

    def make(layout, count, devices, step, *, straight=False):
        workdirs = {name: str(place / layout / name) for name in METHODS}
        table = [(configs[name], workdir, step) for name, workdir in workdirs.items()]
        if straight:
            table += [(configs[name], str(place / "straight" / name), 0) for name in METHODS]
        path = place / f"{layout}.json"
        path.write_text(json.dumps(table))
        env = small.environment(folder)
        statuses = processes.run("elastic", path, processes=count, devices=devices, env=env, timeout=1400)
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
    step, _, host = small.checkpoint(found["two"])
    assert step == STOP
    assert small.events(found["two"]) == [(STOP, "stopped")]
    outcomes = {layout: small.outcome(found[layout]) for layout in ("one", "four", "straight")}
    steps = [r["step"] for r in outcomes["straight"]["records"] if r["kind"] == "train"]
    assert steps == list(range(1, TOTAL + 1))
    for layout in ("one", "four"):
        assert (STOP, "restore") in small.events(found[layout])
        assert outcomes[layout] == outcomes["straight"]
    assert host["ledger"]
