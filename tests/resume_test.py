"""A run that is killed, stopped and continued ends with the bits of one that was not; nothing of the state is idle."""

import contextlib
import os
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import processes
import pytest
import small

from jaxcl import metrics, train
from jaxcl.schema import UserError

# Killed in the middle of a task; after a meta-update (every=5); at a boundary; while step 15 is being saved, twice in
# a row; with half a line written. Then stopped in the first and in the last task: exit status 0 and 130.
CHAIN = [
    ("SIGKILL:step:2", -9),  # before the first checkpoint
    ("SIGTERM:step:5", 0),
    ("SIGKILL:record:7", -9),
    ("SIGKILL:end_task:8", -9),
    ("SIGKILL:step:10", -9),
    ("SIGKILL:save:15", -9),
    ("SIGKILL:save:15", -9),
    ("SIGINT:step:23", 130),
    ("none", 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def command(config, workdir, folder, point="none"):
    (started,) = processes.start(
        "run", point, f"--config={config}", f"--workdir={workdir}", env=small.environment(folder)
    )
    return started


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """A config file and the folder of its run without interruption."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    config = small.write(small.config(folder), workdir.parent / "config.py")
    processes.finish([command(config, workdir, folder)])
    return config, workdir


def test_a_chain_of_kills_and_stops_changes_no_bit(straight, folder, tmp_path):
    config, reference = straight
    logs = []
    for point, code in CHAIN:
        started = command(config, tmp_path / "run", folder, point)
        processes.finish([started], codes=(code,))
        logs.append(started.log.read_text())
    assert not any("Traceback" in log for log in logs)
    assert [log.count("the same command continues") for log in logs] == [0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert small.outcome(tmp_path / "run") == small.outcome(reference)
    assert {(5, "restore"), (23, "restore")} <= set(small.events(tmp_path / "run"))


def test_killed_twice_in_a_row_at_steps_drawn_at_random(straight, folder, tmp_path):
    config, reference = straight
    steps = sorted(random.Random(0).sample(range(1, small.TOTAL + 1), 5))
    for step in [step for step in steps for _ in range(2)]:
        processes.finish([command(config, tmp_path / "run", folder, f"SIGKILL:step:{step}")], codes=(-9,))
    processes.finish([command(config, tmp_path / "run", folder)])
    assert small.outcome(tmp_path / "run") == small.outcome(reference)


def test_killed_from_outside_during_a_save(straight, folder, tmp_path):
    config, reference = straight
    workdir = tmp_path / "run"
    started = command(config, workdir, folder)
    target = workdir / "checkpoints" / "12"
    end = time.monotonic() + 60
    while not target.exists() and time.monotonic() < end and started.popen.poll() is None:
        time.sleep(0.001)
    os.kill(started.popen.pid, signal.SIGKILL)
    processes.finish([started], codes=(-9,))
    processes.finish([command(config, workdir, folder)])
    assert small.outcome(workdir) == small.outcome(reference)


def test_a_finished_run_says_so_and_changes_nothing(straight, folder):
    config, workdir = straight
    before = small.tree_of(workdir)
    started = command(config, workdir, folder)
    processes.finish([started])
    assert "finished before" in started.log.read_text()
    assert small.tree_of(workdir) == before


AT = 18  # where the controls resume: two steps into the last task, three after a meta-update


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run in this process with all its checkpoints."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    session = small.session(folder, workdir, checkpoint={"every_steps": 3, "every_minutes": None, "keep": 99})
    session.train(lambda step: None)
    session.close()
    return workdir


def resumed(folder, whole, workdir, at, change=lambda session: None):
    """Continues a copy of a run from one of its checkpoints and returns the outcome."""
    shutil.copytree(whole, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > at:
            shutil.rmtree(path)
    session = small.session(folder, workdir)
    assert session.step == at
    change(session)
    session.train(lambda step: None)
    session.close()
    return {"checkpoint": small.checkpoint(workdir), "records": small.records(workdir)}


def expected(whole):
    return {"checkpoint": small.checkpoint(whole), "records": small.records(whole)}


@pytest.mark.parametrize("at", range(3, small.TOTAL, 3))
def test_every_checkpoint_continues_to_the_same_bits(folder, whole, tmp_path, at):
    assert resumed(folder, whole, tmp_path / "run", at) == expected(whole)


def without_middle(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[7:]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: metrics.truncate(path, 6), "ends at step 6, but the checkpoint is at step 24; restore the file"),
        (lambda path: path.unlink(), "has no records, but the checkpoint is at step 24"),
        (without_middle, "lacks 2 of the first"),
    ],
)
def test_a_lost_history_is_refused_and_nothing_is_written(folder, whole, tmp_path, damage, words):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "metrics.jsonl")
    before = small.tree_of(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run/metrics\.jsonl: {words}"):
        small.session(folder, tmp_path / "run")
    assert small.tree_of(tmp_path / "run") == before


def test_a_checkpoint_without_the_number_of_records_is_restored(folder, whole, tmp_path, monkeypatch):
    original = train.checkpoint.Checkpoints.restore

    def older(self, *rest, **named):
        found = original(self, *rest, **named)
        return found._replace(host={k: v for k, v in found.host.items() if k != "records"})

    monkeypatch.setattr(train.checkpoint.Checkpoints, "restore", older)
    assert resumed(folder, whole, tmp_path / "run", AT) == expected(whole)


def test_a_run_without_its_checkpoints_says_that_it_starts_again(folder, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with contextlib.closing(small.session(folder, tmp_path / "run")) as session:
        assert session.step == 0
    (event,) = small.records(tmp_path / "run", "train", "eval", "ledger", "event")
    assert event["message"] == "no checkpoint found: starts from the beginning"


def test_a_resume_compiles_nothing_anew(folder, whole, tmp_path):
    """What is restored looks to the compiler like what was there before, at every step and task end."""
    made = small.shared(folder)[2]
    sizes = made.step._cache_size(), made.end_task._cache_size()
    resumed(folder, whole, tmp_path / "run", AT)
    assert (made.step._cache_size(), made.end_task._cache_size()) == sizes


def test_the_loop_forbids_transfers_that_are_not_meant(folder, tmp_path):
    settings, own, made = small.shared(folder)
    careless = made._replace(place=made.stream.at)  # NumPy arrays: every call would copy them
    session = train.Session(careless, own, tmp_path / "run", settings)
    with contextlib.closing(session), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        session.train(lambda step: None)


def replaced(state, name, value):
    """Returns the state with the leaves below `name` replaced."""
    from jaxcl import tree

    names = [leaf for leaf, _ in tree.named_leaves(state)]
    assert any(leaf.startswith(name) for leaf in names), names
    pairs = zip(names, jax.tree.leaves(state), jax.tree.leaves(value), strict=True)
    return jax.tree.unflatten(jax.tree.structure(state), [b if n.startswith(name) else a for n, a, b in pairs])


def forget(session, name):
    """Sets a part of the restored state back to what it is at the beginning."""
    session.state = replaced(session.state, name, session.made.create())


CONTROLS = {
    "params": lambda s: forget(s, "params"),
    "opt_state": lambda s: forget(s, "opt_state"),
    "rows of the reservoir": lambda s: forget(s, "memory/inner/inner/er/rows"),
    "count of the reservoir": lambda s: forget(s, "memory/inner/inner/er/seen"),
    "anchor": lambda s: forget(s, "memory/inner/anchor"),
    "guard": lambda s: forget(s, "memory/guard"),
    "step of the state": lambda s: forget(s, "step"),
    "step of the loop": lambda s: setattr(s, "step", AT + 1),
    "ledger": lambda s: setattr(s, "ledger", {k: dict.fromkeys(v, 0) for k, v in s.ledger.items()}),
    "a bit of the rows": lambda s: setattr(
        s, "state", replaced(s.state, "memory/inner/inner/er/rows/inputs", flipped(s))
    ),
}


def flipped(session):
    return jax.tree.map(lambda x: x ^ 1 if x.dtype == jnp.int32 else x, session.state)


@pytest.mark.parametrize("part", CONTROLS)
def test_whatever_is_not_restored_is_noticed(folder, whole, tmp_path, part):
    assert resumed(folder, whole, tmp_path / "run", AT, CONTROLS[part]) != expected(whole)
