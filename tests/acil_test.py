"""ACIL as a method: the head is the ridge regression of all rows in float64, whatever the order and the batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import compose
from jaxcl.methods import acil
from jaxcl.ridge import moments
from jaxcl.schema import UserError

QUICK = True
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

    def step(self, inputs, labels, weights=None):
        batch = toys.points(inputs, labels)
        batch = batch if weights is None else dataclasses.replace(batch, weights=jnp.asarray(weights))
        self.state, self.told = self.run(self.state, batch, jax.random.key(0))
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


@pytest.mark.parametrize(("how", "size"), [("solve", 1), ("solve", 8), ("refresh", 8), ("recursion", 8)])
def test_weights_are_those_of_all_rows_at_once(how, size):
    """Classes grow, come again and keep changing their share; only the set of rows counts."""
    learner, seen = Learner(f"acil(how={how!r}, every=3)"), []
    for task, known in enumerate([(0, 1), (1, 2, 3), (0, 3)]):
        for x, y in batches(rows(64, seed=task, known=known), size):
            learner.step(x, y)
            seen.append((x, y))
        learner.over(x, y)
        x, y = (np.concatenate(part) for part in zip(*seen, strict=True))
        assert off(learner.head, joint(learner.features(x, y), y)) < 1e-6
        np.testing.assert_array_equal(learner.head[:, 4:], 0)
        np.testing.assert_array_equal(learner.state.params["seen"], np.isin(np.arange(C), y))
    assert len(learner.traces) <= learner.before + 1


@pytest.mark.parametrize("how", ["solve", "refresh", "recursion"])
def test_weights_within_a_task_are_of_the_rows_so_far(how):
    learner, data = Learner(f"acil(how={how!r}, every=3)"), batches(rows(96), 8)
    for i, (x, y) in enumerate(data):
        before = learner.head
        learner.step(x, y)
        if how == "recursion" or (i + 1) % 3 == 0:
            past = [np.concatenate(part) for part in zip(*data[: i + 1], strict=True)]
            assert off(learner.head, joint(learner.features(*past), past[1])) < 2e-5
            assert how == "recursion" or off(learner.head, learner.exact()) <= learner.told["bound"] < 1e-5
        else:
            np.testing.assert_array_equal(learner.head, before)


def test_a_hundred_growing_classes_are_one_compilation():
    learner = Learner("acil(every=1)", labels=100)
    for known in range(0, 100, 20):
        x, y = rows(8, seed=known, labels=100, known=range(known, known + 20))
        learner.step(x, y).over(x, y)
        unseen = np.asarray(learner.state.params["seen"]) == 0
        assert unseen.sum() >= 60 - known
        np.testing.assert_array_equal(learner.head[:, unseen], 0)
    assert len(learner.traces) <= learner.before + 1


def published(x, y, size, gamma, classes):
    """R <- R - R X^T (I + X R X^T)^-1 X R, W <- W + R X^T (Y - X W) from left to right in float32, R = I / gamma."""
    one = np.float32
    x, targets = x.astype(one), np.eye(classes, dtype=one)[y]
    r, w = np.eye(x.shape[1], dtype=one) / one(gamma), np.zeros((x.shape[1], classes), one)
    for i in range(0, len(y), size):
        b, t = x[i : i + size], targets[i : i + size]
        r = r - r @ b.T @ np.linalg.inv(np.eye(len(b), dtype=one) + b @ r @ b.T) @ b @ r
        w = w + r @ b.T @ (t - b @ w)
        yield w.astype(np.float64)


@pytest.mark.parametrize("how", ["solve", "recursion"])
def test_large_batches_in_float32_keep_their_digits(how):
    """Features of decaying strength and batches of twice their number: the published update loses most digits."""
    width, size, classes = 64, 128, 5
    rng = np.random.default_rng(3)
    y = rng.integers(0, classes, 12 * size).astype(np.int32)
    x = (rng.normal(size=(classes, 48))[y] + rng.normal(size=(len(y), 48))) * 30 / np.arange(1, 49)
    adapter = {"features": 48, "hidden": 48, "width": width}
    learner = Learner(f"acil(gamma=0.1, how={how!r}, every=1)", labels=classes, **adapter)
    features = learner.features(x.astype(np.float32), y)
    for i, theirs in enumerate(published(features, y, size, 0.1, classes)):
        learner.step(x[i * size : (i + 1) * size].astype(np.float32), y[i * size : (i + 1) * size])
        n = (i + 1) * size
        exact = joint(features[:n], y[:n], 0.1, classes)
        assert off(learner.head, exact) < (1e-6 if how == "solve" else 1e-4)
        wrong = np.mean((features @ learner.head).argmax(1) != (features @ exact).argmax(1))
        assert wrong <= 1e-3
        assert i or off(theirs, exact) > 1e-2  # what this guards against
    if how == "recursion":  # which starts anew at the end of a task
        learner.over(x[:size].astype(np.float32), y[:size])
        assert off(learner.head, exact) < 1e-6
        assert off(learner.head, learner.exact(0.1)) <= learner.state.memory["bound"] < 1e-5


def test_the_label_gain_is_measured_and_can_be_left_out():
    """G-ACIL, equations 10 to 12: W = R [B_(k-1) + X^T Y_old | X^T Y_new], without the second term in the ablation."""
    tasks = [rows(48, seed=0, known=(0, 1)), rows(48, seed=1, known=(1, 2)), rows(48, seed=2, known=(0, 2, 3))]
    whole, ablated = Learner("acil(decompose=True)"), Learner("acil(gain=False)")
    gram, cross, kept = GAMMA * np.eye(D), np.zeros((D, C)), np.zeros((D, C))
    exposed = np.zeros(C)
    for x, y in tasks:
        features, targets = whole.features(x, y), np.eye(C)[y]
        gram, old = gram + features.T @ features, cross
        cross = cross + features.T @ targets
        gained = np.linalg.solve(gram, (cross - old) * exposed)
        share = np.linalg.norm(gained) / (
            np.linalg.norm(gained) + np.linalg.norm(np.linalg.solve(gram, cross) - gained)
        )
        kept = kept + features.T @ targets * (1 - exposed)
        for learner in (whole, ablated):
            learner.step(x, y).over(x, y)
        assert off(whole.head, np.linalg.solve(gram, cross)) < 1e-6
        assert off(ablated.head, np.linalg.solve(gram, kept)) < 1e-6
        np.testing.assert_allclose(whole.state.memory["gain"], share, atol=1e-6)
        exposed = np.maximum(exposed, targets.max(0))
    assert share > 0.05
    assert off(ablated.head, whole.head) > 0.1
    assert whole.step(x, y).told["gain"] == whole.state.memory["gain"]


@pytest.mark.parametrize("by", ["gcv", "loo"])
def test_the_regularisation_is_chosen_by_what_is_least(by):
    path = tuple(10.0**n for n in range(-3, 4))
    learner, (x, y) = Learner(f"acil(gamma={by!r}, gammas={list(path)})"), rows(60, seed=4)
    x = x + np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    learner.step(x, y).over(x[20:], y[20:])
    features, targets, score = learner.features(x, y), np.eye(C)[y], []
    for gamma in path:
        hat = features @ np.linalg.solve(features.T @ features + gamma * np.eye(D), features.T)
        errors = targets - hat @ targets
        if by == "gcv":
            score.append(np.sum(errors**2) / (1 - np.trace(hat) / len(y)) ** 2)
        else:
            score.append(np.sum((errors / (1 - np.diag(hat))[:, None])[20:] ** 2))
    best = path[int(np.argmin(score))]
    assert path[0] < best < path[-1]
    assert learner.state.memory["gamma"] == np.float32(best)
    assert off(learner.head, joint(features, y, best)) < 1e-6


def test_bad_rows_are_left_out_and_counted():
    x, y = rows(16)
    clean, dirty = Learner(), Learner()
    weights = np.ones(16, np.float32)
    weights[3] = 0
    bad, labels = x.copy(), y.copy()
    bad[0], bad[3], labels[1], labels[2] = np.nan, np.inf, C, -1
    clean.step(x, y, (np.arange(16) > 3).astype(np.float32)).over(x, y)
    dirty.step(bad, labels, weights).over(x, y)
    assert dirty.told["left_out"] == 3
    assert dirty.told["rows"] == 12
    assert np.isfinite(dirty.told["loss"])
    assert np.isfinite(dirty.told["grad_norm"])
    assert off(dirty.head, clean.head) < 1e-6


def test_only_the_head_changes_and_the_state_has_no_optimiser():
    learner, (x, y) = Learner(), rows(16)
    before = jax.device_get(learner.state.params)
    learner.step(x, y).over(x, y)
    for name in ("base", "expansion"):
        jax.tree.map(np.testing.assert_array_equal, learner.state.params[name], before[name])
    assert learner.state.opt_state == ()
    assert np.any(learner.state.params["head"])


def test_logits_are_as_sharp_as_the_errors_are_small():
    learner, (x, y) = Learner(), rows(64)
    for batch in batches((x, y), 16):
        learner.step(*batch)
    learner.over(*batch)
    features = learner.features(x, y)
    errors = np.eye(C)[y] - features @ joint(features, y)
    np.testing.assert_allclose(learner.state.params["scale"], 64 * C / np.sum(errors**2), rtol=1e-4)
    learner.step(*batch)
    logits = (features @ joint(features, y) * 64 * C / np.sum(errors**2))[48:]
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), y[48:]]
    np.testing.assert_allclose(learner.told["loss"], nats.mean(), rtol=1e-4)
    pull = features[48:].T @ -errors[48:] / 16
    np.testing.assert_allclose(learner.told["grad_norm"], np.linalg.norm(pull), rtol=1e-3)


def test_moments_can_be_merged_with_those_of_another_run():
    """The memory is the commutative monoid of the core: two halves of the rows, learned apart, are one."""
    whole, left, right = Learner(), Learner(), Learner()
    for i, (x, y) in enumerate(batches(rows(64), 16)):
        whole.step(x, y)
        (right if i else left).step(x, y)
    merged = moments.merge(left.state.memory["moments"], right.state.memory["moments"])
    left.state = dataclasses.replace(left.state, memory={**left.state.memory, "moments": merged})
    assert off(left.over(x, y).head, whole.over(x, y).head) < 1e-6


def test_the_choice_is_told_and_options_that_do_not_fit_are_refused():
    setting = toys.solved(width=2000)
    assert "cheapest" in compose.explain("acil(every=1)", setting)["acil"]
    assert acil.plan(setting, 0.1, 1, "auto", True).name == "recursion"
    assert acil.plan(setting, "gcv", 1, "auto", True).name == "solve"
    assert acil.plan(setting, 0.1, 1, "refresh", True).why == "refresh: as asked for"
    for options, words in {
        "gamma=0.0": "gamma=0.0: must be above 0",
        "gamma=-1.0": "gamma=-1.0: must be above 0",
        "gamma='gcv', gammas=[]": "gammas: empty",
        "gamma='gcv', gammas=[1.0, -1.0]": "gammas=-1.0: must be above 0",
        "gamma='gcv', how='recursion'": "how='recursion'.*how='solve'",
        "gain=False, how='refresh'": "how='refresh'.*how='solve'",
        "every=0": "every=0: must be at least 1",
        "gamma='best'": r"config\.method\[0\]\.gamma='best': expected",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            compose.make(f"acil({options})", setting)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"config\.adapter='analytic'"):
        compose.make("acil", toys.setting())
