"""Tiny models, losses and streams for tests, so that methods are tested without a transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.compose import Setting
from jaxcl.models import analytic, hypernetwork, mlp, weight_boxes
from jaxcl.types import Batch, Model, Output

# Compiling is most of the cost of a test: this halves it. Not for tests that compare bits of different programs.
QUICK = {"xla_backend_optimization_level": 0}
V, L, B, T = 12, 6, 8, 3


def language_model(width=8, hidden=16, dtype=jnp.float32):
    """Predicts a token from the two tokens before it with one hidden layer."""

    def init(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(a, (V, width)) * 0.5,
            "mlp": {"w": jax.random.normal(b, (2 * width, hidden)) / np.sqrt(2 * width), "b": jnp.zeros(hidden)},
            "head": jax.random.normal(c, (hidden, V)) / np.sqrt(hidden),
        }

    def apply(params, batch, cache=None):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        now = params["embed"][batch.inputs]  # [B, L, D]
        past = jnp.pad(now, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        h = jnp.concatenate([now, past], -1) @ params["mlp"]["w"]
        return Output(jnp.tanh(h + jnp.broadcast_to(params["mlp"]["b"], h.shape)), params["head"], cache)

    axes = {"embed": ("vocab", "embed"), "mlp": {"w": ("embed", "mlp"), "b": ("mlp",)}, "head": ("embed", "vocab")}
    return Model(init, apply, axes)


def cross_entropy(output, batch):
    """Returns the weighted negative log-likelihood and the weight."""
    losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.targets)
    return jnp.sum(losses * batch.weights), jnp.sum(batch.weights)


def text(seed, rows=B, task=0, weights=None):
    """Random rows of text whose statistics depend on the task."""
    rng = np.random.default_rng([seed, task])
    tokens = (rng.integers(0, V // 2, (rows, L + 1)) + task * 3) % V
    weights = np.ones((rows, L)) if weights is None else np.broadcast_to(weights, (rows, L))
    return Batch(
        inputs=jnp.asarray(tokens[:, :-1], jnp.int32),
        targets=jnp.asarray(tokens[:, 1:], jnp.int32),
        weights=jnp.asarray(weights, jnp.float32),
        segments=jnp.ones((rows, L), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (rows, L)),
        task=jnp.full((rows,), task, jnp.int32),
    )


def rollouts(seed, rows=B, task=0):
    """Text with the columns of rollouts; every fourth row is a demonstration, which no objective looks at."""
    mark = (np.arange(rows) % 4 == 1).astype("f")
    advantage = np.random.default_rng([seed, task, 1]).normal(size=rows).astype("f")
    columns = {"advantage": advantage * (1 - mark), "share": 1 - mark, "demonstration": mark}
    return dataclasses.replace(text(seed, rows, task), extra={name: jnp.asarray(x) for name, x in columns.items()})


def score(output, batch):
    """Returns the log-probability of each target."""
    return -optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.targets)


def quick(function, **options):
    """Jits with little optimisation."""
    return jax.jit(function, compiler_options=QUICK, **options)


def stack(batches):
    """Stacks batches along a new first axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def linear(size):
    """Predicts a number from features: the gradient of `squared` is known in closed form."""

    def init(key):
        return {"w": jax.random.normal(key, (size,))}

    return Model(init, lambda params, batch, cache=None: Output(batch.inputs @ params["w"]), {"w": (None,)})


def squared(output, batch):
    """Returns half the weighted squared error and the weight."""
    return 0.5 * jnp.sum(batch.weights * jnp.square(output.hidden - batch.targets)), jnp.sum(batch.weights)


def points(inputs, targets, task=0):
    """Rows of features with a target each: a number, or a class if it is an integer."""
    rows = len(targets)
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    blank = jnp.zeros((rows,), jnp.int32)
    return Batch(inputs, targets, jnp.ones(rows, jnp.float32), blank, blank, jnp.full((rows,), task, jnp.int32))


def shapes(tree):
    """Returns the shapes of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def setting(*, model=None, tx=None, example=None, tasks=T, loss=cross_entropy, microbatches=1, score=None):
    """A setting for the toy language model."""
    example = shapes(example or text(0))
    return Setting(model or language_model(), tx or optax.adamw(1e-2), example, tasks, loss, microbatches, score)


# kind -> (classifier, **options of its make) -> model of boxes
BOXES = {
    "hypernetwork": lambda target, **options: hypernetwork.make(target, **{"embedding": 4, "gamma": 0.5} | options),
    "weight_boxes": lambda target, **options: weight_boxes.make(target, **{"radius": 0.1} | options),
}


def boxed(kind="hypernetwork", *, tx=None, loss=cross_entropy, tasks=T, features=4, width=8, labels=4, **options):
    """A setting for a perceptron whose weights come from boxes; `options` are those of the boxes."""
    if kind == "hypernetwork":
        options = {"hidden": (6,)} | options
    made = BOXES[kind](mlp.make(inputs=features, hidden=(width,), classes=labels), tasks=tasks, **options)
    example = classes(0, features=features, labels=labels)
    return setting(model=made.model, tx=tx, example=example, tasks=tasks, loss=loss)._replace(boxed=made)


def solved(*, tx=None, loss=cross_entropy, tasks=T, features=4, hidden=8, labels=4, **options):
    """A setting for a frozen perceptron below a head in closed form; `options` are those of the head."""
    example = shapes(classes(0, features=features, labels=labels))
    base = mlp.make(inputs=features, hidden=(hidden,), classes=labels, output="hidden")
    made = analytic.make(base, example, labels, **{"width": 12, "expansion": "relu"} | options)
    found = setting(
        model=made.model, tx=tx, example=classes(0, features=features, labels=labels), tasks=tasks, loss=loss
    )
    return found._replace(analytic=made)


DISTANCES = {"head": "mahalanobis", "expansion": "none", "width": None}


def classes(seed, rows=B, task=0, *, features=4, labels=4):
    """Rows of features around the mean of their class; the classes of a task are turned by its number."""
    rng = np.random.default_rng([seed, task, 2])
    means = np.random.default_rng(9).normal(size=(labels, features))
    targets = rng.integers(0, labels, rows)
    inputs = means[(targets + task) % labels] + 0.3 * rng.normal(size=(rows, features))
    return points(inputs.astype("f"), targets.astype("i"), task)
