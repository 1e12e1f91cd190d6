"""Saved by two processes, continued by one and by four: each method's run ends as if it had never been interrupted.

One group of processes makes the runs of several methods, as most of a start is the same for all of them. Four
processes compile everything four times: those whose programs are large go on there with JAXCL_ALL_LAYOUTS=1 alone.
"""

import json
import shutil

import layouts
import processes
import pytest
import small

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
