"""Saved by two processes, continued by one and by four: each method's run ends as if it had never been interrupted.

One group of processes makes the runs of several methods, as most of a start is the same for all of them. Four
processes compile everything four times: those whose programs are large go on there with JAXCL_ALL_LAYOUTS=1 alone.
"""

import contextlib
import json
import shutil

import layouts
import numpy as np
import processes
import pytest
import small

from jaxcl import distributed, train

STOP = 3  # a step after the first stage has been closed
ON_FOUR = layouts.METHODS if layouts.ALL_LAYOUTS else ("cpt", "mer", "acil")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns workdirs: method -> layout."""
    folder = tmp_path_factory.getbasetemp() / "small"
    folder.mkdir(exist_ok=True)
    place = tmp_path_factory.mktemp("elastic")
    configs = {name: layouts.settings(name) for name in layouts.METHODS}

    def make(layout, count, devices, step, names=layouts.METHODS, *, straight=False):
        workdirs = {name: str(place / layout / name) for name in names}
        table = [(configs[name], workdir, step) for name, workdir in workdirs.items()]
        if straight:
            table += [(configs[name], str(place / "straight" / name), 0) for name in layouts.METHODS]
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
    return {name: {one: place / one / name for one in ("two", "one", "four", "straight")} for name in layouts.METHODS}


@pytest.mark.parametrize("name", layouts.METHODS)
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


def stopped_at(step, monkeypatch):
    """Stops runs in this process after a step; 0 = never."""

    @contextlib.contextmanager
    def stops():
        yield lambda number: "SIGTERM" if step and number >= step else None

    monkeypatch.setattr(distributed, "stop_on_signal", stops)


@pytest.mark.parametrize("kind", ["perceptron", "experts"])
def test_a_run_goes_on_in_its_folder_on_another_mesh_and_with_other_microbatches(kind, tmp_path, monkeypatch):
    if kind == "perceptron":
        config, first, then = layouts.settings("cpt"), {"data": 2, "tensor": 4}, {"data": 4, "tensor": 2}
    else:
        config = small.config(tmp_path / "small", model__experts=4, stream__steps=2, method="cpt", guard=None)
        first, then = {"data": 2, "expert": 4}, {"data": 4, "expert": 2}
    for name in ("straight", "moved"):
        stopped_at(STOP if name == "moved" else 0, monkeypatch)
        assert train.run(config | {"mesh": first}, str(tmp_path / name), final=False) == 0
    assert small.checkpoint(tmp_path / "moved")[0] == STOP
    stopped_at(0, monkeypatch)
    changed = {"mesh": then, **({} if kind == "experts" else {"microbatches": 2})}
    assert train.run(config | changed, str(tmp_path / "moved"), final=False) == 0
    (event,) = [one for one in small.records(tmp_path / "moved", "event") if one["event"] == "restore"]
    assert f"config.mesh is {then}, was {first}" in event["message"]
    assert ("config.microbatches is 2, was None" in event["message"]) == (kind == "perceptron")
    one, other = ([r["loss"] for r in small.records(tmp_path / name, "train")] for name in ("straight", "moved"))
    assert one[:STOP] == other[:STOP]
    np.testing.assert_allclose(other, one, rtol=1e-5)
