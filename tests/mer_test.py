"""Meta-experience replay against a float64 NumPy transcription with backpropagation by hand, and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import compose
from jaxcl import memory as store
from jaxcl.methods import mer
from jaxcl.random import named
from jaxcl.types import Model, Output

D, H, C, ROWS, STEPS = 6, 10, 4, 20, 3
CAPACITY = 12
SHAPES = [(D, H), (H,), (H, H), (H,), (H, C), (C,)]


def network():
    """A classifier with two hidden layers of rectified units."""

    def init(key):
        keys = jax.random.split(key, len(SHAPES))
        return {f"p{i}": 0.4 * jax.random.normal(k, s) for i, (k, s) in enumerate(zip(keys, SHAPES, strict=True))}

    def apply(params, batch, cache=None):
        x = batch.inputs
        for i in (0, 2, 4):
            x = x @ params[f"p{i}"] + params[f"p{i + 1}"][None]
            x = jax.nn.relu(x) if i < 4 else x
        return Output(x)

    return Model(init, apply, {})


def examples(step):
    rng = np.random.default_rng(step)
    labels = rng.integers(0, C, ROWS)
    return rng.normal(size=(ROWS, D)).astype("f") + labels[:, None].astype("f") / 2, labels.astype("i4")


def setting():
    return toys.setting(model=network(), example=toys.points(*examples(0)))


def gradient(p, x, y):
    """Backpropagation of the cross entropy of one example, float64."""
    a = x @ p[0] + p[1]
    u = np.maximum(a, 0)
    b = u @ p[2] + p[3]
    v = np.maximum(b, 0)
    z = v @ p[4] + p[5]
    q = np.exp(z - z.max())
    q /= q.sum()
    dz = q - np.eye(C)[y]
    db = (p[4] @ dz) * (b > 0)
    da = (p[2] @ db) * (a > 0)
    return [np.outer(x, da), da, np.outer(u, db), db, np.outer(v, dz), dz]


@functools.cache
def draws(algorithm, steps, batch, extra):
    """Returns the slots drawn [S, B, steps, K], the places [S, B, steps] and the slots written [S, B]."""

    def of_example(seen, key):
        empty = store.reservoir(setting().example, CAPACITY)
        rows = dataclasses.replace(empty["rows"], task=jnp.arange(CAPACITY, dtype=jnp.int32))
        numbered = {"rows": rows, "seen": seen}
        plans = jax.vmap(lambda k: mer.plan(numbered, batch, algorithm, k))(jax.random.split(named(key, "plan"), steps))
        slot = store.slots(seen, jnp.ones(1, bool), CAPACITY, named(key, "write"), extra)
        return plans.rows.task, plans.place, slot[0]

    keys = jnp.stack([jax.random.split(jax.random.key(i), ROWS) for i in range(STEPS)])
    seen = jnp.arange(STEPS * ROWS, dtype=jnp.int32).reshape(STEPS, ROWS)
    return jax.device_get(toys.quick(jax.vmap(jax.vmap(of_example)))(seen, keys))


def transcription(*, algorithm=1, lr=0.03, beta=1.0, gamma=1.0, batch=5, steps=1, s=1.0, reservoir="vitter"):
    """Algorithms 1, 6 and 7 of Riemer et al. (2019) in float64, with the draws of the run."""
    drawn, places, written = draws(algorithm, steps, batch, int(reservoir == "published"))
    params = [np.asarray(x, "d") for x in jax.tree.leaves(network().init(jax.random.key(5)))]
    memory, filled = [None] * CAPACITY, 0
    for i in range(STEPS):
        for j, (x, y) in enumerate(zip(*examples(i), strict=True)):
            before = [p.copy() for p in params]
            for k in range(steps):
                start = [p.copy() for p in params]
                sequence = [(memory[slot], 1.0) for slot in drawn[i, j, k][: min(filled, batch)]]
                sequence.insert({1: 0, 6: len(sequence), 7: places[i, j, k]}[algorithm], ((x, y), s))
                for (u, v), scale in sequence:
                    params = [
                        p - lr * scale * g for p, g in zip(params, gradient(params, u.astype("d"), v), strict=True)
                    ]
                share = beta if algorithm == 1 else gamma
                params = [a + share * (p - a) for a, p in zip(start, params, strict=True)]
            if algorithm == 1:
                params = [a + gamma * (p - a) for a, p in zip(before, params, strict=True)]
            if written[i, j] < CAPACITY:
                memory[written[i, j]] = (x, y)
                filled = max(filled, written[i, j] + 1)
    return params


def run(**options):
    method = compose.make({"name": "mer", "capacity": CAPACITY, **options}, setting())
    state, step, told = method.init(network().init(jax.random.key(5))), toys.quick(method.step), []
    for i in range(STEPS):
        state, metrics = step(state, toys.points(*examples(i)), jax.random.key(i))
        told.append(metrics)
    return state, told


CASES = [
    {"algorithm": 1, "lr": 0.1, "beta": 0.3, "gamma": 0.5, "steps": 2, "batch": 4},
    {"algorithm": 1, "lr": 0.1, "beta": 0.3, "gamma": 0.5, "steps": 2, "batch": 4, "reservoir": "published"},
    {"algorithm": 6, "lr": 0.1, "gamma": 0.3, "steps": 2, "batch": 4},
    {"algorithm": 7, "lr": 0.05, "gamma": 0.3, "s": 5.0, "batch": 4},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o['algorithm']}-{o.get('reservoir', 'vitter')}")
def test_trajectory_matches_the_transcription(options):
    state, told = run(**options)
    for mine, theirs in zip(jax.tree.leaves(state.params), transcription(**options), strict=True):
        assert np.abs(np.asarray(mine) - theirs).max() < 1e-5
    assert int(state.memory["seen"]) == STEPS * ROWS
    assert float(told[-1]["loss"]) < float(told[0]["loss"])


def test_the_cases_tell_the_algorithms_apart():
    ends = [np.concatenate([p.ravel() for p in transcription(**options)]) for options in CASES]
    for i in range(len(ends)):
        for j in range(i):
            assert np.abs(ends[i] - ends[j]).max() > 1e-3


def test_without_memory_and_shrinking_it_is_online_sgd():
    params = [np.asarray(x, "d") for x in jax.tree.leaves(network().init(jax.random.key(5)))]
    for i in range(STEPS):
        for x, y in zip(*examples(i), strict=True):
            params = [p - 0.05 * g for p, g in zip(params, gradient(params, x.astype("d"), y), strict=True)]
    state, _ = run(lr=0.05, batch=0)
    for mine, theirs in zip(jax.tree.leaves(state.params), params, strict=True):
        assert np.abs(np.asarray(mine) - theirs).max() < 1e-6


def test_places_of_the_current_example():
    """First in algorithm 1, last in 6, uniform over the positions in 7."""
    assert not draws(1, 2, 4, 0)[1].any()
    np.testing.assert_array_equal(draws(6, 2, 4, 0)[1].reshape(-1, 2)[:, 0], np.minimum(np.arange(60), 4))
    places = draws(7, 1, 4, 0)[1].reshape(-1)
    assert (places <= np.minimum(np.arange(60), 4)).all()
    assert set(places) == set(range(5))
