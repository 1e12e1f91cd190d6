"""A suspect step taken again: the five verdicts, and a step of a run that its rows or its machine had struck."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
import small

from jaxcl import program, rerun, train
from jaxcl.rerun import Replay
from jaxcl.schema import UserError

QUICK = True
STRUCK = 11  # checkpoints are at 9 and 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def spoiled(batch):
    return jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, batch)


def run(folder, workdir, **loop):
    """A run whose step 11 is struck: what strikes it is in the batch."""
    kept = {"every_steps": 3, "every_minutes": None, "keep": 3, "keep_every": 3}
    with pytest.MonkeyPatch.context() as patch:
        small.reuse(folder, patch, poison=lambda step, batch: spoiled(batch) if step + 1 == STRUCK else batch)
        assert train.run(small.config(folder, checkpoint=kept, **loop), str(workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def once(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("once") / "run")


@pytest.fixture(scope="module")
def twice(folder, tmp_path_factory):
    """The run has repeated the step, and got the same."""
    return run(folder, tmp_path_factory.mktemp("twice") / "run", watch={"repeat": True})


def again(folder, workdir, struck_here):
    with pytest.MonkeyPatch.context() as patch:
        poison = (lambda step, batch: spoiled(batch) if step + 1 == STRUCK else batch) if struck_here else None
        small.reuse(folder, patch, **({"poison": poison} if poison else {}))
        before = small.tree_of(workdir)
        found = rerun.rerun(workdir, STRUCK)
        assert small.tree_of(workdir) == before  # the run is only read
    return found


def test_rows_that_are_bad_here_too_are_the_rows(folder, once):
    found = again(folder, once, struck_here=True)
    assert found["verdict"] == "data"
    assert (found["from_checkpoint"], found["earlier_equal"]) == (9, True)
    assert all(math.isnan(gave[0]) for gave in found["here"])


def test_what_is_right_here_was_the_machine(folder, once, twice):
    found = again(folder, once, struck_here=False)
    assert found["verdict"] == "transient"
    assert math.isfinite(found["here"][0][0])
    assert again(folder, twice, struck_here=False)["verdict"] == "hardware"


def doubled(build):
    """Builds programs whose tasks end with parameters twice as large."""

    @functools.wraps(build)
    def again(**pieces):
        new = build(**pieces)

        def end_task(state, batch):
            ended = new.end_task(state, batch)
            return dataclasses.replace(ended, params=jax.tree.map(lambda x: x + x, ended.params))

        return new._replace(end_task=end_task)

    return again


def test_tasks_that_end_on_the_way_to_the_step_end_again(folder, tmp_path, monkeypatch):
    """The checkpoints are at 6 and 9, the first task ends at 8, and 9 is suspect."""
    small.reuse(folder, monkeypatch)
    monkeypatch.setattr(program, "build", doubled(program.build))
    kept = {"every_steps": 3, "every_minutes": None, "keep": 9}
    assert train.run(small.config(folder, checkpoint=kept), str(tmp_path / "run")) == 0
    found = rerun.rerun(tmp_path / "run", 9)
    assert (found["verdict"], found["from_checkpoint"]) == ("data", 6)


def made(gave, sums="a"):
    return Replay(9, {10: (1.0, 2.0), 11: gave}, {"w": [sums]})


@pytest.mark.parametrize(
    ("replays", "recorded", "twice", "within", "verdict"),
    [
        ((made((3.0, 4.0)), made((3.0, 4.5))), (9.0, 9.0), True, 0.0, "this"),
        ((made((3.0, 4.0)), made((3.0, 4.0), "b")), (3.0, 4.0), False, 0.0, "this"),
        ((made((3.0, 4.0)),) * 2, (3.0, 4.0), True, 0.0, "data"),
        ((made((math.nan, 4.0)),) * 2, (math.inf, 4.0), False, 0.0, "data"),  # the record keeps no difference
        ((made((3.0, 4.0)),) * 2, (3.001, 4.0), True, 0.0, "hardware"),
        ((made((3.0, 4.0)),) * 2, (3.001, 4.0), True, 1e-2, "data"),
        ((made((3.0, 4.0)),) * 2, (9.0, 4.0), False, 1e-2, "transient"),
        ((made((3.0, 4.0)),) * 2, (3.0, 4.5), False, 0.0, "transient"),  # the norm alone
        ((made((3.0, 4.0)),) * 2, (3.0, 4.5), True, 1e-2, "hardware"),
    ],
)
def test_verdicts(replays, recorded, twice, within, verdict):
    record = {10: (1.0, 2.0), 11: recorded}
    assert rerun.verdict(11, record, replays, twice, within) == verdict
    other = {10: (1.5, 2.0), 11: recorded}
    if verdict != "this":
        assert rerun.verdict(11, other, replays, twice, within) == "elsewhere"


def test_what_cannot_be_replayed_is_said(folder, once, tmp_path, capsys):
    with pytest.raises(UserError, match=rf"--step=99: not in .*; the steps there end with {small.TOTAL}"):
        rerun.rerun(once, 99)
    with pytest.MonkeyPatch.context() as patch:
        small.reuse(folder, patch)
        with pytest.raises(UserError, match=r"--step=2: no checkpoint before it is left \(there are: 3, 6, 9"):
            rerun.rerun(once, 2)
        rerun.main([str(once), f"--step={STRUCK}"])
    assert "transient: a fault that passed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--within=2\.0: must be at least 0 and below 1"):
        rerun.main([str(once), "--step=3", "--within=2"])
