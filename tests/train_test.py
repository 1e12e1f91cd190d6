"""The loop on bad days: signals, damaged checkpoints, bad steps, edited stages."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import small

from jaxcl import train
from jaxcl.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """The run without incident."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        assert train.run(small.config(folder), str(workdir)) == 0
    return workdir


def stopped_at(folder, workdir, step, settings=None, name="SIGTERM", method="account"):
    """Runs until a signal arrives at `step` and returns the exit status."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        small.strike(monkeypatch, name, step, method)
        return train.run(settings or small.config(folder), str(workdir))


def go_on(folder, workdir, settings=None, **options):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch, **options)
        return train.run(settings or small.config(folder), str(workdir))


def test_every_step_is_written_once_and_every_boundary_evaluated(straight):
    assert [r["step"] for r in small.records(straight, "train")] == list(range(1, small.TOTAL + 1))
    evals = {r["step"]: r["boundary"] for r in small.records(straight, "eval")}
    assert evals == {0: -1, 4: None, 8: 0, 12: None, 16: 1, 20: None, 24: 2}
    assert small.events(straight) == []
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["18", "21", "24"]


def test_the_ledger_counts_what_the_batches_held(straight, folder):
    _, _, made = small.shared(folder)
    (ledger,) = [r["sources"] for r in small.records(straight, "ledger") if r["step"] == small.TOTAL]
    batches = [made.stream.at(step) for step in range(small.TOTAL)]
    replayed = sum(int(batch.extra["replayed"].sum()) for batch in batches)
    tokens = sum(float(batch.weights.sum()) for batch in batches)
    assert sum(counts["replayed_rows"] for counts in ledger.values()) == replayed == 2 * 8 * 2  # 25 % of stages 2, 3
    assert sum(counts["new_rows"] for counts in ledger.values()) == small.TOTAL * 8 - replayed
    assert sum(counts["new_tokens"] + counts["replayed_tokens"] for counts in ledger.values()) == tokens


@pytest.mark.parametrize(
    ("name", "step", "method", "status"),
    [
        ("SIGTERM", 0, "evaluate", 0),  # before the first step: what is written for step 0 must not come twice
        ("SIGTERM", 11, "account", 0),  # step 12 is a checkpoint of its own
        ("SIGINT", 15, "account", 130),  # the step that ends a task
    ],
)
def test_a_signal_saves_and_the_same_command_continues(straight, folder, tmp_path, capsys, name, step, method, status):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, step, name=name, method=method) == status
    assert f"stopped by {name}: the state is saved in {workdir}" in capsys.readouterr().out
    assert small.checkpoint(workdir)[0] == step + (method == "account")
    assert not (workdir / "report.json").exists()
    assert go_on(folder, workdir) == 0
    assert small.outcome(workdir) == small.outcome(straight)


def test_a_signal_in_the_last_step_finishes_the_run(straight, folder, tmp_path):
    assert stopped_at(folder, tmp_path / "run", small.TOTAL - 1) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)


def damage(workdir, step):
    """Flips a bit of the largest file of a checkpoint."""
    path = max((workdir / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_costs_time_and_nothing_else(straight, folder, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 13) == 0
    damage(workdir, 14)
    assert go_on(folder, workdir) == 0
    (event,) = small.records(workdir, "event")
    assert (event["step"], event["event"]) == (12, "restore")
    assert "checkpoint 14 is unusable" in event["message"]
    assert small.outcome(workdir) == small.outcome(straight)


def test_with_no_sound_checkpoint_nothing_is_touched(folder, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 5) == 0
    for step in (3, 6):
        damage(workdir, step)
    before = small.tree_of(workdir)
    with pytest.raises(UserError, match=r"no checkpoint can be read.*restore it from a copy"):
        go_on(folder, workdir)
    assert small.tree_of(workdir) == before


def nan_at(steps, times=10**6):
    """Returns a poison: the first `times` times that a batch of `steps` is placed, its weights are NaN."""
    seen = dict.fromkeys(steps, 0)

    def poison(step, batch):
        if step not in seen or seen[step] == times:
            return batch
        seen[step] += 1
        return dataclasses.replace(batch, weights=batch.weights * np.float32(np.nan))

    return poison


def test_one_bad_step_is_skipped(folder, straight, tmp_path):
    assert go_on(folder, tmp_path / "run", poison=nan_at([9])) == 0
    assert small.events(tmp_path / "run") == [(10, "skipped")]
    losses = {r["step"]: r["loss"] for r in small.records(tmp_path / "run", "train")}
    assert [step for step, loss in losses.items() if loss is None] == [10]
    good = {r["step"]: r["loss"] for r in small.records(straight, "train")}
    assert {s: losses[s] for s in range(1, 10)} == {s: good[s] for s in range(1, 10)}
    assert losses[11] != good[11]
    assert small.records(tmp_path / "run", "train")[-1]["guard/skipped"] == 1


def test_steps_that_turn_bad_for_once_are_done_again(folder, straight, tmp_path):
    settings = small.config(folder, rollback=3)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at([9, 10, 11], times=1)) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    assert (9, "rollback") in small.events(tmp_path / "run")


def test_before_the_first_checkpoint_a_rollback_starts_anew(folder, straight, tmp_path):
    settings = small.config(folder, rollback=2)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at([0, 1], times=1)) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    assert small.events(tmp_path / "run") == [(0, "rollback")]


def test_steps_that_stay_bad_end_the_run(folder, tmp_path, capsys):
    settings = small.config(folder, rollback=4)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at(range(10, small.TOTAL))) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "lower config.schedule.peak" in lines[0]
    assert [event for _, event in small.events(tmp_path / "run")].count("rollback") == 1
    assert not (tmp_path / "run" / "report.json").exists()


def edited(folder, stage, **changes):
    settings = copy.deepcopy(small.config(folder))
    settings["stream"]["stages"][stage].update(changes)
    return settings


def test_a_future_stage_may_be_edited(folder, straight, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 10) == 0
    past = small.records(workdir)
    settings = edited(folder, 2, mixture={"d0": 0.5, "d2": 0.5}, steps=4)
    assert go_on(folder, workdir, settings) == 0
    assert small.records(workdir)[: len(past)] == past
    assert small.checkpoint(workdir)[0] == 20
    assert small.records(workdir) != small.records(straight)


@pytest.mark.parametrize(
    "changes", [{"mixture": {"d1": 1.0}}, {"steps": 7}, {"replay": {"fraction": 0.5, "over": "seen"}}]
)
def test_a_past_stage_may_not(folder, tmp_path, changes):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 10) == 0
    before = small.tree_of(workdir)
    with pytest.raises(UserError, match=r"the rows before step 11 are not those.*past stage"):
        go_on(folder, workdir, edited(folder, 0, **changes))
    assert small.tree_of(workdir) == before


def test_a_finished_run_goes_on_with_another_stage(folder, straight, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    past = small.records(workdir)
    settings = small.config(folder)
    settings["stream"]["stages"].append({"name": "again", "mixture": {"d0": 1.0}, "steps": 2})
    assert go_on(folder, workdir, settings) == 0
    assert small.records(workdir)[: len(past)] == past
    assert [r["step"] for r in small.records(workdir, "train")][-2:] == [25, 26]
