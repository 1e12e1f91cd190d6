"""What watches over a run: hangs end the process, copies are compared, steps repeated, and time is accounted for."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import small
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl import goodput, train, watch
from jaxcl.schema import UserError
from jaxcl.types import TrainState

QUICK = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def watcher(tmp_path, **options):
    return watch.Watcher(watch.Watch(**options), tmp_path)


def values(loss, norm=1.0, bad=0.0):
    return {"loss": loss, "grad_norm": norm, "guard/consecutive": bad}


def copies(mesh, numbers):
    """Returns an array that claims to be a copy of one thing on every device, made of what each device really has."""
    sharding = NamedSharding(mesh, PartitionSpec())
    parts = [jax.device_put(jnp.asarray(x), device) for x, device in zip(numbers, mesh.devices.flat, strict=True)]
    return jax.make_array_from_single_device_arrays(parts[0].shape, sharding, parts)


def test_a_flipped_bit_in_one_copy_is_seen():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    right = np.linspace(-1, 1, 1000, dtype=np.float32)
    flipped = right.copy()
    flipped.view(np.int32)[321] ^= 1  # the last bit of a mantissa: no norm would show it
    cut = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    state = {"a": copies(mesh, [right] * 4), "b": copies(mesh, [right, right, flipped, right]), "c": cut}
    assert watch.differing(state) == ["b"]
    assert (
        watch.differing({"a": state["a"], "c": cut, "d": jnp.ones(3), "e": copies(mesh, [np.array(np.nan)] * 4)}) == []
    )


@pytest.mark.parametrize("part", ["params", "opt_state", "memory"])
def test_copies_of_every_part_of_the_state_are_compared(part):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    same = {"w": copies(mesh, [np.ones(3, np.float32)] * 2)}
    parts = {"params": same, "opt_state": same, "memory": same}
    other = {"w": copies(mesh, [np.float32([1, 1, 1]), np.float32([1, 1, 2])])}
    assert watch.differing(TrainState(jnp.zeros((), jnp.int32), **parts)) == []
    assert watch.differing(TrainState(jnp.zeros((), jnp.int32), **parts | {part: other})) == [f"{part}/w"]


def test_copies_of_random_keys_are_compared():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    same, other = ([jax.random.key(seed) for seed in seeds] for seeds in ((3, 3), (3, 4)))
    assert watch.differing({"a": copies(mesh, same)}) == []
    assert watch.differing({"a": copies(mesh, same), "b": copies(mesh, other)}) == ["b"]


def test_copies_are_compared_when_it_is_time_to(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    state = {"w": copies(mesh, [np.float32([1, 2]), np.float32([1, 3])])}
    one = watcher(tmp_path, digest_every=5)
    one.compare(4, state)
    watcher(tmp_path).compare(5, state, now=True)  # never
    for now, step in ((False, 5), (True, 4)):
        with pytest.raises(watch.MachineFault, match=rf"step {step}: devices hold different copies of w"):
            one.compare(step, state, now=now)


def test_copies_on_other_processes_are_compared():
    assert processes.run("copies", processes=2, devices=1) == [["w"]] * 2


@pytest.mark.parametrize(("every", "step"), [(5, 5), (1000, 6)])
def test_a_run_of_which_a_copy_changes_ends_before_it_is_saved(folder, tmp_path, monkeypatch, capsys, every, step):
    monkeypatch.setattr(watch, "differing", lambda state: ["params/embedding"] if int(state.step) >= 5 else [])
    small.reuse(folder, monkeypatch)
    settings = small.config(folder, watch={"digest_every": every})
    assert train.run(settings, str(tmp_path / "run")) == watch.MACHINE
    assert f"step {step}: devices hold different copies of params/embedding" in capsys.readouterr().err
    assert small.checkpoint(tmp_path / "run")[0] == 3
    assert goodput.attempts(tmp_path / "run")[0].cause == "machine"


@pytest.mark.parametrize(("again", "norm", "machine"), [(2.0, 1.0, True), (9.0, 1.0, False), (9.0, 1.5, True)])
def test_a_rejected_step_is_repeated_once_and_judged(tmp_path, again, norm, machine):
    one = watcher(tmp_path, repeat=True)
    one.took(1, 0.1, 0.1, values(1.5))
    with pytest.raises(watch.Repeat, match="step 2 was rejected"):
        one.took(2, 0.1, 0.1, values(9.0, bad=1))
    one.back()
    one.took(1, 0.1, 0.1, values(1.5))
    one.took(2, 0.1, 0.1, values(again, norm, bad=float(not machine)))
    ((step, text),) = one.told()
    assert step == 2
    assert ("fault of the machine" in text) == machine
    assert ("rows or the settings" in text) == (not machine)
    assert one.told() == []


def test_a_fault_before_the_rejected_step_is_found(tmp_path):
    one = watcher(tmp_path, repeat=True)
    one.took(1, 0.1, 0.1, values(1.5))
    with pytest.raises(watch.Repeat):
        one.took(2, 0.1, 0.1, values(float("nan"), bad=1))
    one.took(1, 0.1, 0.1, values(1.25))
    assert [(step, "machine" in text) for step, text in one.told()] == [(1, True)]
    one.saved(2)
    one.took(2, 0.1, 0.1, values(7.0))  # a checkpoint lies between: there is nothing to compare with
    assert one.told() == []


def test_a_step_after_a_fault_of_the_machine_may_be_repeated_again(tmp_path):
    """It was rejected for what came before it, so that its second rejection is the first that counts."""
    one = watcher(tmp_path, repeat=True)
    one.took(1, 0.1, 0.1, values(1.5))
    with pytest.raises(watch.Repeat):
        one.took(2, 0.1, 0.1, values(float("nan"), bad=1))
    one.took(1, 0.1, 0.1, values(1.25))
    with pytest.raises(watch.Repeat, match="step 2 was rejected"):
        one.took(2, 0.1, 0.1, values(float("nan"), bad=1))


def test_nothing_is_repeated_unless_asked(tmp_path):
    watcher(tmp_path).took(2, 0.1, 0.1, values(9.0, bad=1))


def test_after_a_glitch_the_run_is_that_without_one(folder, tmp_path, monkeypatch):
    """A step that the machine got wrong once: repeated from the checkpoint, the run ends bit for bit as without."""
    with monkeypatch.context() as patch:
        small.reuse(folder, patch)
        assert train.run(small.config(folder), str(tmp_path / "straight")) == 0
    broken = []

    def glitch(step, batch):
        if step == 10 and not broken:
            broken.append(step)
            return jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, batch)
        return batch

    with monkeypatch.context() as patch:
        small.reuse(folder, patch, poison=glitch)
        assert train.run(small.config(folder, watch={"repeat": True}), str(tmp_path / "run")) == 0
    assert broken
    told = {r["event"]: r["message"] for r in small.records(tmp_path / "run", "event")}
    assert "back to step 9" in told["rollback"]
    assert "fault of the machine" in told["repeated"]
    assert small.outcome(tmp_path / "run") == small.outcome(tmp_path / "straight")
    (one, two) = goodput.attempts(tmp_path / "run")
    assert (one.cause, two.cause) == ("rolled back", "finished")


def test_rows_at_fault_are_named_and_skipped(folder, tmp_path, monkeypatch):
    def poison(step, batch):
        return jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, batch) if step == 10 else batch

    small.reuse(folder, monkeypatch, poison=poison)
    assert train.run(small.config(folder, watch={"repeat": True}), str(tmp_path / "run")) == 0
    records = small.records(tmp_path / "run", "event")
    told = {r["event"]: r for r in records}
    assert "its rows or the settings" in told["repeated"]["message"]
    assert [r["event"] for r in records].count("rollback") == 1
    index = small.stream(small.config(folder)).index(10)
    assert sum(len(rows) for rows in told["skipped"]["rows"].values()) == (index.source >= 0).sum()
    assert told["skipped"]["rows"]["d1"] == index.row[index.source == 1].tolist()


def test_a_hang_leaves_stacks_and_a_status(tmp_path):
    left, ready = [], threading.Event()

    def leave(status):
        left.append(status)
        ready.set()

    one = watcher(tmp_path, hang_s=0.3)
    with pytest.MonkeyPatch.context() as patch, one.attempt(time.time(), lambda: 7):
        patch.setattr(watch.hung, "__defaults__", (leave,))
        for _ in range(4):
            time.sleep(0.15)
            one.alive()
        assert not left
        assert ready.wait(5)
    assert left[0] == watch.MACHINE
    assert "test_a_hang_leaves_stacks_and_a_status" in (tmp_path / "hang-0.txt").read_text()
    assert [json.loads(x).get("cause") for x in (tmp_path / goodput.FILE).read_text().splitlines()][1] == "hang"


def test_every_process_looks_for_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ready, one = threading.Event(), watcher(tmp_path, hang_s=0.2)
    monkeypatch.setattr(watch.hung, "__defaults__", (lambda status: ready.set(),))
    with one.attempt(time.time(), lambda: 7):
        assert ready.wait(20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang-1.txt"]  # the ledger is process 0's


def test_after_an_evaluation_or_a_save_the_seconds_begin_anew(tmp_path, monkeypatch):
    said, one = [], watcher(tmp_path)
    monkeypatch.setattr(one, "alive", lambda: said.append("alive"))
    for what in ("evaluation", "save"):
        with one.spending(what):
            said.append(what)
    assert said == ["evaluation", "alive", "save", "alive"]


def test_a_hang_is_entered_with_the_step_that_was_reached(tmp_path):
    ready, one = threading.Event(), watcher(tmp_path, hang_s=0.2)
    with pytest.MonkeyPatch.context() as patch, one.attempt(time.time(), lambda: 5):
        patch.setattr(watch.hung, "__defaults__", (lambda status: ready.set(),))
        one.took(5, 0.01, 0.01, values(1.0))
        assert ready.wait(20)
    lines = [json.loads(x) for x in (tmp_path / goodput.FILE).read_text().splitlines()]
    assert {x["step"] for x in lines if x.get("cause") == "hang"} == {5}


def test_slow_steps_are_no_hang(tmp_path):
    one = watcher(tmp_path, hang_s=0.2)
    one.took(1, 100.0, 1.0, values(1.0))
    one.took(2, 100.0, 1.0, values(1.0))
    with pytest.MonkeyPatch.context() as patch, one.attempt(time.time(), lambda: 2):
        patch.setattr(watch.hung, "__defaults__", (lambda status: pytest.fail("ended"),))
        time.sleep(0.6)
    assert not (tmp_path / "hang-0.txt").exists()


def test_a_trace_covers_the_steps_that_were_asked_for(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda place: calls.append(("start", place)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", None)))
    one = watcher(tmp_path, trace=[3, 5])
    for step in range(8):
        one.profile(step)
        calls.append(step)
    trace = str(tmp_path / "trace")
    assert calls == [0, 1, 2, ("start", trace), 3, 4, ("stop", None), 5, 6, 7]
    calls.clear()
    with one.attempt(time.time(), lambda: 4):  # an attempt that ends within it
        one.profile(4)
    assert calls == [("start", trace), ("stop", None)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hang_s": 0.0}, "config.watch.hang_s=0.0: must be above 0"),
        ({"hang_s": float("nan")}, "config.watch.hang_s=nan: must be above 0"),
        ({"digest_every": 0}, "config.watch.digest_every=0: must be at least 1"),
        ({"trace": [3]}, r"config.watch.trace=\[3\]: give its first step"),
        ({"trace": [5, 5]}, r"config.watch.trace=\[5, 5\]: give its first step"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, options, text):
    with pytest.raises(UserError, match=text):
        watcher(tmp_path, **options)


def test_the_skew_of_processes_is_that_of_the_slowest_over_the_median():
    found = watch.skew(np.array([1.0, 4.0, 2.0, 1.0, 2.0]))
    assert found == {"busy_least_s": 1.0, "busy_median_s": 2.0, "busy_most_s": 4.0, "skew": 2.0, "slowest": 1}
    assert watch.skew(np.zeros(3))["skew"] == 1.0


def test_a_process_is_as_busy_as_it_does_not_wait_for_its_device(folder, tmp_path, monkeypatch):
    taken, took, fetch = [], watch.Watcher.took, train.mesh.fetch

    def note(self, step, seconds, busy, values):
        taken.append((seconds, busy))
        return took(self, step, seconds, busy, values)

    def slow(tree):
        time.sleep(0.05)
        return fetch(tree)

    monkeypatch.setattr(watch.Watcher, "took", note)
    monkeypatch.setattr(train.mesh, "fetch", slow)
    small.reuse(folder, monkeypatch)
    assert train.run(small.config(folder), str(tmp_path / "run")) == 0
    assert all(0 < busy < seconds - 0.04 for seconds, busy in taken)
    assert len(taken) == small.TOTAL


def test_the_slowest_process_is_the_busiest(tmp_path, monkeypatch):
    one = watcher(tmp_path)
    for step in range(1, 4):  # the first compiles
        one.took(step, 9.0, 1.0 * step, values(1.0))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(watch.multihost_utils, "process_allgather", lambda mine: np.array([mine, 9.0]))
    found = one.busiest()
    assert (found["busy_least_s"], found["busy_most_s"], found["slowest"]) == (2.5, 9.0, 1)
    assert found["skew"] > 1.5
