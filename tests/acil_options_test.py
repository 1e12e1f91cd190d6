"""ACIL: the label gain, the choice of the regularisation and of the way to the weights, and what is refused."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from closed_form import GAMMA, C, D, Learner, joint, off, rows

from jaxcl import compose
from jaxcl.kernels.ridge import pair
from jaxcl.methods import acil
from jaxcl.ridge import learner as learners
from jaxcl.ridge import moments
from jaxcl.schema import UserError

QUICK = True


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


def test_a_row_counts_in_the_choice_as_often_as_its_weight_says():
    """Ten rows of full weight whose labels are noise, and thirty of a quarter that can be learned."""
    rng, path = np.random.default_rng(8), (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    x, y = rng.standard_normal((40, 8)).astype(np.float32), rng.integers(0, 2, 40).astype(np.int32)
    y[10:] = x[10:, 0] > 0
    weights = np.where(np.arange(40) < 10, 1.0, 0.25).astype(np.float32)
    score = np.zeros((2, len(path)))
    for k, gamma in enumerate(path):
        for n in range(40):
            past, labels, w = (np.delete(part, n, 0).astype(np.float64) for part in (x, np.eye(2)[y], weights[:, None]))
            head = np.linalg.solve(past.T @ (w * past) + gamma * np.eye(8), past.T @ (w * labels))
            score[:, k] += np.sum((np.eye(2)[y[n]] - x[n] @ head) ** 2) * np.array([weights[n], 1.0])
    weighted, plain = score.argmin(1)
    assert weighted != plain
    rows = learners.Rows(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights), jnp.zeros(()))
    m = moments.add(moments.empty(8, 2), *rows.counted)
    assert learners.choose(m, rows, path, "loo") == np.float32(path[weighted])


def test_a_score_that_is_no_number_is_not_chosen(monkeypatch):
    found = types.SimpleNamespace(gcv=pair.of(jnp.array([jnp.nan, 2.0, 1.0, jnp.inf])))
    monkeypatch.setattr(learners.solve, "path", lambda m, gammas: found)
    assert learners.choose(moments.empty(2, 2), None, (1.0, 2.0, 3.0, 4.0), "gcv") == 3


def test_the_choice_is_told_and_options_that_do_not_fit_are_refused():
    setting = toys.solved(width=2000)
    assert "cheapest" in compose.explain("acil(every=1)", setting)["acil"]
    assert acil.plan(setting, 0.1, 1, "auto", True).name == "recursion"
    assert acil.plan(setting._replace(steps=2), 0.1, None, "auto", True).name == "recursion"
    assert acil.plan(setting._replace(steps=2), 0.1, 64, "auto", True).name == "solve"
    assert acil.plan(setting, 0.1, None, "auto", True).name == "solve"
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
