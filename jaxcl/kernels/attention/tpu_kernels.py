"""The three Pallas kernels of TPU attention: one visit of a tile each; `tpu.py` says which tiles and in what order.

A step of the grid adds one tile to accumulators in VMEM. They are cleared on the first step of their own tile and
written on its last, so that steps must run in order. Scores are in base 2. Numbers per query stand in rows
[1, queries] in memory; kernels with queries along rows spread them over the 128 lanes once per own tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcl.kernels.attention.tiles import BOUNDARY, FULL

LANES = 128
LOG2E = math.log2(math.e)
NEVER = -1e30  # score of a key that may not be seen, and logsumexp of a query that sees none
LOWEST = -1e29  # lowest maximum: a query that sees nothing gets 2^(-9e29) = 0
FIRST, LAST = 4, 8  # flags of a step beside the kind of its tile


class Steps(NamedTuple):
    """What step t of the grid does, int32 [N] each; references in SMEM inside a kernel.

    Attributes:
      row: row of the batch.
      own: tile that owns the accumulators.
      other: tile of the other side.
      flags: kind of the tile | FIRST | LAST.
      numbers: int32 [2], how many places a query sees, huge for all; and the place of the first query.
    """

    row: Any
    own: Any
    other: Any
    flags: Any
    numbers: Any


class Options(NamedTuple):
    """Static choices: see `tpu.forward`; the second and the third say whether `Steps.numbers` are to be looked at."""

    causal: bool
    windowed: bool
    shifted: bool
    scale: float
    soft_cap: float | None
    compute: int


def forward(row, own, other, flags, numbers, *refs: Any, options: Options) -> None:
    """o = softmax(q k^T) v by online softmax; refs: q, k, v, ids of queries and keys, o, lse, then scratch."""
    q, k, v, q_ids, kv_ids, o, lse, top, total, mixed, ids = refs
    steps, step = Steps(row, own, other, flags, numbers), pl.program_id(1)
    flag = flags[step]

    @pl.when(flag & FIRST != 0)
    def _() -> None:
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)  # one share per lane
        mixed[...] = jnp.zeros_like(mixed)
        ids[...] = _column(q_ids[...])

    def visit(masked: bool) -> None:
        for start in range(0, k.shape[0], options.compute):
            keys = pl.ds(start, options.compute)
            scores, _ = _scores(q[...], k[keys, :], options)  # [queries, keys]
            if masked:
                places = (own[step] * q.shape[0], other[step] * k.shape[0] + start)
                seen = _seen(_spread(ids[...], options.compute), kv_ids[:, keys], *places, 0, steps, options)
                scores = jnp.where(seen, scores, NEVER)
            new = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
            p = jnp.exp2(scores - _spread(new, options.compute))
            decay = jnp.exp2(top[...] - new)
            shares = [p[:, i : i + LANES] for i in range(0, options.compute, LANES)]
            total[...] = total[...] * decay + sum(shares[1:], shares[0])
            mixed[...] = mixed[...] * _spread(decay, mixed.shape[1]) + _dot(p.astype(v.dtype), v[keys, :], 1, 0)
            top[...] = new

    _each_kind(flag, visit)

    @pl.when(flag & LAST != 0)
    def _() -> None:
        sums = jnp.sum(total[...], axis=1, keepdims=True)
        sums = jnp.broadcast_to(sums, total.shape)
        some = sums > 0
        o[...] = (mixed[...] / _spread(jnp.where(some, sums, 1.0), mixed.shape[1])).astype(o.dtype)
        value = jnp.where(some, (top[...] + jnp.log2(jnp.where(some, sums, 1.0))) / LOG2E, NEVER)
        lse[...] = value.T[:1]


def d_queries(row, own, other, flags, numbers, *refs: Any, options: Options) -> None:
    """dq = scale * dS k, dS = P (dP - delta); refs: q, k, v, ids, lse, delta, do, dq, then scratch."""
    q, k, v, q_ids, kv_ids, lse, delta, d_mixed, d_q, total, ids, lse_column, delta_column = refs
    steps, step = Steps(row, own, other, flags, numbers), pl.program_id(1)
    flag = flags[step]

    @pl.when(flag & FIRST != 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        for column, x in ((ids, q_ids), (lse_column, lse), (delta_column, delta)):
            column[...] = _column(x[...])

    def visit(masked: bool) -> None:
        for start in range(0, k.shape[0], options.compute):
            keys = pl.ds(start, options.compute)
            scores, slope = _scores(q[...], k[keys, :], options)  # [queries, keys]
            if masked:
                places = (own[step] * q.shape[0], other[step] * k.shape[0] + start)
                seen = _seen(_spread(ids[...], options.compute), kv_ids[:, keys], *places, 0, steps, options)
                scores = jnp.where(seen, scores, NEVER)
            p = jnp.exp2(scores - _spread(lse_column[...], options.compute))
            d_p = _dot(d_mixed[...], v[keys, :], 1, 1)
            d_scores = p * (d_p - _spread(delta_column[...], options.compute))
            d_scores = d_scores if slope is None else d_scores * slope
            total[...] += _dot(d_scores.astype(k.dtype), k[keys, :], 1, 0)

    _each_kind(flag, visit)

    @pl.when(flag & LAST != 0)
    def _() -> None:
        d_q[...] = (total[...] * options.scale).astype(d_q.dtype)


def d_keys(row, own, other, flags, numbers, *refs: Any, options: Options) -> None:
    """dk = scale * dS^T q and dv = P^T do, summed over the R query heads; refs as in `d_queries`, dk and dv."""
    q, k, v, q_ids, kv_ids, lse, delta, d_mixed, d_k, d_v, k_total, v_total, ids = refs
    steps, step, head = Steps(row, own, other, flags, numbers), pl.program_id(1), pl.program_id(2)
    flag = flags[step]

    @pl.when((flag & FIRST != 0) & (head == 0))
    def _() -> None:
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)
        ids[...] = _column(kv_ids[...])

    def visit(masked: bool) -> None:
        # Keys along rows: the rows of numbers per query then need no turning, nor does P for P^T do.
        for start in range(0, k.shape[0], options.compute):
            keys = pl.ds(start, options.compute)
            scores, slope = _scores(k[keys, :], q[...], options)  # [keys, queries]
            if masked:
                places = (other[step] * q.shape[0], own[step] * k.shape[0] + start)
                seen = _seen(_spread(ids[keys, :], q.shape[0]), q_ids[...], *places, 1, steps, options)
                scores = jnp.where(seen, scores, NEVER)
            p = jnp.exp2(scores - lse[...])
            v_total[keys, :] += _dot(p.astype(d_mixed.dtype), d_mixed[...], 1, 0)
            d_p = _dot(v[keys, :], d_mixed[...], 1, 1)
            d_scores = p * (d_p - delta[...])
            d_scores = d_scores if slope is None else d_scores * slope
            k_total[keys, :] += _dot(d_scores.astype(q.dtype), q[...], 1, 0)

    _each_kind(flag, visit)

    @pl.when((flag & LAST != 0) & (head == pl.num_programs(2) - 1))
    def _() -> None:
        d_k[...] = (k_total[...] * options.scale).astype(d_k.dtype)
        d_v[...] = v_total[...].astype(d_v.dtype)


def _each_kind(flag: jax.Array, visit: Any) -> None:
    """Runs `visit(masked)` as the kind of the tile wants; a tile that is full pays nothing for the mask."""
    pl.when(flag & 3 == FULL)(lambda: visit(False))
    pl.when(flag & 3 == BOUNDARY)(lambda: visit(True))


def _scores(a: jax.Array, b: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scores a b^T in base 2, and their slope under the soft cap (None without one)."""
    x = _dot(a, b, 1, 1)
    if options.soft_cap is None:
        return x * (options.scale * LOG2E), None
    x = jnp.tanh(x * (options.scale / options.soft_cap))
    return x * (options.soft_cap * LOG2E), 1 - x * x


def _seen(
    rows: jax.Array, columns: jax.Array, query: Any, key: Any, query_axis: int, steps: Steps, options: Options
) -> jax.Array:
    """Returns which pairs see each other, given the ids along rows (spread) and along columns, and the first places."""
    own = rows == columns  # the padding of keys has an id that no query has
    if not options.causal and not options.windowed:
        return own
    query = query + jax.lax.broadcasted_iota(jnp.int32, rows.shape, query_axis)
    if options.shifted:
        query = query + steps.numbers[1]
    key = key + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1 - query_axis)
    if options.causal:
        own &= key <= query
    if options.windowed:
        own &= query - key < steps.numbers[0]
    return own


def _column(row: jax.Array) -> jax.Array:
    """Returns x [1, n] as [n, LANES], every number along all the lanes of its row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _spread(x: jax.Array, width: int) -> jax.Array:
    """Returns x [n, LANES] of equal lanes as [n, width]."""
    return x[:, :width] if width <= LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a [m, n] with axis j of b in float32; float32 operands in full."""
    full = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((i,), (j,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
