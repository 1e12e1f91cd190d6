"""Schedules against float64 transcriptions of the papers, at their joints, and under a longer horizon."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl import schedules
from jaxcl.schema import UserError

INFINITE = {"peak": 3e-4, "constant": 1.65e-4, "end": 3e-5, "warmup": 100, "cooldown": 600}
SHAPES = ["cosine", "inverse_sqrt"]


def infinite_oracle(n, shape, *, peak, constant, end, warmup, cooldown, stay, anneal, timescale=10.0):
    """Ibrahim et al., one step at a time, with phase lengths counted from the end of the phase before."""
    if warmup and n <= warmup:
        return peak * n / warmup
    n -= warmup
    if n <= cooldown:
        if shape == "cosine":
            return constant + (peak - constant) / 2 * (1 + math.cos(math.pi * n / cooldown))
        h = lambda x: 1 / math.sqrt(1 + timescale * x) - 1  # noqa: E731
        return peak + (constant - peak) / h(1) * h(n / cooldown)
    n -= cooldown
    if n <= stay:
        return constant
    return max(end, constant * math.exp(math.log(end / constant) * (n - stay) / anneal))


def wsd_oracle(n, shape, *, peak, end, warmup, start, decay):
    if n < warmup:
        return peak * n / warmup
    if n < start:
        return peak
    x = min((n - start) / decay, 1)
    if shape == "exponential":
        return peak * (end / peak) ** x
    return end + (peak - end) * ((1 - math.sqrt(x)) if shape == "1-sqrt" else 1 - x)


def rewarm_oracle(n, peak, end, ends, warmup):
    start = 0
    for k, stop in enumerate(ends):
        if n < stop:
            low = 0 if k == 0 else end
            if n - start < warmup:
                return low + (peak - low) * (n - start) / warmup
            return end + (peak - end) * (1 + math.cos(math.pi * (n - start - warmup) / (stop - start - warmup))) / 2
        start = stop
    return end


def both(schedule, steps):
    """The schedule in float64, after checking that the traced int32 step gives the same in float32."""
    values = schedule(steps)
    traced = jax.jit(schedule)(jnp.asarray(steps, jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, values, rtol=2e-6, atol=1e-6 * values.max())
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_infinite_equals_the_paper(shape):
    steps = np.arange(4500)
    schedule = schedules.make(name="infinite", shape=shape, **INFINITE, anneal=1300, anneal_from=2700)
    wanted = [infinite_oracle(n, shape, **INFINITE, stay=2000, anneal=1300) for n in steps]
    values = both(schedule, steps)
    np.testing.assert_allclose(values, wanted, rtol=1e-7)
    np.testing.assert_allclose(values[[100, 700, 2700, 4000]], [3e-4, 1.65e-4, 1.65e-4, 3e-5], rtol=1e-12)
    assert np.all(np.diff(values[100:]) <= 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_infinite_is_continuous_at_its_joints(shape):
    schedule = schedules.make(name="infinite", shape=shape, **INFINITE, anneal=1300, anneal_from=2700)
    assert np.abs(np.diff(schedule(np.arange(5000)))).max() <= 3e-6 * (1 + 1e-9)  # the warmup step is the largest


def test_annealing_ends_after_exactly_its_length():
    """An exponent of (n - start) / (length + start) is in circulation: it stops at 9.5e-5 instead of 3e-5."""
    schedule = schedules.make(name="infinite", **INFINITE, anneal=1300, anneal_from=2700)
    assert schedule(4000) == pytest.approx(3e-5, rel=1e-12)
    assert schedule(3999) > 3e-5 * 1.001
    assert schedule(10**6) == pytest.approx(3e-5, rel=1e-12)
    wrong = 1.65e-4 * (3e-5 / 1.65e-4) ** (1300 / (1300 + 2700))
    assert wrong > 9e-5


@pytest.mark.parametrize("shape", ["1-sqrt", "linear", "exponential"])
def test_wsd_equals_the_papers(shape):
    steps = np.arange(1300)
    values = both(schedules.make(name="wsd", peak=1e-3, warmup=50, steps=1000, decay=200, end=1e-5, shape=shape), steps)
    wanted = [wsd_oracle(n, shape, peak=1e-3, end=1e-5, warmup=50, start=800, decay=200) for n in steps]
    np.testing.assert_allclose(values, wanted, rtol=1e-7)
    assert values[-1] == pytest.approx(1e-5)


def test_wsd_decays_without_being_told():
    values = schedules.make(name="wsd", peak=1e-3, steps=1000)(np.arange(1001))
    assert values[900] == 1e-3
    assert values[901] < 1e-3
    assert values[1000] == 0


def test_rewarm_cosine_equals_the_transcription_and_is_continuous():
    steps, ends = np.arange(900), [300, 500, 800]
    values = both(schedules.make(name="rewarm_cosine", peak=1e-3, end=1e-4, warmup=20, ends=ends), steps)
    np.testing.assert_allclose(values, [rewarm_oracle(n, 1e-3, 1e-4, ends, 20) for n in steps], rtol=1e-7)
    assert np.abs(np.diff(values)).max() <= 1e-3 / 20 * (1 + 1e-9)
    assert values[320] == values[20] == values[520] == 1e-3


def test_stages_may_have_peaks_of_their_own_and_fractions_of_warmup():
    values = schedules.rewarm_cosine(peak=[1e-3, 5e-4], ends=[100, 300], warmup=0.1, end=0.0)(np.arange(300))
    assert values[10] == 1e-3
    assert values[120] == 5e-4
    assert values[100] == 0


def test_cosine_equals_optax():
    ours = both(schedules.make(name="cosine", peak=1e-3, steps=1000, warmup=100, end=1e-4), np.arange(1200))
    theirs = optax.warmup_cosine_decay_schedule(0, 1e-3, 100, 1000, 1e-4)(jnp.arange(1200))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_constant():
    np.testing.assert_allclose(
        both(schedules.make(name="constant", peak=2.0, warmup=4), np.arange(6)), [0, 0.5, 1, 1.5, 2, 2]
    )
    np.testing.assert_array_equal(both(schedules.make(name="constant", peak=2.0), np.arange(3)), [2, 2, 2])


@pytest.mark.parametrize(
    "options", [{"name": "cosine", "peak": 1.0, "end": 0.1}, {"name": "wsd", "peak": 1.0, "end": 0.1}]
)
def test_stays_at_its_last_value_after_the_end(options):
    schedule = schedules.make(**options, ends=[100])
    assert schedule(10**6) == schedule(100) == pytest.approx(0.1)


def test_steps_and_stage_ends_come_from_the_stream():
    assert schedules.make(name="cosine", peak=1.0, ends=[50, 80])(80) == 0
    assert schedules.make(name="cosine", peak=1.0, steps=100, ends=[50, 80])(80) > 0
    assert schedules.make(name="rewarm_cosine", peak=1.0, warmup=10, ends=[50, 80])(60) == 1
    assert schedules.make(name="infinite", peak=1.0, constant=1.0, ends=[50, 80])(60) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(0, 60), st.sampled_from(["1-sqrt", "linear", "exponential"])
)
def test_a_longer_horizon_leaves_the_executed_prefix_of_wsd_alone(stable, longer, warmup, shape):
    options = {"name": "wsd", "peak": 1e-3, "end": 1e-5, "warmup": warmup, "decay": 50, "shape": shape}
    start = warmup + stable
    prefix = np.arange(start + 1)
    short = schedules.make(**options, ends=[start + 50])(prefix)
    np.testing.assert_array_equal(short, schedules.make(**options, ends=[start + 50 + longer])(prefix))
    np.testing.assert_array_equal(short, schedules.make(**options, anneal_from=start)(prefix))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 500), st.integers(1, 500), st.integers(1, 300), st.sampled_from(SHAPES))
def test_the_infinite_prefix_depends_neither_on_the_stream_nor_on_a_branch(stay, more, anneal, shape):
    options = {"name": "infinite", "shape": shape, **INFINITE}
    branch = 700 + stay
    prefix = np.arange(branch + 1)
    main = schedules.make(**options, ends=[branch])(prefix)
    np.testing.assert_array_equal(main, schedules.make(**options, ends=[branch, branch + more])(prefix))
    np.testing.assert_array_equal(main, schedules.make(**options, anneal=anneal, anneal_from=branch)(prefix))


def test_cosine_does_depend_on_its_horizon():
    """The control of the two tests above."""
    a, b = (schedules.make(name="cosine", peak=1.0, ends=[end])(50) for end in (100, 110))
    assert a != b


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cosin", "peak": 1.0}, "cosine"),
        ({"name": "cosine", "peak": 1.0}, "steps"),
        ({"name": "cosine", "peak": 1.0, "steps": 10, "warmpu": 3}, "warmup"),
        ({"name": "cosine", "peak": -1.0, "steps": 10}, "peak"),
        ({"name": "cosine", "peak": 1.0, "steps": 10, "warmup": 10}, "warmup"),
        ({"name": "cosine", "peak": 1.0, "steps": 10, "end": 2.0}, "end"),
        ({"name": "rewarm_cosine", "peak": 1.0, "ends": [5, 5]}, "ends"),
        ({"name": "rewarm_cosine", "peak": [1.0, 2.0], "ends": [5]}, "peak"),
        ({"name": "wsd", "peak": 1.0}, "steps"),
        ({"name": "wsd", "peak": 1.0, "steps": 10, "shape": "exponential"}, "end"),
        ({"name": "wsd", "peak": 1.0, "steps": 10, "decay": 0}, "decay"),
        ({"name": "wsd", "peak": 1.0, "steps": 10, "warmup": 9, "decay": 5}, "warmup"),
        ({"name": "infinite", "peak": 1.0, "constant": 2.0}, "constant"),
        ({"name": "infinite", "peak": 1.0, "constant": 0.5}, "cooldown"),
        ({"name": "infinite", **INFINITE, "anneal_from": 800}, "anneal"),
        ({"name": "infinite", **INFINITE, "anneal": 10, "anneal_from": 699}, "constant phase"),
        ({"name": "infinite", **(INFINITE | {"end": 0.0}), "anneal": 10, "anneal_from": 800}, "end"),
    ],
)
def test_bad_options_name_the_field_and_the_remedy(options, words):
    with pytest.raises(UserError, match=words):
        schedules.make(**options)
