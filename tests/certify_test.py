"""Certificates of real runs and of toys: recorded promises are kept, and what cannot be promised is refused."""

import dataclasses
import functools
import json
import shutil

import boxed_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rl_small
import small
import toys

from jaxcl import certify, folder, program, report, train
from jaxcl.certify import __main__ as command
from jaxcl.data import scenarios
from jaxcl.methods import hyperinterval
from jaxcl.models import boxed as boxes
from jaxcl.models import hypernetwork, mlp
from jaxcl.models.boxed import LEDGER
from jaxcl.models.interval import Interval
from jaxcl.report import terminal, words
from jaxcl.schema import UserError

QUICK = True
STEPS, TASKS = 60, 3
KINDS = {
    "task networks": ({"gamma": 0.5}, {"beta": 0.01}),
    "one network": ({"gamma": 4.0, "universal": True}, {"beta": 0.0, "spread": 0.3}),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """Returns the kind, the certificates at every boundary of a run on drawn digits, by task, and its folder."""
    adapter, method = KINDS[request.param]
    source = {"name": "digits", "count": 300, "held_out": 64, "size": 8}
    sources, stages = scenarios.split(source, classes=2 * TASKS, groups=TASKS, steps=STEPS)
    settings = {
        "label": "certified",
        "seed": 1,
        "model": {"name": "mlp", "inputs": 64, "hidden": (12,), "classes": 2},
        "adapter": {"name": "hypernetwork", "embedding": 8, "hidden": (12,), **adapter},
        "method": {"name": "hyperinterval", "steps": STEPS, **method},
        "sources": sources,
        "stream": {"batch": 32, "stages": list(stages)},
        "optim": {"name": "adam", "clip": None},
        "schedule": {"name": "constant", "peak": 5e-3},
        "evaluation": {"every": STEPS, "rows": 64},
        "checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep": TASKS},
        "tensorboard": False,
    }
    place = tmp_path_factory.mktemp("certified") / "run"
    try:
        rl_small.run(settings, place)
    finally:
        jax.config.update("jax_disable_most_optimizations", QUICK)
    found = [r for r in small.records(place, "eval") if r["boundary"] is not None]
    assert [r["boundary"] for r in found] == [-1, *range(TASKS)]
    return request.param, found, place


def test_promises_are_kept_to_the_end(trained):
    kind, found, _ = trained
    for t in range(TASKS):
        own = [r["certificate"][f"task_{t:02d}"] for r in found[t + 1 :]]
        assert all(one["over"] and one["task"] == t for one in own)
        for now, one in enumerate(own):
            for past in own[: now + 1]:
                assert one["deployed"] >= past["promised"]
                assert one["promised"] >= past["promised"]  # the box of the ledger only shrinks
                assert one["kept_radius"] <= past["kept_radius"] * (1 + 1e-6)
        for one in own:
            assert one["promised"] <= one["deployed"]
            assert one["affine_radius"] <= one["radius"] * (1 + 1e-5)
        assert own[0]["promised"] >= own[0]["affine"] - 1e-6  # as much as was certified when it was learned
        assert own[0]["joint"] >= own[0]["affine"] >= own[0]["interval"]
    learned = [found[t + 1]["certificate"][f"task_{t:02d}"] for t in range(TASKS)]
    assert learned[0]["promised"] > 0.8
    if kind == "task networks":  # a box this small leaves one network of 12 units no room for more than the first task
        assert np.mean([one["deployed"] for one in learned]) > 0.9


def test_what_a_kind_of_network_tells(trained):
    kind, found, _ = trained
    assert all(one["promised"] is None and not one["over"] for one in found[0]["certificate"].values())
    assert all(one["joint"] is None for one in found[0]["certificate"].values())
    for record in found:
        for name, one in record["certificate"].items():
            assert one["deployed"] == pytest.approx(record["accuracy"][name], abs=1e-6)
    last = [one for record in found[1:] for one in [record["certificate"][f"task_{record['boundary']:02d}"]]]
    if kind == "task networks":
        assert all(
            one["kept_radius"] == found[-1]["certificate"][f"task_{one['task']:02d}"]["kept_radius"] for one in last
        )
        assert "guessed" not in found[1]["certificate"]["task_00"]
        for one in found[-1]["certificate"].values():
            assert 0 < one["guessed"] <= one["deployed"]
            assert 0 <= one["guessed_interval"] <= one["deployed"]
    else:
        assert last[0]["kept_radius"] >= last[1]["kept_radius"] >= last[2]["kept_radius"] > 0
        assert all("guessed" not in one for one in last)


def test_a_run_is_certified_again_from_its_folder(trained):
    """On all devices of this process, whatever it was trained on."""
    kind, found, place = trained
    if kind == "one network":  # which is the same but for its boxes
        return
    block = command.check(place)
    assert block["kept"]
    assert len(block["tasks"]) == TASKS
    for one in block["tasks"]:
        told = found[-1]["certificate"][one["domain"]]
        assert one["now"] == pytest.approx(told["promised"], abs=1e-6)
        assert one["joint_now"] == pytest.approx(told["joint"], abs=1e-6)


def test_an_earlier_checkpoint_is_held_to_what_was_promised_by_then(trained, tmp_path):
    """What was certified of a task later is no promise that it was learned with."""
    kind, found, place = trained
    if kind == "one network":
        return
    (one,) = command.check(place, STEPS)["tasks"]
    assert one["promised"] == found[1]["certificate"]["task_00"]["promised"]
    shutil.copytree(place, tmp_path / "run")
    lines = (place / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = "".join(line for line in lines if '"boundary":0' not in line.replace(" ", ""))
    (tmp_path / "run" / "metrics.jsonl").write_text(kept)
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no promise of task_00; restore it from a copy"):
        command.check(tmp_path / "run", STEPS)


def test_a_comparison_tells_what_was_promised(trained, tmp_path):
    """Arms are not ranked by accuracy alone: beside it stands what was certified of each."""
    place, other = trained[2], tmp_path / "other"
    shutil.copytree(place, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "label": "other"}))
    results = report.write([str(place), str(other)], out=tmp_path / "both.html")
    block = report.write([str(place)], out=tmp_path / "one.html")["certificates"]
    for group in results["groups"]:
        assert group["classified"]["promised"]["mean"] == pytest.approx(block["promised"])
        now = np.mean([one["now"] for one in block["tasks"]])
        assert group["classified"]["certified"]["mean"] == pytest.approx(now)
    page = (tmp_path / "both.html").read_text()
    assert ">promised</th>" in page
    assert words.share(block["promised"]) in page
    assert "promised" in [str(column.header) for column in terminal.summary(results).columns]


def test_promises_of_another_run_do_not_bind_one_that_starts_from_it(trained):
    """Its tasks are over: a ledger that was taken over would keep the new ones from being learned."""
    config = folder.about(trained[2])["config"]
    _, pieces = train.split({**config, "model": {**config["model"], "start": str(trained[2])}})
    with pytest.raises(UserError, match=rf"its ledger has promises for {TASKS} tasks, which would bind"):
        program.build(**pieces).create()


def test_a_run_that_goes_on_has_the_same_promises(trained, tmp_path):
    """From the end of the first task: what it learns, and what it is held to, are those of a run that was whole."""
    kind, found, place = trained
    if kind == "task networks":
        return
    shutil.copytree(place, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name) > STEPS:
            shutil.rmtree(path)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    rl_small.run(folder.about(place)["config"], tmp_path / "run")
    again = [r for r in small.records(tmp_path / "run", "eval") if r["boundary"] is not None]
    assert [r["certificate"] for r in again] == [r["certificate"] for r in found]


def test_a_run_that_cannot_be_certified_again_says_why(trained, tmp_path, monkeypatch):
    """Other held-out rows; the shapes of another network; a record that is cut short; a task that is not over."""
    kind, _, place = trained
    if kind == "one network":
        return
    original, params = (place / "run.json").read_text(), command.saved.params
    shutil.copytree(place, tmp_path / "run")

    def refused(words, change=lambda config: None):
        told = json.loads(original)
        change(told["config"])
        (tmp_path / "run" / "run.json").write_text(json.dumps(told))
        with pytest.raises(UserError, match=words):
            command.check(tmp_path / "run")

    refused("held-out rows are not those of the run", lambda config: config["sources"]["task_01"].update(held_out=48))
    refused("ledger is of another network", lambda config: config["model"].update(hidden=[13]))
    refused("makes no boxes of weights", lambda config: config.update(adapter=None))

    metrics, lines = tmp_path / "run" / "metrics.jsonl", (place / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if f'"boundary":{TASKS - 1}' not in line.replace(" ", "")))
    refused(rf"metrics.jsonl holds no promise of task_{TASKS - 1:02d}; restore it from a copy")
    metrics.write_text("".join(lines))

    def broken(*args, **options):
        step, found = params(*args, **options)
        return step, {**found, "generator": jax.tree.map(lambda x: np.full_like(x, np.nan), found["generator"])}

    monkeypatch.setattr(command.saved, "params", broken)
    refused(r"weights are not finite, so that nothing is guaranteed.*config\.adapter\.gamma")

    def fresh(*args, **options):
        step, found = params(*args, **options)
        return step, {**found, LEDGER: {**found[LEDGER], "done": np.zeros_like(found[LEDGER]["done"])}}

    monkeypatch.setattr(command.saved, "params", fresh)
    refused(r"no task is over at step \d+")


def test_a_run_without_a_ledger_is_told_so(trained, monkeypatch):
    """As with project=False; that boxes of task networks do not meet is no fault."""
    params = command.saved.params

    def empty(*args, **options):
        step, found = params(*args, **options)
        lower = found[LEDGER]["lower"]
        ends = {"lower": np.full_like(lower, -np.inf), "upper": np.full_like(lower, np.inf)}
        return step, {**found, LEDGER: {**found[LEDGER], **ends}}

    monkeypatch.setattr(command.saved, "params", empty)
    words = (
        r"trained with config\.method\.project=False and kept no ledger, .*train anew with --config\.method\.project"
    )
    with pytest.raises(UserError, match=words):
        command.check(trained[2])


def test_the_ledger_of_another_network_is_refused(tmp_path):
    own, other = (jax.eval_shape(toys.boxed(width=width).boxed.model.init, jax.random.key(0)) for width in (8, 9))
    command.fitting(tmp_path, own, own)
    with pytest.raises(UserError, match=r"ledger is of another network: \S+ has the shape .*; restore run\.json"):
        command.fitting(tmp_path, own, other)


@functools.cache
def toy(universal):
    """Returns a model whose first two tasks are over, its parameters and rows that it is right about."""
    made = toys.boxed(universal=universal, gamma=0.03).boxed
    params = toys.quick(made.model.init)(jax.random.key(0))
    close = toys.quick(lambda params, task: boxes.close(made, params, task))
    rows = {}
    for t in range(2):
        params = {**params, LEDGER: {**params[LEDGER], "current": jnp.float32(t)}}
        one = toys.classes(t, rows=32, task=t)
        labels = toys.quick(made.model.apply)(params, one).logits.argmax(-1).astype(jnp.int32)
        labels = labels.at[:4].set((labels[:4] + 1) % 4)  # and four that it is wrong about
        rows[f"task {t}"] = [type(one)(**{**vars(one), "targets": labels})]
        params = close(params, t)
    return made, params, rows


@pytest.mark.parametrize("universal", [False, True])
def test_no_network_of_the_box_is_worse_than_certified(universal):
    """Of each domain: promised, by the ledger; interval and affine, by the present box."""
    made, params, rows = toy(universal)
    told = certify.make(made, rows)(params)["certificate"]
    uniform = np.random.default_rng(0).uniform(size=(200, made.size)).astype("f")
    uniform[::2] = np.round(uniform[::2])  # corners
    predict = toys.quick(jax.vmap(lambda w, batch: made.target.apply(made.network(params, w), batch).logits, (0, None)))
    for t, (domain, (batch,)) in enumerate(rows.items()):
        low, high = jax.device_get(boxes.limits(made, params, jnp.int32(t)))
        logits = np.asarray(predict(low + uniform * (high - low), batch))
        always = (logits.argmax(-1) == np.asarray(batch.targets)[None]).all(0).mean()
        one = told[domain]
        assert 0.1 < one["promised"] <= always <= one["deployed"] + 1e-6
        assert one["deployed"] <= 28 / 32
        assert one["over"]
        np.testing.assert_allclose(one["kept_radius"], np.mean(high - low) / 2, rtol=1e-5)
        if not universal:  # nothing has happened since
            assert one["promised"] == one["affine"] >= one["interval"]
            assert one["clipped"] == 0
    nothing = {**params, LEDGER: {**params[LEDGER], "done": jnp.zeros(3)}}
    told = certify.make(made, rows)(nothing)["certificate"]
    assert told["task 0"]["promised"] is None


@functools.cache
def wide():
    """Returns the first toy with embeddings of twenty times the radius: boxes certify a part of the rows."""
    _, params, rows = toy(False)
    made = toys.boxed(gamma=0.6).boxed
    params = {**params, LEDGER: made.model.init(jax.random.key(0))[LEDGER]}
    close = toys.quick(lambda params, task: boxes.close(made, params, task))
    for t in range(2):
        params = close({**params, LEDGER: {**params[LEDGER], "current": jnp.float32(t)}}, t)
    return made, params, rows


def test_affine_forms_through_the_target_certify_more_and_never_too_much():
    """What the hypernetwork makes of an embedding, of which some rows are right everywhere."""
    wider, params, rows = wide()
    run = certify.make(wider, rows)
    told = run(params)["certificate"]
    generator, rng, shares = oracle.wide(params["generator"]), np.random.default_rng(2), []
    for t, (domain, (batch,)) in enumerate(rows.items()):
        centre, radius = oracle.embedded(generator, t, 0.6, False)
        networks = oracle.point(generator, oracle.sampled(rng, centre, radius, 400))
        logits = np.stack([oracle.logits(one, np.asarray(batch.inputs, np.float64), (4, 8, 4)) for one in networks])
        always = (logits.argmax(-1) == np.asarray(batch.targets)[None]).all(0).mean()
        assert told[domain]["interval"] <= told[domain]["affine"] <= told[domain]["joint"] <= always
        assert told[domain]["promised"] == told[domain]["affine"]  # by the box of the ledger
        shares.append((told[domain]["interval"], told[domain]["affine"], told[domain]["joint"], always))
    interval, affine, joint, always = np.mean(shares, axis=0)
    assert interval < affine
    assert affine + 0.1 < joint
    assert joint > 0.5 * always
    assert toys.boxed("weight_boxes").boxed.layer is None  # weights that do not depend on each other
    bias = params["generator"]["head"]["bias"]
    head = {**params["generator"]["head"], "bias": bias + 0.4 * jnp.sin(9 * jnp.arange(bias.size))}
    moved = {**params, "generator": {**params["generator"], "head": head}}
    for t, (domain, one) in enumerate(run(moved)["certificate"].items()):
        low, high = jax.device_get(boxes.limits(wider, moved, jnp.int32(t)))
        centre, _ = wider.boxes(moved["generator"], jnp.array([t]), jnp.zeros(1))
        below, above = np.mean(np.asarray(centre[0]) < low), np.mean(np.asarray(centre[0]) > high)
        assert min(below, above) > 0.02
        np.testing.assert_allclose(one["clipped"], below + above, rtol=1e-5, err_msg=domain)


def test_networks_that_the_ledger_shuts_out_are_certified_as_they_are():
    """The ledger has no part in what affine forms say of the networks of the generator."""
    made, params, rows = wide()
    bias = params["generator"]["head"]["bias"]
    head = {**params["generator"]["head"], "bias": bias + jnp.sign(jnp.sin(9 * jnp.arange(bias.size)))}
    moved = {**params, "generator": {**params["generator"], "head": head}}
    free = {**moved, LEDGER: made.model.init(jax.random.key(0))[LEDGER]}
    together = toys.quick(
        lambda params, task, batch: boxes.together(made, params, task, boxes.zonotope(made, params, task), batch)
    )
    generator, rng, sure = oracle.wide(moved["generator"]), np.random.default_rng(3), []
    for t, (batch,) in zip(map(jnp.int32, range(2)), rows.values(), strict=True):
        found, kept = boxes.zonotope(made, moved, t).ends, boxes.limits(made, moved, t)
        assert np.mean((found.upper < kept.lower) | (found.lower > kept.upper)) > 0.5  # they do not meet
        centre, radius = oracle.embedded(generator, t, 0.6, False)
        networks = oracle.point(generator, oracle.sampled(rng, centre, radius, 200))
        logits = np.stack([oracle.logits(one, np.asarray(batch.inputs, np.float64), (4, 8, 4)) for one in networks])
        labels = logits.mean(0).argmax(-1)
        told = type(batch)(**{**vars(batch), "targets": jnp.asarray(labels, jnp.int32)})
        always = (logits.argmax(-1) == labels[None]).all(0)
        certain = np.asarray(together(moved, t, told))
        np.testing.assert_array_equal(certain, together(free, t, told))
        assert not (certain & ~always).any()
        sure.append(certain.mean())
    assert max(sure) > 0


def test_every_row_counts_once_and_by_its_weight(monkeypatch):
    """Rows that are cut into batches, and brought together anew for affine forms, eight at a time."""
    monkeypatch.setattr(certify, "ROWS", 8)
    made, params, rows = wide()
    (batch,) = rows["task 0"]
    share = jnp.asarray(np.arange(32) % 3 > 0, jnp.float32)

    def halves(weights):
        whole = dataclasses.replace(batch, weights=weights)
        return [jax.tree.map(lambda x, i=i: x[16 * i : 16 * i + 16], whole) for i in range(2)]

    every = halves(jnp.ones(32))
    given = {"every": every, "turned": every[::-1], "some": halves(share), "rest": halves(1 - share)}
    told = certify.make(made, given)(params)["certificate"]
    names = ("deployed", "promised", "interval", "affine", "joint", "guessed", "guessed_interval")
    every, turned, some, rest = ([told[domain][name] for name in names] for domain in given)
    assert turned == every
    number = float(share.sum())
    parts = (number * np.asarray(some) + (32 - number) * np.asarray(rest)) / 32
    np.testing.assert_allclose(parts, every, rtol=1e-6)
    assert all(told["some"][name] != told["rest"][name] for name in ("deployed", "promised", "affine", "joint"))
    assert told["every"]["joint"] > told["every"]["affine"] > 0
    assert 32 * (1 - told["every"]["affine"]) > 8  # more than one piece goes through affine forms


def test_a_margin_within_rounding_is_not_certified():
    """A box of one network whose logits differ by two ulps: float32 has them right, exact arithmetic need not."""
    made, params, rows = toy(False)
    (batch,) = rows["task 0"]
    rng = np.random.default_rng(0)
    layers = {
        "layer_0": {"bias": np.ones(8), "kernel": 0.1 * rng.normal(size=(4, 8))},
        "layer_1": {"bias": 1 + 2.0**-22 * (np.arange(4) == 1), "kernel": np.tile(0.05 * rng.uniform(size=(8, 1)), 4)},
    }
    vector = boxes.ravel(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers))
    head = {"weight": 0 * params["generator"]["head"]["weight"], "bias": vector}
    ledger = {**params[LEDGER], "lower": jnp.tile(vector[None], (3, 1)), "upper": jnp.tile(vector[None], (3, 1))}
    params = {**params, "generator": {**params["generator"], "head": head}, LEDGER: ledger}
    batch = dataclasses.replace(batch, targets=jnp.ones(32, jnp.int32))
    told = certify.make(made, {"task 0": [batch]})(params)["certificate"]["task 0"]
    assert told["deployed"] == 1
    assert [told[name] for name in ("promised", "interval", "affine", "joint")] == [0, 0, 0, 0]


def test_a_tie_is_not_certain():
    same = Interval(*[jnp.zeros((8, 4))] * 2)
    assert not boxes.certain(same, toys.classes(0)).any()


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_tasks_are_guessed_by_their_entropy(share):
    """Against float64; a task that is not over takes no part, sure as its network may be.

    The widths are those of the ledger, here of a `share` of the present box of a task, whatever that has become.
    """
    made, params, rows = toy(False)
    lower, upper = params[LEDGER]["lower"], params[LEDGER]["upper"]
    middle, size = (lower[0] + upper[0]) / 2, share * (upper[0] - lower[0]) / 2
    narrow = {"lower": lower.at[0].set(middle - size), "upper": upper.at[0].set(middle + size)}
    params = {**params, LEDGER: {**params[LEDGER], **narrow}}
    place = params["generator"]["embedding"]
    place = {**place, "centre": place["centre"].at[2].mul(100.0)}
    params = {**params, "generator": {**params["generator"], "embedding": place}}
    told = certify.make(made, rows)(params)["certificate"]
    for t, (domain, (batch,)) in enumerate(rows.items()):
        plain, interval, classes = [], [], []
        for k in range(3):
            other = dataclasses.replace(batch, task=jnp.full(32, k, jnp.int32))
            logits = np.asarray(made.model.apply(params, other).logits, np.float64)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            share = share / share.sum(-1, keepdims=True)
            term = -share * np.log(np.maximum(share, 1e-300))
            if k < 2:
                box = boxes.limits(made, params, jnp.int32(k))
                found = jax.device_get(boxes.logits(made, params, box, batch, outward=True))
                interval.append((term / (1e-3 + found.upper - found.lower)).sum(-1))
            plain.append(term.sum(-1))
            classes.append(logits.argmax(-1))
        assert (plain[2] < np.minimum(*plain[:2])).mean() > 0.5
        for name, entropy in (("guessed", plain[:2]), ("guessed_interval", interval)):
            chosen = np.argmin(entropy, axis=0)
            right = (chosen == t) & (np.asarray(classes)[chosen, np.arange(32)] == np.asarray(batch.targets))
            np.testing.assert_allclose(told[domain][name], right.mean(), atol=1e-6)


def test_what_all_boxes_have_in_common():
    names = ["first", "second", "third"]
    made, params, _ = toy(True)
    with pytest.raises(UserError, match="no task is over"):
        certify.common(made, {**params, LEDGER: {**params[LEDGER], "done": jnp.zeros(3)}}, names)
    shared = certify.common(made, params, names)
    centre, radius = made.boxes(params["generator"], jnp.arange(2), jnp.ones(2))
    np.testing.assert_allclose(shared.lower, (centre - radius).max(0), atol=1e-6)
    np.testing.assert_allclose(shared.upper, (centre + radius).min(0), atol=1e-6)
    assert (shared.lower <= shared.upper).all()
    made, params, _ = toy(False)  # embeddings of different tasks are far from each other
    with pytest.raises(UserError, match=r"box of second misses .* no network is in all of them.*project=true"):
        certify.common(made, params, names)


def test_the_last_of_three_boxes_misses_the_first_alone():
    """In one weight of two; boxes are compared with all before them."""
    made = toys.boxed().boxed
    ends = np.array([[[0, 2], [0, 2]], [[1, 4], [1, 4]], [[3, 5], [1.5, 5]]], "f")

    def apart(generator, which, scales):
        return ends[which].mean(-1), np.ptp(ends[which], -1) / 2

    names, params = ["first", "second", "third"], {LEDGER: {"done": jnp.ones(3)}, "generator": {}}
    with pytest.raises(UserError, match=r"box of third misses .* in 50 % of the weights"):
        certify.common(made._replace(boxes=apart), params, names)
    ends[2, 0, 0] = 2
    np.testing.assert_array_equal(certify.common(made._replace(boxes=apart), params, names), [[2, 1.5], [2, 2]])


def test_thirty_tasks_are_not_forgotten():
    """Pixels in another order for every task: at the end as good as just after, three points at the most."""
    tasks, steps, pixels, labels, rows = 30, 40, 16, 4, 32
    target = mlp.make(inputs=pixels, hidden=(16,), classes=labels)
    made = hypernetwork.make(target, tasks=tasks, embedding=8, hidden=(16,), gamma=0.2)
    example = toys.points(np.zeros((rows, pixels), "f"), np.zeros(rows, "i"))
    setting = toys.setting(model=made.model, tx=optax.adam(5e-3), example=example, tasks=tasks)._replace(boxed=made)
    method = hyperinterval.make(setting, steps=steps, beta=0.01)
    rng = np.random.default_rng(0)
    means = rng.uniform(size=(labels, pixels))

    def drawn(task, count):
        """Returns batches, stacked."""
        order = np.random.default_rng(task).permutation(pixels)
        targets = rng.integers(0, labels, (count, rows))
        inputs = np.maximum(means[targets] + 0.25 * rng.normal(size=(count, rows, pixels)), 0)[..., order]
        return toys.stack(
            [toys.points(x.astype("f"), y.astype("i"), task) for x, y in zip(inputs, targets, strict=True)]
        )

    @toys.quick
    def learn(state, batches, key):
        keys = jax.random.split(key, steps)
        return jax.lax.scan(lambda s, x: method.step(s, *x), state, (batches, keys))[0]

    end_task = toys.quick(method.end_task)

    @toys.quick
    def accuracy(params, batches):
        return jnp.mean(jax.lax.map(lambda b: made.model.apply(params, b).logits.argmax(-1) == b.targets, batches))

    held = [drawn(t, 4) for t in range(tasks)]
    state, after = method.init(toys.quick(made.model.init)(jax.random.key(0))), []
    for t in range(tasks):
        state = learn(state, drawn(t, steps), jax.random.key(t))
        state = end_task(state, held[t], jax.random.key(t))
        after.append(float(accuracy(state.params, held[t])))
    final = [float(accuracy(state.params, batches)) for batches in held]
    assert np.mean(after) > 0.8
    assert np.mean(final) >= np.mean(after) - 0.03
    assert min(b - a for a, b in zip(after, final, strict=True)) > -0.1
