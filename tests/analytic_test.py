"""Frozen features, their expansions and the preallocated head; from a config to a run, and what is refused."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import adapters, main, network, program, saved, train
from jaxcl.data import rows as tables
from jaxcl.data import scenarios
from jaxcl.models import analytic, cnn, mlp, patches
from jaxcl.report.run import load
from jaxcl.ridge import learner
from jaxcl.schema import UserError

QUICK = True
B, C = 8, 4


def made(**options):
    return toys.solved(**{"hidden": 6, "width": 5} | options).analytic


def params_of(one):
    return one.model.init(jax.random.key(3))


def wide(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"expansion": "relu"}, lambda f, own: np.maximum(f @ wide(own["projection"]), 0)),
        ({"expansion": "tanh", "scale": "normal"}, lambda f, own: np.tanh(f @ wide(own["projection"]))),
        (
            {"expansion": "gaussian", "sigma": 1.5},
            lambda f, own: np.exp(-((f[:, None] - wide(own["centres"])[None]) ** 2).sum(-1) / (2 * 1.5**2)),
        ),
        ({"expansion": "none", "width": None}, lambda f, own: f),
        (
            {"expansion": "none", "width": None, "bias": True, "normalise": True},
            lambda f, own: np.pad(f, ((0, 0), (0, 1)), constant_values=1) / np.sqrt((f**2).sum(1, keepdims=True) + 1),
        ),
    ],
    ids=["relu", "tanh", "gaussian", "none", "bias and length"],
)
def test_expansions_are_their_formulas(options, expected):
    one, batch = made(**options), toys.classes(0)
    params = params_of(one)
    raw = wide(one.raw(params, batch))
    layer = wide(params["base"]["layer_0"]["kernel"])
    np.testing.assert_allclose(raw, np.maximum(wide(batch.inputs) @ layer, 0), rtol=1e-5, atol=1e-6)
    found = one.features(params, batch)
    assert found.shape == (B, one.width)
    np.testing.assert_allclose(found, expected(raw, params.get("expansion", {})), rtol=1e-5, atol=1e-6)


def test_projections_have_the_scale_of_their_paper_or_of_its_code():
    normal, uniform = (
        np.asarray(params_of(made(scale=scale, hidden=100, width=200))["expansion"]["projection"])
        for scale in ("normal", "uniform")
    )
    assert 0.95 < normal.std() < 1.05
    assert 0.09 < np.abs(uniform).max() <= 0.1
    assert 0.095 < uniform.std() * np.sqrt(3) < 0.105


def test_a_class_that_was_not_seen_is_below_all_that_were_and_its_loss_is_finite():
    one, batch = made(), toys.classes(0)
    params = params_of(one)
    np.testing.assert_array_equal(one.model.apply(params, batch).logits, -analytic.MARGIN)
    head = -100 * jnp.abs(jax.random.normal(jax.random.key(0), params["head"].shape))
    params |= {"head": head, "seen": jnp.array([0.0, 1, 0, 1]), "bias": jnp.array([50.0, -3, 0, 0])}
    params["scale"] = jnp.float32(0.5)
    logits = one.model.apply(params, batch).logits
    x = wide(one.features(params, batch))
    want = 0.5 * (x @ wide(head) + wide(params["bias"])[None])[:, [1, 3]]
    np.testing.assert_allclose(logits[:, [1, 3]], want, rtol=1e-5)
    np.testing.assert_allclose(logits[:, [0, 2]], want.min(1, keepdims=True).repeat(2, 1) - analytic.MARGIN, rtol=1e-5)
    total, weight = toys.cross_entropy(one.model.apply(params, batch), batch)
    assert np.isfinite(total)
    assert weight == B


@pytest.mark.parametrize("shared", [False, True])
def test_distances_are_quadratic_forms(shared):
    rng = np.random.default_rng(0)
    x, means = rng.normal(size=(B, 5)).astype("f"), rng.normal(size=(5, C)).astype("f")
    precision = rng.normal(size=(1 if shared else C, 5, 5)).astype("f")
    away = wide(x)[:, :, None] - wide(means)[None]
    own = [wide(precision[0 if shared else c]) for c in range(C)]
    want = np.stack([np.einsum("bd,de,be->b", away[..., c], own[c], away[..., c]) for c in range(C)], 1)
    np.testing.assert_allclose(analytic.distances(x, means, precision), want, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_no_padding_are_averaged():
    batch = toys.text(0)
    batch = dataclasses.replace(batch, segments=batch.segments.at[0, 2:].set(0))
    one = analytic.make(toys.language_model(), toys.shapes(batch), C, width=7)
    hidden = wide(toys.language_model().apply(params_of(one)["base"], batch).hidden)
    want = hidden.mean(1)
    want[0] = hidden[0, :2].mean(0)
    np.testing.assert_allclose(one.raw(params_of(one), batch), want, rtol=1e-5, atol=1e-6)


BASES = {
    "mlp": lambda **more: mlp.make(inputs=64, hidden=(7, 5), classes=3, **more),
    "linear": lambda **more: mlp.make(inputs=64, hidden=(), classes=3, **more),
    "cnn": lambda **more: cnn.make(inputs=(8, 8, 1), channels=(2,), hidden=(5,), classes=3, **more),
    "patches": lambda **more: patches.make(side=8, filters=6, window=3, hidden=(5,), classes=3, **more),
}


@pytest.mark.parametrize("name", BASES)
def test_what_the_last_layer_reads_comes_from_the_same_parameters(name):
    plain, hidden = BASES[name](), BASES[name](output="hidden")
    params = plain.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, hidden.init(jax.random.key(0)))
    assert jax.tree.structure(plain.axes) == jax.tree.structure(hidden.axes)
    batch = toys.points(np.random.default_rng(0).uniform(size=(B, 64)).astype("f"), np.zeros(B, "i"))
    below = params["head"] if name == "patches" else params
    last = below[max(key for key in below if key.startswith("layer_"))]
    read = hidden.apply(params, batch).hidden
    assert read.shape == (B, 64 if name == "linear" else 5)
    np.testing.assert_allclose(read @ last["kernel"] + last["bias"][None], plain.apply(params, batch).hidden, rtol=1e-5)


STEPS = 3


def config(**overrides):
    """Returns the sections of a run of two tasks on drawn digits; overrides replace them."""
    source = {"name": "digits", "count": 24, "held_out": 10, "size": 8}
    sources, stages = scenarios.split(source, classes=4, groups=2, steps=STEPS, relabel=False)
    return {
        "model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 4},
        "adapter": {"name": "analytic", "width": 8},
        "sources": sources,
        "stream": {"batch": 8, "stages": stages},
        "method": "acil",
        "optim": {"name": "adam"},
        "schedule": {"name": "constant", "peak": 1e-3},
        "evaluation": {"every": 10, "rows": 10},
        "mesh": {"devices": jax.devices()[:1]},
    } | overrides


def finished(folder, **overrides):
    """Runs to the end on all devices; returns the parameters and what was noted of the run."""
    sections = config(**overrides) | {"mesh": {"data": 8}, "checkpoint": {"every_steps": 1000}, "tensorboard": False}
    assert train.run(sections, str(folder), final=False) == 0
    found = jax.device_get(saved.params(folder / "checkpoints")[1])
    return found, json.loads((folder / "run.json").read_text())


def test_a_run_brings_its_backbone(tmp_path):
    learned, _ = finished(tmp_path / "base", adapter=None, method="cpt")
    assert np.any(learned["layer_0"]["bias"])
    after, noted = finished(tmp_path / "head", model=config()["model"] | {"start": str(tmp_path / "base")})
    jax.tree.map(np.testing.assert_array_equal, after["base"], learned)
    np.testing.assert_array_equal(after["seen"], 1)
    assert "is cheapest" in noted["facts"]["acil"]
    again = {"adapter": None, "method": "cpt", "model": config()["model"] | {"start": str(tmp_path / "base")}}
    begun = program.build(**config(**again)).create().params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(begun), learned)


@pytest.mark.parametrize("largest", [1.0, 1e12])
def test_a_run_says_how_its_head_was_solved_for_and_when_its_digits_are_lost(tmp_path, largest):
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((48, 64)).astype(np.float32), np.arange(48) % 4
    x[np.flatnonzero(labels >= 2)[0]] *= np.float32(largest)  # a row of the second task
    np.savez(tmp_path / "bank.npz", features=x, labels=labels)
    sources, stages = scenarios.class_incremental(
        {"name": "features", "path": str(tmp_path / "bank.npz")}, 4, 2, steps=3
    )
    finished(tmp_path / "run", sources=sources, stream={"batch": 8, "stages": stages}, method="acil(gamma=0.5)")
    found = load(tmp_path / "run")
    assert found.label == "acil"  # no step is taken, so that a learning rate says nothing
    assert sorted(found.solves) == [0, 1]
    assert all(known["gamma"] == 0.5 for known in found.solves.values())
    assert 0 < found.solves[0]["bound"] < 1e-3
    said = [event for event in found.events if event["event"] == "inexact"]
    if largest == 1:
        assert 0 < found.solves[1]["bound"] < 1e-3
        assert not said
    else:
        assert found.solves[1]["bound"] == 1
        assert [event["step"] for event in said] == [6]
        assert "features that are far larger than the rest, or regularise more" in said[0]["message"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The head, solved for at the end of each task" in page
    assert f"<td>{found.solves[0]['bound']:.3g}</td>" in page


def test_of_a_head_that_no_one_solved_for_nothing_is_said():
    assert learner.solved({"inner": {"gamma": 1.0}, "bound": 1.0}) == learner.solved(()) == learner.solved({}) == {}
    assert learner.inexact({}) is None
    assert learner.inexact({"solve": {"bound": 0.0099}}) is None
    assert "off by 2 %" in learner.inexact({"solve": {"bound": 0.02}})


def test_centres_are_features_of_rows_of_the_first_task():
    made = program.build(**config(adapter={"name": "analytic", "expansion": "gaussian", "width": 6}))
    state = made.create()
    centres = np.asarray(state.params["expansion"]["centres"])
    base = state.params["base"]["layer_0"]
    first = np.concatenate([made.stream.at(step).inputs.reshape(8, -1) for step in range(STEPS)])
    features = np.maximum(first @ np.asarray(base["kernel"]) + np.asarray(base["bias"]), 0)
    distance = np.abs(centres[:, None] - features[None]).max(-1).min(1)
    assert np.all(distance < 1e-5)
    assert len(np.unique(centres.round(5), axis=0)) == 6


def test_centres_are_of_all_classes_of_a_sorted_table_and_of_other_rows_with_another_seed():
    labels, rng, drawn = np.repeat(np.int32([0, 1, 2, 3]), 10), np.random.default_rng(0), []
    whole = toys.points(rng.standard_normal((40, 4)).astype("f"), labels)
    columns = {name: np.asarray(getattr(whole, name)) for name in tables.NAMES}
    rows = tables.Rows(np.ones(40, np.int64), lambda n: {name: x[n] for name, x in columns.items()}, "")

    def draw(count, random):
        drawn.append(adapters.drawing(rows)(count, random))
        return drawn[-1]

    one = made(expansion="gaussian", width=20)
    load = adapters.loading(None, one, draw)
    for seed in range(2):
        found = load(jax.random.key(seed), params_of(one))
        np.testing.assert_allclose(found["expansion"]["centres"], one.raw(found, drawn[-1]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.unique(drawn[-1].targets), [0, 1, 2, 3])
        assert len(np.unique(drawn[-1].inputs, axis=0)) == 20
    assert set(map(tuple, drawn[0].inputs)) != set(map(tuple, drawn[1].inputs))


# name -> (sections, words the line must hold)
BAD = {
    "no adapter": ({"adapter": None}, ["config.method='acil'", "config.adapter='analytic'"]),
    "method that trains": ({"method": "ewc"}, ["config.method='ewc'", "acil", "leave the adapter out"]),
    "boxes": ({"adapter": "hypernetwork"}, ["config.method='acil'", "hyperinterval"]),
    "no such adapter": ({"adapter": "analitic"}, ["config.adapter.name='analitic'", "analytic"]),
    "no such option": ({"adapter": "analytic(widht=3)"}, ["config.adapter.widht", "'width'"]),
    "no such expansion": ({"adapter": "analytic(expansion='sin')"}, ["config.adapter.expansion='sin'", "'relu'"]),
    "width of nothing": ({"adapter": "analytic(width=0)"}, ["config.adapter.width=0", "at least 1"]),
    "width of what is given": ({"adapter": "analytic(expansion='none', width=8)"}, ["config.adapter.width=8"]),
    "scale of nothing": ({"adapter": "analytic(expansion='none', scale='normal')"}, ["config.adapter.scale='normal'"]),
    "sigma": ({"adapter": "analytic(expansion='gaussian', sigma=0.0)"}, ["config.adapter.sigma=0.0", "above 0"]),
    "power": ({"adapter": "analytic(power=0.5)"}, ["config.adapter.power=0.5", "head='mahalanobis'"]),
    "shared": ({"adapter": "analytic(shared=True)"}, ["config.adapter.shared=True", "head='mahalanobis'"]),
    "head": ({"adapter": "analytic(head='mahalanobis')"}, ["config.adapter.head='mahalanobis'", "'linear'"]),
    "frozen": ({"optim": {"name": "adam", "frozen": ["^base"]}}, ["config.optim.frozen", "leave it out"]),
    "label outside the head": (
        {"model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 3}},
        ["config.model.classes=3", "set it to 4"],
    ),
    "rows of another size": (
        {"model": {"name": "mlp", "inputs": 63, "hidden": (6,), "classes": 4}},
        ["config.model.inputs=63", "shape (8, 8, 1)", "set it to 64"],
    ),
    "no such run": (
        {"model": {"name": "mlp", "inputs": 64, "hidden": (6,), "classes": 4, "start": "no/run"}},
        ["config.model.start='no/run'", "give the folder of a run"],
    ),
    "gamma": ({"method": "acil(gamma=0.0)"}, ["gamma=0.0", "above 0"]),
    "microbatches": ({"microbatches": 2}, ["config.microbatches=2", "set it to 1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_names_field_and_remedy(name):
    overrides, words = BAD[name]
    with pytest.raises(UserError) as error:
        program.build(**config(**overrides))
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    for word in words:
        assert word in text


def test_a_model_that_tells_no_features_is_refused():
    base = network.Network(toys.language_model(), None, None)
    with pytest.raises(UserError, match=r"config\.model\.name='transformer': tells no features"):
        adapters.with_head(base, {"name": "transformer"}, {}, toys.text(0), None)
    with pytest.raises(UserError, match=r"takes \[B, D\] or \[B, L, D\]"):
        analytic.features_of(toys.linear(4), toys.shapes(toys.points(np.zeros((2, 4), "f"), np.zeros(2, "f"))))


@pytest.mark.parametrize("part", ["compare", "backbone"])
def test_every_part_of_the_config_can_run(part):
    whole = main.plain(importlib.import_module("configs.analytic").get_config(part))
    whole["sources"] = {k: one | {"count": 40, "held_out": 10} for k, one in whole["sources"].items()}
    whole["mesh"] = {"devices": jax.devices()[:1]}
    for entry in whole.pop("variants", [{"set": ()}]):
        sections = {**{k: v for k, v in whole.items() if k not in ("seeds", "control")}, **dict(entry["set"])}
        program.build(**train.split(sections)[1])
