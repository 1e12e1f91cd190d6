"""HyperInterval step by step: schedules, worst cases, what is pulled to where, and what must not move."""

import dataclasses
import functools

import boxed_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl.methods import hyperinterval
from jaxcl.models import boxed as boxes
from jaxcl.models.boxed import LEDGER
from jaxcl.models.interval import Interval

UNIVERSAL = [False, True]
STEPS, BETA, GAMMA = 4, 0.3, 0.5
SCHEDULE = optax.linear_schedule(0.05, 0.01, 50)
OPTIONS = hyperinterval.Options(
    steps=8, beta=0.0, kappa=0.5, ramp=0.5, schedule="smooth", average="once", point="centre", sample=None,
    lookahead=False, project=True, spread=0.0, cap=1.0, ease=1.0, fresh=True, select=0, aside=0.1,
)  # fmt: skip


class Run:
    """A method on the toy, compiled."""

    def __init__(self, universal, tx=None, gamma=GAMMA, **options):
        self.tx = tx or optax.adamw(SCHEDULE, weight_decay=0.1)
        self.setting = toys.boxed(tx=self.tx, universal=universal, gamma=gamma)
        self.made = self.setting.boxed
        self.method = hyperinterval.make(self.setting, **{"steps": STEPS, "beta": BETA} | options)
        self.step, self.end_task = toys.quick(self.method.step), toys.quick(self.method.end_task)

    def begin(self, seed=0):
        return self.method.init(toys.quick(self.made.model.init)(jax.random.key(seed)))

    def task(self, state, t, steps=2):
        """Learns and closes a task."""
        for i in range(steps):
            state, _ = self.step(state, toys.classes(i, task=t), jax.random.key(i))
        return self.end_task(state, toys.stack([toys.classes(0, task=t)] * 2), jax.random.key(9))


@functools.cache
def learned(universal):
    """Returns a run without fresh moments, and its states after none, one, two and three tasks."""
    run = Run(universal, fresh=False)
    states = [run.begin()]
    for t in range(toys.T):
        states.append(run.task(states[-1], t))
    return run, states


def at(state, age, **params):
    """Returns the state at a step of a task, with parts of its parameters replaced."""
    memory = {**state.memory, "age": jnp.int32(age)}
    return dataclasses.replace(state, params={**state.params, **params}, memory=memory)


def cross_entropy(logits, targets):
    shifted = logits - logits.max(-1, keepdims=True)
    own = shifted[..., np.arange(len(targets)), np.asarray(targets)]
    return (np.log(np.exp(shifted).sum(-1)) - own).mean(-1)


def test_schedules():
    def told(i, **options):
        return [float(x) for x in hyperinterval.rates(OPTIONS._replace(**options), jnp.int32(i))]

    half = (1 - np.cos(np.pi / 4)) / 2
    for i, gamma in ((0, 0), (1, half), (2, 0.5), (3, 1 - half), (4, 1), (7, 1), (100, 1)):
        assert told(i) == pytest.approx([gamma, 1 - 0.5 * gamma], abs=1e-6)
        assert told(i, kappa=1.0) == pytest.approx([gamma, 1])
    assert told(1, ramp=0.25) == pytest.approx([0.5, 0.75])
    assert told(1, ramp=0.0) == pytest.approx([1, 0.5])
    long = {"schedule": "published", "steps": 2000}
    assert told(0, **long) == [0, 1]
    assert told(500, **long) == pytest.approx([500 / 999, 0.975])
    assert told(999, **long) == pytest.approx([1, 0.95005])
    assert told(1000, **long) == told(1999, **long) == [1, 0.5]  # the jump
    assert told(15_000, **long | {"steps": 40_000})[1] == 0.5  # never below kappa


def test_drift_by_hand():
    rng = np.random.default_rng(0)
    centre, radius, c, r = rng.normal(size=(4, 3, 7)).astype("f")
    targets, which, counted = {"centre": c, "radius": r}, jnp.array([2, 0, 1]), jnp.array([1.0, 0.0, 1.0])
    targets = jax.tree.map(jnp.asarray, targets)
    for universal in UNIVERSAL:
        ends = [(-1, 1 / 3), (0, 1 / 3), (1, 1 / 3)] if universal else [(0, 1.0)]
        want = sum(
            share * np.sum((centre[i] + side * radius[i] - c[k] - side * r[k]) ** 2.0)
            for i, k in ((0, 2), (2, 1))
            for side, share in ends
        )
        got = hyperinterval.drift(centre, radius, targets, which, counted, universal)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        turned = jnp.array([2, 1, 0])
        again = hyperinterval.drift(centre[turned], radius[turned], targets, which[turned], counted[turned], universal)
        np.testing.assert_allclose(again, want, rtol=1e-5)
        slopes = jax.grad(hyperinterval.drift, (0, 1))(c[which], r[which], targets, which, counted, universal)
        assert not hyperinterval.drift(c[which], r[which], targets, which, counted, universal)
        assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_boxes_without_radius_are_trained_like_points(universal):
    """At the start of a task by gamma_i = 0, and at its end by gamma = 0: loss and gradient of the plain network."""
    run = Run(universal, tx=optax.sgd(1.0), gamma=0.0, beta=0.0)
    state, rows = run.begin(), toys.classes(3, task=1)

    def plain(generator):
        return toys.cross_entropy(run.made.model.apply({**state.params, "generator": generator}, rows), rows)

    first = {**state.params[LEDGER], "current": jnp.float32(1)}
    state = at(state, 0, **{LEDGER: first})
    (total, weight), grads = toys.quick(lambda g: (plain(g), jax.grad(lambda g: plain(g)[0] / jnp.float32(toys.B))(g)))(
        state.params["generator"]
    )
    for age in (0, STEPS):
        new, told = run.step(at(state, age), rows, jax.random.key(0))
        assert told["scale"] == (age > 0)
        np.testing.assert_allclose(told["loss"], total / weight, rtol=1e-6 if age else 3e-7)
        moved = jax.tree.map(lambda a, b: a - b, state.params["generator"], new.params["generator"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), moved, grads)
    assert np.abs(grads["embedding"]["centre"][1]).max() > 0 or universal  # with gamma 0 one embedding is at 0


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_worst_logits_of_a_point_are_its_logits(universal):
    """Bit for bit at gamma_i = 0; up to rounding where the box has no size but is computed as one."""
    run, states = learned(universal)
    rows = toys.classes(3, task=1)

    @toys.quick
    def both(params):
        held = boxes.point(run.made, params, rows.task[0])
        output = run.made.target.apply(run.made.network(params, held), rows)
        found = [
            hyperinterval._worst(run.made, params, Interval(held, held), output, rows, jnp.float32(gamma))
            for gamma in (0, 1)
        ]
        return output.logits, *found

    plain, exact, close = both(states[2].params)
    np.testing.assert_array_equal(exact, plain)
    np.testing.assert_allclose(close, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_the_worst_case_is_no_better_than_any_network_of_the_box(universal):
    run, states = learned(universal)
    state, rows = at(states[0], STEPS), toys.classes(4, task=0)
    told = run.step(state, rows, jax.random.key(0))[1]
    generator, inputs = oracle.wide(state.params["generator"]), np.asarray(rows.inputs, np.float64)
    centre, radius = oracle.embedded(generator, 0, GAMMA, universal)

    def costs(vectors):
        return cross_entropy(np.stack([oracle.logits(v, inputs, (4, 8, 4)) for v in vectors]), rows.targets)

    own = costs([oracle.point(generator, centre)])[0]
    assert told["kappa"] == 0.5
    worst = 2 * float(told["loss"]) - own
    sampled = costs(oracle.point(generator, oracle.sampled(np.random.default_rng(0), centre, radius, 200)))
    assert own < sampled.max() <= worst
    kappa = Run(universal, kappa=1.0, beta=0.0)
    alone = kappa.step(at(kappa.begin(), STEPS), rows, jax.random.key(0))[1]
    np.testing.assert_allclose(alone["loss"], own, rtol=1e-5)
    assert worst > own * 1.01
    # What is trained is what is deployed: the network that the ledger clips.
    closed = at(states[1], STEPS)
    moved = jax.tree.map(lambda w: w + 0.2 * jnp.sign(w), closed.params["generator"])
    ledger = {**closed.params[LEDGER], "current": jnp.float32(0)}
    params = {**closed.params, "generator": moved, LEDGER: ledger}
    clipped = dataclasses.replace(closed, params=params, memory={"age": jnp.int32(STEPS)})
    told = kappa.step(clipped, rows, jax.random.key(0))[1]
    total, weight = toys.cross_entropy(run.made.model.apply(params, rows), rows)
    np.testing.assert_allclose(told["loss"], total / weight, rtol=1e-5)
    # And the worst case is that of the box that the ledger clips.
    half = Run(universal, kappa=0.5, beta=0.0)
    told = half.step(clipped, rows, jax.random.key(0))[1]

    @toys.quick
    def hardest(params):
        found = boxes.box(run.made, params, rows.task[0])
        return boxes.worst(boxes.logits(run.made, params, found, rows), rows)

    bad = cross_entropy(np.asarray(hardest(params), np.float64), rows.targets)
    np.testing.assert_allclose(told["loss"], 0.5 * total / weight + 0.5 * bad, rtol=1e-5)
    free = {**params, LEDGER: states[0].params[LEDGER]}
    wider = cross_entropy(np.asarray(hardest(free), np.float64), rows.targets)
    assert wider > 1.02 * bad
    bare, _ = toys.cross_entropy(run.made.model.apply(free, rows), rows)
    assert abs(float(bare / total) - 1) > 0.02


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_embeddings_of_other_tasks_do_not_move(universal):
    """Not by weight decay, and not by the moments of their own time, which this run keeps."""
    _, states = learned(universal)
    for t in range(toys.T):
        old, new = (states[t + i].params["generator"]["embedding"] for i in range(2))
        for part, before in old.items():
            others = [k for k in range(toys.T) if k != t]
            np.testing.assert_array_equal(new[part][jnp.array(others)], before[jnp.array(others)])
            assert np.any(new[part][t] != before[t])
    moments = next(s for s in jax.tree.leaves(states[2].opt_state, is_leaf=is_adam) if is_adam(s))
    assert np.any(moments.mu["embedding"]["centre"][0])  # they would have


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_drift_is_nothing_at_the_start_of_a_task_and_the_mean_over_earlier_tasks_later(universal):
    run, states = learned(universal)
    rows = toys.classes(7, task=2)
    told = run.step(states[2], rows, jax.random.key(0))[1]
    assert told["drift"] < 1e-9
    assert told["loss"] > 0.01
    moved = {**states[2].params["generator"]}
    moved["head"] = jax.tree.map(lambda w: w + 0.1 * jnp.sign(w), moved["head"])
    told = run.step(at(states[2], 1, generator=moved), rows, jax.random.key(0))[1]
    twice = Run(universal, average="twice")
    less = twice.step(at(states[2], 1, generator=moved), rows, jax.random.key(0))[1]
    want = pulled(states[2], moved, [0, 1], universal)
    np.testing.assert_allclose(told["drift"], BETA * want / 2, rtol=1e-4)
    np.testing.assert_allclose(less["drift"], BETA * want / 4, rtol=1e-4)


@pytest.mark.parametrize("universal", UNIVERSAL)
def test_a_task_that_is_learned_again_is_not_pulled_to_itself(universal):
    run, states = learned(universal)
    moved = {**states[3].params["generator"]}
    moved["head"] = jax.tree.map(lambda w: w + 0.1 * jnp.sign(w), moved["head"])
    told = run.step(at(states[3], 1, generator=moved), toys.classes(7, task=0), jax.random.key(0))[1]
    np.testing.assert_allclose(told["drift"], BETA * pulled(states[3], moved, [1, 2], universal) / 2, rtol=1e-4)


def pulled(state, generator, tasks, universal):
    """Returns the sum over tasks of |H_k - H_k*|^2, in float64."""
    found, wide = 0.0, oracle.wide(generator)
    for k in tasks:
        low, high = oracle.box(wide, *oracle.embedded(wide, k, GAMMA, universal))
        c, r = (np.asarray(state.memory["targets"][part][k], np.float64) for part in ("centre", "radius"))
        ends = (low - (c - r), (low + high) / 2 - c, high - (c + r)) if universal else [(low + high) / 2 - c]
        found += sum(np.sum(end**2) for end in ends) / len(ends)
    return found


def test_a_task_in_one_scan_is_a_task_step_by_step():
    run, states = learned(True)
    batches = toys.stack([toys.classes(i, task=1) for i in range(STEPS)])
    keys = jax.random.split(jax.random.key(0), STEPS)
    whole, told = jax.jit(lambda s: jax.lax.scan(lambda s, x: run.method.step(s, *x), s, (batches, keys)))(states[1])
    state, step, losses = states[1], jax.jit(run.method.step), []
    for i in range(STEPS):
        state, metrics = step(state, jax.tree.map(lambda x, i=i: x[i], batches), keys[i])
        losses.append(metrics["loss"])
    np.testing.assert_allclose(told["loss"], np.stack(losses), rtol=1e-6)
    assert len(set(np.asarray(told["scale"]).tolist())) == 3  # gamma_i was traced
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, state)


def test_looking_ahead_is_two_steps():
    """The first is that of all losses but R, with what the optimiser remembers; other embeddings stay in it, too."""
    lr = 0.2
    tx, rows = optax.sgd(lr, momentum=0.9), toys.classes(7, task=2)
    ahead, alone = (Run(False, tx=tx, spread=0.5, **options) for options in ({"lookahead": True}, {"beta": 0.0}))
    _, states = learned(False)
    noisy = jax.tree.map(lambda w: w + 0.05 * jnp.cos(100 * w), states[2].params["generator"])
    before = jax.tree.map(jnp.zeros_like, noisy)
    before |= {part: jax.tree.map(lambda w: 0.2 * jnp.sin(90 * w), noisy[part]) for part in ("head", "embedding")}
    warm = tx.update(before, tx.init(noisy), noisy)[1]
    state = dataclasses.replace(at(states[2], 2, generator=noisy), opt_state=warm)
    bare = dataclasses.replace(state, memory={"age": state.memory["age"]})
    stepped, first = alone.step(bare, rows, jax.random.key(0))
    stepped = stepped.params["generator"]

    def pull(generator):
        centre, _ = ahead.made.boxes(generator, jnp.arange(2), jnp.ones(2))
        return BETA / 2 * jnp.sum(jnp.square(centre - state.memory["targets"]["centre"][:2]))

    slope = toys.quick(jax.grad(pull))(stepped)
    want = jax.tree.map(lambda p, g: p - lr * g, stepped, slope)
    for part in want["embedding"]:
        want["embedding"][part] = stepped["embedding"][part]  # those of other tasks
    found, told = ahead.step(state, rows, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.params["generator"], want)
    np.testing.assert_allclose(told["drift"], pull(stepped), rtol=1e-5)
    np.testing.assert_allclose(told["spread"], first["spread"], rtol=1e-6)
    assert abs(float(pull(noisy)) / float(told["drift"]) - 1) > 1e-3


def test_a_sample_of_the_earlier_tasks_stands_for_all():
    run, states = learned(False)
    rows = toys.classes(7, task=2)
    noisy = jax.tree.map(lambda w: w + 0.05 * jnp.cos(100 * w), states[2].params["generator"])
    state = at(states[2], 2, generator=noisy)
    some = Run(False, sample=1)
    full = float(run.step(state, rows, jax.random.key(0))[1]["drift"])
    keys = jax.random.split(jax.random.key(1), 400)
    drawn = jax.jit(jax.vmap(lambda k: some.method.step(state, rows, k)[1]["drift"]))(keys)
    kinds, counts = np.unique(np.round(np.asarray(drawn) / full, 4), return_counts=True)
    assert len(kinds) == 2  # one of the two tasks at a time
    np.testing.assert_allclose(kinds.mean(), 1, rtol=1e-3)
    assert counts.min() > 150


def test_a_sample_of_more_tasks_than_there_are_is_all_of_them():
    """Each counts once, however many are asked for."""
    for before, sample in (
        ([1, 1, 0, 0], 3),
        ([1, 1, 1, 0], 9),
        ([1, 0, 0, 0], 2),
    ):
        done, task = np.array(before) > 0, jnp.int32(sum(before))
        which, counted = hyperinterval._chosen(jnp.asarray(done), task, sample, jax.random.key(0))
        told = np.zeros(4)
        np.add.at(told, np.asarray(which), np.asarray(counted))
        np.testing.assert_array_equal(told, done)
        assert len(set(np.asarray(which).tolist())) == len(which)


@pytest.mark.parametrize("fresh", [True, False])
def test_moments_start_anew_and_the_schedule_goes_on(fresh):
    run = Run(False, fresh=fresh, beta=0.0)
    state = run.begin()
    for i in range(2):
        state, _ = run.step(state, toys.classes(i), jax.random.key(i))
    closed = run.end_task(state, toys.stack([toys.classes(0)] * 2), jax.random.key(9))
    adam = next(s for s in jax.tree.leaves(closed.opt_state, is_leaf=is_adam) if is_adam(s))
    for moments in (adam.mu, adam.nu):
        assert any(np.any(x) for x in jax.tree.leaves(moments)) != fresh
    assert adam.count == (0 if fresh else 2)
    assert [int(s.count) for s in closed.opt_state if isinstance(s, optax.ScaleByScheduleState)] == [2]
    assert closed.memory["age"] == 0


def test_a_task_begins_where_the_task_before_is():
    """The universal embedding, in its first step alone, and not if the task is over."""
    for universal in UNIVERSAL:
        run, states = learned(universal)
        params, made = states[1].params, run.made
        old = params["generator"]["embedding"]["centre"]
        for first in (True, False):
            new = hyperinterval.started(made, params, jnp.int32(1), jnp.array(first))
            same = 0 if universal and first else 1
            np.testing.assert_array_equal(new["generator"]["embedding"]["centre"][1], old[same])
            np.testing.assert_array_equal(new["generator"]["embedding"]["centre"][2], old[2])
            assert new[LEDGER]["current"] == 1
        again = hyperinterval.started(made, params, jnp.int32(0), jnp.array(True))
        np.testing.assert_array_equal(again["generator"]["embedding"]["centre"], old)
        back = hyperinterval.started(made, states[2].params, jnp.int32(0), jnp.array(True))  # from the second task
        want = states[2].params["generator"]["embedding"]["centre"]
        np.testing.assert_array_equal(back["generator"]["embedding"]["centre"], want)
        if universal:  # its first box is that of the task before, inside the ledger
            ledger = states[1].params[LEDGER]
            begun = hyperinterval.started(made, params, jnp.int32(1), jnp.array(True))
            centre, _ = made.boxes(begun["generator"], jnp.array([1]), jnp.zeros(1))
            assert (centre[0] >= ledger["lower"][0] - 1e-6).all()
            assert (centre[0] <= ledger["upper"][0] + 1e-6).all()


def test_without_projection_nothing_is_promised():
    run = Run(True, project=False, beta=0.0)
    state = run.task(run.begin(), 0)
    assert np.isinf(state.params[LEDGER]["lower"]).all()
    assert state.params[LEDGER]["done"].tolist() == [1, 0, 0]


def test_wide_boxes_earn_up_to_a_cap():
    box = Interval(jnp.array([0.0, 0.0, -1.0]), jnp.array([0.2, 1.0, 9.0]))
    want = np.mean(np.log(np.array([0.1, 0.5, 2.0]) + 1e-6))
    np.testing.assert_allclose(hyperinterval.width(box, 2.0), want, rtol=1e-6)


def test_what_wide_boxes_earn_changes_from_task_to_task():
    """By `ease` with every task that is over; the box is that of the ledger."""
    run, (_, states) = Run(True, spread=2.0, ease=0.5, cap=0.3), learned(True)
    for k in range(toys.T):
        told = run.step(at(states[k], STEPS), toys.classes(3, task=k), jax.random.key(0))[1]
        ledger = {**states[k].params[LEDGER], "current": jnp.float32(k)}
        box = boxes.box(run.made, {**states[k].params, LEDGER: ledger}, jnp.int32(k))
        radius = np.minimum((np.asarray(box.upper) - np.asarray(box.lower)) / 2, 0.3)
        np.testing.assert_allclose(told["spread"], -2.0 * 0.5**k * np.mean(np.log(radius + 1e-6)), rtol=1e-4)


def test_what_is_selected_by_is_the_box_inside_the_ledger():
    """One network, whose first task was promised a box much smaller than that of the second."""
    run, states = learned(True)
    params, task = states[1].params, jnp.int32(1)
    ledger = {**params[LEDGER], "current": jnp.float32(1)}
    middle, size = (ledger["upper"] + ledger["lower"]) / 2, (ledger["upper"] - ledger["lower"]) / 2
    params = {**params, LEDGER: ledger | {"lower": middle - 0.05 * size, "upper": middle + 0.05 * size}}
    rows = toys.classes(3, rows=64, task=1)
    rows = dataclasses.replace(rows, targets=run.made.model.apply(params, rows).logits.argmax(-1).astype(jnp.int32))

    @toys.quick
    def shares(params):
        free = {**params, LEDGER: {**params[LEDGER], "lower": ledger["lower"] - jnp.inf, "upper": middle + jnp.inf}}
        found = [boxes.box(run.made, one, task, tight=True) for one in (params, free)]
        sure = [jnp.mean(boxes.certain(boxes.logits(run.made, params, one, rows), rows)) for one in found]
        return hyperinterval._certified(run.made, params, task, params["generator"], rows), *sure

    told, inside, raw = shares(params)
    np.testing.assert_allclose(told, inside, rtol=1e-6)
    assert raw < inside - 0.1
