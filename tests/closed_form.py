"""A method with a head in closed form on a frozen perceptron, compiled once for a file of tests, and its oracle."""

import functools

import jax
import numpy as np
import toys

from jaxcl import compose

D, C, GAMMA = 24, 6, 0.1


@functools.cache
def compiled(options, labels, adapter):
    """Returns setting, method, its jitted step and end of a task, features, and how often the step was traced."""
    setting = toys.solved(labels=labels, **{"width": D, "hidden": 10} | dict(adapter))
    made, traces = compose.make(options, setting), []

    def step(*args):
        traces.append("step")
        return made.step(*args)

    return setting, made, jax.jit(step), jax.jit(made.end_task), jax.jit(setting.analytic.features), traces


class Learner:
    """A run of a method on a frozen perceptron; `rows` are (inputs, labels)."""

    def __init__(self, options="acil", *, labels=C, **adapter):
        self.setting, made, *rest = compiled(options, labels, tuple(adapter.items()))
        self.run, self.end, self.read, self.traces = rest
        self.state, self.before = made.init(self.setting.model.init(jax.random.key(0))), len(self.traces)

    def step(self, inputs, labels):
        self.state, self.told = self.run(self.state, toys.points(inputs, labels), jax.random.key(0))
        return self

    def over(self, inputs, labels):
        self.state = self.end(self.state, toys.stack([toys.points(inputs, labels)]), jax.random.key(0))
        return self

    def features(self, inputs, labels):
        """Returns float64 features, computed in one shape whatever the number of rows."""
        spare = -len(labels) % 128
        batch = toys.points(np.pad(inputs, ((0, spare), (0, 0))), np.pad(labels, (0, spare)))
        return np.asarray(self.read(self.state.params, batch), np.float64)[: len(labels)]

    def exact(self, gamma=GAMMA):
        """Returns the float64 weights of the sums in memory."""
        m = self.state.memory["moments"]
        gram, cross = (np.asarray(p.high, np.float64) + np.asarray(p.low, np.float64) for p in (m.gram, m.cross))
        return np.linalg.solve(gram + gamma * np.eye(len(gram)), cross)

    @property
    def head(self):
        return np.asarray(self.state.params["head"], np.float64)


def rows(count, seed=0, labels=C, known=None):
    """Returns inputs [N, 4] around the mean of their class, and labels, of the classes `known`."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(5).normal(size=(labels, 4))
    y = rng.choice(labels if known is None else known, count).astype(np.int32)
    return (means[y] + 0.5 * rng.normal(size=(count, 4))).astype(np.float32), y


def joint(x, labels, gamma=GAMMA, classes=C):
    """Returns the ridge weights of all rows at once, float64."""
    return np.linalg.solve(x.T @ x + gamma * np.eye(x.shape[1]), x.T @ np.eye(classes)[labels])


def off(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def batches(data, size):
    x, y = data
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(y) - len(y) % size, size)]
