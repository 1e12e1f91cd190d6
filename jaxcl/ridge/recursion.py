"""The inverse that follows the rows: R = (A + gamma I)^-1 and W = R B, with weights after every batch.

    P = R X^T;  S = I + X P = L L^T;  V = L^-1 P^T;  E = L^-1 (Y - X W);  R <- R - V^T V;  W <- W + V^T E

Equal to the published R <- R - R X^T (I + X R X^T)^-1 X R (ACIL, Zhuang et al. 2022, equations 9 and 10), but O(d^2 b)
rather than O(d^3), symmetric to the last bit, and positive up to rounding: the error is that of the condition of S
instead of that of A / gamma. S is the worse conditioned the more rows it has while N < 1.5 d, so that batches are cut
into blocks. After N of about 1.5 d rows, `start` from the moments once more: that is more accurate than what the
recursion has become, and `drift` says when it is due again.

Cost of b rows: 3 d^2 b + 3 d b^2 + 4 d b C operations; memory 4 d (d + C) bytes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from jaxcl.kernels import ridge
from jaxcl.kernels.ridge import pair
from jaxcl.ridge import solve
from jaxcl.ridge.moments import Moments, prepare

BLOCK = 128  # rows that are taken in at a time
ENOUGH = 1.5  # rows per feature from which on a start from the moments is better than the recursion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverse:
    """What the recursion carries.

    Attributes:
      r: float32 [d, d], (A + gamma I)^-1.
      w: float32 [d, C], ridge weights of the rows so far.
    """

    r: jax.Array
    w: jax.Array


def start(m: Moments, gamma: solve.Gamma) -> Inverse:
    """Returns the inverse and the weights of moments; of no rows they are I / gamma and zeros."""
    return begun(solve.weights(m, gamma))


def begun(found: solve.Solution) -> Inverse:
    """Returns the inverse that belongs to a solution."""
    size = found.factor.shape[0]
    lower = solve_triangular(found.factor, jnp.eye(size), lower=True)
    return Inverse(ridge.downdate(jnp.zeros((size, size)), lower, 1.0), found.weights)


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


def _run(inverse: Inverse, x: jax.Array, labels: jax.Array, weights: jax.Array, block: int, sign: float) -> Inverse:
    if block < 1:
        raise ValueError(f"block={block}: expected at least one row")
    classes = inverse.w.shape[1]
    x, weights = prepare(x, labels, weights, classes)
    root = jnp.sqrt(weights)[:, None]
    rows = root * x, root * jax.nn.one_hot(labels, classes)
    whole, last = divmod(x.shape[0], block)
    if whole > 1:
        cut = tuple(part[: whole * block].reshape(whole, block, -1) for part in rows)
        inverse, _ = jax.lax.scan(lambda i, part: (_step(i, part[0], part[1], sign), None), inverse, cut)
    elif whole:
        inverse = _step(inverse, rows[0][:block], rows[1][:block], sign)
    return _step(inverse, rows[0][-last:], rows[1][-last:], sign) if last else inverse


def _step(inverse: Inverse, x: jax.Array, y: jax.Array, sign: float) -> Inverse:
    seen = pair.contract(x, inverse.r, 1, 0)  # P^T, [b, d]
    s = jnp.eye(x.shape[0]) + sign * pair.contract(seen, x, 1, 1)
    lower = jnp.linalg.cholesky(s)  # symmetrised, which costs b^2
    v = solve_triangular(lower, seen, lower=True)
    errors = solve_triangular(lower, y - pair.contract(x, inverse.w, 1, 0), lower=True)
    w = inverse.w + sign * pair.contract(v, errors, 0, 0)
    return Inverse(ridge.downdate(inverse.r, v, -sign), w)


def drift(inverse: Inverse, m: Moments, gamma: solve.Gamma) -> jax.Array:
    """Returns the largest |(A + gamma I) R v - v| / |v| over four fixed vectors, float32 []: 0 for an exact inverse."""
    size = inverse.r.shape[0]
    v = jnp.asarray(np.random.default_rng(0).standard_normal((size, min(4, size))), jnp.float32)
    image = pair.contract(inverse.r, v, 1, 0)
    back = pair.contract(m.gram.high, image, 1, 0) + pair.of(gamma).high * image
    return jnp.max(jnp.sqrt(jnp.sum((back - v) ** 2, 0) / jnp.sum(v**2, 0)))
