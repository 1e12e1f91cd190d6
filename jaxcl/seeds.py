"""Mean and 95 % confidence interval over seeds, and of the differences between runs that share a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval over n values; NaN where n is too small to say."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; False where there is no interval."""
        return bool(abs(self.mean) > self.half_width)


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Returns mean +- t_{n-1, (1 + level) / 2} s / sqrt(n), with s the standard deviation with n - 1 (Student 1908).

    One value has a mean and no interval; no value has neither. A value that is NaN makes the result NaN.
    """
    from scipy.special import stdtrit  # noqa: PLC0415  slow to import, and only reports need it

    x = np.asarray(values, np.float64)
    if x.size == 0:
        return Interval(float("nan"), float("nan"), 0)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, float("nan"), 1)
    t = float(stdtrit(x.size - 1, (1 + level) / 2))
    return Interval(mean, t * float(x.std(ddof=1)) / float(np.sqrt(x.size)), x.size)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval:
    """Returns the interval of a - b over the seeds that both have: what they share cancels, seed by seed."""
    common = sorted(set(a) & set(b))
    return interval([a[seed] - b[seed] for seed in common], level)
