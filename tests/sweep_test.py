"""Sweeps: variants x seeds that continue where they were cut off, one report; the launcher; the shipped configs."""

import importlib
from pathlib import Path

import jax
import pytest
import small

from jaxcl import main, program, seeds, sweep, train
from jaxcl.report.run import parts
from jaxcl.schema import UserError

ROOT = Path(__file__).parent.parent
DOSES = {"naive": 0.0, "replay": 0.5}
NAMES = ["naive-seed3", "naive-seed4", "replay-seed3", "replay-seed4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


def settings(folder):
    variants = [{"label": name, "set": [("stream.replay.fraction", dose)]} for name, dose in DOSES.items()]
    return small.config(folder, stream__steps=2, variants=variants, seeds=[3, 4], control="naive")


def run(folder, workdir, stop=None):
    """Runs the sweep, or until a SIGTERM in run number `stop`; returns the folders of the runs that it trained."""
    trained = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        claim = train.folder.claim

        def counted(place, *rest):
            trained.append(place.name)
            if len(trained) == stop:
                small.strike(monkeypatch, "SIGTERM", 4)
            return claim(place, *rest)

        monkeypatch.setattr(train.folder, "claim", counted)
        assert sweep.run(settings(folder), str(workdir)) == 0
    return trained


def test_a_sweep_that_is_stopped_goes_on_where_it_was(folder, tmp_path):
    sweeps = tmp_path / "sweep"
    assert run(folder, sweeps, stop=2) == NAMES[:2]
    assert not (sweeps / "report.html").exists()
    before = small.tree_of(sweeps / NAMES[0] / "checkpoints")
    assert run(folder, sweeps) == NAMES[1:]
    assert small.tree_of(sweeps / NAMES[0] / "checkpoints") == before
    one = sweep.expand(settings(folder))[1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        assert train.run(one, str(tmp_path / "straight")) == 0
    assert small.outcome(sweeps / NAMES[1]) == small.outcome(tmp_path / "straight")
    told = small.results(sweeps)
    assert [(group["label"], group["seeds"]) for group in told["groups"]] == [(name, [3, 4]) for name in DOSES]
    assert told["control"] == "naive"
    found = [small.results(sweeps / name)["figures"]["forgetting"] for name in NAMES]
    assert told["groups"][1]["figures"]["forgetting"] == pytest.approx(seeds.interval(found[2:])._asdict())


def test_runs_have_second_places_of_their_own():
    base = {
        "seeds": [0, 1],
        "variants": [{"label": "a"}, {"label": "b"}],
        "checkpoint": {"second": "/copies", "keep": 3},
    }
    found = [one["checkpoint"] for one in sweep.expand(base)]
    assert [one["second"] for one in found] == [f"/copies/{label}-seed{seed}" for label in "ab" for seed in (0, 1)]
    assert all(one["keep"] == 3 for one in found)
    assert base["checkpoint"]["second"] == "/copies"


def test_a_run_is_the_base_with_the_keys_of_its_variant():
    base = {"seed": 7, "stream": {"steps": 3, "replay": {"fraction": 0.1}}, "method": "cpt"}
    variants = [{"label": "a"}, {"label": "b", "set": [("stream.replay.fraction", 0.5), ("method", "er")]}]
    runs = sweep.expand({**base, "variants": variants, "seeds": [0, 1], "control": "a"})
    assert [(r["label"], r["seed"]) for r in runs] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [r["stream"]["replay"]["fraction"] for r in runs] == [0.1, 0.1, 0.5, 0.5]
    assert [r["method"] for r in runs] == ["cpt", "cpt", "er", "er"]
    assert all(r["stream"]["steps"] == 3 and "control" not in r for r in runs)
    assert base["stream"]["replay"]["fraction"] == 0.1
    assert [r["seed"] for r in sweep.expand({**base, "variants": variants})] == [7, 7]


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ([{"label": "a"}, {"label": "a"}], "label 'a' is missing or used twice"),
        ([{"set": []}], "label None is missing"),
        ([{"label": "a", "sets": []}], r"config.variants\[a\].sets: unknown key"),
    ],
)
def test_malformed_variants_are_refused(variants, words):
    with pytest.raises(UserError, match=words):
        sweep.expand({"variants": variants})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": []}, r"config\.variants=\[\]: nothing to run; name one at least"),
        ({"seeds": []}, r"config\.seeds=\[\]: nothing to run; name one at least"),
        ({"control": "niave"}, r"control='niave': none of config\.variants has this label; did you mean 'naive'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(folder, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        sweep.run(settings(folder) | change, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.weight_decay", -1.0, r"config.variants\[bad\], seed 4: config.optim.weight_decay=-1.0"),
        ("schedule.peak", -1.0, "config.schedule.peak=-1.0: must be above 0"),
        ("schedule.cooldwn", 3, "config.schedule.cooldwn: unknown key"),
        ("stream.stpes", 3, "config.stream.stpes: unknown key"),
        ("loss", {"z_loss": -1.0}, "config.loss.z_loss"),
        ("method", "er(", "config.method="),
        ("evaluation.every", 0, "config.evaluation.every=0"),
        ("rollback", 0, "config.rollback=0"),
    ],
)
def test_a_bad_last_point_is_told_before_the_first_is_trained(folder, tmp_path, key, value, words):
    config = settings(folder) | {"seeds": [4]}
    config["variants"] = [*config["variants"], {"label": "bad", "set": [(key, value)]}]
    with pytest.raises(UserError, match=words):
        sweep.run(config, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_launcher_makes_a_grid(recipe, folder, tmp_path, monkeypatch):
    launch, asked = recipe("quickstart", "launch"), []
    monkeypatch.setattr(sweep, "run", lambda config, workdir: asked.append((config, workdir)) or 0)
    path = small.write(small.config(folder), tmp_path / "config.py")
    arguments = [f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--seeds=0,1", "--config.stream.steps=5"]
    grid = ["--grid=stream.replay.fraction=0,0.25", "--grid=method=cpt,er"]
    assert launch.launch(["launch.py", *arguments, *grid]) == 0
    ((config, workdir),) = asked
    runs = sweep.expand(config)
    assert workdir == str(tmp_path / "grid")
    assert [(r["stream"]["replay"]["fraction"], r["method"], r["seed"]) for r in runs] == [
        (fraction, method, seed) for fraction in (0, 0.25) for method in ("cpt", "er") for seed in (0, 1)
    ]
    assert {r["stream"]["steps"] for r in runs} == {5}
    assert len({sweep.name_of(r["label"], r["seed"]) for r in runs}) == 8
    with pytest.raises(UserError, match="--grid=method: write it as KEY=VALUE"):
        launch.axes(["method"])


@pytest.fixture
def shipped(monkeypatch):
    """Returns the plain config of a file in configs/."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: main.plain(importlib.import_module(f"configs.{name}").get_config())


def test_shipped_configs_can_be_built(shipped, folder):
    """On other text, so that nothing is harvested."""
    compare = shipped("compare")
    paths = small.corpus(folder / "text")
    sources = dict(zip(compare["sources"], small.config(folder)["sources"].values(), strict=True))
    assert len(paths) == len(sources) == 3
    for one in [shipped("quickstart"), *sweep.expand({**compare, "seeds": [0]})]:
        packing = {**one["packing"], "directory": str(folder / "cache")}
        _, pieces = train.split({**one, "sources": sources, "packing": packing})
        made = program.build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}})
        assert 1e5 < made.facts["parameters"] < 3e6
        assert one.get("label") == "joint" or len(made.stream.stages) == 3


def rest(one):
    return {k: v for k, v in one.items() if k not in ("label", "seed", "method", "schedule")}


def test_the_comparison_has_every_dose_five_seeds_and_a_control_for_each_meta_update(shipped):
    runs = sweep.expand(shipped("compare"))
    groups = {one["label"]: one for one in runs}
    assert all(len({r["seed"] for r in runs if r["label"] == label}) >= 5 for label in groups)
    plain = [one for one in groups.values() if one["method"] == "cpt" and len(one["stream"]["stages"]) == 3]
    peak = groups["naive"]["schedule"]["peak"]
    doses = [one["stream"]["replay"]["fraction"] for one in plain if one["schedule"]["peak"] == peak]
    assert sorted(doses) == [0, 0.05, 0.25, 0.5]
    shrunk = [(one, dict(parts(one))["reptile"]["keep"]) for one in groups.values() if "reptile" in one["method"]]
    assert len(shrunk) >= 2
    for one, keep in shrunk:
        rates = {
            name: value * (keep if name in ("peak", "end") else 1)
            for name, value in one["schedule"].items()
            if name != "name"
        }
        wanted = {"name": one["schedule"]["name"], **rates}
        assert any(rest(other) == rest(one) and other["schedule"] == pytest.approx(wanted) for other in plain), one[
            "label"
        ]


@pytest.mark.parametrize("name", ["soft_rl_compare", "continual_rl"])
def test_sweeps_of_rollouts_can_be_built_and_share_their_start(shipped, name):
    starts = {}
    for one in sweep.expand({**shipped(name), "seeds": [2]}):
        one["model"].pop("start", None)  # a run that is not there
        for source in one["sources"].values():
            source["problems"] = 60
        made = program.build(**{**train.split(one)[1], "mesh": {"devices": jax.devices()[:1]}})
        assert 1e5 < made.facts["parameters"] < 3e5
        learns, index = [stage["learn"] for stage in one["stream"]["stages"]], made.stream.index(0)
        starts[one["label"]] = (made.stream.stages[0].mixture, index.source.tolist(), index.row.tolist())
        assert learns[1:] == (["rl"] if name == "soft_rl_compare" else learns[:1] * 2) or one["label"] == "discrete SFT"
    assert len(starts) >= 4
    assert all(start == next(iter(starts.values())) for start in starts.values())


def test_the_pilot_of_soft_rl_has_other_seeds_than_the_comparison(recipe, shipped):
    pilot = recipe("soft_rl", "launch")
    config = shipped("soft_rl_compare")
    runs = sweep.expand(pilot.pilot(config, [10, 20]))
    told = [(one["policy"], one["stream"]["stages"][0]["steps"], one["seed"]) for one in runs]
    assert told == [(p, n, s) for p in ("soft(temperature=1.0)", "hard") for n in (10, 20) for s in (0, 1)]
    assert {one["seed"] for one in runs}.isdisjoint(config["seeds"])
    assert {one["stream"]["stages"][1]["steps"] for one in runs} == {config["stream"]["stages"][1]["steps"]}
