"""Mixtures by exact counts: which source a slot belongs to, in closed form, without drawing lots.

A slot is the n-th new row of a stage. The sources are split off one after another, the heaviest first; the first n
slots give `floor(n w + 1/2)` to a source of conditional weight w, and the rest of them form a shorter sequence for the
next sources. So both questions, whose slot n is and how many slots the source had before, cost one division
per source, and every prefix of the sequence holds the proportions within about one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np

_DENOMINATOR = 10**6  # keeps 2 n p inside int64 up to n = 4e12 rows

Count = TypeVar("Count", int, np.ndarray)


class Mixture(NamedTuple):
    """Sources in the order in which they are split off, with their share of what is left."""

    order: np.ndarray  # int64 [K] source numbers, heaviest first
    numerator: np.ndarray  # int64 [K]; the last share is 1 / 1
    denominator: np.ndarray  # int64 [K]


def exact(value: float | int | str | Fraction) -> Fraction:
    """Returns the number as it is written: 0.1 is 1/10 and not the nearest binary fraction."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def rounded(n: Count, numerator: int, denominator: int) -> Count:
    """Returns `floor(n * numerator / denominator + 1/2)` in integers."""
    return (2 * n * numerator + denominator) // (2 * denominator)


def make(weights: Mapping[int, float]) -> Mixture:
    """Returns the mixture of source numbers with these weights; they are positive and need not sum to 1."""
    order = sorted(weights, key=lambda k: (-exact(weights[k]), k))
    left, shares = sum((exact(w) for w in weights.values()), Fraction(0)), []
    for k in order:
        share = (exact(weights[k]) / left).limit_denominator(_DENOMINATOR) if k != order[-1] else Fraction(1)
        shares.append(share)
        left -= exact(weights[k])
    return Mixture(
        np.array(order, np.int64),
        np.array([share.numerator for share in shares], np.int64),
        np.array([share.denominator for share in shares], np.int64),
    )


def locate(mixture: Mixture, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of every slot and how many earlier slots that source had; int64 [n] each."""
    source, before = np.empty(slots.shape, np.int64), np.empty(slots.shape, np.int64)
    where, left = np.arange(slots.size), slots.astype(np.int64)
    for k, numerator, denominator in zip(*mixture, strict=True):
        count = rounded(left, numerator, denominator)
        mine = rounded(left + 1, numerator, denominator) > count
        source[where[mine]], before[where[mine]] = k, count[mine]
        where, left = where[~mine], (left - count)[~mine]
        if not where.size:
            break
    return source, before


def counts(mixture: Mixture, slots: int, sources: int) -> np.ndarray:
    """Returns how many of the first `slots` slots each source has, int64 [sources]."""
    out, left = np.zeros(sources, np.int64), int(slots)
    for k, numerator, denominator in zip(*mixture, strict=True):
        out[k] = rounded(left, int(numerator), int(denominator))
        left -= int(out[k])
    return out
