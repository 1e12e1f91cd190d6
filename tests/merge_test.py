"""Analytic runs add up: the merge of runs is the run on all rows, however they are grouped, or it is refused."""

import json
import shutil

import numpy as np
import pytest
from closed_form import Learner, batches, off, rows

from jaxcl import branch, compose, folder, merge, saved, train
from jaxcl.data import scenarios
from jaxcl.schema import UserError

STEPS = 3  # of eight rows: each of the 24 rows of a task comes once
SOURCES, STAGES = scenarios.split(
    {"name": "digits", "count": 24, "held_out": 12, "size": 8}, classes=6, groups=3, steps=STEPS, relabel=False
)


def config(*tasks, **overrides):
    """Returns the config of a run on some of three tasks."""
    return {
        "model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 6},
        "adapter": {"name": "analytic", "width": 12},
        "sources": SOURCES,
        "stream": {"batch": 8, "stages": [STAGES[t] for t in tasks]},
        "method": "acil(gamma=0.2)",
        "guard": {"spike": float("inf")},
        "optim": {"name": "adam"},
        "schedule": {"name": "constant", "peak": 1e-3},
        "evaluation": {"every": 100, "rows": 12},
        "checkpoint": {"every_steps": 1000},
        "tensorboard": False,
        "mesh": {"data": 8},
    } | overrides


def trained(place, *tasks, **overrides):
    assert train.run(config(*tasks, **overrides), str(place), final=False) == 0
    return place


def state_of(place):
    """Returns the leaves of the newest checkpoint, float64, with pairs of numbers as one."""
    _, leaves, host = saved.read(place / "checkpoints")
    found = {name: np.asarray(x, np.float64) for name, x in leaves.items()}
    for name in [name for name in found if name.endswith("/high")]:
        found[name.removesuffix("/high")] = found.pop(name) + found.pop(f"{name.removesuffix('high')}low")
    return found, host


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of one task each, and the run of all three."""
    place = tmp_path_factory.mktemp("runs")
    return [trained(place / "abc"[t], t) for t in range(3)] + [trained(place / "all", 0, 1, 2)]


def test_a_merge_is_the_run_on_all_rows_and_can_go_on(runs, tmp_path, capsys):
    *parts, whole = runs
    new = tmp_path / "new"
    merge.main([*map(str, parts), str(new), "--evaluate"])
    assert f"the rows of 3 runs, {3 * STEPS} steps" in capsys.readouterr().out
    (found, host), (wanted, told) = state_of(new), state_of(whole)
    assert found.keys() == wanted.keys()
    for name in ("gram", "cross", "counts"):
        assert off(found[f"memory/inner/moments/{name}"], wanted[f"memory/inner/moments/{name}"]) < 1e-13
    for name in (name for name in found if name.startswith("params/")):
        assert off(found[name], wanted[name]) < 1e-6 if np.any(wanted[name]) else not np.any(found[name]), name
    assert found["memory/inner/age"] == found["step"] == wanted["step"] == 3 * STEPS
    assert found["memory/inner/bound"] < 1e-5
    assert host["ledger"] == {name: counts for name, counts in told["ledger"].items() if counts["new_rows"]}
    evals = [
        [r for r in map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"][-1]
        for one in (new, whole)
    ]
    assert evals[0]["accuracy"] == evals[1]["accuracy"]
    assert evals[0]["loss"] == pytest.approx(evals[1]["loss"], rel=1e-5)
    assert (new / "report.html").exists()
    about = folder.about(new)
    assert about["finished"]
    assert [one["id"] for one in about["facts"]["merged"]] == [folder.about(one)["id"] for one in parts]
    assert train.run(about["config"], str(new), final=False) == 0
    assert "finished before" in capsys.readouterr().out
    branch.make(new, tmp_path / "more")
    (stage,) = about["config"]["stream"]["stages"]
    stages = [stage, {"name": "again", "steps": 1, "mixture": {"task_00": 1.0}}]
    more = about["config"] | {"stream": {"batch": 8, "stages": stages}}
    assert train.run(more, str(tmp_path / "more"), final=False) == 0
    after = state_of(tmp_path / "more")[0]
    assert after["memory/inner/moments/counts"].sum() == 3 * 24 + 8


def test_the_order_and_the_grouping_do_not_count(runs, tmp_path):
    *parts, whole = runs
    merge.make(parts[:2], tmp_path / "two")
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "two" / "report.html").exists()
    merge.make([parts[2], tmp_path / "two"], tmp_path / "three", gamma="gcv")
    (found, host), (wanted, _) = state_of(tmp_path / "three"), state_of(whole)
    assert off(found["memory/inner/moments/gram"], wanted["memory/inner/moments/gram"]) < 1e-13
    assert off(found["params/head"], wanted["params/head"]) > 1e-3  # of another gamma
    assert folder.about(tmp_path / "three")["config"]["method"] == [{"name": "acil", "gamma": "gcv"}]
    assert sorted(host["ledger"]) == ["task_00", "task_01", "task_02"]
    with pytest.raises(UserError, match=r"two: was trained on the source 'task_00', and so was .*a: its rows would"):
        merge.make([parts[0], tmp_path / "two"], tmp_path / "new")


def other(runs, tmp_path, **changes):
    """Copies the second run with another config."""
    place = tmp_path / "other"
    shutil.copytree(runs[1], place)
    about = folder.about(place)
    for key, value in changes.items():
        section = about if key in ("finished", "facts") else about["config"]
        section[key] = value
    folder.write(place / "run.json", about)
    return place


CASES = {
    "width": (
        {"adapter": {"name": "analytic", "width": 13}},
        r"other: config\.adapter\.width=13, but 12 in .*a: o",
    ),
    "expansion": ({"adapter": {"name": "analytic", "width": 12, "expansion": "tanh"}}, r"expansion='tanh', but 'relu'"),
    "classes": ({"model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 7}}, r"adapter\.classes=7, but 6"),
    "activation": ({"model": config()["model"] | {"classes": 6, "output": "hidden"}}, r"model\.output='hidden', but"),
    "gamma": ({"method": "acil(gamma=0.3)"}, r"\[0\]\.gamma=0\.3, but 0\.2 in .*; say which one counts with --gamma"),
    "method": ({"method": "slda"}, r"\[0\]\.gamma='the default', but 0\.2 in .*; say which"),
    "unfinished": ({"finished": False}, r"other: has not finished"),
    "trained": ({"adapter": None}, r"config\.adapter=None: its weights were trained and are no sum over rows"),
    "old": ({"facts": {}}, r"does not tell the shape of a row"),
    "same rows": ({"stream": config(0)["stream"]}, r"was trained on the source 'task_00', and so was .*a: its rows"),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_that_do_not_add_up_are_refused(runs, tmp_path, name):
    changes, words = CASES[name]
    place, new = other(runs, tmp_path, **changes), tmp_path / "new"
    with pytest.raises(UserError, match=words) as error:
        merge.make([runs[0], place], new)
    assert "\n" not in str(error.value)
    assert not new.exists()


def test_another_seed_is_another_feature_map_and_folders_are_kept(runs, tmp_path):
    stranger = trained(tmp_path / "stranger", 1, seed=1)
    before = (stranger / "run.json").read_text()
    with pytest.raises(UserError, match=r"another feature map; train .* config\.seed \(here 0 and 1\)"):
        merge.make([runs[0], stranger], tmp_path / "new")
    with pytest.raises(UserError, match=r"stranger: is not empty; merge into a new folder"):
        merge.make(runs[:2], stranger)
    with pytest.raises(UserError, match=r"1 run: name two or more"):
        merge.make(runs[:1], tmp_path / "new")
    with pytest.raises(UserError, match=r"not the folder of a run"):
        merge.make([runs[0], tmp_path / "absent"], tmp_path / "new")
    assert (stranger / "run.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"stranger"}


METHODS = {
    "acil(how='recursion', every=2)": {},
    "acil(decompose=True, every=2)": {},
    "ranpac(gamma=0.4)": {},
    "slda(epsilon=0.1, every=2)": {},
    "nmc": {"normalise": True},
    "nmc(cosine=True)": {},
    "fecam": {"head": "mahalanobis", "power": 0.5},
    "fecam(gamma1=0.5)": {"head": "mahalanobis", "shared": True},
    "air(every=2)": {},
    "aef_ocl(every=2)": {},
    "gkeal(gamma=0.3)": {"expansion": "gaussian", "sigma": 2.0},
}


@pytest.mark.parametrize("options", METHODS)
def test_what_a_method_keeps_adds_up(options, tmp_path):
    """Classes that one part has alone, and one that both have; the second part is the larger."""
    parts, adapter = [rows(16, 0, known=(0, 1, 2)), rows(48, 1, known=(2, 3))], METHODS[options]
    learners = [Learner(options, **adapter) for _ in range(4)]
    for learner, own in zip(learners, ([0], [1], [0, 1], []), strict=True):
        for x, y in (batch for n in own for batch in batches(parts[n], 8)):
            learner.step(x, y)
    one, two, both, new = learners
    add = compose.merger(options)
    sums = add(one.state.memory, two.state.memory)
    new.state = both.state.__class__(both.state.step, new.state.params, (), {**new.state.memory, **sums})
    for learner in (new, both):
        learner.over(x, y)
    for name, wanted in both.state.params.items():
        if name not in ("base", "expansion"):
            np.testing.assert_allclose(new.state.params[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
