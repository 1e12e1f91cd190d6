"""Ridge regression that never forgets: against float64 NumPy, in any order and batch, forwards and backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl import tree
from jaxcl.kernels.ridge import pair
from jaxcl.ridge import choice, moments, recursion, solve
from jaxcl.schema import UserError

D, C, B = 24, 5, 32
add, remove, merge = toys.quick(moments.add), toys.quick(moments.remove), toys.quick(moments.merge)
update, downdate = toys.quick(recursion.update), toys.quick(recursion.downdate)
weights_of = toys.quick(solve.weights, static_argnums=1)


def wide(x):
    return np.asarray(x.high, np.float64) + np.asarray(x.low, np.float64)


def off(got, want):
    """Returns the error relative to the norm."""
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def rows(count, seed=0, width=D, classes=C - 1):
    """Returns rectified features of decaying strength, labels and weights; the last class has no rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    means, mix = (np.random.default_rng(7).standard_normal(shape) for shape in ((classes, width), (width, width)))
    inner = (means[labels] + rng.standard_normal((count, width))) * 5 / np.arange(1, width + 1)
    return np.maximum(inner @ mix, 0).astype(np.float32), labels, np.ones(count, np.float32)


def sums64(x, labels, weights, classes=C):
    x, weighted = np.asarray(x, np.float64), np.asarray(weights, np.float64)[:, None] * x
    return x.T @ weighted, weighted.T @ np.eye(classes)[labels]


def joint64(x, labels, weights, gamma, classes=C):
    gram, cross = sums64(x, labels, weights, classes)
    return np.linalg.solve(gram + gamma * np.eye(len(gram)), cross)


def stream(*batches, width=D, classes=C):
    return functools.reduce(lambda m, batch: add(m, *batch), batches, moments.empty(width, classes))


def split(batch, at):
    return [tuple(part[lo:hi] for part in batch) for lo, hi in zip((0, *at), (*at, None), strict=True)]


def test_sums_have_the_quality_of_float64_and_padding_has_no_effect():
    x, labels, weights = rows(3 * B)
    weights = np.random.default_rng(1).uniform(0.1, 2, len(x)).astype(np.float32)
    weights[:3], labels[3:5] = 0, (-1, C)
    gram, cross = sums64(x[5:], labels[5:], weights[5:])
    x[:3] = np.nan
    x[3:5] = np.inf
    m = stream(*split((x, labels, weights), (B, 2 * B)))
    assert off(wide(m.gram), gram) < 1e-12
    assert off(wide(m.cross), cross) < 1e-12
    np.testing.assert_array_equal(m.gram.high, m.gram.high.T)
    np.testing.assert_array_equal(m.gram.low, m.gram.low.T)
    np.testing.assert_allclose(wide(m.counts), np.bincount(labels[5:], np.float64(weights[5:]), C), rtol=1e-12)
    assert m.total == pytest.approx(wide(m.counts).sum())


def test_ten_thousand_updates_keep_the_quality_of_float64():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((10_000, 2, 4)) + 1).astype(np.float32)
    labels, weights = rng.integers(0, 2, x.shape[:2]).astype(np.int32), np.ones(x.shape[:2], np.float32)
    run = toys.quick(lambda m, all: jax.lax.scan(lambda m, batch: (moments.add(m, *batch), None), m, all)[0])
    m = run(moments.empty(4, 2), (x, labels, weights))
    gram, cross = sums64(x.reshape(-1, 4), labels.reshape(-1), weights.reshape(-1), 2)
    assert off(wide(m.gram), gram) < 1e-13
    assert off(wide(m.cross), cross) < 1e-13
    assert m.total == 20_000


def test_rows_beyond_a_block_are_summed_in_blocks():
    batch = rows(2 * pair.ROWS + 7)
    m = stream(batch)
    assert off(wide(m.gram), sums64(*batch)[0]) < 4 * 2.0**-40  # slices have 9 bits for 128 rows
    assert off(wide(m.cross), sums64(*batch)[1]) < 1e-12
    single = stream(*split(batch, (pair.ROWS, 2 * pair.ROWS)))
    assert off(wide(m.gram), wide(single.gram)) < 1e-13
    for part in ("high", "low"):  # the sums of classes to the last bit: the same blocks of rows
        np.testing.assert_array_equal(getattr(m.cross, part), getattr(single.cross, part))


@settings(max_examples=12)
@given(st.randoms(use_true_random=False), st.sampled_from([0.1, 1.0, 100.0]))
def test_weights_do_not_depend_on_order_and_batches(random, gamma):
    batch = rows(3 * B, 3)
    order = random.sample(range(3 * B), 3 * B)
    spread = [order.pop() if order and random.random() < 0.6 else -1 for _ in range(8 * B)]
    index = np.asarray(spread + order + [-1] * (-len(order) % B))
    weights = (index >= 0).astype(np.float32)  # -1 is padding
    m, inverse = moments.empty(D, C), recursion.Inverse(jnp.eye(D) / gamma, jnp.zeros((D, C)))
    for at in range(0, len(index), B):
        part = index[at : at + B]
        m = add(m, batch[0][part], batch[1][part], weights[at : at + B])
        inverse = update(inverse, batch[0][part], batch[1][part], weights[at : at + B])
    want = joint64(*batch, gamma)
    found = weights_of(m, gamma)
    assert off(wide(pair.Pair(found.weights, found.low)), want) < 1e-11
    largest = np.linalg.norm(sums64(*batch)[0], 2)
    assert off(inverse.w, want) < 2.0**-24 * (1 + largest / gamma)  # the condition of S at most
    assert not np.asarray(inverse.w)[:, -1].any()


def test_moments_are_a_commutative_monoid():
    a, b, c = (stream(rows(B, seed)) for seed in range(3))
    for got, want in (
        (merge(a, b), merge(b, a)),
        (merge(merge(a, b), c), merge(a, merge(b, c))),
        (merge(merge(a, b), c), stream(*(rows(B, seed) for seed in range(3)))),
        (merge(a, moments.empty(D, C)), a),
    ):
        assert off(wide(got.gram), wide(want.gram)) < 1e-13
        assert off(wide(got.cross), wide(want.cross)) < 1e-13
        np.testing.assert_array_equal(got.counts.high, want.counts.high)
    jax.tree.map(np.testing.assert_array_equal, merge(a, moments.empty(D, C)), a)


def test_rows_are_unlearned():
    kept, gone = rows(4 * B, 0), rows(B, 1)
    m = remove(stream(*split(kept, (B, 2 * B, 3 * B)), gone), *gone)
    assert off(wide(m.gram), sums64(*kept)[0]) < 1e-12
    np.testing.assert_array_equal(wide(m.counts), np.bincount(kept[1], kept[2], C))
    found = weights_of(m, 0.1)
    assert off(wide(pair.Pair(found.weights, found.low)), joint64(*kept, 0.1)) < 1e-12
    inverse = downdate(recursion.start(stream(kept, gone), 1.0), *gone)
    assert off(inverse.w, joint64(*kept, 1.0)) < 2e-5
    assert not weights_of(remove(stream(gone), *gone), 1.0).weights.any()


def test_a_process_that_computes_in_float64_has_the_same_weights():
    batch = rows(B)

    def run(*batch):
        m = moments.add(moments.empty(D, C), *batch)
        inverse = recursion.update(recursion.start(m, 0.1), *batch)
        return m, solve.weights(m, 0.1), inverse, recursion.downdate(inverse, *(part[:3] for part in batch))

    wanted = run(*batch)
    with jax.enable_x64(True):
        found = run(*batch), jax.jit(run)(*batch)
    for one in found:
        for (name, want), got in zip(tree.named_leaves(wanted), jax.tree.leaves(one), strict=True):
            assert got.dtype == want.dtype, name
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_streams_are_mapped_over():
    """Sums, weights, their path and the inverse of several streams at once are those of each."""
    batches = [rows(B, i) for i in range(3)]
    x, labels, weights = (jnp.stack([jnp.asarray(batch[k]) for batch in batches]) for k in range(3))

    def run(x, labels, weights):
        m = moments.add(moments.empty(D, C), x, labels, weights)
        inverse = recursion.update(recursion.start(m, 0.1), x, labels, weights)
        rest = solve.path(m, np.ones(2)).gcv, solve.leave_one_out(m, x, labels, weights, np.ones(2))
        return m, solve.weights(m, 0.1).weights, inverse.w, *rest

    together = jax.jit(jax.vmap(run))(x, labels, weights)
    for i in range(3):
        alone = jax.jit(run)(x[i], labels[i], weights[i])
        for (name, one), many in zip(tree.named_leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-4, err_msg=name)
        assert off(np.asarray(together[1][i]), joint64(*batches[i], 0.1)) < 1e-6


def test_a_head_grows_without_a_new_program():
    traces = []

    @toys.quick
    def grow(*arguments):
        traces.append(1)
        return moments.add(*arguments)

    m = moments.empty(4, 20)
    for label in range(20):
        x = np.random.default_rng(label).standard_normal((8, 4)).astype(np.float32)
        m = grow(m, x, np.full(8, label, np.int32), np.ones(8, np.float32))
        found = weights_of(m, 0.5)
        for unseen in (m.cross.high, m.cross.low, found.weights, found.low):
            assert not np.asarray(unseen)[:, label + 1 :].any()
        assert np.asarray(found.weights)[:, : label + 1].any(0).all()
    assert len(traces) == 1


def test_without_float64_the_weights_have_ten_digits(monkeypatch):
    batch = rows(8 * B, 5)
    best = jax.jit(lambda m: solve.weights(m, 1.0))(stream(batch))
    monkeypatch.setattr(pair, "dot", pair._dot_sliced)  # as on TPUs
    found = jax.jit(lambda m: solve.weights(m, 1.0))(stream(batch))
    assert np.any(best.low != found.low)
    assert off(wide(pair.Pair(best.weights, best.low)), joint64(*batch, 1.0)) < 1e-12
    error = off(wide(pair.Pair(found.weights, found.low)), joint64(*batch, 1.0))
    assert 0 < error < 1e-9
    assert error <= found.bound


@pytest.mark.parametrize("gamma", [100.0, 0.1, 1e-4])
@pytest.mark.parametrize("count", [8 * B, D // 2])
def test_the_error_of_a_solution_is_small_and_below_its_bound(gamma, count):
    batch = rows(count, 5)
    found = weights_of(stream(batch), gamma)
    error = off(wide(pair.Pair(found.weights, found.low)), joint64(*batch, gamma))
    condition = np.linalg.cond(sums64(*batch)[0] + gamma * np.eye(D))
    assert error <= found.bound
    assert found.bound in (pytest.approx(float(2 * found.residual * found.condition), rel=1e-6), np.inf)
    assert condition / 1.05 < found.condition < 10 * condition
    if condition > 2**24:  # beyond float32: the bound says so
        assert found.bound == np.inf
    else:
        assert error < 1e-12 * condition
        assert found.bound < 1e-11 * condition


def test_a_bound_holds_for_every_residual_that_is_left(monkeypatch):
    """Without refinement the error is that of float32, and the bound knows."""
    monkeypatch.setattr(solve, "_ROUNDS", 0)
    monkeypatch.setattr(solve, "_refine", functools.partial(rough, solve._refine))
    batch = rows(8 * B, 5)
    found = toys.quick(functools.partial(solve.weights, gamma=1.0))(stream(batch))
    error = off(found.weights, joint64(*batch, 1.0))
    assert 1e-5 < error <= found.bound < 1


def test_a_bound_holds_where_the_factor_is_of_another_matrix():
    """Ten rows of large features: rounding makes the matrix indefinite, and the factor is of a larger one.

    The least eigenvalue is gamma, since the other directions have no rows.
    """
    gamma = 0.1
    for seed in range(4):
        x, labels, weights = rows(B, seed)
        x, weights = np.float32(1000) * x, np.where(np.arange(B) < 10, weights, 0)
        found = weights_of(stream((x, labels, weights)), gamma)
        few = x[:10].astype(np.float64)
        want = few.T @ np.linalg.solve(few @ few.T + gamma * np.eye(10), np.eye(C)[labels[:10]])
        assert off(wide(pair.Pair(found.weights, found.low)), want) <= found.bound
        assert found.least == np.float32(gamma)


def rough(real, gram, right, gamma, precondition, w, scale):
    return real(gram, right, gamma, precondition, pair.of(precondition(right.high) * 1.0001), scale)


def test_a_round_of_refinement_that_makes_it_worse_is_not_kept(monkeypatch):
    real, calls = solve._correction, []

    def worse(*of):
        calls.append(1)
        return real(*of) * (1.0 if len(calls) == 1 else -40.0)

    monkeypatch.setattr(solve, "_correction", worse)
    monkeypatch.setattr(jax.lax, "while_loop", looped)
    batch = rows(8 * B, 5)
    m, gamma = stream(batch), pair.of(0.01)
    lower, largest = solve.factor(m.gram, gamma)[0], jnp.float32(np.linalg.norm(sums64(*batch)[0], 2))
    w, found = solve._refine(m.gram, m.cross, gamma, lambda r: 0.9 * solve._apply(lower)(r), pair.zeros(D, C), largest)
    assert len(calls) == 2
    gram, cross = sums64(*batch)
    left = cross - (gram + 0.01 * np.eye(D)) @ wide(w)
    assert np.linalg.norm(left) / (float(largest) * np.linalg.norm(wide(w))) == pytest.approx(float(found), rel=1e-3)


def looped(on, body, carry):
    while on(carry):
        carry = body(carry)
    return carry


@pytest.mark.parametrize(("shift", "rounding"), [(1.0, 0.0), (0.0, 7.0)])
def test_the_least_eigenvalue_does_not_count_what_the_factor_is_above_the_matrix(shift, rounding):
    """By a shift that is known, or by as much as rounding may be: seven units of the largest eigenvalue."""
    basis, gamma = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0], 1e-9
    values = np.concatenate([np.zeros(4), np.linspace(1, 2, D - 4)])
    gram = np.float32((basis * values) @ basis.T)
    above = shift + rounding * 2.0**-24 * values[-1]
    lower = np.float32(np.linalg.cholesky((basis * (values + gamma + above)) @ basis.T))
    largest, least = solve._spectrum(jnp.asarray(gram), jnp.float32(gamma), jnp.asarray(lower), jnp.float32(shift))
    assert largest == pytest.approx(2, rel=0.05)
    assert least == np.float32(gamma)


def test_one_eigendecomposition_gives_all_gammas():
    batch, gammas = rows(6 * B, 6), 10.0 ** np.arange(-2, 4)
    found = toys.quick(lambda m: solve.path(m, gammas))(stream(batch))
    gram, count = sums64(*batch)[0], 6 * B
    for n, gamma in enumerate(gammas):
        want = joint64(*batch, gamma)
        squares = ((np.eye(C)[batch[1]] - batch[0].astype(np.float64) @ want) ** 2).sum()
        degrees = np.trace(np.linalg.solve(gram + gamma * np.eye(D), gram))
        assert off(wide(found.weights)[n], want) < 5e-9
        np.testing.assert_allclose(wide(found.squares)[n], squares, rtol=1e-9)
        np.testing.assert_allclose(wide(found.degrees)[n], degrees, rtol=1e-9)
        np.testing.assert_allclose(wide(found.gcv)[n], squares / count / (1 - degrees / count) ** 2, rtol=1e-9)


def test_errors_without_the_row_itself_are_those_of_refits():
    batch, gammas = rows(40, 8), (0.1, 10.0)
    x, labels, weights = batch
    weights = np.where(np.arange(40) % 3, 1.0, 0.5).astype(np.float32)
    weights[4] = 0
    leave = toys.quick(lambda m, *rows: solve.leave_one_out(m, *rows, np.asarray(gammas)))
    found = leave(stream((x, labels, weights)), x, labels, weights)
    for got, gamma in zip(found, gammas, strict=True):
        for n in range(40):
            others = np.arange(40) != n
            refit = joint64(x[others], labels[others], weights[others], gamma)
            error = ((np.eye(C)[labels[n]] - x[n] @ refit) ** 2).sum()
            np.testing.assert_allclose(got[n], error if weights[n] else 0, rtol=2e-3, atol=1e-6)


def test_an_old_factor_is_refreshed():
    old, new = rows(9 * B, 1), rows(B, 2)
    before = weights_of(stream(old), 1.0)
    m, want = stream(old, new), joint64(*(np.concatenate(p) for p in zip(old, new, strict=True)), 1.0)
    refresh = toys.quick(solve.refresh, static_argnums=(1, 4))
    errors = [off(refresh(m, 1.0, before.factor, before.weights, n), want) for n in (0, 2, 6)]
    assert errors[0] > 1e-3
    assert errors[1] < errors[0] / 10
    assert errors[2] < 2e-6


def published32(r, w, x, y):
    """One update as it was published, from left to right, in float32."""
    k = np.linalg.inv(np.eye(len(x), dtype=np.float32) + x @ r @ x.T)
    r = r - r @ x.T @ k @ x @ r
    return r, w + r @ x.T @ (y - x @ w)


def test_large_batches_are_robust_where_the_published_order_collapses():
    rng, d, classes, gamma = np.random.default_rng(0), 512, 10, 0.1
    labels = rng.integers(0, classes, 1024).astype(np.int32)
    inner = (rng.standard_normal((classes, 768))[labels] + rng.standard_normal((1024, 768))) * 20 / np.arange(1, 769)
    x = np.maximum(inner @ rng.uniform(-1, 1, (768, d)) / 768**0.5, 0).astype(np.float32)
    want, y = joint64(x, labels, np.ones(1024), gamma, classes), np.eye(classes, dtype=np.float32)[labels]
    start = recursion.Inverse(jnp.eye(d) / gamma, jnp.zeros((d, classes)))
    found = jax.jit(recursion.update)(start, x, labels, np.ones(1024, np.float32))
    theirs = published32(np.asarray(start.r), np.asarray(start.w), x, y)
    assert off(theirs[1], want) > 1
    assert (np.argmax(x @ theirs[1], 1) == labels).mean() < 0.7
    assert off(found.w, want) < 2e-3
    assert (np.argmax(x @ np.asarray(found.w), 1) == np.argmax(x @ want, 1)).mean() > 0.999
    np.testing.assert_array_equal(found.r, found.r.T)
    assert np.linalg.eigvalsh(np.asarray(found.r))[0] > 0


def test_a_start_from_the_moments_ends_the_drift():
    batch = rows(8 * B, 9)
    m, gamma = stream(batch), 0.01
    exact = recursion.start(m, gamma)
    assert off(exact.w, joint64(*batch, gamma)) < 1e-6
    assert off(exact.r, np.linalg.inv(sums64(*batch)[0] + gamma * np.eye(D))) < 2e-2
    far = update(recursion.Inverse(jnp.eye(D) / gamma, jnp.zeros((D, C))), *batch)
    assert recursion.drift(exact, m, gamma) < recursion.drift(far, m, gamma)
    assert recursion.drift(recursion.Inverse(exact.r * 1.1, exact.w), m, gamma) == pytest.approx(0.1, rel=0.2)
    bent = np.asarray(exact.r, np.float64) * np.linspace(1, 2, D)  # columns of unequal error
    v = np.random.default_rng(0).standard_normal((D, 4))
    away = (sums64(*batch)[0] + gamma * np.eye(D)) @ bent @ v - v
    worst = (np.linalg.norm(away, axis=0) / np.linalg.norm(v, axis=0)).max()
    assert recursion.drift(recursion.Inverse(jnp.float32(bent), exact.w), m, gamma) == pytest.approx(worst, rel=1e-2)
    nothing = recursion.start(moments.empty(D, C), gamma)
    np.testing.assert_allclose(nothing.r, np.eye(D) / gamma, rtol=1e-6)
    assert not nothing.w.any()


def test_the_parts_of_an_update_are_those_of_the_paper():
    old, new, gamma = rows(4 * B, 1, classes=3), rows(B, 2), 1.0
    before = stream(old)
    parts = toys.quick(solve.decompose, static_argnums=2)(before, stream(old, new), gamma)
    exposed = np.arange(C) < 3
    (gram, cross), (more, _) = sums64(*old), sums64(*new)
    y, x = np.eye(C)[new[1]], new[0].astype(np.float64)
    w, r = np.linalg.solve(gram + gamma * np.eye(D), cross), np.linalg.inv(gram + more + gamma * np.eye(D))
    unexposed = w - r @ x.T @ x @ w + r @ x.T @ (y * ~exposed)
    assert off(wide(parts.unexposed), unexposed) < 1e-11
    assert off(wide(parts.gain), r @ x.T @ (y * exposed)) < 1e-11
    whole = joint64(*(np.concatenate(p) for p in zip(old, new, strict=True)), 1.0)
    assert off(wide(parts.gain) + wide(parts.unexposed), whole) < 1e-11
    assert off(wide(parts.unexposed), whole) > 0.1


def equations(jaxpr, times=1):
    """Yields (equation, how often it runs), inner ones of loops, branches and kernels included."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
        if eqn.primitive.name == "cond":  # a branch for TPUs, one for GPUs, and last the one for all others
            leaves = list(filter(is_jaxpr, leaves))[-1:]
        for inner in leaves:
            if is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner), times * eqn.params.get("length", 1))


def work(jaxpr):
    """Returns the operations of all products."""
    total = 0
    for eqn, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            ((left, _), _) = eqn.params["dimension_numbers"]
            total += times * 2 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[left[0]]
        if eqn.primitive.name == "triangular_solve":
            total += times * eqn.outvars[0].aval.size * min(eqn.invars[0].aval.shape)
    return total


def precisions(function, *arguments):
    """Returns the (precision, type of the sum) of every product."""
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    dots = [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    return [(set(eqn.params["precision"] or ()), eqn.outvars[0].aval.dtype.name) for eqn in dots]


def is_jaxpr(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def test_an_update_costs_what_it_says_and_no_second_matrix():
    d, b, classes = 1024, 64, 10
    state = recursion.Inverse(jnp.zeros((d, d)), jnp.zeros((d, classes)))
    batch = jnp.zeros((b, d)), jnp.zeros(b, jnp.int32), jnp.ones(b)
    traced = jax.jit(recursion.update, donate_argnums=0).trace(state, *batch)
    assert work(traced.jaxpr.jaxpr) <= 1.1 * (3.25 * d * d * b + 3 * d * b * b + 4 * d * b * classes)
    compiled = traced.lower().compile()
    assert compiled.cost_analysis()["flops"] <= 1.1 * (4 * d * d * b + 3 * d * b * b + 4 * d * b * classes)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 0.19 * 4 * d * d  # three arrays of [b, d]
    assert memory.alias_size_in_bytes >= 4 * d * (d + classes)
    m = jax.eval_shape(lambda: moments.empty(d, classes))
    compiled = jax.jit(moments.add, donate_argnums=0).lower(m, *batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * d * d
    assert compiled.memory_analysis().alias_size_in_bytes >= 8 * d * (d + classes)


def everything(m, inverse, x, labels, weights):
    m = moments.remove(moments.add(m, x, labels, weights), x[:4], labels[:4], weights[:4])
    found = solve.weights(m, 0.1)
    followed = recursion.update(inverse, x, labels, weights, block=8)  # blocks that follow each other
    inverse = recursion.downdate(followed, x[:4], labels[:4], weights[:4])
    more = solve.path(m, np.ones(2)), solve.leave_one_out(m, x, labels, weights, np.ones(2))
    more += solve.decompose(m, m, 0.1), solve.refresh(m, 0.1, found.factor, found.weights)
    return m, found, recursion.start(m, 0.1), recursion.drift(inverse, m, 0.1), inverse, more


def test_no_product_depends_on_the_default_precision():
    arguments = moments.empty(D, C), recursion.Inverse(jnp.eye(D), jnp.zeros((D, C))), *rows(B)
    found = precisions(everything, *arguments)
    assert len(found) > 35
    assert all(one[0] == {jax.lax.Precision.HIGHEST} and one[1] in ("float32", "float64") for one in found)


def test_the_cheapest_way_is_chosen_and_said():
    often, seldom = (choice.choose(8192, 256, 100, updates) for updates in (1, 100))
    assert often.name == "recursion"
    assert "every batch of 256 rows" in often.why
    assert seldom.name == "refresh"
    assert choice.choose(8192, 256, 100, 100, iterations=40).name == "solve"  # a factor is cheaper than that many
    for found in (often, seldom):
        assert found.costs[found.name].seconds == min(cost.seconds for cost in found.costs.values())
    d, b, c, t = 64, 48, 5, 3  # rows as many as matter
    sums, moved = 6 * d * d * b * t, 16 * d * d * t
    costs = choice.choose(d, b, c, t, iterations=2).costs
    assert costs["recursion"][:2] == (
        sums + t * (3 * d * d * b + 3 * d * b * b + 4 * d * b * c),
        moved + 12 * d * d * t,
    )
    assert costs["refresh"][:2] == (sums + 12 * d * d * c + 4 * d * d * c * 2, moved + 8 * d * d * 3)
    assert costs["solve"][:2] == (sums + d**3 / 3 + 3 * (12 * d * d * c + 16 * d * d * c), moved + 40 * d * d)
    slow = choice.choose(8192, 1, 10, 1, bandwidth=1e9)
    assert "memory traffic" in slow.why
    with pytest.raises(UserError, match="rows=0"):
        choice.choose(64, 0, 10, 1)
