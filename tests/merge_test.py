"""Analytic runs add up: the merge of runs is the run on all rows, however they are grouped, or it is refused."""

import json
import shutil

import numpy as np
import pytest
import small
import toys
from closed_form import Learner, batches, off, rows

from jaxcl import branch, compose, folder, merge, saved, train
from jaxcl.data import scenarios
from jaxcl.schema import UserError

STEPS = 3  # of eight rows: each of the 24 rows of a task comes once
SOURCES, STAGES = scenarios.split(
    {"name": "digits", "count": 24, "held_out": 12, "size": 8}, classes=4, groups=2, steps=STEPS, relabel=False
)


def config(*tasks, **overrides):
    """Returns the config of a run on some of two tasks."""
    return {
        "model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 4},
        "adapter": {"name": "analytic", "width": 12},
        "sources": SOURCES,
        "stream": {"batch": 8, "stages": [STAGES[t] for t in tasks]},
        "method": "acil(gamma=0.2, how='recursion')",
        "guard": {"spike": float("inf")},
        "optim": {"name": "adam"},
        "schedule": {"name": "constant", "peak": 1e-3},
        "evaluation": {"every": 100, "rows": 12},
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep": 99},
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
    """Two runs of one task each, and the run of both."""
    place = tmp_path_factory.mktemp("runs")
    return [trained(place / "ab"[t], t) for t in range(2)] + [trained(place / "all", 0, 1)]


def test_a_merge_is_the_run_on_all_rows_and_can_go_on(runs, tmp_path, capsys):
    *parts, whole = runs
    new = tmp_path / "new"
    merge.main([*map(str, parts), str(new), "--evaluate"])
    assert f"the rows of 2 runs, {2 * STEPS} steps" in capsys.readouterr().out
    (found, host), (wanted, told) = state_of(new), state_of(whole)
    assert found.keys() == wanted.keys()
    for name in ("gram", "cross", "counts"):
        assert off(found[f"memory/inner/moments/{name}"], wanted[f"memory/inner/moments/{name}"]) < 1e-13
    for name in (name for name in found if name.startswith("params/")):
        assert off(found[name], wanted[name]) < 1e-6 if np.any(wanted[name]) else not np.any(found[name]), name
    assert found["memory/inner/age"] == found["step"] == wanted["step"] == 2 * STEPS
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
    assert after["memory/inner/moments/counts"].sum() == 2 * 24 + 8


def test_the_order_does_not_count_and_gamma_enters_once(runs, tmp_path):
    one, two, whole = runs
    merge.main([str(two), str(one), str(tmp_path / "new"), "--gamma=0.7"])
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "new" / "report.html").exists()
    (found, host), (wanted, _) = state_of(tmp_path / "new"), state_of(whole)
    gram, cross = (found[f"memory/inner/moments/{name}"] for name in ("gram", "cross"))
    assert off(gram, wanted["memory/inner/moments/gram"]) < 1e-13
    assert off(found["params/head"], np.linalg.solve(gram + 0.7 * np.eye(len(gram)), cross)) < 1e-6
    assert folder.about(tmp_path / "new")["config"]["method"] == [{"name": "acil", "gamma": 0.7, "how": "recursion"}]
    assert sorted(host["ledger"]) == ["task_00", "task_01"]
    with pytest.raises(UserError, match=r"new: was trained on the source 'task_00', and so was .*a: its rows would"):
        merge.make([one, tmp_path / "new"], tmp_path / "more", gamma=0.7)


def test_from_the_middle_of_a_task_a_run_goes_on_to_the_same_bits(runs, tmp_path):
    branch.make(runs[2], tmp_path / "again", step=2)
    assert small.outcome(trained(tmp_path / "again", 0, 1)) == small.outcome(runs[2])


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


DISTANCES = {"name": "analytic", "width": 12, "head": "mahalanobis"}
CASES = {
    "width": (
        {"adapter": {"name": "analytic", "width": 13}},
        r"other: config\.adapter\.width=13, but 12 in .*a: o",
    ),
    "expansion": ({"adapter": {"name": "analytic", "width": 12, "expansion": "tanh"}}, r"expansion='tanh', but 'relu'"),
    "sigma": ({"adapter": {"name": "analytic", "width": 12, "sigma": 2.0}}, r"adapter\.sigma=2\.0, but 10\.0 in"),
    "bias": ({"adapter": {"name": "analytic", "width": 11, "bias": True}}, r"adapter\.bias=True, but False in"),
    "length": (
        {"adapter": {"name": "analytic", "width": 12, "normalise": True}},
        r"adapter\.normalise=True, but False",
    ),
    "head": ({"adapter": DISTANCES}, r"adapter\.head='mahalanobis', but 'linear' in"),
    "classes": ({"model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 5}}, r"adapter\.classes=5, but 4"),
    "backbone": ({"model": config()["model"] | {"hidden": (7,)}}, r"config\.model\.hidden\[0\]=7, but 6 in"),
    "an option more": ({"model": config()["model"] | {"bias": True}}, r"bias=True, but 'the default' in"),
    "rows": (
        {"facts": {"row": {"shape": [4, 16, 1], "dtype": "float32"}}},
        r"config\.rows=\[4, 16, 1\], but \[8, 8, 1\] in",
    ),
    "gamma": (
        {"method": "acil(gamma=0.3, how='recursion')"},
        r"\[0\]\.gamma=0\.3, but 0\.2 in .*; say which one counts with --gamma",
    ),
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


@pytest.mark.parametrize(("option", "value", "default"), [("power", 0.5, 1.0), ("shared", True, False)])
def test_heads_of_distances_are_alike_or_refused(runs, tmp_path, option, value, default):
    one = other(runs, tmp_path / "one", adapter=DISTANCES)
    two = other(runs, tmp_path / "two", adapter=DISTANCES | {option: value})
    with pytest.raises(UserError, match=rf"two/other: config\.adapter\.{option}={value}, but {default} in .*one/other"):
        merge.make([one, two], tmp_path / "new")


def test_rows_of_any_run_before_are_noticed(runs, tmp_path):
    one, two = runs[:2]
    with pytest.raises(UserError, match=r"other: was trained on the source 'task_01', and so was .*b: its rows"):
        merge.make([two, one, other(runs, tmp_path)], tmp_path / "new")


def test_the_same_rows_from_another_place_are_noticed(runs, tmp_path):
    """By what they hold: names and paths of files differ."""
    known = folder.about(runs[0])["facts"]
    facts = known | {"sources": {"again": known["sources"]["task_00"]}}
    sources = {"again": {"name": "table", "path": "elsewhere.npz"}}
    stream = config(0)["stream"] | {"stages": [STAGES[0] | {"mixture": {"again": 1}}]}
    place = other(runs, tmp_path, sources=sources, stream=stream, facts=facts)
    with pytest.raises(UserError, match=r"was trained on the source 'again', and so was .*a: its rows would count"):
        merge.make([runs[0], place], tmp_path / "new")


@pytest.mark.parametrize(
    ("seed", "remedy"), [(1, r"same config\.seed \(here 0 and 1\)"), (0, r"same config\.model\.start, or, of a Gaus")]
)
@pytest.mark.parametrize("name", ["params/base/layer_0/kernel", "params/expansion/projection"])
def test_another_feature_map_is_refused(runs, tmp_path, monkeypatch, name, seed, remedy):
    """One bit of one number of the backbone or of the projection."""
    place, read = other(runs, tmp_path, seed=seed), saved.read

    def changed(directory, **options):
        step, leaves, host = read(directory, **options)
        if directory.parent == place:
            leaves[name] = np.array(leaves[name])
            leaves[name][3, 2] = np.nextafter(leaves[name][3, 2], np.float32(2))
        return step, leaves, host

    monkeypatch.setattr(saved, "read", changed)
    with pytest.raises(UserError, match=rf"other: {name} is not that of .*a: another .*{remedy}"):
        merge.make([runs[0], place], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_are_kept_and_named(runs, tmp_path):
    place = other(runs, tmp_path)
    before = small.tree_of(place)
    with pytest.raises(UserError, match=r"other: is not empty; merge into a new folder"):
        merge.make(runs[:2], place)
    with pytest.raises(UserError, match=r"1 run: name two or more"):
        merge.make(runs[:1], tmp_path / "new")
    with pytest.raises(UserError, match=r"not the folder of a run"):
        merge.make([runs[0], tmp_path / "absent"], tmp_path / "new")
    assert small.tree_of(place) == before
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


REFUSED = {
    "ds_al": r"config\.method='ds_al': what it keeps is no sum over rows",
    "ewc": r"config\.method='ewc': what it keeps is no sum over rows",
    "acil(gain=False)": r"acil\.gain=False: which labels count depends on the order",
    "acil(gamma='loo')": r"acil\.gamma='loo': is chosen by rows, of which a merge has none",
    "gkeal(gamma='loo')": r"gkeal\.gamma='loo'",
    "ranpac": r"ranpac\.gamma='held_out'",
    "air(slots=2)": r"air\.slots=2: sums of classes that are over have lost",
}


@pytest.mark.parametrize("options", REFUSED)
def test_methods_that_keep_no_sums_are_refused(options):
    with pytest.raises(UserError, match=REFUSED[options]) as error:
        compose.merger(options)
    assert "\n" not in str(error.value)


METHODS = {
    "acil(decompose=True, how='solve')": {},
    "ranpac(gamma=0.4)": {},
    "slda(epsilon=0.1)": {},
    "nmc": {"normalise": True},
    "nmc(cosine=True)": {},
    "fecam": {"head": "mahalanobis", "power": 0.5},
    "fecam(gamma1=0.5)": {"head": "mahalanobis", "shared": True},
    "air": {},
    "aef_ocl": {},
    "gkeal(gamma=0.3, how='solve')": {"expansion": "gaussian", "sigma": 2.0},
}


@pytest.mark.parametrize("options", METHODS)
def test_what_a_method_keeps_adds_up(options):
    """Classes that one part has alone, and one that both have; the second part is the larger."""
    parts, adapter = [rows(16, 0, known=(0, 1, 2)), rows(48, 1, known=(2, 3))], METHODS[options]
    one, two, both, new = (Learner(options, **adapter) for _ in range(4))
    for learner, own in ((one, parts[:1]), (two, parts[1:]), (both, parts)):
        for x, y in (batch for part in own for batch in batches(part, 8)):
            learner.step(x, y)
    sums = toys.quick(compose.merger(options))(one.state.memory, two.state.memory)
    new.state = both.state.__class__(both.state.step, new.state.params, (), {**new.state.memory, **sums})
    for learner in (new, both):
        learner.over(x, y)
    for name, wanted in both.state.params.items():
        if name not in ("base", "expansion"):
            np.testing.assert_allclose(new.state.params[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
