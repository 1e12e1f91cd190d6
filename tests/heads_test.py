"""Heads from means and covariances, and ridge with a chosen regularisation, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import compose
from jaxcl.methods import fecam, slda
from jaxcl.ridge import learner as learners
from jaxcl.ridge import moments
from jaxcl.schema import UserError

QUICK = True
C, D = 5, 6
PLAIN = {"expansion": "none", "width": None, "labels": C, "hidden": D}


@functools.cache
def compiled(options, adapter):
    setting = toys.solved(**PLAIN | dict(adapter))
    made = compose.make(options, setting)
    return setting, made, jax.jit(made.step), jax.jit(made.end_task), jax.jit(setting.analytic.features)


class Learner:
    """A run of a method on the features of a frozen perceptron."""

    def __init__(self, options, **adapter):
        self.setting, made, self.run, self.end, self.read = compiled(options, tuple(adapter.items()))
        self.state = made.init(self.setting.model.init(jax.random.key(1)))

    def learn(self, x, y, size=8, *, over=True):
        for i in range(0, len(y), size):
            batch = toys.points(x[i : i + size], y[i : i + size])
            self.state, self.told = self.run(self.state, batch, jax.random.key(0))
        if over:
            self.state = self.end(self.state, toys.stack([batch]), jax.random.key(0))
        return self

    def features(self, inputs, labels):
        """Returns float64 features, computed in one shape whatever the number of rows."""
        spare = -len(labels) % 128
        batch = toys.points(np.pad(inputs, ((0, spare), (0, 0))), np.pad(labels, (0, spare)))
        return np.asarray(self.read(self.state.params, batch), np.float64)[: len(labels)]

    def logits(self, x, y):
        return np.asarray(self.setting.model.apply(self.state.params, toys.points(x, y)).logits, np.float64)

    @property
    def params(self):
        return {k: np.asarray(v, np.float64) for k, v in self.state.params.items() if k not in ("base", "expansion")}


def rows(count, seed=0, known=(0, 1, 2)):
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(5).normal(size=(C, 4))
    y = rng.choice(known, count).astype(np.int32)
    return (means[y] + 0.7 * rng.normal(size=(count, 4))).astype(np.float32), y


def close(got, want, tolerance=1e-5):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), (got, want)


def means_of(x, y):
    return np.stack([x[y == c].mean(0) if (y == c).any() else np.zeros(x.shape[1]) for c in range(C)])


def same_differences(got, want, known, tolerance=1e-4):
    """Asserts that logits agree but for what no class differs in."""
    got, want = (z[:, known] - z[:, known].mean(1, keepdims=True) for z in (got, want))
    close(got, want, tolerance)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_row_belongs_to_the_nearest_mean(cosine):
    learner = Learner(f"nmc(cosine={cosine})", normalise=True)
    x, y = (np.concatenate(part) for part in zip(rows(48), rows(48, 1, (0, 3)), strict=True))
    learner.learn(x, y)
    features = learner.features(x, y)
    lengths = np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(lengths, lengths > 0.5, rtol=1e-6)  # a row without an active feature stays zero
    means = means_of(features, y)
    known, mean = [0, 1, 2, 3], means[:4]
    if cosine:
        want = features @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    else:
        want = -((features[:, None] - mean[None]) ** 2).sum(-1) / 2
    got = learner.logits(x, y)
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    variance = ((features - means[y]) ** 2).sum() / (len(y) * D)
    same_differences(got, want / variance, known)
    np.testing.assert_array_equal(learner.params["head"][:, 4], 0)
    assert np.all(got[:, 4] < got[:, :4].min(1) - 10)
    backwards = Learner(f"nmc(cosine={cosine})", normalise=True).learn(x[::-1], y[::-1])
    close(backwards.params["head"], learner.params["head"], 1e-6)


def test_means_are_there_after_every_step():
    learner, (x, y) = Learner("nmc", normalise=True), rows(16)
    learner.learn(x[:8], y[:8], over=False)
    close(learner.params["head"].T, means_of(learner.features(x[:8], y[:8]), y[:8]))
    same = Learner("nmc", normalise=True).learn(x[:1].repeat(8, 0), y[:1].repeat(8), over=False)
    assert same.params["scale"] == learners.SHARPEST  # rows of no variance


def discriminant(x, y, epsilon):
    means = means_of(x, y)
    away = x - means[y]
    precision = np.linalg.inv((1 - epsilon) * away.T @ away / len(y) + epsilon * np.eye(x.shape[1]))
    return precision @ means.T, -0.5 * np.einsum("cd,de,ce->c", means, precision, means)


@pytest.mark.parametrize("epsilon", [1e-4, 0.5])
def test_discriminants_are_those_of_one_covariance(epsilon):
    learner = Learner(f"slda(epsilon={epsilon}, every=4)", bias=False)
    x, y = (np.concatenate(part) for part in zip(rows(48), rows(48, 1, (0, 3)), strict=True))
    learner.learn(x, y, over=False)  # 12 steps: the last weights are of all rows
    weights, bias = discriminant(learner.features(x, y), y, epsilon)
    close(learner.params["head"], weights, 1e-4)
    close(learner.params["bias"], bias, 1e-4)
    np.testing.assert_array_equal(learner.params["head"][:, 4], 0)
    assert learner.told["bound"] < 1e-4
    same_differences(learner.logits(x, y), learner.features(x, y) @ weights + bias[None], [0, 1, 2, 3])
    backwards = Learner(f"slda(epsilon={epsilon}, every=4)", bias=False).learn(x[::-1], y[::-1])
    close(backwards.params["head"], learner.params["head"], 1e-4)


def test_the_published_running_covariance_is_that_of_the_sums_for_one_class():
    """N S <- N S + N / (N + 1) (x - mean)(x - mean)^T, as `slda` says of what it leaves out."""
    learner, (x, y) = Learner("slda(epsilon=0.5, every=4)", bias=False), rows(24, known=(1,))
    features = learner.learn(x, y).features(x, y)
    total, mean = np.zeros((D, D)), np.zeros(D)
    for n, row in enumerate(features):
        total += n / (n + 1) * np.outer(row - mean, row - mean)
        mean += (row - mean) / (n + 1)
    precision = np.linalg.inv(0.5 * total / 24 + 0.5 * np.eye(D))
    close(learner.params["head"][:, 1], precision @ mean, 1e-4)


def covariances(x, y, shared):
    """Returns covariances by class, or within all classes, [K, d, d]; None for a class of one row or none."""
    means = means_of(x, y)
    away = [x[y == c] - means[c] for c in range(C)]
    if shared:
        whole = np.concatenate(away)
        return [whole.T @ whole / sum(max(len(a) - 1, 0) for a in away)]
    return [a.T @ a / (len(a) - 1) if len(a) > 1 else None for a in away]


def precision_of(c, gamma1, gamma2, correlation):
    if c is None:
        return np.eye(D)
    beside = c[~np.eye(D, dtype=bool)]
    beside = beside[beside != 0].mean() if (beside != 0).any() else 0
    c = c + gamma1 * np.diag(c).mean() * np.eye(D) + gamma2 * beside * (1 - np.eye(D))
    if correlation:
        c = c / np.sqrt(np.outer(np.diag(c), np.diag(c)))
    return np.linalg.inv(c)


@pytest.mark.parametrize(("shared", "correlation"), [(False, True), (False, False), (True, False)])
def test_distances_are_those_of_shrunk_correlations(shared, correlation):
    adapter = {"head": "mahalanobis", "power": 0.5, "shared": shared}
    learner = Learner(f"fecam(correlation={correlation}, gamma2=0.5)", **adapter)
    x, y = (np.concatenate(part) for part in zip(rows(49), rows(48, 1, (0, 3)), strict=True))
    x, y = np.concatenate([x, x[:1]]), np.concatenate([y, np.int32([4])])  # a class of one row
    learner.learn(x[:49], y[:49], size=7)
    turned = np.sqrt(learner.features(x[:49], y[:49]))  # two classes are still to come
    own = [precision_of(c, 1.0, 0.5, correlation) for c in covariances(turned, y[:49], shared)]
    close(learner.params["precision"], np.stack(own), 1e-3)
    features = learner.learn(x[49:], y[49:], size=7).features(x, y)
    turned, means = np.sqrt(features), np.sqrt(means_of(features, y))
    own = [precision_of(c, 1.0, 0.5, correlation) for c in covariances(turned, y, shared)]
    close(learner.params["precision"], np.stack(own), 1e-3)
    unit = turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-30)
    away = unit[:, None] - (means / np.linalg.norm(means, axis=1, keepdims=True))[None]
    own = own * C if shared else own
    want = -0.5 * np.stack([np.einsum("bd,de,be->b", away[:, c], own[c], away[:, c]) for c in range(C)], 1)
    close(learner.logits(x, y), want, 1e-3)


@pytest.mark.parametrize("size", [1, C])
def test_a_row_counts_as_often_as_its_weight_says(size):
    """Padding, of weight 0, not at all."""
    x, y = np.random.default_rng(3).normal(size=(6, D)).astype(np.float32), np.int32([0, 1, 1, 0, 3, 0])
    w = np.array([1, 2, 1, 0, 3, 0])
    begun = np.zeros((C, D), np.float32), np.zeros((size, D, D), np.float32), np.zeros(C, np.float32)
    given = (x, y, w.astype(np.float32)), (x.repeat(w, 0), y.repeat(w), np.ones(w.sum(), np.float32))
    found, wanted = (fecam.merged(*begun, learners.Rows(*one, np.float32(0))) for one in given)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_end_of_a_task_looks_at_all_of_its_batches():
    a, b = (toys.points(*rows(8, seed)) for seed in (0, 1))
    found = learners.flat(toys.stack([a, b]))
    np.testing.assert_array_equal(found.inputs, np.concatenate([a.inputs, b.inputs]))
    np.testing.assert_array_equal(found.targets, np.concatenate([a.targets, b.targets]))


def test_a_feature_that_never_varies_takes_no_part_in_the_shrinkage():
    rng = np.random.default_rng(0)
    away = rng.normal(size=(30, D)) * (np.arange(D) > 0)
    scatter = (away.T @ away).astype(np.float32)
    found = fecam.precisions(scatter[None], np.float32([29]), 1.0, 1.0, True)[0]
    close(np.asarray(found, np.float64), precision_of(np.float64(scatter) / 29, 1.0, 1.0, True), 1e-3)


def test_rows_that_are_all_the_same_have_the_identity():
    found = fecam.precisions(np.zeros((2, D, D), np.float32), np.float32([3, 0]), 1.0, 1.0, True)
    np.testing.assert_array_equal(found, np.stack([np.eye(D)] * 2))


PATH = [10.0**n for n in range(-3, 4)]


@pytest.mark.parametrize("by", ["held_out", "loo", "gcv"])
def test_ranpac_chooses_the_regularisation_on_rows_it_has_not_seen(by):
    adapter = {"expansion": "relu", "scale": "normal", "width": 20}
    learner, (x, y) = Learner(f"ranpac(gamma={by!r}, gammas={PATH})", **adapter), rows(64, 4)
    x = x + np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    learner.learn(x, y, size=32)
    features, targets, score = learner.features(x, y), np.eye(C)[y], []
    for gamma in PATH:
        ridge = functools.partial(np.add, gamma * np.eye(20))
        hat = features @ np.linalg.solve(ridge(features.T @ features), features.T)
        errors = targets - hat @ targets
        if by == "held_out":  # the last batch
            rest = features[:32]
            w = np.linalg.solve(ridge(rest.T @ rest), rest.T @ targets[:32])
            score.append(np.sum((features[32:] @ w - targets[32:]) ** 2))
        elif by == "loo":
            score.append(np.sum((errors / (1 - np.diag(hat))[:, None])[32:] ** 2))
        else:
            score.append(np.sum(errors**2) / (1 - np.trace(hat) / 64) ** 2)
    best = PATH[int(np.argmin(score))]
    assert PATH[0] < best < PATH[-1]
    assert learner.state.memory["gamma"] == np.float32(best)
    close(learner.params["head"], np.linalg.solve(features.T @ features + best * np.eye(20), features.T @ targets))


def test_ranpac_holds_a_fifth_out_of_a_task_whose_end_is_all_of_it(monkeypatch):
    """Classes that are new in it would have no row left: the best gamma would be the largest."""
    learner, (x, y) = Learner("ranpac(gamma=1.0)", expansion="relu", scale="normal", width=20), rows(64, 4)
    x = x + np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    made = compose.make(f"ranpac(gammas={PATH})", learner.setting._replace(steps=2))
    batches = [toys.points(x[i : i + 32], y[i : i + 32]) for i in (0, 32)]
    state = made.init(learner.state.params)
    for batch in batches:
        state, _ = toys.quick(made.step)(state, batch, jax.random.key(0))
    found = toys.quick(made.end_task)(state, toys.stack(batches), jax.random.key(0)).memory["gamma"]
    features, targets, score = learner.features(x, y), np.eye(C)[y], []
    for gamma in PATH:
        rest = features[:-12]
        w = np.linalg.solve(rest.T @ rest + gamma * np.eye(20), rest.T @ targets[:-12])
        score.append(np.sum((features[-12:] @ w - targets[-12:]) ** 2))
    assert found == np.float32(PATH[int(np.argmin(score))])
    assert found < PATH[-1]
    monkeypatch.setattr(learners, "choose", lambda m, rows, path, by: jnp.sum(rows.weights * jnp.arange(64)))
    told = toys.quick(lambda *args: made.end_task(*args).memory["gamma"])(state, toys.stack(batches), jax.random.key(0))
    assert told == sum(range(64 - 12, 64))  # the last 12 rows, each once


def test_ranpac_without_a_choice_is_ridge():
    learner, (x, y) = Learner("ranpac(gamma=2.0)"), rows(32)
    features, targets = learner.learn(x, y).features(x, y), np.eye(C)[y]
    head = np.linalg.solve(features.T @ features + 2 * np.eye(D), features.T @ targets)
    close(learner.params["head"], head)
    errors = np.sum((targets - features @ head) ** 2)
    np.testing.assert_allclose(learner.params["scale"], 32 * len(set(y)) / errors, rtol=1e-4)


def test_means_and_scatter_have_the_digits_of_the_sums():
    """Means 100 times as large as the spread: the scatter within the classes is a small difference of large sums."""
    rng = np.random.default_rng(2)
    y, x = rng.integers(0, C - 1, 90).astype(np.int32), rng.normal(size=(90, D)).astype(np.float32) + 100

    def found(x, y, w):
        m = moments.add(moments.empty(D, C), x, y, w)
        return learners.means_of(m.cross, m.counts), learners.scatter_within(m)

    means, scatter = (wide(pair) for pair in toys.quick(found)(x, y, np.ones(90, np.float32)))
    exact = means_of(np.float64(x), y)
    away = np.float64(x) - exact[y]
    close(means, exact.T, 1e-12)
    close(scatter, away.T @ away, 1e-7)
    assert not np.any(means[:, C - 1])


def wide(pair):
    return np.asarray(pair.high, np.float64) + np.asarray(pair.low, np.float64)


def test_options_that_do_not_fit_are_refused():
    linear, distances = toys.solved(**PLAIN), toys.solved(**PLAIN | {"head": "mahalanobis"})
    for setting, options, words in (
        (linear, "slda(epsilon=0.0)", r"slda\.epsilon=0\.0"),
        (linear, "slda(every=0)", r"slda\.every=0"),
        (linear, "ranpac(gamma=-1.0)", r"ranpac\.gamma=-1\.0"),
        (linear, "ranpac(gammas=[0.0])", r"ranpac\.gammas=0\.0"),
        (linear, "fecam", "'mahalanobis'"),
        (distances, "fecam(gamma1=-1.0)", r"fecam\.gamma1=-1\.0"),
        (distances, "nmc", "'linear'"),
        (toys.setting(), "slda", r"config\.adapter='analytic'"),
        (linear, "nmc + ewc", "remove ewc"),
    ):
        with pytest.raises(UserError, match=words) as error:
            compose.make(options, setting)
        assert "\n" not in str(error.value)


def test_a_discriminant_of_no_rows_is_zero():
    learner = Learner("slda(epsilon=0.5, every=4)", bias=False)
    head, bias, bound = toys.quick(slda.discriminant)(learner.state.memory["moments"], 0.5)
    assert not np.any(head)
    assert not np.any(bias)
    assert np.isfinite(bound)
