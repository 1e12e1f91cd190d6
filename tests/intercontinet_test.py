"""InterContiNet: the centre moves, then the box contracts, and neither ever leaves the box of the task before."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl.methods import intercontinet
from jaxcl.models import boxed as boxes
from jaxcl.models import weight_boxes
from jaxcl.models.boxed import LEDGER
from jaxcl.models.interval import Interval

STEPS, CONTRACTION = 6, 0.5  # three steps of each phase


@functools.cache
def method(**options):
    setting = toys.boxed("weight_boxes", tx=optax.adamw(0.05, weight_decay=0.1), radius=0.2)
    made = intercontinet.make(setting, **{"steps": STEPS, "contraction": CONTRACTION} | options)
    return setting.boxed, made, toys.quick(made.step), toys.quick(made.end_task)


def begin(**options):
    boxed, made, _, _ = method(**options)
    return made.init(boxed.model.init(jax.random.key(0)))


def walk(state, task, steps=STEPS, **options):
    """Returns the states of the steps of a task, the first included."""
    states, told = [state], []
    for i in range(steps):
        state, metrics = method(**options)[2](states[-1], toys.classes(i, task=task), jax.random.key(i))
        states.append(state)
        told.append(metrics)
    return states, told


@functools.cache
def first():
    return walk(begin(), 0)


def moved(before, after):
    return {
        name: bool(np.any(before.params["generator"][name] != after.params["generator"][name]))
        for name in ("centre", "radius", "shift", "scale")
    }


def test_each_phase_moves_its_own_part_alone():
    """Also with the moments of the other phase and weight decay at hand."""
    states, _ = first()
    for i in range(STEPS):
        shifting = i < STEPS / 2
        # the certified accuracy of a box that wide is below nine tenths of the accuracy, so that it contracts
        want = {"centre": False, "radius": False, "shift": shifting, "scale": not shifting}
        assert moved(states[i], states[i + 1]) == want


def test_contraction_stops_at_the_threshold():
    states, told = walk(begin(threshold=0.0), 0, threshold=0.0)
    assert not any(any(moved(a, b).values()) for a, b in itertools.pairwise(states[3:]))
    assert told[-1]["right"] >= 0
    for right, robust in ((1.0, 1.0), (0.5, 0.6)):  # of the accuracy: 0.9 robust + 0.1 r >= 0.9 (0.9 right + 0.1 a)
        memory = {"age": jnp.int32(4), "right": jnp.float32(right), "robust": jnp.float32(robust)}
        held = dataclasses.replace(first()[0][4], memory=memory)
        after = method()[2](held, toys.classes(0), jax.random.key(0))[0]
        assert not any(moved(held, after).values())


def test_losses_and_running_means():
    states, told = first()
    boxed = method()[0]
    for i, metrics in enumerate(told):
        rows, params = toys.classes(i), states[i].params
        centre, radius = weight_boxes.present(params["generator"])
        bound = boxes.logits(boxed, params, Interval(centre - radius, centre + radius), rows)
        output = boxed.target.apply(boxed.network(params, centre), rows)
        shown = output.logits if i < STEPS / 2 else boxes.worst(bound, rows)
        cost = optax.softmax_cross_entropy_with_integer_labels(shown, rows.targets).mean()
        np.testing.assert_allclose(metrics["loss"], cost, rtol=1e-4)
        np.testing.assert_allclose(metrics["right"], np.mean(output.logits.argmax(-1) == rows.targets))
        np.testing.assert_allclose(metrics["robust"], np.mean(boxes.certain(bound, rows)))
        before = states[i].memory if i else metrics
        for name in ("right", "robust"):
            want = 0.9 * before[name] + 0.1 * metrics[name]
            np.testing.assert_allclose(states[i + 1].memory[name], want, rtol=1e-5, atol=1e-7)


def test_running_means_begin_anew_with_every_task():
    state = method()[3](first()[0][-1], toys.stack([toys.classes(0)] * 2), jax.random.key(0))
    (_, after), (told,) = walk(state, 1, steps=1)
    for name in ("right", "robust"):
        assert after.memory[name] == told[name]
    assert abs(state.memory["right"] - told["right"]) > 0.01


@pytest.mark.parametrize("project", [True, False])
def test_boxes_nest_over_tasks(project):
    """By construction; with the ledger, bit for bit."""
    boxed, _, _, end_task = method(project=project)
    state, sizes = begin(project=project), []
    old = state.params["generator"]
    for t in range(toys.T):
        low, high = old["centre"] - old["radius"], old["centre"] + old["radius"]
        states, _ = walk(state, t, project=project)
        for one in states:
            centre, radius = weight_boxes.present(one.params["generator"])
            rounding = 4e-7 * (jnp.abs(old["centre"]) + old["radius"])
            assert (centre - radius >= low - rounding).all()
            assert (centre + radius <= high + rounding).all()
            held = boxes.point(boxed, one.params, jnp.int32(t))
            np.testing.assert_allclose(held, centre, rtol=1e-6, atol=1e-6)
        before = states[-1].params
        state = end_task(states[-1], toys.stack([toys.classes(0, task=t)] * 2), jax.random.key(0))
        old = state.params["generator"]
        centre, radius = weight_boxes.present(before["generator"])
        np.testing.assert_allclose(old["centre"], centre, rtol=1e-6, atol=1e-7)  # the box is kept
        np.testing.assert_allclose(old["radius"], radius, rtol=1e-6, atol=1e-7)
        assert not np.any(old["shift"])
        assert state.memory["age"] == 0
        sizes.append(float(radius.mean()))
        ledger, was = state.params[LEDGER], before[LEDGER]
        assert np.isfinite(ledger["lower"]).all() == project
        assert (ledger["lower"] >= was["lower"]).all()
        assert (ledger["upper"] <= was["upper"]).all()
        assert ledger["done"].tolist() == [1.0] * (t + 1) + [0.0] * (toys.T - 1 - t)
    assert 0.2 > sizes[0] > sizes[1] > sizes[2] > 0
