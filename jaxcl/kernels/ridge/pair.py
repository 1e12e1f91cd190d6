"""Pairs of float32 numbers that stand for their sum: float64 quality where there is no float64.

Sums are those of Knuth and Dekker (Dekker 1971, "A floating-point technique for extending the available precision").
Matrix products cut every operand into two slices of few bits, whose products a float32 accumulator sums without
rounding, and a remainder that is small enough for its rounding not to matter (Ozaki et al. 2012, "Error-free
transformations of matrix multiplication"). Every product in here is either exact or negligible, so that it does not
matter whether a compiler contracts it into a fused multiply-add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 128  # terms of a sum of products of slices: more would leave fewer than 9 bits for a slice
_TINY = 2.0**-100  # columns below this are all remainder: the unit of their slices would be subnormal


class Pair(NamedTuple):
    """high + low, where |low| is at most half a unit in the last place of high; float32, of one shape."""

    high: jax.Array
    low: jax.Array


class Pieces(NamedTuple):
    """first + second + rest: slices whose products can be summed exactly, and what remains, 2^-18 of the largest."""

    first: jax.Array
    second: jax.Array
    rest: jax.Array


def of(value: Pair | jax.Array | np.ndarray | float) -> Pair:
    """Returns a number or array as a pair; the low part is zero for what JAX already holds in float32."""
    if isinstance(value, Pair):
        return value
    if isinstance(value, jax.Array) and value.dtype == np.float64:
        return narrow(value)
    if isinstance(value, jax.Array):
        return Pair(value.astype(jnp.float32), jnp.zeros(value.shape, jnp.float32))
    wide = np.asarray(value, np.float64)
    high = wide.astype(np.float32)
    return Pair(jnp.asarray(high), jnp.asarray((wide - high).astype(np.float32)))


def zeros(*shape: int) -> Pair:
    """Returns a pair of zeros."""
    return Pair(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def wide(x: Pair) -> jax.Array:
    """Returns a pair in float64; call it within `jax.enable_x64(True)`."""
    return x.high.astype(jnp.float64) + x.low.astype(jnp.float64)


def narrow(x: jax.Array) -> Pair:
    """Returns float64 numbers as a pair, to 2^-48; call it within `jax.enable_x64(True)`."""
    high = x.astype(jnp.float32)
    return Pair(high, (x - high.astype(jnp.float64)).astype(jnp.float32))


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """Returns a + b exactly."""
    total = a + b
    part = total - a
    return Pair(total, (a - (total - part)) + (b - part))


def _renormalise(high: jax.Array, low: jax.Array) -> Pair:
    """Returns high + low exactly, given |high| >= |low|."""
    total = high + low
    return Pair(total, low - (total - high))


def plus(pair: Pair, x: jax.Array) -> Pair:
    """Returns pair + x to about 2^-48."""
    high, error = two_sum(pair.high, x)
    return _renormalise(high, pair.low + error)


def add(a: Pair, b: Pair) -> Pair:
    """Returns a + b to about 2^-48 of the result."""
    high, error = two_sum(a.high, b.high)
    low, rest = two_sum(a.low, b.low)
    high, error = _renormalise(high, error + low)
    return _renormalise(high, error + rest)


def negative(a: Pair) -> Pair:
    """Returns -a."""
    return Pair(-a.high, -a.low)


def product(a: jax.Array, b: jax.Array) -> Pair:
    """Returns a * b to about 2^-47, element by element; shapes as for `*`."""

    def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-4096)  # the upper 12 bits of 24
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return high, x - high

    (ah, al), (bh, bl) = halves(a), halves(b)
    high, one = two_sum(ah * bh, ah * bl)
    high, two = two_sum(high, al * bh)
    return _renormalise(high, one + two + al * bl)


def times(a: Pair, b: Pair) -> Pair:
    """Returns a * b to about 2^-46, element by element; shapes as for `*`."""
    high = product(a.high, b.high)
    return plus(high, a.high * b.low + a.low * b.high)


def root(x: jax.Array) -> Pair:
    """Returns the square root of x >= 0 to about 2^-46."""
    high = jnp.sqrt(x)
    square = product(high, high)
    error = (x - square.high) - square.low
    return Pair(high, error / jnp.where(high > 0, 2 * high, 1.0))


def inverse(x: Pair) -> Pair:
    """Returns 1 / x to about 2^-46 for x > 0, and 0 for other numbers, element by element."""
    known = x.high > 0
    high = jnp.where(known, 1 / jnp.where(known, x.high, 1.0), 0.0)
    whole = times(Pair(high, jnp.zeros_like(high)), x)
    error = jnp.where(known, (1 - whole.high) - whole.low, 0.0)
    return plus(Pair(high, jnp.zeros_like(high)), high * error)


def total(x: Pair) -> Pair:
    """Returns the sum of all elements."""
    flat = Pair(x.high.reshape(-1), x.low.reshape(-1))
    size = max(flat.high.size, 1)
    while size > 1:  # halves: log2 of the size steps, each of them exact to 2^-48
        half = (size + 1) // 2
        spare = 2 * half - flat.high.size
        padded = Pair(*(jnp.pad(part, (0, spare)) for part in flat))
        flat, size = add(Pair(*(p[:half] for p in padded)), Pair(*(p[half:] for p in padded))), half
    return Pair(flat.high[0], flat.low[0])


def bits_of(terms: int) -> int:
    """Returns the bits of a slice of which twice `terms` products can be summed in 24 bits."""
    return (25 - max(terms - 1, 1).bit_length()) // 2


def pieces(x: Pair, axis: int) -> Pieces:
    """Cuts x for sums of products along `axis` of the matrices x; each line along it has units of its own.

    With K bits a slice holds multiples of a unit, at most 2^(K - 1) of them.
    """
    bits = bits_of(x.high.shape[axis])
    top = jnp.max(jnp.abs(x.high), axis=axis, keepdims=True)
    exponent = jax.lax.bitcast_convert_type(top, jnp.int32) & jnp.int32(0x7F800000)
    power = jnp.maximum(jax.lax.bitcast_convert_type(exponent, jnp.float32), _TINY)  # top < 2 power
    unit = jnp.broadcast_to(power * 2.0 ** (2 - bits), x.high.shape)
    finer = 2.0**bits
    first = jnp.round(x.high / unit) * unit
    rest = x.high - first
    second = jnp.round(rest / (unit / finer)) * (unit / finer)
    return Pieces(first, second, (rest - second) + x.low)


def contract(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a with axis j of b in full float32, or float64, whatever the default precision is."""
    full = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.promote_types(a.dtype, jnp.float32)}
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), **full)


def by_label(into: Pair, values: Pair, labels: jax.Array, sign: float = 1.0, *, turned: bool = False) -> Pair:
    """Returns `into` + sign * the sums of rows by label, to about 2^-42 of the largest; of at most 128 rows.

    Args:
      into: [C, n], or [n, C] if it is `turned`.
      values: [b, n].
      labels: int32 [b] in 0..C - 1; other rows count nowhere.
      sign: 1, or -1.
      turned: see `into`.
    """
    for piece in pieces(values, 0):  # the sums of slices are exact
        found = jax.ops.segment_sum(piece, labels, into.high.shape[int(turned)])
        into = plus(into, sign * (found.T if turned else found))
    return into


def parts(a: Pieces, b: Pieces, i: int, j: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three arrays whose sum is the product of a and b over axis i of a and j of b.

    The first two are exact; the third has 2^-18 of their size, and float32 rounding.
    """

    def join(axis: int, *x: jax.Array) -> jax.Array:
        return jnp.concatenate(x, axis)

    middle = contract(join(i, a.first, a.second), join(j, b.second, b.first), i, j)
    x, y = a.second + a.rest, b.second + b.rest
    last = contract(join(i, a.first, a.rest, x), join(j, b.rest, b.first, y), i, j)
    return contract(a.first, b.first, i, j), middle, last


def absorb(into: Pair, found: tuple[jax.Array, ...], sign: float = 1.0) -> Pair:
    """Returns into + sign * the sum of what `parts` returned."""
    return functools.reduce(plus, (sign * x for x in found), into)


def in_blocks(add: Callable[[Any, Any], Any], into: Any, rows: Any, most: int = ROWS) -> Any:
    """Returns `into` with blocks of at most `most` rows added one after the other; every leaf of `rows` is [b, ...]."""
    whole, last = divmod(jax.tree.leaves(rows)[0].shape[0], most)
    if whole > 1:
        cut = jax.tree.map(lambda x: x[: whole * most].reshape(whole, most, *x.shape[1:]), rows)
        into, _ = jax.lax.scan(lambda one, part: (add(one, part), None), into, cut)
    elif whole:
        into = add(into, jax.tree.map(lambda x: x[:most], rows))
    return add(into, jax.tree.map(lambda x: x[-last:], rows)) if last else into


def dot(a: Pair, b: Pair) -> Pair:
    """Returns the matrix product [m, n] of a [m, k] and b [k, n] to about 2^-40 of its largest products.

    Programs for TPUs sum slices; all others have float64, whether or not JAX is told to use it, and reach 2^-47.
    """
    return jax.lax.platform_dependent(a, b, tpu=_dot_sliced, default=_dot_wide)


def _dot_sliced(a: Pair, b: Pair) -> Pair:
    return _by_terms(lambda into, a, b: absorb(into, parts(pieces(a, 1), pieces(b, 0), 1, 0)), a, b)


@jax.custom_batching.sequential_vmap  # a batch of float64 products has no lowering where JAX is not told to use it
def _dot_wide(a: Pair, b: Pair) -> Pair:
    def add_product(into: Pair, a: Pair, b: Pair) -> Pair:
        with jax.enable_x64(True):
            full = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float64}
            return narrow(wide(into) + jax.lax.dot_general(wide(a), wide(b), (((1,), (0,)), ((), ())), **full))

    return _by_terms(add_product, a, b)


def _by_terms(add_product: Callable[[Pair, Pair, Pair], Pair], a: Pair, b: Pair) -> Pair:
    """Returns the product of a [m, k] and b [k, n], by blocks of their k terms: `add_product(into, a, b)`."""
    (rows, terms), columns = a.high.shape, b.high.shape[1]

    def chunk(cut: Callable[[jax.Array, int], jax.Array], into: Pair) -> Pair:
        return add_product(into, Pair(*(cut(part, 1) for part in a)), Pair(*(cut(part, 0) for part in b)))

    def body(n: jax.Array, into: Pair) -> Pair:
        return chunk(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, n * ROWS, ROWS, axis), into)

    whole = terms // ROWS
    into = jax.lax.fori_loop(0, whole, body, zeros(rows, columns)) if whole else zeros(rows, columns)
    if terms % ROWS:
        into = chunk(lambda x, axis: jax.lax.slice_in_dim(x, whole * ROWS, terms, axis=axis), into)
    return into
