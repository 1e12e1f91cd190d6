"""What was learned and what was forgotten: every figure that follows from the evaluation matrix, as pure NumPy.

The matrix `R` is float [T + 1, T]. Row 0 is measured before any training and row t + 1 after task t, so
`R[t, j]` is the score on task j once t tasks are done, and the diagonal "just learned" is `R[j + 1, j]`.
Scores are losses (nats per token) unless `higher_is_better=True` says that they are accuracies.

Signs are the same for both kinds: *forgetting* is positive when a task got worse, *transfer* (backward and
forward) is positive when it got better. Entries that were not measured are NaN, and a figure that needs one of
them is NaN as well: nothing is inferred and nothing is skipped. For a run that is still going on, cut the matrix
with `finished` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

Matrix = np.ndarray  # float64 [T + 1, T]


def matrix(rows: Mapping[int, Mapping[str, float]], domains: list[str]) -> Matrix:
    """Returns R from measurements at the boundaries.

    Args:
      rows: boundary -> {domain: score}; -1 is before training and k is after task k.
      domains: the domain that each task trains on, in the order of the tasks.

    Returns:
      float64 [T + 1, T]; NaN where a boundary or a domain was not measured.
    """
    missing: dict[str, float] = {}
    return np.array(
        [[rows.get(k, missing).get(domain, np.nan) for domain in domains] for k in range(-1, len(domains))],
        dtype=np.float64,
    ).reshape(len(domains) + 1, len(domains))


def finished(R: Matrix) -> Matrix:
    """Returns the part of R, [k + 1, k], that belongs to the first k tasks, all of them measured at their end."""
    _check(R)
    k = 0
    while k < R.shape[1] and np.isfinite(R[k + 1, : k + 1]).all():
        k += 1
    return R[: k + 1, :k]


def per_task_forgetting(
    R: Matrix, *, variant: Literal["best", "earlier", "learned"] = "best", higher_is_better: bool = False
) -> np.ndarray:
    """Returns how much worse each task is at the end, [T]; the last task cannot have been forgotten yet.

    With losses L and row T as the last one:

      best:     F_j = L[T, j] - min_{0 <= t <= T} L[t, j]      >= 0; what the model knew before training counts
      earlier:  F_j = L[T, j] - min_{1 <= t <= T-1} L[t, j]    Chaudhry et al. 2018 (RWalk): the last row
                                                               is left out, so an improvement is negative
      learned:  F_j = L[T, j] - L[j + 1, j]                    the negative backward transfer of task j

    "best" is the definition of Abbes et al. 2025 for continual pre-training with the sign that literature gives to
    forgetting: larger is worse. For accuracies the minimum is a maximum and the sign is turned.
    """
    _check(R)
    L = -R if higher_is_better else R
    T = R.shape[1]
    if variant == "best":
        reference = L.min(axis=0)
    elif variant == "earlier":
        reference = L[1:T].min(axis=0) if T > 1 else np.full(T, np.nan)
    elif variant == "learned":
        reference = _diagonal(L)
    else:
        raise ValueError(f"variant={variant!r}: choose from best, earlier, learned")
    return L[T] - reference


def forgetting(
    R: Matrix, *, variant: Literal["best", "earlier", "learned"] = "best", higher_is_better: bool = False
) -> float:
    """Returns the mean of `per_task_forgetting` over the tasks before the last, j < T - 1; NaN for a single task."""
    values = per_task_forgetting(R, variant=variant, higher_is_better=higher_is_better)
    return _mean(values[:-1])


def backward_transfer(R: Matrix, *, higher_is_better: bool = False) -> float:
    """Returns BWT = mean_{j < T-1} (S[T, j] - S[j + 1, j]) with the score S = -loss; negative means forgetting.

    Lopez-Paz and Ranzato 2017 (GEM), eq. 3. NaN for a single task.
    """
    return -forgetting(R, variant="learned", higher_is_better=higher_is_better)


def forward_transfer(R: Matrix, *, higher_is_better: bool = False) -> float:
    """Returns FWT = mean_{j >= 1} (S[j, j] - S[0, j]) with S = -loss: what earlier tasks gave to a later one.

    Lopez-Paz and Ranzato 2017 (GEM), eq. 4, with the measured first row as the reference; NaN if it was not
    measured, or for a single task.
    """
    _check(R)
    S = R if higher_is_better else -R
    before = np.array([S[j, j] - S[0, j] for j in range(1, R.shape[1])])
    return _mean(before)


def learned(R: Matrix) -> float:
    """Returns mean_j R[j + 1, j]: the score of every task just after it was trained (LA of Riemer et al. 2019)."""
    _check(R)
    return _mean(_diagonal(R))


def retained(R: Matrix) -> float:
    """Returns mean_j R[T, j]: the score of all tasks at the end (ACC of GEM, RA of Riemer et al. 2019)."""
    _check(R)
    return _mean(R[-1]) if R.shape[1] else float("nan")


def average_incremental(R: Matrix) -> float:
    """Returns (1 / T) sum_i mean_{j <= i} R[i + 1, j]: the mean, over boundaries, of the mean of the tasks seen."""
    _check(R)
    return _mean(np.array([R[i + 1, : i + 1].mean() for i in range(R.shape[1])]))


def summary(R: Matrix, *, higher_is_better: bool = False) -> dict[str, float]:
    """Returns every figure of this module by name."""
    up = higher_is_better
    return {
        "learned": learned(R),
        "retained": retained(R),
        "forgetting": forgetting(R, higher_is_better=up),
        "forgetting_earlier": forgetting(R, variant="earlier", higher_is_better=up),
        "backward_transfer": backward_transfer(R, higher_is_better=up),
        "forward_transfer": forward_transfer(R, higher_is_better=up),
        "average_incremental": average_incremental(R),
    }


def _check(R: Matrix) -> None:
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1:
        raise ValueError(f"evaluation matrix of shape {R.shape}: expected [T + 1, T], row 0 measured before training")


def _diagonal(R: Matrix) -> np.ndarray:
    return np.diagonal(R[1:]).copy()


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
