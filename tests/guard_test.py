"""The guard: no effect on good steps, no trace of bad ones, statistics that cannot be poisoned."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose, train
from jaxcl.guard import guard
from jaxcl.schema import UserError
from jaxcl.types import Method, TrainState


def echo():
    """A method whose loss and gradient norm are what the rows say, and which would store both everywhere."""

    def step(state, batch, key):
        loss, norm = batch.weights[0, 0], batch.weights[0, 1]
        new = TrainState(state.step + 1, {"w": state.params["w"] + loss}, state.opt_state + norm, state.memory * loss)
        return new, {"loss": loss, "grad_norm": norm, "weight": jnp.ones(())}

    def init(params):
        return TrainState(jnp.zeros((), jnp.int32), params, jnp.zeros(()), jnp.ones(()))

    return Method(init, step, lambda state, batch, key: state)


def run(values, ends=(), **options):
    """Feeds (loss, gradient norm) pairs; returns the final state and, for each step, (skipped, consecutive)."""
    method = guard(echo(), **options)
    step, end_task = toys.quick(method.step), toys.quick(method.end_task)
    state, told, batch = method.init({"w": jnp.zeros(())}), [], toys.text(0)
    for i, value in enumerate(values):
        pair = jnp.asarray(value if isinstance(value, tuple) else (value, 1.0), jnp.float32)
        rows = dataclasses.replace(batch, weights=batch.weights.at[0, :2].set(pair))
        state, metrics = step(state, rows, jax.random.key(0))
        told.append((int(metrics["guard/skipped"]), int(metrics["guard/consecutive"])))
        if i in ends:
            state = end_task(state, toys.stack([batch]), jax.random.key(0))
    return state, told


NOISE = [2.0 + 0.1 * np.sin(7 * i) for i in range(40)]
BAD = [float("nan"), float("inf"), -float("inf"), (2.0, float("nan")), (2.0, float("inf"))]


@pytest.mark.parametrize("options", ["cpt", "er(rows=2, capacity=8) + reptile(every=2)"])
def test_good_steps_are_untouched(options):
    """Bit for bit, at the compiler's default optimisation."""
    plain = compose.make(options, toys.setting(tx=optax.adamw(1e-2)))
    guarded = guard(plain, warmup=2)
    params = toys.language_model().init(jax.random.key(1))
    a, b = plain.init(params), guarded.init(params)
    steps = jax.jit(plain.step), jax.jit(guarded.step)
    for i in range(6):
        a, told_a = steps[0](a, toys.text(i), jax.random.key(i))
        b, told_b = steps[1](b, toys.text(i), jax.random.key(i))
        assert float(told_b["guard/skipped"]) == 0
        assert all(np.array_equal(told_b[name], value) for name, value in told_a.items())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(compose.inner(b)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_bad_steps_leave_no_trace():
    clean, _ = run(NOISE, warmup=4, window=16)
    values = list(NOISE)
    for position, bad in zip((0, 3, 10, 11, 30), BAD, strict=True):
        values.insert(position, bad)
    values.insert(20, 50.0)  # an outlying loss
    values.insert(25, (2.0, 90.0))  # an outlying gradient norm
    values += [float("nan"), 60.0]  # the window is full: a value stored now would push a good one out
    state, told = run(values, warmup=4, window=16)
    assert told[-1][0] == 9
    assert int(state.step) == len(values)
    for name in ("params", "opt_state"):
        np.testing.assert_array_equal(
            jax.tree.leaves(getattr(state, name))[0], jax.tree.leaves(getattr(clean, name))[0]
        )
    np.testing.assert_array_equal(state.memory["inner"], clean.memory["inner"])
    np.testing.assert_array_equal(state.memory["guard"]["window"], clean.memory["guard"]["window"])


def test_counters():
    nan = float("nan")
    _, told = run([1.0, nan, nan, 1.0, nan], warmup=4)
    assert told == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def test_non_finite_values_are_never_accepted():
    state, told = run([1.0] + 10 * [float("nan")], patience=3)
    assert told[-1] == (10, 10)
    assert np.isfinite(state.params["w"])


def test_a_new_task_may_jump():
    """The loss leaps at a task switch: fine after `end_task`, a spike without it."""
    values = NOISE[:20] + [v + 20 for v in NOISE[:5]]
    assert run(values, ends=(19,), warmup=4)[1][-1] == (0, 0)
    assert run(values, warmup=4)[1][20] == (1, 1)


def test_a_level_that_stays_is_believed():
    """Without task boundaries a jump that lasts must not stop training for ever."""
    values = NOISE[:20] + [v + 20 for v in NOISE[:10]]
    _, told = run(values, warmup=4, patience=3)
    assert [t[1] for t in told[20:]] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]


def test_by_default_outliers_are_believed_before_the_loop_gives_up():
    patience = inspect.signature(guard).parameters["patience"].default
    assert patience < train.Loop().rollback


def test_the_limit_is_robust():
    """A third of outliers within the window moves the median of the accepted values little."""
    rng = np.random.default_rng(0)
    values = list(2 + 0.1 * rng.normal(size=200))
    assert run(values, warmup=8, spike=8.0)[1][-1][0] == 0  # no false alarm on noise
    falling = list(4 * np.exp(-np.arange(200) / 40) + 0.02 * rng.normal(size=200) + 0.1)
    assert run(falling, warmup=8)[1][-1][0] == 0
    for i in range(20, 200, 5):
        values[i] = 9.0
    assert run(values, warmup=8, window=16)[1][-1][0] == 36
    assert run(values, warmup=8, spike=float("inf"))[1][-1][0] == 0


def test_outliers_of_the_warmup_do_not_widen_the_limit():
    """Nothing is rejected before it is over: three steps of sixteen must not decide what an outlier is."""
    values = NOISE[:16]
    values[4] = values[8] = values[12] = 100.0
    assert run([*values, 9.0], warmup=16)[1][-2:] == [(0, 0), (1, 1)]
    assert run([*values, NOISE[16]], warmup=16)[1][-1] == (0, 0)


def test_a_loss_that_hardly_varies_is_not_guarded_too_closely():
    """The spread counts as at least 5 % of the median: of 2.0 and ten spreads that is a limit of 3.0."""
    assert run([2.0] * 10 + [2.9], warmup=4)[1][-1] == (0, 0)
    assert run([2.0] * 10 + [3.1], warmup=4)[1][-1] == (1, 1)


@pytest.mark.parametrize("name", ["spike", "warmup", "window", "patience"])
def test_options_are_checked(name):
    with pytest.raises(UserError, match=f"config.guard.{name}=0"):
        guard(echo(), **{name: 0})
