"""Bad input of ridge sums: a clear error before anything is computed, and the state is as it was."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ridge_test import B, C, D, add, rows, stream

from jaxcl.ridge import classes, moments, recursion, solve
from jaxcl.schema import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.asarray([0, C], np.int32)}, rf"labels={C}: the head has classes 0 to {C - 1}"),
        ({"labels": np.asarray([-1, 0], np.int32)}, "labels=-1"),
        ({"labels": np.zeros(3, np.int32)}, r"labels of shape \[3\] for 2 rows"),
        ({"features": np.full((2, D), np.nan)}, r"features\[0, 0\]=nan: not finite"),
        ({"features": np.zeros((2, D + 1))}, rf"\[2, {D + 1}\]: the moments are of \[b, {D}\]"),
        ({"features": np.full((2, D), 1e39)}, r"features\[0, 0\]=1e\+39: not finite in float32"),
        ({"features": np.full((2, D), 1e20)}, r"features\[0, 0\]=1e\+20: not finite in float32, or its square"),
        ({"weights": np.asarray([1.0, -1.0])}, "weights=-1.0: how often a row counts"),
        ({"weights": float("nan")}, "weights=nan"),
        ({"weights": np.ones(3)}, r"weights of shape \[3\] for 2 rows"),
        ({"features": np.full((2, D), np.nan), "weights": np.asarray([0, 1])}, r"features\[1, 0\]=nan"),
        ({"features": np.zeros((2, D), complex)}, "features of complex128: give real numbers"),
        ({"features": np.full((2, D), "x")}, "features of <U1: give real numbers"),
        ({"labels": np.asarray([0.0, 0.5])}, "labels of float64: give whole numbers"),
        ({"gamma": "x"}, "gamma=x"),
        ({"gamma": 1e39}, r"gamma=1e\+39"),
        ({"gamma": 1e-46}, "gamma=1e-46"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": float("nan")}, "gamma=nan"),
    ],
)
def test_bad_batches_are_named(change, message):
    good = {"features": np.zeros((2, D), np.float32), "labels": np.zeros(2, np.int32), "gamma": 0.1}
    m = stream(rows(B))
    before = jax.tree.map(np.array, m)
    moments.check(m, **good)
    with pytest.raises(UserError, match=message):
        moments.check(m, **(good | change))
    jax.tree.map(np.testing.assert_array_equal, m, before)


def test_rows_without_weight_are_not_looked_at():
    bad = np.asarray([[np.nan] * D, [1.0] * D])
    moments.check(moments.empty(D, C), bad, np.asarray([C + 5, 0]), np.asarray([0.0, 1.0]))


def test_rows_that_were_never_added_are_not_taken_out():
    x, labels, weights = rows(B)
    m = add(moments.empty(D, C), x, labels, weights)
    moments.check(m, x, labels, gone=True)
    moments.check(m, x[:3], labels[:3], gone=True)
    with pytest.raises(UserError, match=rf"rows of class {C - 1} are to go, of 0: take out rows that were added"):
        moments.check(m, x[:1], np.full(1, C - 1), gone=True)
    with pytest.raises(UserError, match=r"features\[:, \d+\] of the rows to go have squares of .* in sum, of "):
        moments.check(m, 2 * x, labels, gone=True)
    moments.check(m, 2 * x, labels)
    half = add(moments.empty(D, C), x, labels, weights / 2)
    moments.check(half, x, labels, weights / 2, gone=True)
    with pytest.raises(UserError, match="are to go, of"):
        moments.check(half, x, labels, gone=True)
    left = moments.remove(m, x, labels, weights)
    with pytest.raises(UserError, match=r"1 rows of class \d are to go, of 0"):
        moments.check(left, x[:1], labels[:1], gone=True)


@pytest.mark.parametrize("gamma", [0.0, -1, float("nan"), float("inf"), np.float32(-1), np.int64(0), 1e39, None])
def test_no_weights_come_of_a_gamma_that_is_not_positive(gamma):
    m, eye = moments.empty(D, C), jnp.eye(D)
    for solved in (
        lambda: solve.weights(m, gamma),
        lambda: jax.jit(solve.weights, static_argnums=1)(m, gamma),
        lambda: solve.refresh(m, gamma, eye, jnp.zeros((D, C))),
        lambda: solve.decompose(m, m, gamma),
        lambda: recursion.start(m, gamma),
    ):
        with pytest.raises(UserError, match=rf"gamma={re.escape(str(gamma))}: the inverse needs a positive number"):
            solved()


@pytest.mark.parametrize("gammas", [[1.0, 0.0], [-1.0], np.array([1.0, np.nan]), jnp.array([0.0])])
def test_no_path_has_a_gamma_that_is_not_positive(gammas):
    x, labels, weights = rows(4)
    m = stream(rows(B))
    inverse = recursion.start(m, 1.0)
    for solved in (
        lambda: solve.path(m, np.asarray(gammas)),
        lambda: solve.leave_one_out(m, x, labels, weights, np.asarray(gammas)),
        lambda: recursion.drift(inverse, m, np.asarray(gammas)[-1]),
    ):
        with pytest.raises(UserError, match=r"gamma=.*: the inverse needs a positive number"):
            solved()


def test_rows_of_another_size_are_refused_when_a_program_is_traced():
    x, labels, weights = rows(4)
    m, inverse = moments.empty(D, C), recursion.Inverse(jnp.eye(D), jnp.zeros((D, C)))
    for function, state in (
        (moments.add, m),
        (moments.remove, m),
        (recursion.update, inverse),
        (recursion.downdate, inverse),
    ):
        with pytest.raises(
            UserError, match=rf"features of shape \[4, {D - 1}\]: the moments are of \[b, {D}\] features"
        ):
            jax.eval_shape(function, state, x[:, 1:], labels, weights)
        for name, *others in (("labels", labels[:1], weights), ("weights", labels, np.float32(1))):
            with pytest.raises(UserError, match=rf"{name} of shape \[1?\] for features of shape \[4, {D}\]"):
                jax.eval_shape(function, state, x, *others)


def test_what_is_no_row_label_or_number_is_refused():
    x, labels, weights = rows(4)
    m, s = moments.empty(D, C), classes.empty(D, C)
    inverse = recursion.Inverse(jnp.eye(D), jnp.zeros((D, C)))
    for call, message in (
        (lambda: classes.add(s, x[:, 1:], labels, weights), rf"features of shape \[4, {D - 1}\]"),
        (lambda: solve.leave_one_out(m, x[:, 1:], labels, weights, [1.0]), rf"features of shape \[4, {D - 1}\]"),
        (lambda: recursion.stream(inverse, x, labels, weights), r"give batches, \[k, b, d\], or call update"),
        (lambda: moments.add(m, x, labels.astype(np.float32), weights), "labels of float32: give whole numbers"),
        (lambda: recursion.update(inverse, x, labels > 0, weights), "labels of bool: give whole numbers"),
        (lambda: solve.weights(m, np.ones(1)), r"gamma of shape \[1\]: give one number"),
        (lambda: solve.weights(m, np.ones(0)), r"gamma of shape \[0\]: give one number"),
        (lambda: solve.path(m, 0.1), r"gamma of shape \[\]: give a list of numbers"),
        (lambda: solve.path(m, []), r"gamma of shape \[0\]: give a list of numbers"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_rows_of_infinite_weight_are_padding():
    x, labels, weights = rows(8)
    odd = np.concatenate([weights[:4], [np.inf, np.nan, -1.0, 0.0]]).astype(np.float32)
    found = moments.add(moments.empty(D, C), x, labels, odd)
    want = moments.add(moments.empty(D, C), x[:4], labels[:4], weights[:4])
    for part in ("gram", "cross", "counts"):
        np.testing.assert_array_equal(getattr(found, part).high, getattr(want, part).high)


def test_only_moments_of_one_map_are_merged():
    mapped = [moments.fingerprint({"w": np.full((2, 3), value, np.float32)}) for value in (0, 0, 1)]
    assert mapped[0] == mapped[1] != mapped[2]
    a, b = (moments.empty(D, C, mapped[n]) for n in (0, 2))
    moments.check_merge(a, moments.empty(D, C, mapped[1]))
    with pytest.raises(UserError, match="different maps"):
        moments.check_merge(a, b)
    with pytest.raises(UserError, match="as many features and classes"):
        moments.check_merge(a, moments.empty(D, C + 1, mapped[0]))
    before = jax.tree.map(np.array, (a, b))
    with pytest.raises(UserError, match="different maps"):
        moments.merge(a, b)
    with pytest.raises(UserError, match="as many features and classes"):
        jax.jit(moments.merge)(a, moments.empty(D + 1, C))  # sizes are known when it is traced
    jax.tree.map(np.testing.assert_array_equal, (a, b), before)
    assert add(a, *rows(B)).features == mapped[0]
