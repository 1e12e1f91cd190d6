"""Products with the last layer of a hypernetwork by blocks of its rows, in XLA: each block is read from memory once.

What is formed of a block, |V| and sign(V) or its products with all generators, stays in the cache of a core. A smaller
block takes the rows at the end that are left over; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.kernels.boxes.reference import dot, signed

# Bytes of a block. CPU: of 1 MiB of L2 (Zen 4, K 100, T 1 to 10) 0.4 to 0.8 MB were fastest, 6 MB took 1.7 times as
# long. Elsewhere a block is a launch of several kernels: large, but small against V.
CACHE = 3 * 2**18
PASS = 2**20  # of a block of V in `update`, which reads it three times
LARGE = 2**26
# Boxes up to which their outer products are sums of products, which are fused with what follows; more are one matrix
# product, whose result is stored. For 5 boxes the sums took 0.75 of the time, for 10 boxes 0.85.
_FEW = 16


def rows_of(room: int, width: int) -> int:
    """Returns the rows per block for blocks of `room` bytes of float32 [rows, width]."""
    return max(room // (4 * width) // 64 * 64, 64)


def _fold(rows: int, total: int, visit: Callable[[Any, Any, int], Any], carry: Any) -> Any:
    """Folds `visit(carry, start, size)` over blocks of `rows` of `total` rows, and first over what is left over.

    The loop comes last: a write behind it would be fused with what the results are used for, once for every use, and
    each would keep a copy of the arrays that it reads.
    """
    rows = min(rows, total)
    rest = total % rows
    carry = visit(carry, total - rest, rest) if rest else carry
    return jax.lax.fori_loop(0, total // rows, lambda i, state: visit(state, i * rows, rows), carry)


def _take(x: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: jax.Array, block: jax.Array, start: Any, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis)


def _put_first(x: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    """Returns x with a block written before anything is read from it again."""
    return jax.lax.optimization_barrier(_put(x, block, start))


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a^T b, [rows, K], of a [T, rows] and b [T, K]."""
    if not 0 < len(a) <= _FEW:
        return dot(a, b, 0, 0)
    total = a[0][:, None] * b[0][None]
    for t in range(1, len(a)):
        total = total + a[t][:, None] * b[t][None]
    return total


def affine(
    room: int, weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns centre weight^T + bias and radius |weight|^T, both [T, N], by blocks of `room` bytes of weight [N, K]."""

    def visit(carry: Any, start: Any, size: int) -> Any:
        block, shift = _take(weight, start, size), _take(bias, start, size)
        middle = dot(centre, block, 1, 1) + shift[None]
        return _put(carry[0], middle, start, 1), _put(carry[1], dot(radius, jnp.abs(block), 1, 1), start, 1)

    empty = jnp.zeros((len(centre), len(weight)), weight.dtype)
    return _fold(rows_of(room, weight.shape[1]), len(weight), visit, (empty, empty))


def affine_backward(
    room: int, weight: jax.Array, centre: jax.Array, radius: jax.Array, d_centre: jax.Array, d_radius: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (weight, bias, centre, radius), given those of the results, [T, N] both."""

    def visit(carry: Any, start: Any, size: int) -> Any:
        block = _take(weight, start, size)
        middle, half = _take(d_centre, start, size, 1), _take(d_radius, start, size, 1)
        d_block = _outer(middle, centre) + signed(_outer(half, radius), block)
        of_centre, of_radius = dot(middle, block, 1, 0), dot(half, jnp.abs(block), 1, 0)
        return _put(carry[0], d_block, start), carry[1] + of_centre, carry[2] + of_radius

    empty = jnp.zeros_like(weight), jnp.zeros_like(centre), jnp.zeros_like(radius)
    d_weight, of_centre, of_radius = _fold(rows_of(room, weight.shape[1]), len(weight), visit, empty)
    return d_weight, jnp.sum(d_centre, 0), of_centre, of_radius


def row_sums(room: int, weight: jax.Array, generators: jax.Array) -> jax.Array:
    """Returns sum_s |weight generators_s|, [N], by blocks of `room` bytes of weight [N, K] and its products [N, S]."""

    def visit(carry: Any, start: Any, size: int) -> Any:
        moved = dot(_take(weight, start, size), generators, 1, 1)  # [rows, S]
        return _put(carry, jnp.sum(jnp.abs(moved), 1), start)

    rows = rows_of(room, weight.shape[1] + len(generators))
    return _fold(rows, len(weight), visit, jnp.zeros(len(weight), weight.dtype))


def row_sums_backward(
    room: int, weight: jax.Array, generators: jax.Array, d_sums: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of (weight, generators), given that of the sums [N]; the products are formed again."""

    def visit(carry: Any, start: Any, size: int) -> Any:
        block = _take(weight, start, size)
        moved = dot(block, generators, 1, 1)
        d = signed(jnp.broadcast_to(_take(d_sums, start, size)[:, None], moved.shape), moved)
        return _put(carry[0], dot(d, generators, 1, 0), start), carry[1] + dot(d, block, 0, 0)

    rows = rows_of(room, weight.shape[1] + len(generators))
    return _fold(rows, len(weight), visit, (jnp.zeros_like(weight), jnp.zeros_like(generators)))


def update(
    room: int,
    weight: jax.Array,
    first: jax.Array,
    second: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    d_centre: jax.Array,
    d_radius: jax.Array,
    numbers: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weight and moments after a step of Adam, by blocks of `room` bytes of weight [N, K], in place.

    `numbers` are those of `tpu.update`.
    """
    lr, b1, b2, eps, share_1, share_2 = numbers

    def visit(carry: Any, start: Any, size: int) -> Any:
        weight, first, second = carry
        block = _take(weight, start, size)
        middle, half = _take(d_centre, start, size, 1), _take(d_radius, start, size, 1)
        d_block = _outer(middle, centre) + signed(_outer(half, radius), block)
        # Each is read back from its array: the order of the three writes is then given, and XLA copies no array.
        first = _put_first(first, b1 * _take(first, start, size) + (1 - b1) * d_block, start)
        second = _put_first(second, b2 * _take(second, start, size) + (1 - b2) * d_block**2, start)
        root = jnp.sqrt(_take(second, start, size) / share_2) + eps
        return _put(weight, block - lr * (_take(first, start, size) / share_1) / root, start), first, second

    return _fold(rows_of(room, weight.shape[1]), len(weight), visit, (weight, first, second))
