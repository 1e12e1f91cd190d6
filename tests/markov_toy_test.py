"""Forgetting on three Markov "languages": replay lowers it with its dose; Reptile acts as a smaller learning rate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose
from jaxcl.types import Batch, Model, Output

WORDS, CONTEXT, WIDTH, HIDDEN = 32, 4, 12, 64
TASKS, STEPS, ROWS, SEEDS = 3, 300, 128, 5


def language(seed):
    """Transition probabilities of one language, [32, 32]."""
    p = np.random.default_rng(seed).gamma(0.15, size=(WORDS, WORDS)) + 1e-3
    return p / p.sum(1, keepdims=True)


def sample(task, count, seed):
    """Returns `count` examples [n, 6]: a tag of the language, four words of context, the next word."""
    rng, chain = np.random.default_rng([seed, task]), language(task).cumsum(1)
    words = np.empty((count, CONTEXT + 1), int)
    words[:, 0] = rng.integers(0, WORDS, count)
    for t in range(CONTEXT):
        words[:, t + 1] = np.minimum((rng.random((count, 1)) > chain[words[:, t]]).sum(1), WORDS - 1)
    return np.concatenate([np.full((count, 1), WORDS + task), words], 1).astype("i4")


def batch_of(examples, task):
    rows = examples.shape[0]
    blank = jnp.zeros((rows,), jnp.int32)
    return Batch(examples[:, :-1], examples[:, -1], jnp.ones((rows,)), blank, blank, blank + task)


def model():
    """A table of embeddings, one hidden layer, a softmax over the words."""

    def init(key):
        a, b, c = jax.random.split(key, 3)
        size = (CONTEXT + 1) * WIDTH
        return {
            "embed": 0.3 * jax.random.normal(a, (WORDS + TASKS, WIDTH)),
            "w": jax.random.normal(b, (size, HIDDEN)) / np.sqrt(size),
            "u": jax.random.normal(c, (HIDDEN, WORDS)) / np.sqrt(HIDDEN),
        }

    def apply(params, batch, cache=None):
        x = jax.nn.one_hot(batch.inputs, WORDS + TASKS) @ params["embed"]  # a product: scatters are slow on processors
        return Output(jnp.tanh(x.reshape(x.shape[0], -1) @ params["w"]), params["u"])

    return Model(init, apply, {})


@functools.cache
def data():
    pool = np.stack([sample(t, STEPS * ROWS, 10).reshape(STEPS, ROWS, -1) for t in range(TASKS)])  # [T, S, B, 6]
    return jnp.asarray(pool), jnp.asarray(np.stack([sample(t, 2000, 90) for t in range(TASKS)]))


@functools.cache
def compiled(options):
    """Returns a function of a learning rate that trains on one language after another, for several seeds at once."""
    pool, held_out = data()
    example = toys.shapes(batch_of(pool[0, 0], 0))

    def loss(params, rows):
        total, weight = toys.cross_entropy(model().apply(params, batch_of(rows, 0)), batch_of(rows, 0))
        return total / weight

    def trial(lr, key):
        made = toys.setting(model=model(), tx=optax.adam(lr, b2=0.95), example=example, tasks=TASKS)
        method = compose.make(options, made)

        def task(state, item):
            rows, t = item

            def step(state, piece):
                return method.step(state, batch_of(piece, t), jax.random.fold_in(key, state.step))[0], None

            state, _ = jax.lax.scan(step, state, rows)
            return state, jax.vmap(lambda r: loss(state.params, r))(held_out)

        return jax.lax.scan(task, method.init(model().init(key)), (pool, jnp.arange(TASKS)))[1]

    return toys.quick(jax.vmap(trial, (None, 0)))


@functools.cache
def run(options, lr):
    """Returns losses [seed, after task, of task]."""
    return np.asarray(compiled(options)(lr, jax.random.split(jax.random.key(0), SEEDS)))


def forgetting(losses):
    """Returns the rise over the best loss so far, mean over the earlier tasks, [seed]."""
    rises = [losses[:, -1, t] - losses[:, t:, t].min(1) for t in range(TASKS - 1)]
    return np.mean(rises, axis=0)


def interval(values):
    """Returns the 95 % confidence interval of the mean (Student's t, 4 degrees of freedom)."""
    half = 2.776 * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


@pytest.mark.slow
def test_replay_lowers_forgetting_with_its_dose():
    doses = ["cpt", *(f"er(fraction={share}, capacity=4096)" for share in (0.05, 0.25, 0.5))]
    found = [forgetting(run(options, 3e-3)) for options in doses]
    bounds = [interval(values) for values in found]
    for (lowest, _), (_, highest) in itertools.pairwise(bounds):
        assert lowest > highest, bounds
    assert found[0].mean() > 1.5
    assert found[2].mean() < 0.5 * found[0].mean()
    assert found[3].mean() < 0.3 * found[0].mean()


def test_reptile_acts_like_its_smaller_learning_rate():
    """At a small rate the meta-update that keeps half is training at half the rate: no more is claimed for it."""
    shrunk, matched = run("cpt + reptile(every=10, keep=0.5)", 3e-3), run("cpt", 1.5e-3)
    assert abs(forgetting(shrunk).mean() - forgetting(matched).mean()) < 0.03
    assert abs(shrunk[:, -1].mean() - matched[:, -1].mean()) < 0.03
    assert forgetting(run("cpt", 3e-3)).mean() - forgetting(matched).mean() > 0.3  # the rate itself matters
