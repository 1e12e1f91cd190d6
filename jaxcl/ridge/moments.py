"""The sums a ridge regression is made of: rows may come in any order and batch, be merged, and be taken out again.

    A = sum_i w_i x_i x_i^T,   B_c = sum of w_i x_i over the rows i of class c,   n_c = sum of w_i over them

All are pairs of float32 (`jaxcl.kernels.ridge.pair`), and what is added to them was summed without rounding or with an
error of about 2^-38, so that the order of 10^4 batches does not show in float32 weights. They form a commutative
monoid: `empty`, `add`, `merge`. `remove` is exact unlearning. Classes are preallocated (a head of C columns); a class
without rows has a column of zeros, and so have its weights.

Memory: 8 d (d + C) bytes. Cost of b rows: d^2 b float64 operations, on TPUs 6 d^2 b of float32. On a mesh A and B
are cut by rows over the batch axes and the rows of a batch are copied to all devices: nothing of the size of A travels.
Source: RanPAC (McDonnell et al. 2023) keeps A and B; ACIL (Zhuang et al. 2022) keeps (A + gamma I)^-1 instead.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcl import schema
from jaxcl.kernels import ridge, sharded
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair

MOST = 1024  # rows that are added at a time
_Block = tuple[jax.Array, ...]  # features, labels, weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over the rows so far.

    Attributes:
      gram: [d, d], symmetric to the last bit.
      cross: [d, C].
      counts: [C], sums of weights.
      features: int32 [], which map made the features; see `fingerprint`.
    """

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = MappingProxyType(
        {"gram": ("features", None), "cross": ("features", None)}  # see `jaxcl.mesh.state_shardings`
    )
    gram: Pair
    cross: Pair
    counts: Pair
    features: jax.Array

    @property
    def total(self) -> jax.Array:
        """Weight of all rows, float32 []."""
        return jnp.sum(self.counts.high)


def empty(features: int, classes: int, fingerprint: int = 0) -> Moments:
    """Returns the moments of no rows for `features` numbers per row and a head of `classes` columns."""
    return Moments(
        pair.zeros(features, features), pair.zeros(features, classes), pair.zeros(classes), jnp.int32(fingerprint)
    )


def fingerprint(maker: Any) -> int:
    """Returns an int32 for the arrays that make features out of inputs (a frozen backbone and projection).

    Args:
      maker: tree of arrays; their names, shapes, dtypes and bytes count.
    """
    found = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(maker)[0]:
        values = np.ascontiguousarray(leaf)
        found = zlib.crc32(f"{path}{values.shape}{values.dtype}".encode(), found)
        found = zlib.crc32(values.tobytes(), found)
    return found - (found >> 31 << 32)


def add(m: Moments, x: jax.Array, labels: jax.Array, weights: jax.Array) -> Moments:
    """Returns the moments with a batch of rows added.

    Args:
      m: the moments so far.
      x: float32 [b, d] features.
      labels: int32 [b] in 0..C - 1. A row of another label counts as padding: under `jit` nothing can be raised, so
        call `check` on the host.
      weights: float32 [b] >= 0. A row of weight 0 is padding; what its features are, NaN included, has no effect. So
        is one of a weight that is negative or not finite.

    Raises:
      UserError: features of another size, not one label and one weight for every row, or labels of another type.
    """
    return _accumulate(m, x, labels, weights, 1.0)


def remove(m: Moments, x: jax.Array, labels: jax.Array, weights: jax.Array) -> Moments:
    """Returns the moments without a batch of rows that was added before: exact unlearning. Arguments as for `add`.

    Exact to the digits of the sums with them in: a row 10^k times as large as the others has taken 2 k of their 14
    digits with it, and neither the moments nor the `bound` of weights know of that afterwards. Unlearn outliers from
    moments of the batches that they were in, and merge the rest.
    """
    return _accumulate(m, x, labels, weights, -1.0)


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the rows of both.

    Raises:
      UserError: see `check_merge`; under `jit` sizes alone are compared.
    """
    check_merge(a, b)
    gram, cross, counts = (pair.add(x, y) for x, y in ((a.gram, b.gram), (a.cross, b.cross), (a.counts, b.counts)))
    return Moments(gram, cross, counts, a.features)


def prepare(x: jax.Array, labels: jax.Array, weights: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns (x, weights) with padding, and rows of no class, all zero.

    On a mesh they are copied to all devices: a few rows travel, so that A does not.

    Raises:
      UserError: not one label, a whole number, and one weight for every row.
    """
    for name, given in (("labels", labels), ("weights", weights)):
        if np.shape(given) != np.shape(x)[:1]:
            found = f"{name} of shape {list(np.shape(given))} for features of shape {list(np.shape(x))}"
            raise schema.UserError(f"{found}: give one for every row")
    if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
        raise schema.UserError(f"labels of {jnp.asarray(labels).dtype}: give whole numbers")
    x, labels, weights = sharded.whole(x), sharded.whole(labels), sharded.whole(weights)
    counted = (labels >= 0) & (labels < classes) & (weights > 0) & (weights < jnp.inf)
    weights = jnp.where(counted, weights, 0.0).astype(jnp.float32)
    return jnp.where(weights[:, None] > 0, x, 0.0).astype(jnp.float32), weights


def add_classes(cross: Pair, counts: Pair, x: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[Pair, Pair]:
    """Returns the sums of classes alone, B and n, with a batch added: b d operations. Arguments as for `add`."""
    x, weights = prepare(x, labels, weights, counts.high.shape[0])
    return _add_all_labels(cross, counts, (x, labels, weights), 1.0)


def _accumulate(m: Moments, x: jax.Array, labels: jax.Array, weights: jax.Array, sign: float) -> Moments:
    check_width(np.shape(x), m.gram.high.shape[0])
    x, weights = prepare(x, labels, weights, m.counts.high.shape[0])
    return pair.in_blocks(lambda m, rows: _add_block(m, rows, sign), m, (x, labels, weights), MOST)


def _add_block(m: Moments, rows: _Block, sign: float) -> Moments:
    x, _, weights = rows
    root = pair.root(weights)
    scaled = pair.times(pair.of(x), Pair(root.high[:, None], root.low[:, None]))
    cross, counts = _add_all_labels(m.cross, m.counts, rows, sign)
    return Moments(ridge.gram_update(m.gram, scaled, sign), cross, counts, m.features)


def _add_all_labels(cross: Pair, counts: Pair, rows: _Block, sign: float) -> tuple[Pair, Pair]:
    return pair.in_blocks(lambda sums, block: _add_labels(sums[0], sums[1], block, sign), (cross, counts), rows)


def _add_labels(cross: Pair, counts: Pair, rows: _Block, sign: float) -> tuple[Pair, Pair]:
    x, labels, weights = rows
    column = pair.of(weights[:, None])
    cross = pair.by_label(cross, pair.product(x, column.high), labels, sign, turned=True)
    counts = pair.by_label(Pair(*(part[:, None] for part in counts)), column, labels, sign)
    return cross, Pair(*(part[:, 0] for part in counts))


def check(
    m: Moments, features: Any, labels: Any, weights: Any = 1.0, *, gamma: float | None = None, gone: bool = False
) -> None:
    """Says on the host whether a batch fits the moments; nothing is changed.

    Args:
      m: the moments it is to be added to, or taken out of.
      features: [b, d].
      labels: [b].
      weights: [b] or a number, >= 0. Rows of weight 0 are not looked at.
      gamma: the regularisation, if it is to be checked.
      gone: whether the rows are to be taken out. Sums do not know their rows: what is noticed is a class that has fewer
        rows, or a feature whose squares sum to less, than would go.

    Raises:
      UserError: a size, a weight below 0, a label outside the head, a feature that is not finite or whose square is
        not in float32, rows that cannot be among those added, or a gamma that is not positive.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    width, classes = m.cross.high.shape
    if features.dtype.kind not in "biuf" and features.dtype.name != "bfloat16":
        raise schema.UserError(f"features of {features.dtype}: give real numbers")
    if labels.dtype.kind not in "iu":
        raise schema.UserError(f"labels of {labels.dtype}: give whole numbers")
    check_width(features.shape, width)
    if labels.shape != features.shape[:1]:
        found = f"labels of shape {list(labels.shape)} for {len(features)} rows of features"
        raise schema.UserError(f"{found}: give one label for every row")
    weights = np.asarray(weights, np.float64)
    if weights.shape not in ((), labels.shape):
        found = f"weights of shape {list(weights.shape)} for {len(labels)} rows"
        raise schema.UserError(f"{found}: give one number, or one for every row")
    weights = np.broadcast_to(weights, labels.shape)
    if (bad := weights[~((weights >= 0) & np.isfinite(weights))]).size:
        raise schema.UserError(f"weights={bad[0]}: how often a row counts; give finite numbers from 0 on")
    counted = np.flatnonzero(weights > 0)
    features, labels, weights = features[counted], labels[counted], weights[counted]
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise schema.UserError(f"labels={outside[0]}: the head has classes 0 to {classes - 1}; make it larger")
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(np.square(features.astype(np.float32))))
    if bad.size:
        row, column = bad[0]
        found = f"features[{counted[row]}, {column}]={features[row, column]}"
        raise schema.UserError(f"{found}: not finite in float32, or its square; repair the row or give it weight 0")
    if gone:
        _check_gone(m, features.astype(np.float64), labels, weights)
    if gamma is not None:
        check_gamma(gamma)


def _check_gone(m: Moments, features: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
    there = np.asarray(m.counts.high, np.float64)
    going = np.bincount(labels, weights, len(there))
    for label in np.flatnonzero(going > there * (1 + 1e-6))[:1]:
        found = f"{going[label]:g} rows of class {label} are to go, of {there[label]:g}"
        raise schema.UserError(f"{found}: take out rows that were added")
    squares, held = weights @ features**2, np.diagonal(np.asarray(m.gram.high)).astype(np.float64)
    for column in np.flatnonzero(squares > held * (1 + 1e-5))[:1]:
        found = f"features[:, {column}] of the rows to go have squares of {squares[column]:.6g} in sum"
        raise schema.UserError(f"{found}, of {held[column]:.6g}: take out rows that were added")


def check_width(shape: tuple[int, ...], width: int) -> None:
    """Raises UserError unless features have the shape [b, width]."""
    if len(shape) != 2 or shape[1] != width:
        raise schema.UserError(f"features of shape {list(shape)}: the moments are of [b, {width}] features")


def check_gamma(gamma: Any, *, path: bool = False) -> None:
    """Raises UserError unless every gamma is positive and finite, also in float32. One that is traced passes.

    Args:
      gamma: a number or pair of numbers; for `path`, several of them.
      path: whether it is [G], of at least one.
    """
    shape = np.shape(gamma.high if isinstance(gamma, Pair) else gamma)
    if len(shape) != path or 0 in shape:
        raise schema.UserError(f"gamma of shape {list(shape)}: give {'a list of numbers' if path else 'one number'}")
    if any(isinstance(part, Tracer) for part in jax.tree.leaves(gamma)):
        return
    values = np.atleast_1d(np.asarray(gamma.high if isinstance(gamma, Pair) else gamma))
    real = np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32) if real else np.full(values.shape, np.nan, np.float32)
    for value in values[~((single > 0) & np.isfinite(single))][:1]:
        raise schema.UserError(f"gamma={value}: the inverse needs a positive number of float32; try 0.1 or 100")


def check_merge(a: Moments, b: Moments) -> None:
    """Raises UserError unless the moments are of the same sizes and, where it is known, of the same features."""
    if a.cross.high.shape != b.cross.high.shape:
        found = f"cross of shapes {list(a.cross.high.shape)} and {list(b.cross.high.shape)}"
        raise schema.UserError(f"{found}: merge moments of as many features and classes")
    if isinstance(a.features, Tracer) or isinstance(b.features, Tracer):
        return
    maps = [np.asarray(m.features) for m in (a, b)]
    if np.any(maps[0] != maps[1]):
        found = f"features={maps[0]} and {maps[1]}"
        raise schema.UserError(f"{found}: made by different maps; merge moments of one backbone and projection")
