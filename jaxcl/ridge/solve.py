"""Ridge weights from moments: W = (A + gamma I)^-1 B in float32 arithmetic with an error that is known.

    L L^T = A + gamma I (float32);  repeat: r = B - (A + gamma I) W (pairs);  W += a few steps of CG preconditioned by L

Iterative refinement (Wilkinson 1963; Carson & Higham 2018 for three precisions) reaches the accuracy of its residuals,
about 2^-40 on TPUs and 2^-47 elsewhere, if the condition is below about 2^24 / d; conjugate gradients inside reach
beyond that, where the factor is that of a shifted matrix or of an older one.

Cost: d^3 / 3 for the factor, and per round for the residual 2 d^2 C in float64, on TPUs about 12 d^2 C in float32, and
4 d^2 C for a step of CG. On a mesh it is all cut by rows (`jaxcl.kernels.ridge.cholesky`); only the eigendecompositions
of `path`, `leave_one_out` gather A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.kernels import sharded
from jaxcl.kernels.ridge import cholesky, pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge.moments import Moments, check_gamma, check_width, prepare

Gamma = Pair | jax.Array | float  # a pair or Python number keeps digits that an array of float32 does not

_Carry = tuple[jax.Array, Pair, jax.Array, jax.Array, jax.Array]  # round, W, residual, its size, that before

_ROUNDS = 12  # of refinement, at most; two or three are the rule
_STEPS = 3  # of conjugate gradients per residual
_FLOOR = 2.0**-40  # of |A| |W|: what a residual is off by, at most in practice
_EPSILON = 2.0**-24
_OFF = 8 * _EPSILON  # |L L^T - A - gamma I| / |A|, at most in practice; two at 64 to 800 features of several kinds


class Solution(NamedTuple):
    """Weights and how far they can be from the exact ridge solution.

    Attributes:
      weights: float32 [d, C].
      low: float32 [d, C], what to add for more digits than float32 has.
      bound: float32 [], on |weights + low - exact| / |exact|, Frobenius norms: residual times condition.
      residual: float32 [], |B - (A + gamma I) W| / (|A + gamma I| |W|), what rounding may hide included.
      condition: float32 [], estimate from above of that of A + gamma I.
      factor: float32 [d, d], lower triangular; a preconditioner for `refresh`.
      least: float32 [], estimate from below of the least eigenvalue of A + gamma I, which more rows only raise.
    """

    weights: jax.Array
    low: jax.Array
    bound: jax.Array
    residual: jax.Array
    condition: jax.Array
    factor: jax.Array
    least: jax.Array


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x))


def factor(gram: Pair, gamma: Gamma) -> tuple[jax.Array, jax.Array]:
    """Returns the Cholesky factor of A + gamma I, float32 [d, d], lower triangular, and what raised its diagonal.

    That is 0, unless rounding makes the matrix indefinite: then the diagonal is raised until it is not.
    """
    size = gram.high.shape[0]
    top = jnp.max(jnp.diagonal(gram.high)) + pair.of(gamma).high

    def fails(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(carry[1])) & (carry[0] < top)

    def attempt(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        shift = jnp.where(carry[0] < 0, 0.0, jnp.maximum(8 * carry[0], 8 * _EPSILON * top))
        return shift, cholesky.factor(gram.high + (pair.of(gamma).high + shift) * jnp.eye(size))

    none = jnp.float32(-1), jnp.full((size, size), jnp.nan)
    shift, lower = jax.lax.while_loop(fails, attempt, none)
    return lower, shift


def _apply(lower: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns r -> (L L^T)^-1 r."""
    return lambda r: cholesky.solve(lower, r)


def _residual(gram: Pair, right: Pair, gamma: Pair, w: Pair) -> jax.Array:
    """Returns B - (A + gamma I) W, float32 [d, C] of small relative error."""
    shared = sharded.strips(gram.high.shape[0])
    product = pair.dot(gram, w) if shared is None else shared.product(pair.dot, gram, w)
    spread = Pair(*(jnp.broadcast_to(part, w.high.shape) for part in gamma))
    used = pair.add(product, pair.times(w, spread))
    return pair.add(right, pair.negative(used)).high


def _correction(
    gram: jax.Array, gamma: jax.Array, r: jax.Array, precondition: Callable[[jax.Array], jax.Array], count: int
) -> jax.Array:
    """Returns `count` steps of preconditioned conjugate gradients for (A + gamma I) D = r, column by column."""

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)  # a class without rows has a residual of zero

    def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d, r, p, rz = carry
        q = pair.contract(gram, p, 1, 0) + gamma * p
        length = ratio(rz, jnp.sum(p * q, 0))[None]
        d, r = d + length * p, r - length * q
        z = precondition(r)
        new = jnp.sum(r * z, 0)
        return d, r, z + ratio(new, rz)[None] * p, new

    z = precondition(r)
    return jax.lax.fori_loop(0, count, step, (jnp.zeros_like(r), r, z, jnp.sum(r * z, 0)))[0]


def _refine(
    gram: Pair, right: Pair, gamma: Pair, precondition: Callable[[jax.Array], jax.Array], w: Pair, scale: jax.Array
) -> tuple[Pair, jax.Array]:
    """Refines w until its residual, relative to `scale` |W|, is that of rounding or does not fall by half any more."""

    def size(w: Pair, r: jax.Array) -> jax.Array:
        weight = scale * _norm(w.high)
        return jnp.where(weight > 0, _norm(r) / jnp.where(weight > 0, weight, 1.0), jnp.where(_norm(r) > 0, 1.0, 0.0))

    def on(carry: _Carry) -> jax.Array:
        n, _, _, new, old = carry
        return (n < _ROUNDS) & (new > 2.0**-46) & (new < 0.5 * old)

    def step(carry: _Carry) -> _Carry:
        n, w, r, last, _ = carry
        better = pair.plus(w, _correction(gram.high, gamma.high, r, precondition, _STEPS))
        fresh = _residual(gram, right, gamma, better)
        new = size(better, fresh)
        w, r = jax.tree.map(lambda a, b: jnp.where(new < last, a, b), (better, fresh), (w, r))
        return n + 1, w, r, jnp.minimum(new, last), last

    r = _residual(gram, right, gamma, w)
    first = size(w, r)
    _, w, _, found, _ = jax.lax.while_loop(on, step, (jnp.int32(0), w, r, first, jnp.full_like(first, jnp.inf)))
    return w, found


def _largest(matrix: Callable[[jax.Array], jax.Array], size: int, count: int) -> jax.Array:
    """Returns an estimate from below of the largest eigenvalue by a power method on four vectors."""
    start = jnp.asarray(np.random.default_rng(0).standard_normal((size, min(4, size))), jnp.float32)

    def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = carry
        new = matrix(v)
        top = jnp.max(jnp.abs(new), 0)
        new = new / top[None]  # squares of what is left do not overflow
        length = jnp.sqrt(jnp.sum(new * new, 0))
        return new / length[None], top * length

    return jnp.max(jax.lax.fori_loop(0, count, step, (start, jnp.zeros(start.shape[1])))[1])


def _spectrum(gram: jax.Array, gamma: jax.Array, lower: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest eigenvalue of A + gamma I, and a lower bound (in practice) on the least one.

    The power method stops below the largest eigenvalue of (L L^T)^-1, by less than a factor of two after 12 steps. What
    L L^T is above the matrix, by its shift and by rounding, does not count; the least eigenvalue is never below gamma.
    """
    largest = _largest(lambda v: pair.contract(gram, v, 1, 0) + gamma * v, gram.shape[0], 8)
    inverse = _largest(_apply(lower), gram.shape[0], 12)
    return largest, jnp.maximum(gamma, 0.5 / inverse - shift - _OFF * largest)


def normal(gram: Pair, right: Pair, gamma: Gamma) -> Solution:
    """Returns the solution of (A + gamma I) W = B for pairs A [d, d] and B [d, C]; see `weights`.

    Raises:
      UserError: a gamma that is known when the program is traced, and not positive.
    """
    check_gamma(gamma)
    with jax.enable_x64(False):  # in float32 where the process is told to compute in float64, too
        ridge, (lower, shift) = pair.of(gamma), factor(gram, gamma)
        largest, least = _spectrum(gram.high, ridge.high, lower, shift)
        w, found = _refine(gram, right, ridge, _apply(lower), pair.zeros(*right.high.shape), largest)
        residual, condition = found + _FLOOR, largest / least
        bound = residual * condition
        bound = jnp.where(jnp.isfinite(bound) & (bound < 0.5), 2 * bound, jnp.inf)  # relative to the exact weights
        return Solution(w.high, w.low, bound, residual, condition, lower, least)


def weights(m: Moments, gamma: Gamma) -> Solution:
    """Returns the ridge weights of the rows so far: argmin |Y - X W|^2 + gamma |W|^2.

    Args:
      m: moments of the rows.
      gamma: > 0; a Python number counts with all its digits.
    """
    return normal(m.gram, m.cross, gamma)


def refresh(m: Moments, gamma: Gamma, factor: jax.Array, w: jax.Array, iterations: int = 6) -> jax.Array:
    """Returns better weights, float32 [d, C], from older ones and an older factor: no new factorisation.

    The error shrinks by about 15 per iteration if the factor has seen 90 % of the rows. 4 d^2 C operations each.

    Args:
      m: moments of all rows.
      gamma: > 0.
      factor: lower triangular [d, d], `Solution.factor` of earlier moments.
      w: [d, C], weights to start from.
      iterations: of conjugate gradients, all in one sequence.
    """
    check_gamma(gamma)
    ridge = pair.of(gamma)
    r = _residual(m.gram, m.cross, ridge, pair.of(w))
    return w + _correction(m.gram.high, ridge.high, r, _apply(factor), iterations)


def bound(m: Moments, gamma: Gamma, w: jax.Array, least: jax.Array) -> jax.Array:
    """Returns a bound on |w - exact| / |exact| of weights [d, C] from anywhere, float32 []; inf from 0.5 on.

    Args:
      m: moments.
      gamma: > 0.
      w: float32 [d, C].
      least: `Solution.least` of this gamma, and of these moments or of earlier ones that rows were only added to: what
        has become larger since makes the bound too large, never too small.
    """
    off = _norm(_residual(m.gram, m.cross, pair.of(gamma), pair.of(w))) / least
    size = _norm(w)
    share = jnp.where(size > 0, off / jnp.where(size > 0, size, 1.0), jnp.where(off > 0, jnp.inf, 0.0))
    return jnp.where(share < 0.5, 2 * share, jnp.inf)


class Path(NamedTuple):
    """Solutions for G values of gamma.

    Attributes:
      weights: pair of [G, d, C].
      squares: pair of [G], sum of squared errors over the rows seen.
      degrees: pair of [G], effective number of parameters, trace of A (A + gamma I)^-1.
      gcv: pair of [G], generalised cross-validation (Golub, Heath & Wahba 1979): (RSS / N) / (1 - degrees / N)^2; inf
        where the rows do not exceed the degrees.
    """

    weights: Pair
    squares: Pair
    degrees: Pair
    gcv: Pair


def path(m: Moments, gammas: jax.Array | np.ndarray) -> Path:
    """Returns the solutions for many gammas [G] from one eigendecomposition, refined; no rows are needed.

    The eigenvalues are float64 numbers but on TPUs, where degrees and gcv have the digits of float32.
    """
    check_gamma(gammas, path=True)
    values, basis = _eigen(m)
    count = pair.total(m.counts)

    def one(gamma: Pair) -> tuple[Pair, Pair, Pair, Pair]:
        inverse = 1 / (values.high + gamma.high)

        def precondition(r: jax.Array) -> jax.Array:
            return pair.contract(basis, inverse[:, None] * pair.contract(basis, r, 0, 0), 1, 0)

        largest = values.high[-1] + gamma.high
        w, _ = _refine(m.gram, m.cross, gamma, precondition, pair.zeros(*m.cross.high.shape), largest)
        # W^T A W = W^T B - gamma W^T W, so that RSS = N - W^T B - gamma W^T W for one-hot targets
        used = pair.add(pair.times(w, m.cross), pair.times(_spread(gamma, w.high), pair.times(w, w)))
        squares = pair.add(count, pair.negative(pair.total(used)))
        share = pair.inverse(pair.add(values, _spread(gamma, values.high)))
        degrees = pair.total(pair.times(values, share))
        return w, squares, degrees, _gcv(squares, degrees, count)

    return Path(*jax.lax.map(one, pair.of(gammas)))


def _spread(value: Pair, like: jax.Array) -> Pair:
    return Pair(*(jnp.broadcast_to(part, like.shape) for part in value))


def _gcv(squares: Pair, degrees: Pair, count: Pair) -> Pair:
    each = pair.inverse(count)
    left = pair.times(pair.add(count, pair.negative(degrees)), each)
    factor = pair.inverse(left)  # squared it becomes inf, where the square of what is left would become 0
    found = pair.times(pair.times(squares, each), pair.times(factor, factor))
    return Pair(jnp.where(left.high > 0, found.high, jnp.inf), jnp.where(left.high > 0, found.low, 0.0))


def _eigen(m: Moments) -> tuple[Pair, jax.Array]:
    """Returns eigenvalues [d], ascending and not negative, and eigenvectors, float32 [d, d], of A."""
    return jax.lax.platform_dependent(m.gram, tpu=_eigen_narrow, default=_eigen_wide)


def _eigen_narrow(gram: Pair) -> tuple[Pair, jax.Array]:
    values, basis = jnp.linalg.eigh(gram.high, symmetrize_input=False)
    return pair.of(jnp.maximum(values, 0.0)), basis


@jax.custom_batching.sequential_vmap  # as for products in `jaxcl.kernels.ridge.pair`
def _eigen_wide(gram: Pair) -> tuple[Pair, jax.Array]:
    with jax.enable_x64(True):
        values, basis = jnp.linalg.eigh(pair.wide(gram), symmetrize_input=False)
        return pair.narrow(jnp.maximum(values, 0.0)), basis.astype(jnp.float32)


def leave_one_out(
    m: Moments, x: jax.Array, labels: jax.Array, row_weights: jax.Array, gammas: jax.Array | np.ndarray
) -> jax.Array:
    """Returns the squared error of each row under the weights of all other rows, float32 [G, b].

    With h_i = w_i x_i^T (A + gamma I)^-1 x_i the error is (y_i - x_i W) / (1 - h_i) (Allen 1974, PRESS): one
    factorisation for all rows and gammas.

    Args:
      m: moments that these rows are part of.
      x: float32 [b, d].
      labels: int32 [b].
      row_weights: float32 [b] as in `add`; the error of a row of weight 0 is 0.
      gammas: [G], each > 0.
    """
    check_gamma(gammas, path=True)
    check_width(np.shape(x), m.gram.high.shape[0])
    classes = m.cross.high.shape[1]
    x, row_weights = prepare(x, labels, row_weights, classes)
    values, basis = _eigen(m)
    seen, targets = pair.contract(x, basis, 1, 0), jax.nn.one_hot(labels, classes)
    target_parts = pair.contract(basis, m.cross.high, 0, 0)

    def one(gamma: jax.Array) -> jax.Array:
        inverse = (1 / (values.high + gamma))[None]
        leverage = row_weights * jnp.sum(seen * seen * inverse, 1)
        errors = targets - pair.contract(seen * inverse, target_parts, 1, 0)
        return jnp.where(row_weights > 0, jnp.sum(errors * errors, 1) / (1 - leverage) ** 2, 0.0)

    return jax.lax.map(one, pair.of(gammas).high)


class Parts(NamedTuple):
    """The weights after a batch as a sum, each a pair of [d, C] (G-ACIL, Zhuang et al. 2024, equations 10 to 12).

    Attributes:
      unexposed: what they are without the labels of classes seen before.
      gain: what those labels add, the exposed-class label gain; zero if no class comes again.
    """

    unexposed: Pair
    gain: Pair


def decompose(before: Moments, after: Moments, gamma: Gamma) -> Parts:
    """Returns the parts of the weights after some rows that are due to labels of old and of new classes.

    With R_k = (A_k + gamma I)^-1 the paper's W_(k-1) - R_k X_k^T X_k W_(k-1) equals R_k B_(k-1), so that
    unexposed = R_k [B_(k-1) | columns of new classes] and gain = R_k [B_k - B_(k-1) | 0].

    Args:
      before: moments before the rows.
      after: the same with the rows added.
      gamma: > 0.
    """
    exposed = (before.counts.high > 0)[None]
    gained = pair.add(after.cross, pair.negative(before.cross))
    gained = Pair(*(jnp.where(exposed, part, 0.0) for part in gained))
    rest = pair.add(after.cross, pair.negative(gained))
    right = Pair(*(jnp.concatenate(parts, 1) for parts in zip(rest, gained, strict=True)))
    found = normal(after.gram, right, gamma)
    high, low = (jnp.split(part, 2, axis=1) for part in (found.weights, found.low))
    return Parts(*map(Pair, high, low))
