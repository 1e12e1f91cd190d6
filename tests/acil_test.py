"""ACIL as a method: the head is the ridge regression of all rows in float64, whatever the order and the batches."""

import dataclasses

import jax
import numpy as np
import pytest
from closed_form import GAMMA, C, Learner, batches, joint, off, rows

from jaxcl.ridge import moments, recursion

QUICK = True


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
            assert off(learner.head, learner.exact()) <= learner.told["bound"]
            assert how == "recursion" or learner.told["bound"] < 1e-5
        else:
            np.testing.assert_array_equal(learner.head, before)


def test_between_two_factors_weights_are_refreshed():
    """Rows are few enough for an older factor from 88 on; before, each step brings a new one."""
    learner, data, refreshed = Learner("acil(how='refresh', every=1)"), batches(rows(160), 8), 0
    for i, (x, y) in enumerate(data):
        before = learner.head
        learner.step(x, y)
        if learner.state.memory["factored"] < 8 * (i + 1):
            refreshed += 1
            assert off(before, learner.exact()) > 1e-3
        assert off(learner.head, learner.exact()) <= learner.told["bound"] < 1e-4
    assert refreshed == 5


def test_a_bound_counts_on_the_least_eigenvalue_of_the_last_factor():
    """Neither on gamma alone, which more rows leave far behind, nor on more than the rows of the factor have."""
    learner, least = Learner("acil(how='refresh', every=1)", width=5), {0: GAMMA}
    for n, (x, y) in enumerate(batches(rows(120), 8)):
        learner.step(x, y)
        memory = learner.state.memory
        least[8 * n + 8] = np.linalg.eigvalsh(np.float64(memory["moments"].gram.high))[0] + GAMMA
        known = least[int(memory["factored"])]
        assert 0.45 * known < memory["least"] < 1.001 * known
        assert off(learner.head, learner.exact()) <= learner.told["bound"] < 1e-4
    assert known > 3 * GAMMA
    assert memory["factored"] < 120
    assert learner.over(x, y).state.memory["factored"] == 120  # weights of a task that is over are solved for


@pytest.mark.parametrize("how", ["refresh", "recursion"])
def test_a_branch_with_another_gamma_starts_anew(how):
    """The factor, the inverse and the least eigenvalue of the run are of its own gamma."""
    run, branch = Learner(f"acil(gamma=1000.0, how={how!r}, every=1)"), Learner(f"acil(how={how!r}, every=1)")
    *data, last = batches(rows(96), 8)
    for x, y in data:
        run.step(x, y)
    branch.state = run.state
    branch.step(*last)
    assert branch.told["gamma"] == np.float32(GAMMA)
    assert off(branch.head, branch.exact()) <= branch.told["bound"] < 1e-4


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


def test_the_recursion_starts_anew_from_the_sums_at_the_end_of_a_task():
    learner = Learner("acil(how='recursion')")
    for x, y in batches(rows(96), 8):
        learner.step(x, y)
    followed = learner.state.memory["inverse"].w
    learner.over(x, y)
    inverse, m = learner.state.memory["inverse"], learner.state.memory["moments"]
    np.testing.assert_array_equal(inverse.w, learner.state.params["head"])
    assert np.any(inverse.w != followed)
    jax.tree.map(np.testing.assert_array_equal, inverse, jax.jit(recursion.start, static_argnums=1)(m, GAMMA))


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
