"""A run that replays from its reservoir on disk, killed, stopped, rolled back and cut over processes: the same bits."""

import copy
import shutil

import numpy as np
import processes
import pytest
import small
from train_test import damage, nan_at

from jaxcl import folder as run_folder
from jaxcl import train
from jaxcl.data.archive import Archive
from jaxcl.data.reservoir import Reservoir
from jaxcl.schema import UserError

CAPACITY = 40  # less than the 64 rows of a stage: rows are replaced
REPLAY = {"fraction": 0.25, "mode": "replace", "over": "reservoir", "capacity": CAPACITY}
# Rows are committed at steps 8 and 16: 64 rows, then 64 + 48 of them.
CHAIN = [
    ("SIGKILL:commit:64", -9),
    ("SIGKILL:step:10", -9),  # the reservoir has steps 0 to 7, the checkpoint is of step 9
    ("SIGKILL:commit:112", -9),
    ("SIGKILL:commit:112", -9),
    ("SIGKILL:save:21", -9),
    ("none", 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def config(folder, **overrides):
    return small.config(folder, stream__replay=REPLAY, **overrides)


def held(settings, workdir):
    """Returns the numbers of the rows that the reservoir of a run holds, and the rows."""
    archive = Archive(str(workdir / "reservoir"), small.stream(settings))
    with archive._make(own=False) as found:
        return found.held().tolist(), found.read(found.held()).tolist()


def outcome(settings, workdir):
    return {**small.outcome(workdir), "reservoir": held(settings, workdir)}


def command(settings, folder, workdir, point="none", code=0, count=1, devices=1):
    """Runs the command line and returns its output."""
    workdir.parent.mkdir(exist_ok=True)
    path = small.write(settings, workdir.parent / f"{workdir.name}.py")
    arguments = ("run", point, f"--config={path}", f"--workdir={workdir}")
    started = processes.start(*arguments, processes=count, devices=devices, env=small.environment(folder))
    processes.finish(started, codes=(code,))
    return "".join(process.log.read_text() for process in started)


def test_a_chain_of_kills_and_stops_changes_no_bit(folder, tmp_path):
    settings = config(folder)
    command(settings, folder, tmp_path / "straight")
    logs = [command(settings, folder, tmp_path / "run", point, code) for point, code in CHAIN]
    assert not any("Traceback" in log for log in logs)
    assert outcome(settings, tmp_path / "run") == outcome(settings, tmp_path / "straight")
    (ledger,) = [r["sources"] for r in small.records(tmp_path / "run", "ledger") if r["step"] == small.TOTAL]
    assert ledger == small.stream(settings).ledger(small.TOTAL)
    assert sum(counts["replayed_rows"] for counts in ledger.values()) == 2 * 8 * 2  # 25 % of stages 2 and 3


def flip(settings, workdir, slot):
    """Changes a bit of the row in a slot."""
    with Archive(str(workdir / "reservoir"), small.stream(settings))._make(own=False) as found:
        stripe = found.stripes[slot % len(found.stripes)]
        (place,) = stripe.find(found.held()[slot : slot + 1])
    (path,) = (workdir / "reservoir" / f"stripe-{slot % len(found.stripes):05d}").glob("rows-*")
    data = bytearray(path.read_bytes())
    data[place * 4 * stripe.width] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.slow
def test_processes_change_no_bit(folder, tmp_path):
    settings = config(folder, mesh={"data": 2}, stream__steps=5, method="cpt")
    del settings["guard"]
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    command(settings, folder, one, devices=2)
    command(settings, folder, two, count=2)
    assert outcome(settings, two) == outcome(settings, one)
    assert len(list((two / "reservoir").glob("stripe-*"))) == 2
    shutil.copytree(two, mixed)
    back_to(mixed, 9)
    command(settings, folder, mixed, devices=2)  # one process goes on with the files of two
    assert outcome(settings, mixed) == outcome(settings, one)
    back_to(two, 9)
    flip(settings, two, 1)
    log = command(settings, folder, two, count=2, code=2)
    assert "of the stream is damaged; restore a copy" in log
    assert "process 1 cannot go on" in log


def back_to(workdir, step):
    """Removes what a run did after the checkpoint at a step."""
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    run_folder.write(workdir / "run.json", {**run_folder.about(workdir), "finished": False})


def go_on(folder, workdir, settings=None, stop=None, **options):
    """Runs in this process, to the end or to a SIGTERM at step `stop`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch, **options)
        if stop is not None:
            small.strike(monkeypatch, "SIGTERM", stop)
        assert train.run(settings or config(folder), str(workdir)) == 0


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    go_on(folder, workdir)
    return workdir


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """The folder of a run that was stopped when 18 steps were done."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    go_on(folder, workdir, stop=17)
    return workdir


@pytest.mark.parametrize("stop", [6, 7, 8, 15, 16])
def test_a_stop_around_a_commit_changes_no_bit(folder, straight, tmp_path, stop):
    go_on(folder, tmp_path / "run", stop=stop)
    go_on(folder, tmp_path / "run")
    assert outcome(config(folder), tmp_path / "run") == outcome(config(folder), straight)


def test_a_rollback_changes_no_bit(folder, straight, tmp_path):
    settings = config(folder, rollback=3)
    go_on(folder, tmp_path / "run", settings, poison=nan_at([15, 16, 17], times=1))  # back to 15, before the commit
    assert (15, "rollback") in small.events(tmp_path / "run")
    assert outcome(settings, tmp_path / "run") == outcome(settings, straight)


def test_an_older_checkpoint_finds_its_rows(folder, straight, begun, tmp_path):
    workdir = shutil.copytree(begun, tmp_path / "run")
    damage(workdir, 18)
    damage(workdir, 15)
    go_on(folder, workdir)
    assert (12, "restore") in small.events(workdir)
    assert outcome(config(folder), workdir) == outcome(config(folder), straight)


def test_rows_of_a_stage_that_was_edited_are_forgotten(folder, begun, tmp_path, monkeypatch):
    settings = copy.deepcopy(config(folder))
    settings["stream"]["stages"][1]["mixture"] = {"d2": 1.0}
    settings["checkpoint"]["keep"] = 99
    go_on(folder, tmp_path / "straight", settings)
    whole = config(folder, checkpoint={**config(folder)["checkpoint"], "keep": 99})
    go_on(folder, tmp_path / "run", whole, stop=20)
    back_to(tmp_path / "run", 6)
    shutil.copytree(tmp_path / "run", tmp_path / "control")
    go_on(folder, tmp_path / "run", settings)
    assert outcome(settings, tmp_path / "run") == outcome(settings, tmp_path / "straight")
    monkeypatch.setattr(Reservoir, "rewind", lambda self, count: None)
    go_on(folder, tmp_path / "control", settings)
    assert outcome(settings, tmp_path / "control") != outcome(settings, tmp_path / "straight")


LOSSES = {
    "missing": (shutil.rmtree, "reservoir: is missing, which the checkpoint at step 18 needs; restore it from a copy"),
    "emptied": (
        lambda place: [path.unlink() for path in place.rglob("*.*") if path.name != "reservoir.json"],
        r"reservoir: holds the states from row 0 to 0 of the stream, not 112, which .* start a new --workdir",
    ),
    "damaged": (
        lambda place: next(place.rglob("rows-*")).write_bytes(bytes(9000)),
        r"row \d+ of the stream is damaged; restore a copy",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_reservoir_is_refused_and_nothing_is_written(folder, begun, tmp_path, loss):
    workdir = shutil.copytree(begun, tmp_path / "run")
    damaged, words = LOSSES[loss]
    damaged(workdir / "reservoir")
    before = small.tree_of(workdir)
    with pytest.raises(UserError, match=words) as error:
        go_on(folder, workdir)
    assert "\n" not in str(error.value)
    assert small.tree_of(workdir) == before


def test_the_replayed_rows_of_the_loop_come_from_the_disk(folder, tmp_path):
    """Other words in the reservoir, with checksums that fit: the run trains on them."""
    settings = config(folder)
    seen = {}

    def watch(step, batch):
        seen[step] = batch
        return batch

    read = Reservoir._read
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Reservoir, "_read", lambda self, index: np.full_like(read(self, index), 7))
        go_on(folder, tmp_path / "run", settings, poison=watch)
    for step, batch in seen.items():
        old = np.asarray(batch.extra["replayed"]) > 0
        assert old.sum() == (2 if step >= small.STEPS else 0)
        assert (np.asarray(batch.inputs)[old] == 7).all()
        assert (np.asarray(batch.task)[old] < step // small.STEPS).all()
        assert not (np.asarray(batch.inputs)[~old] == 7).any()
