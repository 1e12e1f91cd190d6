"""What happens between the boundaries: stability gap, worst case and windowed figures of dense evaluation curves.

A curve is `values`, float [N] or [N, T], measured at increasing `steps`, int [N]. Values are losses unless
`higher_is_better=True`. Evaluations at task ends alone cannot see any of this (De Lange et al. 2023, "Continual
evaluation for lifelong learning: identifying the stability gap").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Gap(NamedTuple):
    """How one domain fares during one stage, relative to its loss L(t0) at the boundary where the stage begins."""

    depth: float  # max(0, max_n L(n) - L(t0)), nats: the worst moment
    peak: int | None  # steps after t0 at which it happens; None if it never got worse
    recovery: int | None  # steps after t0 until it is back; 0 = it never got worse; None = not within the stage
    area: float  # integral of max(0, L - L(t0)) over the stage, nats x steps
    lasting: float  # L(t1) - L(t0) at the end of the stage: what is left of it, negative if it improved
    transient: float  # depth - max(0, lasting): the part that came back, which is the stability gap proper


def gap(
    steps: Sequence[int] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    start: int,
    end: int,
    *,
    tolerance: float = 0.0,
    higher_is_better: bool = False,
) -> Gap:
    """Returns the stability gap of one domain over the stage (start, end].

    Depth and recovery follow De Lange et al. 2023 and Guo et al. 2024 ("Efficient continual pre-training by
    mitigating the stability gap"): recovery is the first evaluation after the worst moment with
    L <= L(t0) + tolerance. The area is exact for the piecewise linear curve through the evaluations, including
    the points where it crosses L(t0).

    Args:
      steps: increasing evaluation steps [N]; `start` must be one of them.
      values: loss of the domain [N].
      start: step t0 of the boundary.
      end: last step of the stage; evaluations after it are ignored.
      tolerance: how far above L(t0) counts as recovered, and as never having got worse; in the unit of `values`.
      higher_is_better: for accuracies.

    Raises:
      ValueError: no evaluation at `start`, or steps that do not increase.
    """
    t, L = _curve(steps, values, higher_is_better)
    at = np.flatnonzero(t == start)
    if not at.size:
        raise ValueError(f"no evaluation at step {start}, where the stage begins: a gap has no reference without it")
    stage = (t >= start) & (t <= end)
    t, rise = t[stage] - start, L[stage] - L[at[0]]
    worst = int(rise.argmax())
    depth, lasting = float(rise[worst]), float(rise[-1])
    area = _positive_area(t, rise)
    if depth <= tolerance:
        return Gap(depth, int(t[worst]) if depth > 0 else None, 0, area, lasting, depth - max(0.0, lasting))
    back = np.flatnonzero(rise[worst:] <= tolerance)
    recovery = int(t[worst + back[0]]) if back.size else None
    return Gap(depth, int(t[worst]), recovery, area, lasting, depth - max(0.0, lasting))


def worst_case(
    steps: Sequence[int] | np.ndarray,
    values: np.ndarray,
    ends: Sequence[int],
    *,
    at: int | None = None,
    higher_is_better: bool = False,
) -> tuple[float, float]:
    """Returns (worst, worst_case): min-ACC and WC-ACC of De Lange et al. 2023, or their loss analogs.

    With k the task in progress at step t and t_j the last step of task j:

      worst      = (1 / (k - 1)) sum_{j < k} max_{t_j < n <= t} L_n(j)       NaN for the first task
      worst_case = (1 / k) L_t(k) + (1 - 1 / k) worst                        L_t(1) for the first task

    The maximum is a minimum for accuracies. Results have the sign and unit of `values`.

    Args:
      steps: [N].
      values: [N, T], the curve of each task.
      ends: last step of each task [T], increasing.
      at: step t; by default the last evaluation.
      higher_is_better: for accuracies.
    """
    t, L = _curve(steps, values, higher_is_better)
    now = int(t[-1]) if at is None else at
    index = np.flatnonzero(t == now)
    if not index.size:
        raise ValueError(f"no evaluation at step {now}")
    k = min(int(np.searchsorted(np.asarray(ends), now)), L.shape[1] - 1)
    current = float(L[index[0], k])
    sign = -1.0 if higher_is_better else 1.0
    if k == 0:
        return float("nan"), sign * current
    peaks = []
    for j in range(k):
        since = L[(t > ends[j]) & (t <= now), j]
        peaks.append(float(since.max()) if since.size else float("nan"))
    worst = float(np.mean(peaks))
    return sign * worst, sign * (current / (k + 1) + worst * k / (k + 1))


def windowed_forgetting(values: np.ndarray, window: int, *, higher_is_better: bool = False) -> float:
    """Returns WF^w: the largest deterioration within any `window` consecutive evaluations, averaged over tasks.

    WF^w = mean_j max_{0 < n - m < w} (L_n(j) - L_m(j)), De Lange et al. 2023 (there with accuracies and
    the sign turned). Negative if every task improves all the time; NaN if there are fewer than two evaluations.

    Args:
      values: [N] or [N, T].
      window: w >= 2 evaluations.
      higher_is_better: for accuracies.
    """
    return _windowed(-values if higher_is_better else values, window)


def windowed_plasticity(values: np.ndarray, window: int, *, higher_is_better: bool = False) -> float:
    """Returns WP^w: the largest improvement within any `window` consecutive evaluations, averaged over tasks.

    WP^w = mean_j max_{0 < n - m < w} (L_m(j) - L_n(j)), De Lange et al. 2023.
    """
    return _windowed(values if higher_is_better else -values, window)


def average_anytime(steps: Sequence[int] | np.ndarray, values: np.ndarray, ends: Sequence[int]) -> float:
    """Returns the mean, over evaluations after training began, of the mean over the tasks seen so far.

    AAA of Caccia et al. 2022: (1 / N) sum_n (1 / k_n) sum_{j <= k_n} a_n(j). A task is seen from its first step
    on, that is for steps in (t_{j-1}, ...].
    """
    t, a = _curve(steps, values, False)
    starts = np.array([0, *ends[:-1]])
    means = [a[i, : int((starts < now).sum())].mean() for i, now in enumerate(t) if now > 0]
    return float(np.mean(means)) if means else float("nan")


def _curve(steps: Sequence[int] | np.ndarray, values: object, higher_is_better: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, losses) after checking that they belong together."""
    t, L = np.asarray(steps), np.asarray(values, np.float64)
    if t.ndim != 1 or L.shape[:1] != t.shape or t.size == 0:
        raise ValueError(f"curve of shape {L.shape} at steps of shape {t.shape}: expected one row per step")
    if (np.diff(t) <= 0).any():
        raise ValueError("evaluation steps must increase")
    return t, -L if higher_is_better else L


def _positive_area(t: np.ndarray, rise: np.ndarray) -> float:
    """Returns the integral of max(0, rise) for the piecewise linear curve through the points."""
    a, b, width = rise[:-1], rise[1:], np.diff(t)
    up, span = np.maximum(a, 0) + np.maximum(b, 0), np.abs(b - a)
    crossing = (a * b) < 0
    share = np.divide(up, span, out=np.ones_like(up), where=crossing)  # part of the piece that lies above zero
    return float((0.5 * up * width * share).sum())


def _windowed(worse: np.ndarray, window: int) -> float:
    """Returns mean_j max_{0 < n - m < window} (worse_n - worse_m)."""
    if window < 2:
        raise ValueError(f"window={window}: a change needs at least two evaluations")
    x = np.asarray(worse, np.float64)
    x = x[:, None] if x.ndim == 1 else x  # [N, T]
    lags = range(1, min(window, x.shape[0]))
    changes = [(x[d:] - x[:-d]).max(axis=0) for d in lags]
    return float(np.max(changes, axis=0).mean()) if changes else float("nan")
