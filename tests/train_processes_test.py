"""One run on several processes and meshes: the same losses, the same rows, stopped and continued together."""

import json

import numpy as np
import processes
import pytest
import small

FSDP = {"data": 2, "fsdp": 2}
LAYOUTS = [(1, 4), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def command(folder, workdir, count, devices, mesh, point="none", codes=(0,)):
    """Runs the command line on `count` processes with `devices` devices each and returns the folder of the run."""
    workdir.parent.mkdir(exist_ok=True)
    config = small.write(small.config(folder, mesh=mesh), workdir.parent / f"{workdir.name}.py")
    arguments = ("run", point, f"--config={config}", f"--workdir={workdir}")
    env = small.environment(folder)
    processes.finish(processes.start(*arguments, processes=count, devices=devices, env=env), timeout=600, codes=codes)
    return workdir


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The same mesh cut over one, two and four processes."""
    place = tmp_path_factory.mktemp("layouts")
    return {count: command(folder, place / f"{count}x{devices}", count, devices, FSDP) for count, devices in LAYOUTS}


def losses(workdir):
    return {r["step"]: r["loss"] for r in small.records(workdir, "train")}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_change_no_bit(runs, count):
    assert len(losses(runs[1])) == small.TOTAL
    assert small.records(runs[count]) == small.records(runs[1])
    assert small.checkpoint(runs[count]) == small.checkpoint(runs[1])
    assert small.results(runs[count]) == small.results(runs[1])


def test_only_one_process_writes(runs):
    for workdir in runs.values():
        assert len(small.records(workdir, "train")) == small.TOTAL
        assert json.loads((workdir / "run.json").read_text())["finished"]


@pytest.mark.parametrize(("name", "mesh", "devices"), [("8", {"data": 8}, 8), ("2x4", {"fsdp": 2, "tensor": 4}, 8)])
def test_other_meshes_agree_in_the_first_steps(folder, runs, tmp_path, name, mesh, devices):
    other = losses(command(folder, tmp_path / name, 1, devices, {"data": 1, **mesh}))
    reference = losses(runs[1])
    first = range(1, 6)  # until the first meta-update; later steps amplify the last bits
    np.testing.assert_allclose([other[s] for s in first], [reference[s] for s in first], rtol=1e-5)
    assert set(other) == set(reference)


def test_rows_do_not_depend_on_the_processes_or_the_mesh(folder, runs, tmp_path):
    _, _, made = small.shared(folder)
    ledgers = [small.records(runs[count], "ledger") for count in runs]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert ledgers[0][-1]["sources"] == made.stream.ledger(small.TOTAL)
    hosts = [small.checkpoint(runs[count])[2]["stream"] for count in runs]
    assert hosts == [made.stream.fingerprint()] * 3


def test_a_signal_to_one_of_two_stops_both_and_they_continue(folder, runs, tmp_path):
    workdir = tmp_path / "run"
    command(folder, workdir, 2, 2, FSDP, point="SIGTERM:step:9@1")
    step = small.checkpoint(workdir)[0]
    assert 9 <= step < small.TOTAL
    assert not (workdir / "report.json").exists()
    command(folder, workdir, 2, 2, FSDP)
    assert small.outcome(workdir) == small.outcome(runs[2])


def test_killed_on_two_processes_continued_on_one(folder, runs, tmp_path):
    workdir = tmp_path / "run"
    command(folder, workdir, 2, 2, FSDP, point="SIGKILL:step:14", codes=(-9, -6, 1))
    assert small.checkpoint(workdir)[0] in (9, 12)
    command(folder, workdir, 1, 4, FSDP)
    assert small.outcome(workdir) == small.outcome(runs[2])
