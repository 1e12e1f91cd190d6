"""Golden numbers, sign conventions and planted gaps for everything that is derived from evaluations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import forgetting, seeds, stability

# Accuracies on which the conventions of published libraries all differ; row 0 is measured before training.
ACCURACY = np.array(
    [
        [0.10, 0.12, 0.11, 0.10],
        [0.90, 0.30, 0.25, 0.20],
        [0.70, 0.92, 0.35, 0.22],
        [0.95, 0.60, 0.94, 0.40],
        [0.85, 0.93, 0.50, 0.96],
    ]
)
LOSS = np.array([[4.0, 5.0, 6.0], [2.0, 4.5, 6.5], [3.0, 1.5, 5.0], [3.5, 2.5, 1.0]])


def test_golden_accuracy_matrix():
    up = {"higher_is_better": True}
    assert forgetting.retained(ACCURACY) == pytest.approx(0.81)
    assert forgetting.learned(ACCURACY) == pytest.approx(0.93)
    assert forgetting.average_incremental(ACCURACY) == pytest.approx(0.8375)
    assert forgetting.backward_transfer(ACCURACY, **up) == pytest.approx(-0.16)
    assert forgetting.forward_transfer(ACCURACY, **up) == pytest.approx(0.24)
    assert forgetting.forgetting(ACCURACY, variant="earlier", **up) == pytest.approx(0.53 / 3)
    assert forgetting.forgetting(ACCURACY, variant="best", **up) == pytest.approx(0.18)
    assert forgetting.forgetting(ACCURACY, variant="learned", **up) == pytest.approx(0.16)


def test_golden_loss_matrix():
    assert forgetting.per_task_forgetting(LOSS) == pytest.approx([1.5, 1.0, 0.0])
    assert forgetting.forgetting(LOSS) == pytest.approx(1.25)
    assert forgetting.backward_transfer(LOSS) == pytest.approx(-1.25)
    assert forgetting.forward_transfer(LOSS) == pytest.approx(((5.0 - 4.5) + (6.0 - 5.0)) / 2)
    assert forgetting.learned(LOSS) == pytest.approx(1.5)
    assert forgetting.retained(LOSS) == pytest.approx(7 / 3)
    assert forgetting.average_incremental(LOSS) == pytest.approx((2.0 + 2.25 + 7 / 3) / 3)


def test_forgetting_is_positive_when_a_task_got_worse():
    """`best - current`, the sign of one published implementation, would be negative here."""
    worse = np.array([[3.0, 3.0], [1.0, 3.0], [2.0, 1.0]])
    assert forgetting.forgetting(worse) == 1.0
    assert forgetting.backward_transfer(worse) == -1.0
    assert forgetting.forgetting(-worse, higher_is_better=True) == 1.0
    assert forgetting.backward_transfer(-worse, higher_is_better=True) == -1.0


def test_knowledge_from_before_training_can_be_forgotten():
    """A pre-trained model knows task 0 better before the stream than after its own task."""
    R = np.array([[1.0, 9.0], [2.0, 9.0], [2.5, 3.0]])
    assert forgetting.forgetting(R) == 1.5
    assert forgetting.forgetting(R, variant="learned") == 0.5


def test_improvement_after_the_fact_is_negative_only_without_the_last_row():
    better = np.array([[3.0, 3.0, 3.0], [1.0, 3.0, 3.0], [1.5, 1.0, 3.0], [0.5, 1.0, 1.0]])
    assert forgetting.forgetting(better) == 0.0
    assert forgetting.forgetting(better, variant="earlier") == pytest.approx(-0.25)
    assert forgetting.backward_transfer(better) == pytest.approx(0.25)


def test_missing_measurements_are_nan_and_nothing_is_inferred():
    R = LOSS.copy()
    R[0] = np.nan
    assert np.isnan(forgetting.forward_transfer(R))
    assert np.isnan(forgetting.forgetting(R))
    assert forgetting.backward_transfer(R) == pytest.approx(-1.25)  # does not need the first row


def test_one_task_has_nothing_to_forget():
    R = np.array([[3.0], [1.0]])
    figures = forgetting.summary(R)
    assert figures["learned"] == figures["retained"] == 1.0
    assert all(np.isnan(figures[name]) for name in ("forgetting", "backward_transfer", "forward_transfer"))
    assert np.isnan(forgetting.retained(np.zeros((1, 0))))


def test_matrix_from_boundaries_and_the_finished_part():
    rows = {-1: {"a": 3.0, "b": 4.0, "other": 9.0}, 0: {"a": 1.0, "b": 3.5}}
    R = forgetting.matrix(rows, ["a", "b"])
    np.testing.assert_array_equal(R, [[3.0, 4.0], [1.0, 3.5], [np.nan, np.nan]])
    np.testing.assert_array_equal(forgetting.finished(R), [[3.0], [1.0]])
    assert forgetting.finished(LOSS).shape == (4, 3)
    assert forgetting.finished(forgetting.matrix({}, ["a"])).shape == (1, 0)


def test_malformed_matrix_is_refused():
    with pytest.raises(ValueError, match="row 0 measured before training"):
        forgetting.forgetting(np.zeros((3, 3)))


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_relations_that_hold_for_every_matrix(T, seed):
    R = np.random.default_rng(seed).normal(size=(T + 1, T))
    assert (forgetting.per_task_forgetting(R) >= 0).all()
    if T > 1:
        assert forgetting.forgetting(R) >= -forgetting.backward_transfer(R) - 1e-12
        # retained - learned = -BWT (T - 1) / T for losses
        drift = forgetting.retained(R) - forgetting.learned(R)
        assert drift == pytest.approx(-forgetting.backward_transfer(R) * (T - 1) / T)
    loss, score = forgetting.summary(R), forgetting.summary(-R, higher_is_better=True)
    for name in ("forgetting", "forgetting_earlier", "backward_transfer", "forward_transfer"):
        np.testing.assert_allclose(loss[name], score[name])


# A boundary at step 100 with loss 2: up to 3.5 at step 120, back to 2 at step 160, then down to 1.8.
STEPS = np.array([0, 50, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200, 210])
VALUES = np.array([5.0, 3.0, 2.0, 2.75, 3.5, 3.125, 2.75, 2.375, 2.0, 1.95, 1.9, 1.85, 1.8, 7.0])


def test_planted_gap_is_recovered_exactly():
    gap = stability.gap(STEPS, VALUES, 100, 200)
    assert gap.depth == 1.5
    assert gap.peak == 20
    assert gap.recovery == 60
    assert gap.area == pytest.approx(0.5 * 1.5 * 20 + 0.5 * 1.5 * 40)
    assert gap.lasting == pytest.approx(-0.2)
    assert gap.transient == 1.5


def test_gap_of_accuracies_mirrors_the_gap_of_losses():
    assert stability.gap(STEPS, -VALUES, 100, 200, higher_is_better=True) == stability.gap(STEPS, VALUES, 100, 200)
    flipped = stability.gap(STEPS, -VALUES, 100, 200)  # the wrong sign sees an improvement only
    assert flipped.depth == pytest.approx(0.2)


def test_area_is_exact_where_the_curve_crosses_the_reference_between_evaluations():
    gap = stability.gap([0, 10, 20], [1.0, 2.0, 0.0], 0, 20)  # above the reference until step 15
    assert gap.area == pytest.approx(0.5 * 10 * 1 + 0.5 * 5 * 1)
    assert gap.recovery == 20


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=8))
def test_area_equals_numerical_integration(values):
    steps = np.arange(len(values)) * 7
    fine = np.linspace(0, steps[-1], 20001)
    rise = np.interp(fine, steps, np.asarray(values) - values[0])
    expected = np.trapezoid(np.maximum(rise, 0), fine)
    assert stability.gap(steps, values, 0, int(steps[-1])).area == pytest.approx(expected, abs=0.01)


def test_gap_that_never_recovers_and_one_that_never_opens():
    lasting = stability.gap([0, 1, 2], [1.0, 2.0, 1.5], 0, 2)
    assert (lasting.recovery, lasting.lasting, lasting.transient) == (None, 0.5, 0.5)
    monotone = stability.gap([0, 1, 2], [1.0, 1.5, 2.0], 0, 2)
    assert (monotone.depth, monotone.recovery, monotone.transient) == (1.0, None, 0.0)
    none = stability.gap([0, 1, 2], [1.0, 0.9, 0.8], 0, 2)
    assert (none.depth, none.peak, none.recovery, none.area) == (0.0, None, 0, 0.0)
    within = stability.gap([0, 1, 2], [1.0, 1.05, 1.04], 0, 2, tolerance=0.1)
    assert (within.recovery, within.peak) == (0, 1)


def test_gap_needs_the_reference_and_increasing_steps():
    with pytest.raises(ValueError, match="no evaluation at step 5"):
        stability.gap([0, 10], [1.0, 1.0], 5, 10)
    with pytest.raises(ValueError, match="must increase"):
        stability.gap([0, 0], [1.0, 1.0], 0, 10)


def test_worst_case_against_a_slow_transcription():
    """Accuracies: min-ACC = mean over earlier tasks of the minimum since their end, WC-ACC weighs the current one."""
    rng = np.random.default_rng(0)
    steps, ends = np.arange(0, 31), [10, 20, 30]
    a = rng.uniform(size=(31, 3))
    for now in (10, 15, 20, 27, 30):
        k = 0 if now <= 10 else 1 if now <= 20 else 2
        minima = [min(a[n, j] for n in range(31) if ends[j] < n <= now) for j in range(k)]
        low = sum(minima) / k if k else float("nan")
        case = a[now, k] / (k + 1) + (1 - 1 / (k + 1)) * low if k else a[now, 0]
        got = stability.worst_case(steps, a, ends, at=now, higher_is_better=True)
        np.testing.assert_allclose(got, (low, case))
        np.testing.assert_allclose(stability.worst_case(steps, -a, ends, at=now), (-low, -case))


@pytest.mark.parametrize("window", [2, 5, 40])
def test_windowed_figures_against_a_slow_transcription(window):
    a = np.random.default_rng(1).uniform(size=(12, 2))  # accuracies
    pairs = [(m, n) for n in range(12) for m in range(n) if n - m <= window - 1]
    drop = np.mean([max(a[m, j] - a[n, j] for m, n in pairs) for j in range(2)])
    gain = np.mean([max(a[n, j] - a[m, j] for m, n in pairs) for j in range(2)])
    assert stability.windowed_forgetting(a, window, higher_is_better=True) == pytest.approx(drop)
    assert stability.windowed_plasticity(a, window, higher_is_better=True) == pytest.approx(gain)
    assert stability.windowed_forgetting(-a, window) == pytest.approx(drop)
    assert stability.windowed_plasticity(-a, window) == pytest.approx(gain)


def test_windowed_figures_of_a_monotone_curve():
    falling = np.array([4.0, 3.0, 2.5])
    assert stability.windowed_forgetting(falling, 2) == -0.5
    assert stability.windowed_plasticity(falling, 3) == 1.5
    assert np.isnan(stability.windowed_forgetting(falling[:1], 2))
    with pytest.raises(ValueError, match="at least two"):
        stability.windowed_forgetting(falling, 1)


def test_average_anytime_counts_tasks_from_their_first_step():
    steps, ends = [0, 1, 2, 3, 4], [2, 4]
    values = np.array([[9.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 5.0], [4.0, 6.0]])
    assert stability.average_anytime(steps, values, ends) == pytest.approx((1 + 2 + 4 + 5) / 4)


def test_interval_against_scipy_and_tables():
    scipy_stats = pytest.importorskip("scipy.stats")
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    low, high = scipy_stats.t.interval(0.95, 4, loc=np.mean(x), scale=scipy_stats.sem(x))
    got = seeds.interval(x)
    assert (got.low, got.high, got.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert seeds.interval([0.0, 2.0]).half_width == pytest.approx(12.7062, rel=1e-5)  # t table, 1 degree of freedom


def test_interval_of_one_and_of_no_seed():
    one = seeds.interval([3.0])
    assert (one.mean, one.n) == (3.0, 1)
    assert np.isnan(one.half_width)
    assert not one.excludes_zero
    assert np.isnan(seeds.interval([]).mean)


def test_paired_difference_uses_common_seeds_and_cancels_what_they_share():
    shared = {0: 10.0, 1: 20.0, 2: 30.0, 7: 5.0}
    better = {0: 9.0, 1: 19.1, 2: 28.9, 3: 1.0}
    got = seeds.paired(better, shared)
    assert got.n == 3
    assert got.mean == pytest.approx(-1.0)
    assert got.excludes_zero
    assert got.half_width < 0.3 < seeds.interval(list(better.values())).half_width
