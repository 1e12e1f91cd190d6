"""Saved by two processes, continued by one and by four: each method's run ends as if it had never been interrupted.

One group of processes makes the runs of several methods, as most of a start is the same for all of them. Four
processes compile everything four times: those whose programs are large go on there with JAXCL_ALL_LAYOUTS=1 alone.
"""

import importlib
import json
import os
import shutil

import processes
import pytest
import rl_small
import small

from jaxcl.main import plain

# Rows are cut in two, and so are the parameters: sums over two devices are exact in any order, over four they are not.
MESH = {"data": 2, "tensor": 2}
STOP = 3  # a step after the first stage has been closed
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
ON_FOUR = METHODS if os.environ.get("JAXCL_ALL_LAYOUTS") else ("cpt", "mer", "acil")


def settings(name):
    """Returns the config of a run of two stages and four steps."""
    if name == "soft rl":  # at the stop, answers of the next step wait: drawn from parameters that are gone
        return rl_small.config(
            mesh=MESH,
            stream__stages=[
                {"name": "three", "steps": 2, "mixture": {"three": 1.0}},
                {"name": "four", "steps": 2, "mixture": {"four": 0.7, "three": 0.3}},
            ],
            objective="grpo",
            rollout={"group": 4, "samples": 2, "modes": [], "ahead": True},
            evaluation={"every": 100, "rows": 4},
            checkpoint={"every_steps": 100},
        )
    found = plain(importlib.import_module("configs.split_digits").get_config())
    found["sources"] = {key: one | {"count": 32, "held_out": 16} for key, one in list(found["sources"].items())[:2]}
    found["stream"] = {"batch": 8, "stages": [{**one, "steps": 2} for one in found["stream"]["stages"][:2]]}
    found |= {"model": MODEL, "evaluation": {"every": 100, "rows": 8}, "checkpoint": {"every_steps": 100}, "mesh": MESH}
    return found | {"tensorboard": False} | DIGITS[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns workdirs: method -> layout."""
    folder = tmp_path_factory.getbasetemp() / "small"
    folder.mkdir(exist_ok=True)
    place = tmp_path_factory.mktemp("elastic")
    configs = {name: settings(name) for name in METHODS}

    def make(layout, count, devices, step, names=METHODS, *, straight=False):
        workdirs = {name: str(place / layout / name) for name in names}
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
    make("four", 4, 1, 0, ON_FOUR)
    return {name: {one: place / one / name for one in ("two", "one", "four", "straight")} for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_save_and_others_go_on(runs, name):
    found = runs[name]
    assert small.checkpoint(found["two"])[0] == STOP
    assert small.events(found["two"]) == [(STOP, "stopped")]
    layouts = ("one", "four") if name in ON_FOUR else ("one",)
    outcomes = {layout: small.outcome(found[layout]) for layout in (*layouts, "straight")}
    assert [r["step"] for r in outcomes["straight"]["records"] if r["kind"] == "train"] == [1, 2, 3, 4]
    for layout in layouts:
        assert (STOP, "restore") in small.events(found[layout])
        assert outcomes[layout] == outcomes["straight"]
