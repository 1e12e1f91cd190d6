"""Where the time went: hand-made ledgers, kills at any byte, and a run."""

import json

import pytest
import small

from jaxcl import goodput, train
from jaxcl.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def killed_and_continued(folder):
    """An attempt that is killed at step 60 of 2 s each, and one that goes on from step 41."""
    clock = Clock()
    ledger = goodput.Ledger(folder, clock=clock)
    ledger.started(990.0)
    ledger.ready(1)  # 10 s to start
    for step in range(2, 61):
        clock.now += 2
        ledger.took(step, 2.0)
        if step == 41:
            with ledger.spending("save"):
                clock.now += 4
            ledger.beat(step)
    clock.now += 30  # nobody is there
    other = goodput.Ledger(folder, clock=clock)
    other.started(clock.now)
    clock.now += 20
    other.ready(42)
    for step in range(43, 101):
        clock.now += 2
        other.took(step, 2.0)
    with other.spending("evaluation"):
        clock.now += 6
    other.ended(100, "finished")
    return clock


def test_every_second_has_a_class(tmp_path):
    killed_and_continued(tmp_path)
    found = goodput.summary(tmp_path)
    last = goodput.attempts(tmp_path)[0].last  # the last entry before the kill: a few steps may be missing
    assert 57 <= last <= 60
    seconds = found["seconds"]
    assert seconds["start"] == pytest.approx(30)
    assert seconds["evaluation"] == pytest.approx(6)
    assert seconds["save"] == pytest.approx(4)
    assert seconds["repeated"] == pytest.approx(2 * (last - 42), abs=0.1)
    assert seconds["productive"] == pytest.approx(2 * (41 + 58), abs=0.1)
    assert seconds["down"] == pytest.approx(30 + 2 * (60 - last))
    assert sum(seconds.values()) == pytest.approx(found["total_s"])
    assert found["total_s"] == pytest.approx(1000 - 990 + 59 * 2 + 4 + 30 + 20 + 58 * 2 + 6)
    assert found["utilisation"] == pytest.approx(seconds["productive"] / found["total_s"])
    assert found["repeated_steps"] == last - 42
    assert found["failures"] == {"killed": 1}
    assert found["mtbf_s"] == pytest.approx(found["total_s"] - seconds["down"])
    assert found["mttr_s"] == pytest.approx(seconds["down"] + 20 + 2 * (last - 42), abs=0.1)


def test_a_line_torn_by_a_kill_costs_that_line(tmp_path):
    killed_and_continued(tmp_path)
    path = tmp_path / goodput.FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    torn = goodput.Ledger(tmp_path, clock=lambda: 5000.0)
    torn.started(5000.0)
    assert [one.cause for one in goodput.attempts(tmp_path)] == ["killed", "killed", "killed"]
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "start"


@pytest.mark.parametrize("place", [1, -1])
def test_a_line_that_no_kill_has_torn_is_named(tmp_path, place):
    """A kill tears the last line, or the last before a start: anything else is damage, and figures would be wrong."""
    killed_and_continued(tmp_path)
    path = tmp_path / goodput.FILE
    lines = path.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if n and '"start"' in line)
    number = 1 if place == 1 else start
    path.write_text("\n".join([*lines[:number], "garbage", *lines[number:]]) + "\n")
    if place == 1:
        with pytest.raises(UserError, match=rf"{goodput.FILE}:2: no entry of a ledger; remove the line"):
            goodput.summary(tmp_path)
    else:
        assert goodput.summary(tmp_path)["attempts"] == 2
    for damaged, message in ((b"", "has no start of a run"), (bytes(range(256)) * 9, "no entry of a ledger")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            goodput.main([str(tmp_path)])


def test_a_return_to_a_checkpoint_is_an_attempt(tmp_path):
    clock = Clock()
    ledger = goodput.Ledger(tmp_path, clock=clock)
    ledger.started(1000.0)
    ledger.ready(0)
    for step in range(1, 11):
        clock.now += 1
        ledger.took(step, 1.0)
    ledger.beat(10)
    ledger.ready(4)
    for step in range(5, 13):
        clock.now += 1
        ledger.took(step, 1.0)
    ledger.ended(12, "finished")
    found = goodput.summary(tmp_path)
    assert found["failures"] == {"rolled back": 1}
    assert found["repeated_steps"] == 6
    assert found["seconds"]["productive"] == pytest.approx(4 + 8)
    assert found["seconds"]["repeated"] == pytest.approx(6)
    assert found["mttr_s"] == pytest.approx(6)


def steps(ledger, clock, first, last):
    """Takes steps of a second each."""
    ledger.ready(first)
    for step in range(first + 1, last + 1):
        clock.now += 1
        ledger.took(step, 1.0)
    ledger.beat(last)


@pytest.mark.parametrize("back", [10, 4])
def test_an_attempt_that_was_never_ready_repeats_nothing(tmp_path, back):
    """What is lost is what the one after it has to take again."""
    clock = Clock()
    ledger = goodput.Ledger(tmp_path, clock=clock)
    ledger.started(1000.0)
    steps(ledger, clock, 0, 10)
    ledger.started(clock.now)
    clock.now += 3
    ledger.started(clock.now)
    steps(ledger, clock, back, 20)
    ledger.ended(20, "finished")
    found = goodput.summary(tmp_path)
    assert found["repeated_steps"] == 10 - back
    assert found["seconds"]["productive"] == pytest.approx(20)
    assert found["seconds"]["repeated"] == pytest.approx(10 - back)


def test_steps_that_two_returns_undo_are_repeated_once_each(tmp_path):
    clock = Clock()
    ledger = goodput.Ledger(tmp_path, clock=clock)
    ledger.started(1000.0)
    for first, last in ((0, 10), (8, 12), (4, 20)):
        steps(ledger, clock, first, last)
    ledger.ended(20, "finished")
    found = goodput.summary(tmp_path)
    assert found["repeated_steps"] == 2 + 4 + 4
    assert found["seconds"]["productive"] == pytest.approx(20)
    assert found["seconds"]["repeated"] == pytest.approx(10)


def test_failures_and_repairs_are_averaged(tmp_path):
    clock = Clock()
    ledger = goodput.Ledger(tmp_path, clock=clock)
    for first, away in ((0, 5.0), (10, 20.0), (20, 0.0)):
        ledger.started(clock.now)
        clock.now += 3
        steps(ledger, clock, first, first + 10)
        clock.now += away  # killed
    ledger.ended(30, "finished")
    found = goodput.summary(tmp_path)
    assert found["failures"] == {"killed": 2}
    assert found["mtbf_s"] == pytest.approx(3 * (3 + 10) / 2)
    assert found["mttr_s"] == pytest.approx(((5 + 3) + (20 + 3)) / 2)


def test_a_run_that_goes_on_has_not_failed(tmp_path):
    clock = Clock()
    ledger = goodput.Ledger(tmp_path, clock=clock)
    ledger.started(1000.0)
    steps(ledger, clock, 0, 3)
    assert goodput.summary(tmp_path)["failures"] == {}


@pytest.mark.parametrize("cause", ["SIGTERM", "SIGINT", "finished"])
def test_a_stop_by_a_signal_is_no_failure(tmp_path, cause):
    ledger = goodput.Ledger(tmp_path, clock=Clock())
    ledger.started(1000.0)
    ledger.ready(0)
    ledger.ended(3, cause)
    assert goodput.summary(tmp_path)["failures"] == {}


def test_a_run_that_is_stopped_and_goes_on_has_two_attempts(folder, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        small.reuse(folder, patch)
        small.strike(patch, "SIGTERM", 10)
        assert train.run(small.config(folder), str(workdir)) == 0
    with monkeypatch.context() as patch:
        small.reuse(folder, patch)
        assert train.run(small.config(folder), str(workdir)) == 0
    first, second = goodput.attempts(workdir)
    assert (first.cause, second.cause) == ("SIGTERM", "finished")
    assert (first.last, second.first, second.last) == (11, 11, small.TOTAL)
    found = goodput.summary(workdir)
    assert found["seconds"]["evaluation"] > 0
    assert found["seconds"]["save"] > 0
    assert 0 < found["utilisation"] < 1
    assert "Where the time went" in (workdir / "report.html").read_text()
    goodput.main([str(workdir)])
    assert "effective utilisation" in capsys.readouterr().out
    goodput.main([str(workdir), "--json"])
    assert json.loads(capsys.readouterr().out)[str(workdir)]["attempts"] == 2


def test_a_folder_without_a_ledger_is_named(tmp_path):
    with pytest.raises(UserError, match=r"goodput.jsonl: no such file"):
        goodput.main([str(tmp_path)])
