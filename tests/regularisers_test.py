"""Penalties and distillation against closed forms: L2, EWC, SI, LwF."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose
from jaxcl.methods import ewc, l2, lwf
from jaxcl.types import Model, Output

RNG = np.random.default_rng(0)


def key(i):
    return jax.random.key(i)


def regression(tx=None):
    example = toys.points(np.zeros((4, 3), "f"), np.zeros(4, "f"))
    return toys.setting(model=toys.linear(3), tx=tx or optax.sgd(0.1), example=example, loss=toys.squared)


def rows(x, y, task=0):
    return toys.points(np.asarray(x, "f"), np.asarray(y, "f"), task)


def unigram(classes=5):
    """Logits are the parameters, so that the Fisher matrix is known."""

    def apply(params, batch, cache=None):
        return Output(jnp.broadcast_to(params["b"], (batch.inputs.shape[0], classes)))

    return Model(lambda k: {"b": jnp.linspace(-1.0, 1.0, classes)}, apply, {"b": (None,)})


def test_l2_pulls_to_where_it_began_and_then_to_the_last_task():
    lr, strength = 0.1, 0.5
    method = compose.make(f"l2(strength={strength})", regression(optax.sgd(lr)))
    step, start = toys.quick(method.step), np.array([1.0, -1.0, 0.5])
    state, w, anchor = method.init({"w": jnp.asarray(start, jnp.float32)}), start, start
    for i in range(6):
        x, y = RNG.normal(size=(4, 3)), RNG.normal(size=4)
        state, metrics = step(state, rows(x, y), key(i))
        np.testing.assert_allclose(metrics["l2"], strength / 2 * np.sum((w - anchor) ** 2), rtol=1e-5, atol=1e-9)
        w = w - lr * x.T @ (x @ w - y) / 4 - lr * strength * (w - anchor)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        if i == 2:
            state, anchor = method.end_task(state, toys.stack([rows(x, y)]), key(i)), w
    fixed = compose.make("l2(anchor='init')", regression())
    begun = fixed.init({"w": jnp.ones(3)})
    moved = dataclasses.replace(begun, params={"w": jnp.zeros(3)})
    np.testing.assert_array_equal(
        fixed.end_task(moved, toys.stack([rows(x, y)]), key(0)).memory["l2"]["anchor"]["w"], 1
    )


def test_ewc_with_unit_importance_is_l2():
    params, anchor = ({"w": jnp.asarray(RNG.normal(size=7), jnp.float32)} for _ in range(2))
    elastic, even = ewc.make(regression(), strength=0.3), l2.make(regression(), strength=0.3)
    output = Output(jnp.zeros(1))
    first = elastic.loss({"fisher": {"w": jnp.ones(7)}, "anchor": anchor}, params, output, None)
    second = even.loss({"anchor": anchor}, params, output, None)
    np.testing.assert_array_equal(first, second)
    assert float(first[0]) > 0


def test_online_fisher_is_the_decayed_sum_over_tasks():
    """Linear regression: the gradient of one row is x (x w - y), so each Fisher is a mean of squares of those."""
    strength, decay, lr = 2.0, 0.5, 0.05
    method = compose.make(f"ewc(strength={strength}, decay={decay}, chunk=2)", regression(optax.sgd(lr)))
    step, end_task = toys.quick(method.step), toys.quick(method.end_task)
    w = np.array([0.3, 0.2, -0.4])
    state, fisher, anchor = method.init({"w": jnp.asarray(w, jnp.float32)}), np.zeros(3), w
    for task in range(3):
        for i in range(2):
            x, y = RNG.normal(size=(4, 3)), RNG.normal(size=4)
            state, metrics = step(state, rows(x, y), key(i))
            expected = strength / 2 * np.sum(fisher * (w - anchor) ** 2)
            np.testing.assert_allclose(metrics["ewc"], expected, rtol=1e-4, atol=1e-9)
            w = w - lr * (x.T @ (x @ w - y) / 4 + strength * fisher * (w - anchor))
            np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        x, y = RNG.normal(size=(2, 4, 3)), RNG.normal(size=(2, 4))
        state = end_task(state, toys.stack([rows(*pair) for pair in zip(x, y, strict=True)]), key(task))
        each = (x.reshape(8, 3) * (x @ w - y).reshape(8, 1)) ** 2
        fisher, anchor = each.mean(0) + decay * fisher, w
        np.testing.assert_allclose(state.memory["ewc"]["fisher"]["w"], fisher, rtol=1e-4)
        batch_squared = ((x.reshape(8, 3) * (x @ w - y).reshape(8, 1)).mean(0)) ** 2
        assert np.all(np.abs(batch_squared / each.mean(0) - 1) > 0.1)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_labels_behind_the_fisher(labels):
    """One softmax: with labels from the model F = p (1 - p); with those of the data the mean of (p - 1[y])^2."""
    size, count = 500, 16
    example = toys.points(np.zeros((size, 1), "f"), np.full(size, 4, "i4"))
    made = toys.setting(model=unigram(), example=example)
    part = ewc.make(made, labels=labels, chunk=100)
    params = unigram().init(key(0))
    ended = toys.quick(part.end_task)(part.init(params), params, toys.stack([example] * count), key(1))
    p = np.asarray(jax.nn.softmax(params["b"]), "d")
    expected = p * (1 - p) if labels == "model" else (p - np.eye(5)[4]) ** 2
    tolerance = 5 / np.sqrt(size * count) if labels == "model" else 1e-5
    np.testing.assert_allclose(ended["fisher"]["b"], expected, rtol=0, atol=tolerance * expected.max() + 1e-7)
    assert part.init(params)["fisher"]["b"].sum() == 0


def test_si_is_its_transcription():
    strength, damping, lr = 0.7, 0.05, 0.05
    method = compose.make(f"si(strength={strength}, damping={damping})", regression(optax.sgd(lr, momentum=0.5)))
    step, end_task = toys.quick(method.step), toys.quick(method.end_task)
    w = np.array([0.3, 0.2, -0.4])
    state = method.init({"w": jnp.asarray(w, jnp.float32)})
    importance, path, anchor, velocity = np.zeros(3), np.zeros(3), w, np.zeros(3)
    for _ in range(3):
        for i in range(4):
            x, y = RNG.normal(size=(4, 3)), RNG.normal(size=4)
            state, _ = step(state, rows(x, y), key(i))
            g = x.T @ (x @ w - y) / 4
            velocity = 0.5 * velocity + g + 2 * strength * importance * (w - anchor)
            path, w = path - g * (-lr * velocity), w - lr * velocity
            np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
            np.testing.assert_allclose(state.memory["si"]["path"]["w"], path, rtol=1e-3, atol=1e-6)
        state = end_task(state, toys.stack([rows(x, y)]), key(0))
        importance = importance + np.maximum(path, 0) / ((w - anchor) ** 2 + damping)
        path, anchor = np.zeros(3), w
        np.testing.assert_allclose(state.memory["si"]["importance"]["w"], importance, rtol=1e-3, atol=1e-6)
    assert importance.max() > 0


def test_the_path_of_small_steps_adds_up_to_the_fall_of_the_loss():
    method = compose.make("si(strength=0.0)", regression(optax.sgd(1e-3)))
    x, y, w = RNG.normal(size=(4, 3)), RNG.normal(size=4), np.array([1.0, -2.0, 0.5])
    batch, step = rows(x, y), toys.quick(method.step)
    state = method.init({"w": jnp.asarray(w, jnp.float32)})
    losses = []
    for i in range(200):
        state, metrics = step(state, batch, key(i))
        losses.append(float(metrics["loss"]))
    final = 0.5 * np.mean((x @ np.asarray(state.params["w"], "d") - y) ** 2)
    np.testing.assert_allclose(np.sum(state.memory["si"]["path"]["w"]), losses[0] - final, rtol=0.01)


def test_lwf_is_off_during_the_first_task_and_then_the_divergence():
    temperature, strength = 2.0, 0.5
    method = compose.make(f"lwf(strength={strength}, temperature={temperature})", toys.setting(tx=optax.sgd(0.5)))
    plain = compose.make("cpt", toys.setting(tx=optax.sgd(0.5)))
    params = toys.language_model().init(key(3))
    state, base = method.init(params), plain.init(params)
    step, base_step = toys.quick(method.step), toys.quick(plain.step)
    weights = RNG.uniform(0, 1, (toys.B, toys.L))
    for i in range(2):
        state, metrics = step(state, toys.text(i, weights=weights), key(i))
        base, _ = base_step(base, toys.text(i, weights=weights), key(i))
        assert float(metrics["lwf"]) == 0.0
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(base.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    state = method.end_task(state, toys.stack([toys.text(0)]), key(0))
    teacher = state.params
    for i in range(2, 4):
        before, batch = state.params, toys.text(i, task=1, weights=weights)
        state, metrics = step(state, batch, key(i))
        told, said = (
            np.asarray(toys.language_model().apply(p, batch).logits, "d") / temperature for p in (teacher, before)
        )
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (told, said))
        kl = np.sum(p * np.log(p / q), -1)
        expected = strength * temperature**2 * np.sum(weights * kl) / np.sum(weights)
        np.testing.assert_allclose(metrics["lwf"], expected, rtol=1e-3, atol=1e-6)
        assert (i == 2) == (float(metrics["lwf"]) < 1e-6)  # nothing to pay at the teacher itself


def test_lwf_has_no_gradient_at_the_teacher():
    part = lwf.make(toys.setting(), strength=3.0)
    params = toys.language_model().init(key(3))
    memory = {"teacher": params, "on": jnp.ones((), bool)}

    def total(p):
        return part.loss(memory, p, toys.language_model().apply(p, toys.text(0)), toys.text(0))[0]

    grads = toys.quick(jax.grad(total))(params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4
