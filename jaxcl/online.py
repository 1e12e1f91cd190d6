"""Accuracy while a stream comes: at every evaluation over the classes that have come by then, as pure NumPy.

Evaluations are `right`, float [N, C], the accuracy on each of C classes at increasing `steps`, int [N]. `since`, float
[C], is the number of steps after which a class has come, infinity for one that never does; `rows`, float [C], is how
many held-out rows it has. What the model says of a class before it has come does not count. A value that was not
measured is NaN, and so is every figure that needs it.

    A_t    = accuracy at t on the held-out rows of all classes that have come
    A_AUC  = mean of A_t over all evaluations,  A_avg = mean over the ends of tasks,  A_last = at the last end
    F      = mean over classes c with a maximum above 0 of  max_(ends before the last) a_c - a_c at the last end

Source: Moon et al. 2023 (Si-Blurry, https://arxiv.org/abs/2308.09303, section 5) and Koh et al. 2022 (i-Blurry, "any
time inference"), whose evaluations are evenly spaced; here every evaluation of the run counts, those at ends of tasks
among them. The mean over classes instead of rows is what unequal classes are judged by (SODA10M, CLAD-C).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def seen_accuracy(steps: np.ndarray, right: np.ndarray, rows: np.ndarray, since: np.ndarray) -> np.ndarray:
    """Returns A_t at every evaluation, float64 [N]; NaN where no class has come."""
    right, come = _checked(steps, right, rows, since)
    return _mean(right, come * np.asarray(rows, np.float64))


def class_accuracy(steps: np.ndarray, right: np.ndarray, rows: np.ndarray, since: np.ndarray) -> np.ndarray:
    """Returns the mean over the classes that have come, each with the same weight, float64 [N]."""
    right, come = _checked(steps, right, rows, since)
    return _mean(right, come.astype(np.float64))


def class_forgetting(steps: np.ndarray, right: np.ndarray, since: np.ndarray, ends: Sequence[int]) -> float:
    """Returns F over the evaluations at `ends`, steps of which each must be one; NaN for fewer than two."""
    right, come = _checked(steps, right, np.ones(np.shape(right)[1]), since)
    at = np.searchsorted(steps, ends)
    if len(at) < 2:
        return float("nan")
    table = np.where(come, right, 0.0)[at]
    best = table[:-1].max(axis=0)
    lost = (best - table[-1])[~(best <= 0)]  # NaN stays
    return float(lost.mean()) if lost.size else float("nan")


def summary(
    steps: np.ndarray, right: np.ndarray, rows: np.ndarray, since: np.ndarray, ends: Sequence[int]
) -> dict[str, float]:
    """Returns every figure of this module by name.

    `a_auc`, `a_avg`, `a_last` and `forgetting`, as above; `mean_class`, the mean over classes at the last end, and
    `mean_class_avg`, that over the ends. NaN before the first end.

    Args:
      steps, right, rows, since: see the module.
      ends: last steps of the tasks that are finished, each of them one of `steps`.
    """
    whole, balanced = (f(steps, right, rows, since) for f in (seen_accuracy, class_accuracy))
    at = np.searchsorted(steps, ends)
    known = np.asarray(steps) >= np.min(np.asarray(since, np.float64), initial=np.inf)
    nothing = float("nan")
    return {
        "a_auc": float(whole[known].mean()) if known.any() else nothing,
        "a_avg": float(whole[at].mean()) if len(at) else nothing,
        "a_last": float(whole[at[-1]]) if len(at) else nothing,
        "forgetting": class_forgetting(steps, right, since, ends),
        "mean_class": float(balanced[at[-1]]) if len(at) else nothing,
        "mean_class_avg": float(balanced[at].mean()) if len(at) else nothing,
    }


def _mean(right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1)
    sums = np.where(weights > 0, right * weights, 0.0).sum(axis=1)
    return np.where(total > 0, sums / np.where(total > 0, total, 1.0), np.nan)


def _checked(
    steps: np.ndarray, right: np.ndarray, rows: np.ndarray, since: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the accuracies and which classes have come, [N, C] each."""
    right = np.asarray(right, np.float64)
    if right.ndim != 2 or (len(steps), len(rows), len(since)) != (len(right), *right.shape[1:] * 2):
        shapes = [list(np.shape(x)) for x in (steps, right, rows, since)]
        raise ValueError(f"steps, right, rows and since of shapes {shapes}: expected [N], [N, C], [C] and [C]")
    return right, np.asarray(since, np.float64)[None] <= np.asarray(steps)[:, None]
