"""One run on several processes and meshes: the same losses, the same rows, stopped and continued together."""

import json

import numpy as np
import processes
import pytest
import small

PAIRS = {"data": 1, "fsdp": 2, "tensor": 2}  # sums over two devices are exact in any order; over four they are not
STEPS = 4  # of a stage
TOTAL = STEPS * small.STAGES
LAYOUTS = [(1, 4), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def shortened(folder, mesh):
    """Returns a config of fewer steps: a step of four processes on few cores is slow."""
    settings = small.config(folder, mesh=mesh, stream__steps=STEPS, method="er(capacity=24) + reptile(every=4)")
    del settings["guard"]
    return settings


def command(folder, workdir, count, devices, mesh, point="none", codes=(0,)):
    """Runs the command line on `count` processes with `devices` devices each and returns the folder of the run."""
    workdir.parent.mkdir(exist_ok=True)
    config = small.write(shortened(folder, mesh), workdir.parent / f"{workdir.name}.py")
    arguments = ("run", point, f"--config={config}", f"--workdir={workdir}")
    env = small.environment(folder)
    processes.finish(processes.start(*arguments, processes=count, devices=devices, env=env), timeout=600, codes=codes)
    return workdir


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The same mesh cut over one, two and four processes."""
    place = tmp_path_factory.mktemp("layouts")
    return {count: command(folder, place / f"{count}x{devices}", count, devices, PAIRS) for count, devices in LAYOUTS}


def losses(workdir):
    return {r["step"]: r["loss"] for r in small.records(workdir, "train")}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_change_no_bit(runs, count):
    assert len(losses(runs[1])) == TOTAL
    assert small.records(runs[count]) == small.records(runs[1])
    assert small.checkpoint(runs[count]) == small.checkpoint(runs[1])
    assert small.results(runs[count]) == small.results(runs[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--workdir=run --config.schedule.peak=0.1{process}", "config.schedule.peak=0.11 on process 1, and 0.1 on"),
        ("--workdir=run{process}", "run1' on process 1, and '"),
    ],
)
def test_processes_that_were_told_different_things_do_not_train(folder, tmp_path, options, message):
    """Each would train a model of its own, and report that of the first."""
    path = small.write(shortened(folder, {"data": 2}), tmp_path / "config.py")
    options = options.replace("=run", f"={tmp_path}/run").split()
    started = processes.start("run", "none", f"--config={path}", *options, processes=2, env=small.environment(folder))
    processes.finish(started, timeout=120, codes=(2,))
    first, second = (one.log.read_text() for one in started)
    assert "process 1 cannot go on; its own message says why" in first
    assert message in second
    assert "start all processes with the same command line" in second
    assert not list(tmp_path.glob("run*"))


def test_only_one_process_writes(runs):
    for workdir in runs.values():
        assert len(small.records(workdir, "train")) == TOTAL
        assert json.loads((workdir / "run.json").read_text())["finished"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluations_say_which_process_is_the_slowest(runs, count):
    lines = [json.loads(line) for line in (runs[count] / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "eval"]
    assert all(("skew" in time) == (count > 1) for time in times)
    assert all(time["skew"] >= 1 and 0 <= time["slowest"] < count for time in times if count > 1)
    speed = json.loads((runs[count] / "report.json").read_text())["time"]
    assert (speed["skew"] is not None) == (count > 1)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_other_meshes_agree_in_the_first_steps(folder, runs, tmp_path, mesh):
    other = losses(command(folder, tmp_path / "run", 1, 8, mesh))
    reference = losses(runs[1])
    first = range(1, 5)  # later steps amplify the last bits
    np.testing.assert_allclose([other[s] for s in first], [reference[s] for s in first], rtol=1e-5)
    assert set(other) == set(reference)


def test_rows_do_not_depend_on_the_processes_or_the_mesh(folder, runs, tmp_path):
    stream = small.stream(shortened(folder, {}))
    ledgers = [small.records(runs[count], "ledger") for count in runs]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert ledgers[0][-1]["sources"] == stream.ledger(TOTAL)
    hosts = [small.checkpoint(runs[count])[2]["stream"] for count in runs]
    assert hosts == [stream.fingerprint()] * 3


def test_a_signal_to_one_of_two_stops_both_and_one_continues(folder, runs, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as launched:
        launched.setenv("JAXCL_STOPPED", "75")  # the one that was not sent the signal ends with it as well
        command(folder, workdir, 2, 2, PAIRS, point="SIGTERM:step:5@1", codes=(75,))
    step = small.checkpoint(workdir)[0]
    assert 5 <= step < TOTAL
    assert not (workdir / "report.json").exists()
    command(folder, workdir, 1, 4, PAIRS)
    assert small.outcome(workdir) == small.outcome(runs[2])
