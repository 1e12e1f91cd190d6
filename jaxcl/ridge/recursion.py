"""The inverse that follows the rows: R = (A + gamma I)^-1 and W = R B, with weights after every batch.

    P = R X^T;  S = I + X P = L L^T;  V = L^-1 P^T;  E = L^-1 (Y - X W);  R <- R - V^T V;  W <- W + V^T E

Equal to the published R <- R - R X^T (I + X R X^T)^-1 X R (ACIL, Zhuang et al. 2022, equations 9 and 10), but O(d^2 b)
rather than O(d^3), symmetric to the last bit, and positive up to rounding: the error is that of the condition of S
instead of that of A / gamma. S is the worse conditioned the more rows it has while N < 1.5 d, so that batches are cut
into blocks. After N of about 1.5 d rows, `start` from the moments once more: that is more accurate than what the
recursion has become, and `drift` says when it is due again.

Between two blocks one kernel (`jaxcl.kernels.ridge.stream`) writes R and multiplies it with the rows of the second.

Cost of b rows: 3 d^2 b + 3 d b^2 + 4 d b C operations; memory 4 d (d + C) bytes. An inverse in float64 (see `start`) is
followed in float64, in plain XLA, at twice the memory: of the sixteen digits of float64 it loses as many as the
condition of S on the way has, up to A / gamma. Features are float32 in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from jaxcl import schema
from jaxcl.kernels import ridge as kernels
from jaxcl.kernels import sharded
from jaxcl.kernels.ridge import cholesky, pair
from jaxcl.ridge import solve
from jaxcl.ridge.moments import Moments, check_gamma, check_width, prepare

_Carry = tuple[jax.Array, jax.Array, jax.Array]  # R before the last block, V of that block, W

BLOCK = 128  # rows that are taken in at a time
ENOUGH = 1.5  # rows per feature from which on a start from the moments is better than the recursion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverse:
    """What the recursion carries.

    Attributes:
      r: float32 or float64 [d, d], (A + gamma I)^-1.
      w: of its type [d, C], ridge weights of the rows so far.
    """

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = MappingProxyType(
        {"r": ("features", None), "w": ("features", None)}  # see `jaxcl.mesh.state_shardings`
    )
    r: jax.Array
    w: jax.Array


def start(m: Moments, gamma: solve.Gamma, dtype: Any = jnp.float32) -> Inverse:
    """Returns the inverse and the weights of moments; of no rows they are I / gamma and zeros.

    Args:
      m: moments.
      gamma: > 0.
      dtype: float32, or float64 in a process that is told to compute in it (`jax_enable_x64`), on one device.

    Raises:
      UserError: another type, or one that the process or the mesh does not have.
    """
    if np.dtype(dtype) == np.float32:
        return begun(solve.weights(m, gamma))
    shared = sharded.strips(m.gram.high.shape[0])
    there = jax.dtypes.canonicalize_dtype(np.float64) == np.float64 and not (shared and shared.axes)
    if np.dtype(dtype) != np.float64 or not there:
        why = "give float32, or float64 with jax_enable_x64 and on one device"
        raise schema.UserError(f"dtype={np.dtype(dtype).name}: the inverse cannot be kept in it; {why}")
    check_gamma(gamma)
    ridge = pair.wide(pair.of(gamma))
    size = m.gram.high.shape[0]
    lower = cholesky.factor(pair.wide(m.gram) + ridge * jnp.eye(size))
    turned = solve_triangular(lower, jnp.eye(size), lower=True)
    r = kernels.downdate(jnp.zeros((size, size)), turned, 1.0)
    return Inverse(r, cholesky.solve(lower, pair.wide(m.cross)))


@jax.enable_x64(False)  # in float32 where the process is told to compute in float64, too
def begun(found: solve.Solution) -> Inverse:
    """Returns the inverse that belongs to a solution."""
    size = found.factor.shape[0]
    shared = sharded.strips(size)
    if shared and shared.axes:
        return Inverse(cholesky.solve(found.factor, jnp.eye(size)), found.weights)
    lower = solve_triangular(found.factor, jnp.eye(size), lower=True)
    return Inverse(kernels.downdate(jnp.zeros((size, size)), lower, 1.0), found.weights)


def update(inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array, *, block: int = BLOCK) -> Inverse:
    """Returns the inverse and weights with a batch of rows added.

    Args:
      inverse: those before.
      x: float32 [b, d].
      labels: int32 [b] in 0..C - 1; a row of another label is padding.
      weights: float32 [b] >= 0; a row of weight 0 is padding and has no effect, whatever its features are.
      block: rows per step. More than 128 lose digits while N < 1.5 d.
    """
    return _run(inverse, x, labels, weights, block, 1.0)


def downdate(inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array, *, block: int = BLOCK) -> Inverse:
    """Returns the inverse and weights without rows that were added before: exact unlearning, as for `update`.

    S = I - X R X^T;  R <- R + V^T V;  W <- W - V^T E
    """
    return _run(inverse, x, labels, weights, block, -1.0)


def stream(inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array) -> Inverse:
    """Returns the inverse and weights with k batches added, one after the other.

    As k calls of `update`, but R is read and written once per batch instead of read twice: the kernel that writes what
    batch i leaves of it multiplies it with batch i + 1 on the way.

    Args:
      inverse: those before.
      x: float32 [k, b, d]; b of at most 128, see `update`.
      labels: int32 [k, b], as for `update`.
      weights: float32 [k, b], as for `update`.
    """
    if np.ndim(x) != 3:
        raise schema.UserError(f"features of shape {list(np.shape(x))}: give batches, [k, b, d], or call update")
    block = max(x.shape[1], 1)
    return _run(inverse, x.reshape(-1, x.shape[2]), labels.reshape(-1), weights.reshape(-1), block, 1.0)


def _run(inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array, block: int, sign: float) -> Inverse:
    """As `_followed`, in the type of the inverse whatever the process is told to compute in."""
    with jax.enable_x64(inverse.r.dtype == jnp.float64):
        return _followed(inverse, x, labels, weights, block, sign)


def _followed(
    inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array, block: int, sign: float
) -> Inverse:
    """Takes in blocks of rows; between two of them R is written, and read for the second, in one go."""
    if block < 1:
        raise ValueError(f"block={block}: expected at least one row")
    classes, count = inverse.w.shape[1], x.shape[0]
    check_width(np.shape(x), inverse.r.shape[0])
    if not count:
        return inverse
    x, weights = prepare(x, labels, weights, classes)
    kind = inverse.r.dtype
    root = jnp.sqrt(weights.astype(kind))[:, None]
    rows = root * x.astype(kind), root * jax.nn.one_hot(labels, classes, dtype=kind)

    def step(carry: _Carry, part: tuple[jax.Array, jax.Array]) -> tuple[_Carry, None]:
        r, v, w = carry
        r, seen = kernels.stream(r, v, part[0], -sign)
        return (r, *_gain(seen, w, *part, sign)), None

    first = min(block, count)
    seen = pair.contract(rows[0][:first], inverse.r, 1, 1)  # R is symmetric: along its rows, which a mesh may have cut
    carry = inverse.r, *_gain(seen, inverse.w, rows[0][:first], rows[1][:first], sign)
    whole, last = divmod(count - first, block)
    if whole:
        features, targets = (part[first : count - last].reshape(whole, block, -1) for part in rows)
        carry, _ = jax.lax.scan(step, carry, (features, targets))
    if last:
        carry, _ = step(carry, (rows[0][-last:], rows[1][-last:]))
    return Inverse(kernels.downdate(carry[0], carry[1], -sign), carry[2])


def _gain(seen: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array, sign: float) -> tuple[jax.Array, jax.Array]:
    """Returns V [b, d] and the new W from P^T [b, d], the old W, and the rows."""
    s = jnp.eye(x.shape[0], dtype=x.dtype) + sign * pair.contract(seen, x, 1, 1)
    lower = jnp.linalg.cholesky(s)  # symmetrised, which costs b^2
    v = solve_triangular(lower, seen, lower=True)
    errors = solve_triangular(lower, y - pair.contract(x, w, 1, 0), lower=True)
    return v, w + sign * pair.contract(v, errors, 0, 0)


def drift(inverse: Inverse, m: Moments, gamma: solve.Gamma) -> jax.Array:
    """Returns the largest |(A + gamma I) R v - v| / |v| over four fixed vectors, [] in the type of R: 0 = exact."""
    check_gamma(gamma)
    size, kind = inverse.r.shape[0], inverse.r.dtype
    with jax.enable_x64(kind == jnp.float64):
        gram, ridge = (x.high.astype(kind) + x.low.astype(kind) for x in (m.gram, pair.of(gamma)))
        v = jnp.asarray(np.random.default_rng(0).standard_normal((size, min(4, size))), kind)
        image = pair.contract(inverse.r, v, 1, 0)
        back = pair.contract(gram, image, 1, 0) + ridge * image
        return jnp.max(jnp.sqrt(jnp.sum((back - v) ** 2, 0) / jnp.sum(v**2, 0)))
