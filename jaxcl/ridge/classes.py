"""Mean and variance of every feature in every class, row by row and without cancellation, in pairs of float32.

    delta = mean_b - mean,   n' = n + n_b
    mean <- mean + delta n_b / n',   M2 <- M2 + M2_b + delta^2 n n_b / n'

with mean_b and M2_b of the rows of a class in one block (Chan, Golub & LeVeque 1979; for one row Welford 1962). The sum
of squares minus the square of the sum loses as many digits as mean^2 / variance has: with float32 features at 1000 of
deviation 0.001 it has none left, where this has twelve. Means are kept as the distance from one row of their class, so
that a large mean costs no digits of small distances. Memory: 20 C D bytes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge import moments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """What is known of the classes.

    Attributes:
      origin: float32 [C, D], features of one row of a class, or of several; zeros before there is one.
      offset: [C, D], mean - origin.
      squares: [C, D], M2: weighted sum of squares around the mean.
      counts: [C], sums of weights.
    """

    origin: jax.Array
    offset: Pair
    squares: Pair
    counts: Pair

    @property
    def mean(self) -> Pair:
        """Mean of every feature in every class, [C, D]."""
        return pair.plus(self.offset, self.origin)


def empty(features: int, classes: int) -> Spread:
    """Returns what is known of no rows."""
    shape = classes, features
    return Spread(pair.zeros(*shape).high, pair.zeros(*shape), pair.zeros(*shape), pair.zeros(classes))


def add(s: Spread, x: jax.Array, labels: jax.Array, weights: jax.Array) -> Spread:
    """Returns the spread with a batch of rows added.

    Args:
      s: that of the rows so far.
      x: float32 [b, D] features.
      labels: int32 [b]; a row of a label that there is not is padding.
      weights: float32 [b] >= 0; a row of weight 0 is padding, whatever its features are.

    Raises:
      UserError: features of another size, not one label and one weight for every row, or labels of another type.
    """
    moments.check_width(np.shape(x), s.origin.shape[1])
    x, weights = moments.prepare(x, labels, weights, s.counts.high.shape[0])
    return pair.in_blocks(_add_block, s, (x, labels, weights))


def variance(s: Spread) -> Pair:
    """Returns the unbiased variance M2 / (n - 1), [C, D]; 0 for a class of one row or none."""
    share = pair.inverse(pair.plus(s.counts, -jnp.ones_like(s.counts.high)))
    return pair.times(s.squares, _columns(share, s.squares))


def _add_block(s: Spread, rows: tuple[jax.Array, ...]) -> Spread:
    x, labels, weights = rows
    classes = s.counts.high.shape[0]

    def by_class(values: Pair) -> Pair:
        """Sums [b, D] of weighted rows by class, [C, D]."""
        return pair.by_label(pair.zeros(classes, values.high.shape[1]), values, labels)

    counts = Pair(*(part[:, 0] for part in by_class(pair.of(weights[:, None]))))
    there, known = (n.high[:, None] > 0 for n in (counts, s.counts))
    largest = jax.ops.segment_max(jnp.where(weights[:, None] > 0, x, -jnp.inf), labels, classes)
    origin = jnp.where(known, s.origin, jnp.where(there, largest, 0.0))
    place = jnp.clip(labels, 0, classes - 1)
    column = Pair(*(jnp.broadcast_to(part, x.shape) for part in pair.of(weights[:, None])))
    away = pair.two_sum(x, -origin[place])
    offset = pair.times(by_class(pair.times(away, column)), _columns(pair.inverse(counts), s.offset))
    away = pair.add(away, pair.negative(Pair(*(part[place] for part in offset))))
    squares = by_class(pair.times(pair.times(away, away), column))
    return merge(s, Spread(origin, offset, squares, counts))


def merge(a: Spread, b: Spread) -> Spread:
    """Returns what is known of the rows of both."""
    counts, known = pair.add(a.counts, b.counts), a.counts.high[:, None] > 0
    origin = jnp.where(known, a.origin, b.origin)
    there = pair.add(b.offset, pair.two_sum(b.origin, -origin))
    here = Pair(*(jnp.where(known, part, other) for part, other in zip(a.offset, there, strict=True)))
    new = _columns(pair.times(b.counts, pair.inverse(counts)), here)  # n_b / n'
    delta = pair.add(there, pair.negative(here))
    between = pair.times(pair.times(delta, delta), pair.times(new, _columns(a.counts, here)))
    offset = pair.add(here, pair.times(delta, new))
    return Spread(origin, offset, pair.add(pair.add(a.squares, b.squares), between), counts)


def _columns(values: Pair, like: Pair) -> Pair:
    """Returns one value for each class, [C], as [C, D]."""
    return Pair(*(jnp.broadcast_to(part[:, None], like.high.shape) for part in values))
