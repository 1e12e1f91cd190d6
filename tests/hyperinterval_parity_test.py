"""One step of HyperInterval against a transcription of the published one: float64, a loop over tasks, six products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl.methods import hyperinterval
from jaxcl.models.boxed import LEDGER

STEPS, BETA, GAMMA, LR = 6, 0.3, 0.7, 0.5
PUBLISHED = {"schedule": "published", "average": "twice", "point": "middle", "project": False, "beta": BETA}


def relu(x):
    return jnp.maximum(x, 0)


def hypernetwork(g, task, gamma, universal):
    """Lower, middle and upper weights of a task, each [N]."""
    e = g["embedding"]["centre"][task]
    size = e.shape[0]
    if universal:
        c, r = gamma / (2 * size) * jnp.cos(e), jnp.ones(size) * gamma / size
    else:
        v = jnp.exp(g["embedding"]["radius"][task])
        c, r = e, gamma * v / jnp.sum(v)
    for i in range(len(g["hidden"])):
        w, b = g["hidden"][f"layer_{i}"]["kernel"], g["hidden"][f"layer_{i}"]["bias"]
        c, r = c @ w + b, r @ jnp.abs(w)
        low, high = relu(c - r), relu(c + r)
        c, r = (high + low) / 2, (high - low) / 2
    c, r = g["head"]["weight"] @ c + g["head"]["bias"], jnp.abs(g["head"]["weight"]) @ r
    return c - r, c, c + r


def network(low, mid, high, x):
    """Lower, middle and upper logits of a perceptron 4-8-4 for x >= 0; weights flattened as bias, kernel."""
    below = middle = above = x
    begin = 0
    for width, out in ((4, 8), (8, 4)):
        cut = [
            (w[begin : begin + out], w[begin + out : begin + out + width * out].reshape(width, out))
            for w in (low, mid, high)
        ]
        begin += out + width * out
        (b_l, w_l), (b_m, w_m), (b_u, w_u) = cut
        below, middle, above = (
            below @ relu(w_l) - above @ relu(-w_l) + b_l[None],
            middle @ relu(w_m) - middle @ relu(-w_m) + b_m[None],
            above @ relu(w_u) - below @ relu(-w_u) + b_u[None],
        )
        if out == 8:
            below, middle, above = relu(below), relu(middle), relu(above)
    return below, middle, above


def cross_entropy(z, y):
    return jnp.mean(jax.nn.logsumexp(z, axis=-1) - z[jnp.arange(len(y)), y])


def published(g, targets, before, task, i, x, y, universal):
    """The loss at iteration i of a task, and its parts."""
    half = STEPS // 2
    gamma, kappa = (GAMMA * i / (half - 1), max(1 - 5e-5 * i, 0.5)) if i < half else (GAMMA, 0.5)
    below, middle, above = network(*hypernetwork(g, task, gamma, universal), x)
    worst = jnp.where(np.arange(4)[None] == y[:, None], below, above)
    own = kappa * cross_entropy(middle, y) + (1 - kappa) * cross_entropy(worst, y)
    pull = 0.0
    for k in before:
        ends = hypernetwork(g, k, GAMMA, universal)
        if universal:
            pull += sum(jnp.sum((now - then) ** 2) for now, then in zip(ends, targets[k], strict=True)) / 3
        else:
            pull += jnp.sum((ends[1] - targets[k][1]) ** 2)
    count = max(1, len(before))
    drift = BETA * pull / count / count
    return own + drift, (own, drift)


@pytest.mark.parametrize("universal", [False, True])
def test_a_step_is_the_published_one(universal):
    """The third task: two are over, the generator has moved since; at full gamma and below."""
    setting = toys.boxed(tx=optax.sgd(LR), universal=universal, gamma=GAMMA, hidden=(6, 5), start="published")
    method = hyperinterval.make(setting, steps=STEPS, **PUBLISHED)
    state = method.init(toys.quick(setting.model.init)(jax.random.key(2)))
    generator, ledger = state.params["generator"], state.params[LEDGER]
    place = {**generator["embedding"], "radius": jax.random.normal(jax.random.key(3), (3, 4))}
    generator = {**generator, "embedding": place}
    every, one = jnp.arange(3), jnp.ones(3)
    centre, radius = setting.boxed.boxes(generator, every, one)
    targets = {"centre": centre, "radius": radius}
    noise = iter(jax.random.split(jax.random.key(4), 99))
    moved = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(next(noise), w.shape), generator)
    done = {**ledger, "done": jnp.array([1.0, 1.0, 0.0]), "current": jnp.float32(2)}
    rows = toys.classes(5, task=2)
    x = jnp.abs(rows.inputs)
    rows = type(rows)(**{**vars(rows), "inputs": x})
    step = toys.quick(method.step)
    for i in (0, 1, 2, 5):
        memory = {"age": jnp.int32(i), "targets": targets}
        old = type(state)(state.step, {**state.params, "generator": moved, LEDGER: done}, state.opt_state, memory)
        new, told = step(old, rows, jax.random.key(0))
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), (moved, generator, x))
            then = [hypernetwork(wide[1], k, GAMMA, universal) for k in range(3)]
            (_, parts), grads = jax.jit(
                jax.value_and_grad(
                    lambda g, i=i, then=then, x=wide[2]: published(
                        g, then, [0, 1], 2, i, x, np.asarray(rows.targets), universal
                    ),
                    has_aux=True,
                )
            )(wide[0])
        parts, grads = jax.device_get((parts, grads))
        np.testing.assert_allclose(told["loss"], parts[0], rtol=1e-5)
        np.testing.assert_allclose(told["drift"], parts[1], rtol=1e-5)
        assert parts[1] > 1e-2
        ours = jax.tree.map(
            lambda a, b: (np.asarray(b, np.float64) - np.asarray(a, np.float64)) / -LR, moved, new.params["generator"]
        )
        grads["embedding"] = jax.tree.map(lambda g: np.where(np.arange(3)[:, None] == 2, g, 0), grads["embedding"])
        for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(grads), strict=True):
            scale = np.abs(b).max()
            still = "radius" in str(name) or (universal and i == 0 and "centre" in str(name))  # gamma_0 = 0
            assert (scale == 0) if still and universal else (scale > 1e-4 or still), name
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(scale, 0.05), err_msg=str(name))
