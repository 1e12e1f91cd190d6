"""Model selection: rows held back are never trained on, and a task ends with the generator that certified the most."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import certify, compose, selection
from jaxcl.methods import hyperinterval
from jaxcl.models import boxed as boxes
from jaxcl.models.boxed import LEDGER
from jaxcl.schema import UserError

QUICK = True
STEPS, ASIDE = 12, 0.4


@functools.cache
def method(universal=True, lr=0.05, **options):
    """Returns the boxes, the method, and its step and end, compiled."""
    setting = toys.boxed(tx=optax.sgd(lr), universal=universal, gamma=0.1)
    options = {"steps": STEPS, "beta": 0.1, "ramp": 0.5, "select": 2, "aside": ASIDE} | options
    made = hyperinterval.make(setting, **options)
    return setting.boxed, made, toys.quick(made.step), toys.quick(made.end_task)


def rows(i, task=0):
    return toys.classes(i, task=task, rows=toys.B)


def walk(**options):
    """Returns the states of a task, the first included."""
    boxed, made, step, _ = method(**options)
    states = [made.init(toys.quick(boxed.model.init)(jax.random.key(1)))]
    for i in range(STEPS):
        states.append(step(states[-1], rows(i), jax.random.key(i))[0])
    return states


def test_the_same_rows_are_held_back_wherever_they_are():
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (4000, 7, 5, 1)) * (rng.uniform(size=(4000, 7, 5, 1)) < 0.3) / 255).astype("f")
    whole = toys.points(images, np.zeros(4000, "i"))
    out = {share: np.asarray(selection.aside(whole, share)) for share in (0.0, 0.1, 0.5, 1.0)}
    for share, found in out.items():
        assert abs(found.mean() - share) < 0.03
    assert (out[0.5] >= out[0.1]).all()
    turned = rng.permutation(4000)
    again = dataclasses.replace(whole, inputs=whole.inputs[turned].reshape(4000, -1))
    np.testing.assert_array_equal(selection.aside(again, 0.1), out[0.1][turned])
    one = images[:1].repeat(500, 0)
    one[np.arange(500), np.arange(500) % 7, np.arange(500) % 5, 0] = np.arange(500) / 500  # each differs in a pixel
    near = np.asarray(selection.aside(toys.points(one, np.zeros(500, "i")), 0.5))
    assert abs(near.mean() - 0.5) < 0.1
    words = dataclasses.replace(whole, inputs=jnp.asarray(rng.integers(0, 50, (4000, 9)), jnp.int32))
    assert abs(float(selection.aside(words, 0.3).mean()) - 0.3) < 0.03


def test_rows_held_back_teach_nothing():
    """Their targets may be anything."""
    _, _, step, _ = method()
    state, batch = walk()[STEPS - 1], rows(3)
    out = np.asarray(selection.aside(batch, ASIDE))
    assert 0 < out.sum() < toys.B
    for where, same in ((out, True), (~out, False)):
        other = dataclasses.replace(batch, targets=jnp.where(where, (batch.targets + 1) % 4, batch.targets))
        new, told = (step(state, one, jax.random.key(0)) for one in (batch, other))
        assert (new[1]["loss"] == told[1]["loss"]) == same
        assert float(new[1]["weight"]) == toys.B - out.sum()
        a, b = (jax.tree.leaves(one[0].params) for one in (new, told))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) == same


def score(boxed, state):
    """Returns the certified share of the rows kept in a state, and the box that certifies."""
    kept = state.memory["selection"]["kept"]["rows"]
    box = boxes.box(boxed, state.params, jnp.int32(0), tight=True)
    sure = boxes.certain(boxes.logits(boxed, state.params, box, kept), kept)
    return jnp.sum(kept.weights * sure) / jnp.sum(kept.weights), box


@pytest.mark.parametrize("universal", [False, True])
def test_a_task_ends_with_the_generator_that_certified_most(universal):
    options = {"universal": universal, "lr": 0.6}
    boxed, _, _, end_task = method(**options)
    states = walk(**options)
    kept = states[-1].memory["selection"]["kept"]
    seen = [np.asarray(rows(i).inputs)[np.asarray(selection.aside(rows(i), ASIDE))] for i in range(STEPS)]
    seen = np.concatenate(seen)
    assert kept["seen"] == len(seen)
    np.testing.assert_array_equal(kept["rows"].inputs[: len(seen)], seen)
    assert np.asarray(kept["rows"].weights).sum() == len(seen)
    look = toys.quick(functools.partial(score, boxed))
    found = {i: look(states[i]) for i in range(8, STEPS + 1, 2)}  # at full gamma
    looks = {i: float(one[0]) for i, one in found.items()}
    best = max(looks, key=lambda i: (looks[i], i))
    assert all(s.memory["selection"]["score"] == -1 for s in states[:8])
    np.testing.assert_allclose(states[-1].memory["selection"]["score"], looks[best], rtol=1e-6)
    assert len({round(x, 6) for x in looks.values()}) > 1  # there was something to choose
    assert best < STEPS
    closed = end_task(states[-1], toys.stack([rows(0)] * 2), jax.random.key(0))
    chosen = states[best].params["generator"]
    jax.tree.map(np.testing.assert_array_equal, closed.params["generator"], chosen)
    np.testing.assert_allclose(closed.params[LEDGER]["lower"][0], found[best][1].lower, rtol=1e-5, atol=1e-6)
    targets = boxed.boxes(chosen, jnp.arange(1), jnp.ones(1))  # and later ones are pulled to what was chosen
    for part, target in zip(("centre", "radius"), targets, strict=True):
        np.testing.assert_allclose(closed.memory["targets"][part][:1], target, rtol=1e-5, atol=1e-6)
    memory = closed.memory["selection"]
    assert memory["score"] == -1
    assert memory["kept"]["seen"] == 0
    assert not np.any(memory["kept"]["rows"].weights)


@pytest.mark.parametrize("universal", [False, True])
def test_what_is_selected_by_is_the_certificate_of_affine_forms(universal):
    """Not accuracy, and not interval arithmetic: all three differ here, and the ledger is open."""
    made = toys.boxed(universal=universal, gamma=0.3).boxed
    params, batch = toys.quick(made.model.init)(jax.random.key(1)), toys.classes(0, rows=256)
    labels = toys.quick(made.model.apply)(params, batch).logits.argmax(-1).astype(jnp.int32)
    batch = dataclasses.replace(batch, targets=labels)
    share = toys.quick(functools.partial(hyperinterval._certified, made))
    found = share(params, jnp.int32(0), params["generator"], batch)
    told = certify.make(made, {"task": [batch]})(params)["certificate"]["task"]
    assert 0 < told["interval"] < told["affine"] < told["deployed"] == 1
    np.testing.assert_allclose(found, told["affine"], atol=1e-6)


def test_a_task_that_never_had_its_full_box_ends_with_what_it_has():
    _, _, step, end_task = method()
    states = walk()
    short = end_task(states[4], toys.stack([rows(0)] * 2), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, short.params["generator"], states[4].params["generator"])
    again = step(short, rows(0), jax.random.key(0))[0]  # and the next task starts from there
    assert again.memory["selection"]["score"] == -1


def test_equal_scores_take_the_later_and_the_state_keeps_its_shape():
    memory = selection.start(toys.classes(0), {"w": jnp.zeros(2)}, 4)
    for value, grade, kept in ((1.0, 0.5, 1.0), (2.0, 0.5, 2.0), (3.0, 0.4, 2.0), (4.0, 0.6, 4.0)):
        params = {"w": jnp.full(2, value)}
        memory = selection.looked(memory, params, jnp.bool_(True), lambda p, r, grade=grade: jnp.float32(grade))
        assert memory["best"]["w"][0] == kept
        skipped = selection.looked(memory, {"w": jnp.ones(2)}, jnp.bool_(False), lambda p, r: jnp.float32(9))
        assert skipped["best"]["w"][0] == kept
    boxed, made, _, _ = method()
    state = jax.eval_shape(lambda: made.init(boxed.model.init(jax.random.key(0))))
    for new in (
        jax.eval_shape(made.step, state, toys.shapes(rows(0)), jax.random.key(0))[0],
        jax.eval_shape(made.end_task, state, toys.shapes(toys.stack([rows(0)])), jax.random.key(0)),
    ):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("select=-1", r"select=-1: must be a number of steps, or 0 for none"),
        ("select=5, aside=0.0", r"aside=0\.0: must lie between 0 and 1; it is a share of the rows"),
        ("select=5, aside=1.0", r"aside=1\.0: must lie between 0 and 1; it is a share of the rows"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=rf"^config\.method hyperinterval\.{words}$"):
        compose.make(f"hyperinterval({options})", toys.boxed())
