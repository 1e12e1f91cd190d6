"""The ledger: whatever happens to a generator, the deployed networks stay in the boxes that were promised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import mesh as meshes
from jaxcl import program, scores
from jaxcl.models import boxed as boxes
from jaxcl.models import weight_boxes
from jaxcl.models.boxed import LEDGER
from jaxcl.models.interval import Interval

CASES = {
    "task networks": ("hypernetwork", {"universal": False, "gamma": 0.05}),
    "one network": ("hypernetwork", {"universal": True, "gamma": 0.05}),
    "boxes of weights": ("weight_boxes", {"radius": 0.02}),
}


def shaken(generator, key, size):
    """Returns a generator with noise on every parameter; radii of weights stay radii."""
    leaves, structure = jax.tree.flatten(generator)
    keys = jax.random.split(key, len(leaves))
    new = jax.tree.unflatten(
        structure, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    return new | ({"radius": jnp.abs(new["radius"])} if "radius" in new else {})


class Trial:
    """A model of boxes that learns nothing and forgets on purpose; rows are labelled as its networks see them."""

    def __init__(self, case):
        kind, options = CASES[case]
        self.made = made = toys.boxed(kind, **options).boxed
        self.init = toys.quick(made.model.init)
        self.close = toys.quick(lambda params, task: boxes.close(made, params, task))
        self.point = toys.quick(lambda params, task: boxes.point(made, params, task))
        self.limits = toys.quick(lambda params, task: boxes.limits(made, params, task))
        self.logits = toys.quick(made.model.apply)
        self.certain = toys.quick(
            lambda params, lower, upper, rows: boxes.certain(
                boxes.logits(made, params, Interval(lower, upper), rows, outward=True), rows
            )
        )
        self.predict = toys.quick(
            jax.vmap(
                lambda params, weights, rows: made.target.apply(made.network(params, weights), rows).logits.argmax(-1),
                in_axes=(None, 0, None),
            )
        )

        def attack(params, rows):
            def gain(generator):
                return toys.cross_entropy(made.model.apply({**params, "generator": generator}, rows), rows)[0]

            grads = jax.grad(gain)(params["generator"])
            return {**params, "generator": jax.tree.map(lambda p, g: p + g, params["generator"], grads)}

        self.attack = toys.quick(attack)

    def current(self, params, task):
        return {**params, LEDGER: {**params[LEDGER], "current": jnp.float32(task)}}

    def right(self, params, rows):
        return np.asarray(self.logits(params, rows).logits.argmax(-1) == rows.targets)

    def bare(self, params):
        """Returns the parameters with an empty ledger."""
        ledger = params[LEDGER]
        return {
            **params,
            LEDGER: {**ledger, "lower": ledger["lower"] * 0 - jnp.inf, "upper": ledger["lower"] * 0 + jnp.inf},
        }


@pytest.mark.parametrize("case", CASES)
def test_promises_outlive_any_drift(case):
    trial, key = Trial(case), jax.random.key(4)
    params, promised, escaped, lost = trial.init(key), [], [], []
    start = params["generator"]
    for t in range(toys.T):
        params = trial.current(params, t)
        if not trial.made.universal:  # nothing holds a task that is not over: begin with a box that certifies something
            params = {**params, "generator": start}
        rows = toys.classes(t, rows=64, task=t)
        rows = dataclasses.replace(rows, targets=trial.logits(params, rows).logits.argmax(-1).astype(jnp.int32))
        before = trial.limits(params, t)
        params = trial.close(params, t)
        where = trial.limits(params, t)
        assert (where.lower >= before.lower).all()
        assert (where.upper <= before.upper).all()
        assert (where.lower <= where.upper).all()
        certain = np.asarray(trial.certain(params, where.lower, where.upper, rows))
        assert certain.mean() > 0.3
        promised.append((t, rows, where, certain))
        for i in range(6):
            hurt = trial.attack(params, rows) if i % 2 else params
            params = {**hurt, "generator": shaken(hurt["generator"], jax.random.fold_in(key, 10 * t + i), 0.3)}
            for task, old, box, sure in promised:
                deployed, bare = trial.point(params, task), trial.point(trial.bare(params), task)
                assert (deployed >= box.lower).all()
                assert (deployed <= box.upper).all()
                assert trial.right(params, old)[sure].all()
                assert trial.right(params, old).mean() >= sure.mean()
                escaped.append(np.mean((bare < box.lower) | (bare > box.upper)))
                lost.append(sure.mean() - trial.right(trial.bare(params), old).mean())
    assert np.mean(escaped) > 0.5  # the attack was one
    assert max(lost) > 0.2
    uniform = np.random.default_rng(0).uniform(size=(1000, trial.made.size)).astype("f")
    for task, old, _, sure in promised:  # and so does every network of the box
        low, high = (np.asarray(end) for end in trial.limits(params, task))
        weights = np.clip(low + uniform * (high - low), low, high)
        found = np.asarray(trial.predict(params, weights, old))
        assert (found == np.asarray(old.targets)[None])[:, sure].all()


def test_the_ledger_of_one_network_is_common_to_all_tasks():
    trial = Trial("one network")
    params, key, width = trial.init(jax.random.key(0)), jax.random.key(1), []
    for t in range(toys.T):
        params = trial.close(trial.current(params, t), t)
        where = trial.limits(params, 0)
        width.append(float(jnp.mean(where.upper - where.lower)))
        raw = trial.made.boxes(params["generator"], jnp.array([t]), jnp.ones(1))
        assert np.all(where.lower >= (raw[0] - raw[1])[0] - 1e-6) or t
        params = {**params, "generator": shaken(params["generator"], jax.random.fold_in(key, t), 0.01)}
    again = trial.close(trial.current(params, 0), 0)  # a second pass over a task may only take away
    before, after = trial.limits(params, 0), trial.limits(again, 0)
    assert (after.lower >= before.lower).all()
    assert (after.upper <= before.upper).all()
    width.append(float(jnp.mean(after.upper - after.lower)))
    assert width[0] > width[1] > width[2] > width[3] > 0
    assert np.array_equal(params[LEDGER]["done"], np.ones(toys.T))


def test_a_task_that_is_over_keeps_what_it_was_promised():
    """A second pass over a task neither widens nor narrows its box."""
    trial = Trial("task networks")
    params = trial.close(trial.init(jax.random.key(0)), 1)
    first = jax.device_get(params[LEDGER])
    moved = {**params, "generator": shaken(params["generator"], jax.random.key(1), 1.0)}
    again = jax.device_get(trial.close(moved, 1)[LEDGER])
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert np.isinf(first["lower"][0]).all()
    assert np.isfinite(first["lower"][1]).all()


def test_rows_of_two_tasks_have_no_network():
    """Task networks answer for one task at a time; one network serves all."""
    rows = toys.classes(0)
    mixed = dataclasses.replace(rows, task=rows.task.at[-1].set(1))
    for case, bad in (("task networks", True), ("one network", False)):
        trial = Trial(case)
        params = trial.init(jax.random.key(0))
        assert np.isnan(trial.logits(params, mixed).logits).all() == bad
        assert np.isfinite(trial.logits(params, rows).logits).all()


def test_one_network_is_that_of_the_task_that_is_learned_whatever_rows_say():
    """Else it would be told the task of held-out rows."""
    trial = Trial("one network")
    start, rows, seen = trial.init(jax.random.key(0)), toys.classes(0), []
    centres = np.asarray(toys.quick(trial.made.boxes)(start["generator"], jnp.arange(toys.T), jnp.zeros(toys.T))[0])
    box = toys.quick(lambda params, task: boxes.box(trial.made, params, task))
    for current in range(toys.T):
        params = trial.current(start, current)
        others = [dataclasses.replace(rows, task=jnp.full_like(rows.task, t)) for t in range(toys.T)]
        found = [np.asarray(trial.logits(params, one).logits) for one in others]
        for t in range(toys.T):
            np.testing.assert_array_equal(found[t], found[0])
            np.testing.assert_allclose(trial.point(params, t), centres[current], rtol=1e-6, atol=1e-7)
            low, high = box(params, t)
            assert (low <= centres[current]).all()
            assert (high >= centres[current]).all()
            np.testing.assert_array_equal([low, high], box(params, 0))
        seen.append(found[0])
    assert np.ptp(seen, axis=0).max() > 1e-4  # their networks are three


def test_a_clipped_weight_can_come_back_and_is_not_driven_away():
    x, where = jnp.array([-2.0, -2.0, 0.5, 2.0, 2.0]), Interval(-jnp.ones(5), jnp.ones(5))
    value, back = jax.vjp(lambda x: boxes.inside(x, where), x)
    np.testing.assert_array_equal(value, [-1, -1, 0.5, 1, 1])
    # a step is against the gradient: outside below, only a negative gradient leads back
    np.testing.assert_array_equal(back(jnp.array([-3.0, 3.0, 3.0, -3.0, 3.0]))[0], [-3, 0, 3, 0, 3])


@pytest.mark.parametrize(("end", "centre"), [("lower", -1.4), ("upper", 1.4)])
def test_a_clipped_end_of_a_box_can_come_back_too(end, centre):
    """The loss over a box reaches centre and radius through the ends that the ledger cuts, if a step leads back."""
    where, held = Interval(-jnp.ones(1), jnp.ones(1)), jnp.zeros(1)
    side = -1 if end == "lower" else 1

    def cut(centre, radius):
        return getattr(boxes.around(centre, radius, held, where), end)

    value, back = jax.vjp(cut, jnp.array([centre]), jnp.ones(1))
    np.testing.assert_array_equal(value, [side])
    np.testing.assert_array_equal(back(jnp.array([3.0 * side])), [[3 * side], [3]])  # a step against it leads back
    np.testing.assert_array_equal(back(jnp.array([-3.0 * side])), [[0], [0]])


def test_a_box_holds_its_network_whatever_the_rounding():
    """The point network is computed in another way than the middle of a tight box, and may be an ulp beside it."""
    above = np.float32(1 + 2**-23)
    free = Interval(jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf))
    found = boxes.around(jnp.ones(3), jnp.zeros(3), jnp.array([above, 1, 2 - above]), free)
    np.testing.assert_array_equal(found, [[1, 1, 2 - above], [above, 1, 1]])


def test_boxes_of_weights_nest_whatever_shift_and_scale_are():
    made = toys.boxed("weight_boxes").boxed
    generator, key = made.model.init(jax.random.key(0))["generator"], jax.random.key(1)
    for i in range(20):
        old_low, old_high = generator["centre"] - generator["radius"], generator["centre"] + generator["radius"]
        a, b = jax.random.split(jax.random.fold_in(key, i))
        moved = {
            **generator,
            "shift": jax.random.normal(a, (made.size,)),
            "scale": jax.random.normal(b, (made.size,)) + 2,
        }
        centre, radius = weight_boxes.present(moved)
        rounding = 4e-7 * (jnp.abs(generator["centre"]) + generator["radius"])
        assert (centre - radius >= old_low - rounding).all()
        assert (centre + radius <= old_high + rounding).all()
        assert (radius > 0).all()
        generator = weight_boxes.settled(moved)
        np.testing.assert_array_equal(generator["centre"], centre)
        np.testing.assert_array_equal(generator["radius"], radius)
        inner, rest = weight_boxes.present(generator)
        np.testing.assert_array_equal(inner, centre)
        np.testing.assert_allclose(rest, jax.nn.sigmoid(weight_boxes.FULL) * radius, rtol=1e-6)
    whole = made.model.init(jax.random.key(0))["generator"]
    centre, radius = made.boxes(whole, jnp.zeros(2, jnp.int32), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(radius[1], 0)
    np.testing.assert_array_equal(centre[0], centre[1])
    np.testing.assert_allclose(radius[0], 0.1 / (1 + np.exp(-5.0)), rtol=1e-6)


def test_nothing_is_certain_of_a_class_that_the_network_does_not_have():
    low, high = -jnp.ones((3, 2)), -0.5 * jnp.ones((3, 2))
    rows = toys.classes(0, rows=3)
    rows = dataclasses.replace(rows, targets=jnp.array([7, -1, 2], jnp.int32))
    assert not boxes.certain(Interval(low, high), rows).any()
    sure = Interval(jnp.array([[0.1, -2.0]] * 3), jnp.array([[0.2, 0.0]] * 3))
    assert boxes.certain(sure, dataclasses.replace(rows, targets=jnp.zeros(3, jnp.int32))).all()


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_is_not_there_has_no_network(task):
    made = toys.boxed().boxed
    assert made.tasks == 3
    params = toys.quick(made.model.init)(jax.random.key(0))
    rows = toys.classes(0, rows=2)
    rows = dataclasses.replace(rows, task=jnp.full_like(rows.task, task))
    assert jnp.isnan(made.model.apply(params, rows).logits).all()


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_makes_the_network_of_a_task_once(case):
    """However many batches a domain has: making it may cost more than using it. The scores are those of the model."""
    trial = Trial(case)
    tasks, calls = (0, 2), []

    def boxes_of(generator, which, scales):
        jax.debug.callback(lambda one: calls.append(int(one[0])), which)
        return trial.made.boxes(generator, which, scales)

    watched = trial.made._replace(boxes=boxes_of)
    mesh = meshes.make(devices=jax.devices()[:1])
    domains = {f"task {t}": [toys.classes(10 * t + i, task=t) for i in range(3)] for t in tasks}
    rows = scores.put(domains)
    params = trial.close(trial.init(jax.random.key(0)), jnp.int32(0))
    wanted = scores.domains(trial.made.model, rows, None)(params)
    found = scores.domains(trial.made.model, rows, None, None, program.deployed(mesh, watched))(params)
    jax.effects_barrier()
    shown = int(params[LEDGER]["current"])
    assert sorted(calls) == [shown if trial.made.universal else t for t in tasks]
    assert found.keys() == wanted.keys()
    for part in ("loss", "accuracy"):
        np.testing.assert_allclose(list(found[part].values()), list(wanted[part].values()), rtol=1e-6)
    assert found["classes"].keys() == wanted["classes"].keys()
    beyond = {"none": [toys.classes(0, task=9)]}
    if not trial.made.universal:
        told = scores.domains(trial.made.model, beyond, None, None, program.deployed(mesh, trial.made))(params)
        assert np.isnan(told["loss"]["none"])
