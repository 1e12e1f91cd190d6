"""Tiled self-attention in plain XLA, for CPUs and for all that no kernel takes: visits the tiles that hold anything.

Forward is the online softmax; backward recomputes the scores of a tile (Dao 2023, 2307.08691, algorithms 1 and 2).
Memory is O(L * K) and a tile of scores [B, H, block, block]; a loop visits the listed tiles one after another, always
in the same order, so that the result has the same bits in every run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.kernels.attention.tiles import Part

# Tokens of a tile's side, for rows of up to SHORT tokens (where small tiles skip more of the future) and for longer
# ones. Measured with heads of 32 and 64 on an AVX-512 core: 32, 256 and 512 are slower.
SMALL, LARGE, SHORT = 64, 128, 512
NEVER = -1e30  # score of a key that may not be seen: finite, so that a difference of two is not NaN
_LOWEST = -1e29  # lowest maximum of a row, far above NEVER: a query that sees nothing gets exp(-9e29) = 0

Whole = jax.Array | None


class _Scores(NamedTuple):
    """What makes scores of products: the tiles' side, the mask's parts (padded to whole tiles) and the two maps."""

    block: int
    tiles: tuple[int, int]  # of the queries and of the keys of a row
    queries: Whole  # int32 [B, L] document of a query, 0 = sees nothing
    keys: Whole  # int32 [B, S]
    window: Whole
    causal: bool
    soft_cap: float | None
    bias: Whole  # [B | 1, G | 1, R | 1, L | 1, S | 1]
    first: Whole = None  # int32 [], place of the first query in the row; None = 0, and L = S


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Whole,
    window: Whole,
    first: Whole = None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    bias: Whole = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, L, H, K] in the dtype of `q`, and the logsumexp of the scores [B, H, L].

    See `jaxcl.kernels.attention.attention` for the arguments; rows attend to themselves: S = L. With `first` (int32 [])
    the queries are the L of S tokens from that place on; `segments` is that of all S, and there is no bias.
    """
    (rows, length, heads, _), groups, dtype = q.shape, k.shape[2], q.dtype
    how, padded, slots = _scores_of(q, k, segments, None, window, first, causal, soft_cap, bias)
    block = how.block
    q, k, v = _split(q, groups, padded) * scale, _split(k, groups, slots), _split(v, groups, slots)

    def visit(i: jax.Array, j: jax.Array, carry: Any) -> Any:
        top, total, mixed = carry
        scores = _score(how, _take(q, i, block), _take(k, j, block), i, j)[0]
        old = _take(top, i, block)
        new = jnp.maximum(old, jnp.max(scores, axis=2))
        e = jnp.exp(scores - new[:, :, None])
        keep = jnp.exp(old - new)
        product = _dot(_flat(e), _rows(_take(v, j, block)), 2, 2).reshape(*new.shape, -1)
        return (
            _put(top, new, i),
            _put(total, _take(total, i, block) * keep + jnp.sum(e, axis=2), i),
            _put(mixed, _take(mixed, i, block) * keep[..., None] + product, i),
        )

    top = jnp.full(q.shape[:4], _LOWEST, q.dtype)
    top, total, mixed = _over_tiles(how, visit, (top, jnp.zeros_like(top), jnp.zeros_like(q)))
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEVER)
    mixed = mixed / jnp.where(total > 0, total, 1.0)[..., None]
    return _join(mixed, length).astype(dtype), lse[..., :length].reshape(rows, heads, length)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Whole,
    window: Whole,
    frozen: Whole,
    mixed: jax.Array,
    lse: jax.Array,
    d_mixed: jax.Array,
    d_lse: Whole,
    first: Whole = None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    bias: Whole = None,
) -> tuple[jax.Array, ...]:
    """Returns the cotangents of (q, k, v), and of `bias` if there is one, given what `forward` returned.

    Tiles of which all queries are frozen are not visited.
    """
    length, groups, slots = q.shape[1], k.shape[2], k.shape[1]
    how, padded, behind = _scores_of(q, k, segments, frozen, window, first, causal, soft_cap, bias)
    wide = _split(d_mixed, groups, padded)
    # sum_s P_ls dP_ls = <dO_l, O_l>: one pass over K numbers per query instead of S. And d lse / d score = P.
    delta = jnp.sum(_split(mixed, groups, padded) * wide, axis=-1)  # [B, G, R, L]
    if d_lse is not None:
        delta = delta - _pad(d_lse, 2, padded).reshape(delta.shape)
    # exp(NEVER - NEVER) would be 1 for a query that sees nothing.
    lse = _pad(jnp.where(lse < _LOWEST, 0.0, lse), 2, padded).reshape(delta.shape)
    split = _split(q, groups, padded) * scale, _split(k, groups, behind), _split(v, groups, behind)
    d_q, d_k, d_v, d_bias = _cotangents(how, *split, lse, delta, wide)
    grads = [_join(d_q * scale, length), _join(d_k, slots), _join(d_v, slots)]
    if frozen is not None:
        still = (_own(frozen, first, length), frozen, frozen)
        grads = [jnp.where(stop[:, :, None, None], 0.0, x) for stop, x in zip(still, grads, strict=True)]
    grads = [x.astype(old.dtype) for x, old in zip(grads, (q, k, v), strict=True)]
    if bias is None:
        return tuple(grads)
    crop = jax.lax.slice(
        d_bias, (0,) * 5, (*d_bias.shape[:3], min(d_bias.shape[3], length), min(d_bias.shape[4], length))
    )
    return *grads, crop.reshape(bias.shape).astype(bias.dtype)


def _scores_of(
    q: jax.Array,
    k: jax.Array,
    segments: Whole,
    frozen: Whole,
    window: Whole,
    first: Whole,
    causal: bool,
    soft_cap: float | None,
    bias: Whole,
) -> tuple[_Scores, int, int]:
    """Returns what makes the scores, and the lengths of queries and of keys, padded to whole tiles."""
    (rows, length, heads, _), (_, slots, groups, _) = q.shape, k.shape
    block, padded = _sides(length)
    behind = -(-slots // block) * block
    if segments is None and (frozen is not None or not (causal or (padded, behind) == (length, slots))):
        segments = jnp.ones((rows, slots), jnp.int32)  # the padding is not behind every query
    queries = keys = None
    if segments is not None:
        keys = _pad(segments, 1, behind)
        queries = _pad(_own(segments, first, length), 1, padded)
        if frozen is not None:  # a frozen query is to the backward pass what padding is: it sees nothing
            queries = jnp.where(_pad(_own(frozen, first, length), 1, padded), 0, queries)
    grouped = _grouped(bias, groups, heads, length, padded)
    tiles = padded // block, behind // block
    return _Scores(block, tiles, queries, keys, window, causal, soft_cap, grouped, first), padded, behind


def _own(x: jax.Array, first: Whole, length: int) -> jax.Array:
    """Returns the entries [B, L] of the queries from those of all tokens [B, S]."""
    return x if first is None else Part(first, length).of(x)


def _cotangents(
    how: _Scores, q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, delta: jax.Array, d_mixed: jax.Array
) -> Any:
    """Returns the cotangents of q (scaled), k, v, as they are given, and of the bias as in `how`."""
    block = how.block

    def visit(i: jax.Array, j: jax.Array, carry: Any) -> Any:
        d_q, d_k, d_v, d_bias = carry
        q_tile, k_tile, d_tile = _take(q, i, block), _take(k, j, block), _rows(_take(d_mixed, i, block))
        scores, slope = _score(how, q_tile, k_tile, i, j)
        p = jnp.exp(scores - _take(lse, i, block)[:, :, None])
        d_p = _dot(_rows(_take(v, j, block)), d_tile, 3, 3).reshape(p.shape)
        d_scores = p * (d_p - _take(delta, i, block)[:, :, None])
        if d_bias is not None:
            d_bias = _add_to_bias(d_bias, d_scores, i, j, block)
        d_scores = _flat(d_scores if slope is None else d_scores * slope)
        # d_q with K before L, as keys are before queries: no product then has to transpose a tile of scores.
        more = _dot(_rows(k_tile), d_scores, 2, 2)
        more = more.reshape(*more.shape[:3], *q_tile.shape[2:4]).swapaxes(2, 3)  # [B, G, R, K, l]
        d_q = _put(d_q, _take(d_q, i, block, 4) + more, i, 4)
        d_k = _put(d_k, _take(d_k, j, block) + _dot(d_scores, _rows(q_tile), 3, 2)[:, :, None], j)
        d_v = _put(d_v, _take(d_v, j, block) + _dot(_flat(p), d_tile, 3, 2)[:, :, None], j)
        return d_q, d_k, d_v, d_bias

    zero, d_bias = jnp.zeros_like(k), None if how.bias is None else jnp.zeros_like(how.bias)
    d_q, *rest = _over_tiles(how, visit, (jnp.zeros_like(q.swapaxes(3, 4)), zero, zero, d_bias))
    return d_q.swapaxes(3, 4), *rest


def _over_tiles(how: _Scores, visit: Any, start: Any) -> Any:
    """Folds `visit` over the tiles (of queries i, of keys j) that may hold a visible pair, ordered by j, then i."""
    known = how.causal and how.first is None
    pairs = [(i, j) for j in range(how.tiles[1]) for i in range(j if known else 0, how.tiles[0])]
    table, count = jnp.asarray(np.array(pairs, np.int32)), len(pairs)
    if how.queries is not None or how.window is not None or how.first is not None:
        wanted = _wanted(how, table[:, 0], table[:, 1])
        # A stable sort moves the wanted tiles to the front and keeps their order.
        table, count = table[jnp.argsort(~wanted, stable=True)], jnp.sum(wanted)
    return jax.lax.fori_loop(0, count, lambda n, carry: visit(table[n, 0], table[n, 1], carry), start)


def _wanted(how: _Scores, i: jax.Array, j: jax.Array) -> jax.Array:
    """Returns for tiles (i, j) whether a query may see a key, bool [n]: no if so in no row of the batch.

    By the lowest and highest document of a tile, which is exact for documents in ascending order.
    """
    wanted = jnp.ones(i.shape, bool)
    if how.queries is not None and how.keys is not None:

        def ends(documents: jax.Array) -> tuple[jax.Array, jax.Array]:
            split = documents.reshape(documents.shape[0], -1, how.block)
            low = jnp.min(jnp.where(split > 0, split, jnp.iinfo(split.dtype).max), axis=2)
            return low, jnp.max(split, axis=2)  # [B, tiles]; low > high in padding

        (first, last), (low, high) = ends(how.queries), ends(how.keys)
        touch = jnp.maximum(first[:, i], low[:, j]) <= jnp.minimum(last[:, i], high[:, j])
        wanted = jnp.any(touch, axis=0)
    query = i * how.block if how.first is None else i * how.block + how.first
    if how.causal and how.first is not None:
        wanted &= j * how.block <= query + how.block - 1
    if how.window is not None:
        nearest = query - (j * how.block + how.block - 1)  # from the first query back to the last key
        wanted &= (nearest < how.window) | (how.window <= 0)
    return wanted


def _score(how: _Scores, q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> tuple[jax.Array, Whole]:
    """Returns the scores [B, G, s, R, l] of a tile and their derivative by the scaled products (None = 1).

    Keys come before queries, so that sums over keys are sums of vectors.
    """
    (rows, groups, share, block, _), slope = q.shape, None
    scores = _dot(_rows(k), _rows(q), 3, 3).reshape(rows, groups, block, share, block)
    if how.soft_cap is not None:
        bent = jnp.tanh(scores / how.soft_cap)
        scores, slope = how.soft_cap * bent, 1 - bent * bent
    if how.bias is not None:
        tile = how.bias
        for axis, n in ((3, i), (4, j)):
            tile = tile if tile.shape[axis] == 1 else _take(tile, n, block, axis)
        scores = scores + jnp.transpose(tile, (0, 1, 4, 2, 3))
    masks, shape = [], (1, block, block)
    key = j * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query = i * block + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    query = query if how.first is None else query + how.first
    if how.causal:
        masks.append(key <= query)
    if how.window is not None:
        masks.append((query - key < how.window) | (how.window <= 0))
    if how.queries is not None and how.keys is not None:
        own = _take(how.queries, i, block, 1)[:, None]
        masks.append((own == _take(how.keys, j, block, 1)[:, :, None]) & (own > 0))
    if masks:
        mask = functools.reduce(jnp.logical_and, masks)  # [B or 1, s, l]
        scores = jnp.where(mask[:, None, :, None], scores, NEVER)
    return scores, slope


def _add_to_bias(d_bias: jax.Array, d_scores: jax.Array, i: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """Returns d_bias [B | 1, G | 1, R | 1, L | 1, S | 1] with the cotangent [B, G, s, R, l] of a tile added."""
    more = jnp.transpose(d_scores, (0, 1, 3, 4, 2))
    more = jnp.sum(more, axis=tuple(a for a in range(5) if d_bias.shape[a] == 1), keepdims=True)
    at = [jnp.zeros_like(i)] * 3 + [
        n * block if d_bias.shape[a] > 1 else jnp.zeros_like(n) for a, n in ((3, i), (4, j))
    ]
    return jax.lax.dynamic_update_slice(d_bias, more + jax.lax.dynamic_slice(d_bias, at, more.shape), at)


def _sides(length: int) -> tuple[int, int]:
    """Returns the side of a tile, and the length of rows padded to whole tiles."""
    count = -(-length // (SMALL if length <= SHORT else LARGE))
    block = length if count == 1 else -(-length // (16 * count)) * 16  # whole vectors, little padding
    return block, block * count


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Returns x with zeros (False) behind, up to `length` along `axis`."""
    more = length - x.shape[axis]
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)]) if more else x


def _grouped(bias: Whole, groups: int, heads: int, length: int, padded: int) -> Whole:
    """Returns a bias [B | 1, H | 1, L | 1, S | 1] as [B | 1, G | 1, R | 1, L | 1, S | 1], padded, float32 or wider."""
    if bias is None:
        return None
    share = (1, 1) if bias.shape[1] == 1 else (groups, heads // groups)
    bias = bias.astype(jnp.promote_types(bias.dtype, jnp.float32)).reshape(bias.shape[0], *share, *bias.shape[2:])
    for axis in (3, 4):
        bias = bias if bias.shape[axis] == 1 else _pad(bias, axis, padded)
    return bias


def _split(x: jax.Array, groups: int, padded: int) -> jax.Array:
    """Returns x [B, L, H, K] as [B, G, R, L, K] with R = H / G, padded, float32 or wider.

    Batch and heads stay apart, so that each may be sharded.
    """
    rows, length, heads, width = x.shape
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(rows, length, groups, heads // groups, width)
    return _pad(x.transpose(0, 2, 3, 1, 4), 3, padded)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Returns x [B, G, R, L, K] as [B, L, G * R, K], without the padding."""
    rows, groups, share, _, width = x.shape
    return x[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(rows, length, groups * share, width)


def _take(x: jax.Array, i: jax.Array, block: int, axis: int = 3) -> jax.Array:
    """Returns tile i of x along `axis`."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(x: jax.Array, tile: jax.Array, i: jax.Array, axis: int = 3) -> jax.Array:
    """Returns x with tile i along `axis` replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, tile, i * tile.shape[axis], axis)


def _rows(tile: jax.Array) -> jax.Array:
    """Returns a tile [B, G, R, l, K] as [B, G, R * l, K]."""
    return tile.reshape(*tile.shape[:2], -1, tile.shape[4])


def _flat(scores: jax.Array) -> jax.Array:
    """Returns scores [B, G, s, R, l] as [B, G, s, R * l]."""
    return scores.reshape(*scores.shape[:3], -1)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a [B, G, m, n] with axis j of b; unlike einsum it never exchanges the operands."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))))
