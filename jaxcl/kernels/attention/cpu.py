"""Blockwise self-attention for CPUs: plain matrix products that skip the causal half and keep no scores."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Queries per block, forward and backward: enough for an efficient matrix product, few enough to skip much of the
# future. Measured for rows of 256 tokens and heads of 64 on an AVX-512 core.
FORWARD, BACKWARD = 128, 64
MOST_BLOCKS = 16  # blocks are unrolled, so that longer rows take longer blocks instead of longer programs
_NEVER = -1e30  # score of a key that may not be seen: finite, so that a difference of two is not NaN
_LOWEST = -1e29  # lowest maximum of a row, far above _NEVER: a query that sees nothing gets exp(-9e29) = 0


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | None,
    *,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, L, H, K] in the dtype of `q`, and the logsumexp of the scores [B, H, L].

    See `jaxcl.kernels.attention.attention` for the arguments; rows attend to themselves: S = L. One block of scores
    [B, H, block, L] is held at a time.
    """
    (rows, length, heads, width), groups, dtype = q.shape, k.shape[2], q.dtype
    share = heads // groups
    q, k, v = _split(q, groups) * scale, _split(k, groups)[:, :, 0], _split(v, groups)[:, :, 0]
    mixed, lse = [], []
    for start, stop, seen in _blocks(length, causal, FORWARD):
        scores = _dot(_take(q, start, stop), k[:, :, :seen], 3, 3)  # [B, G, R * l, s]
        mask = _mask(segments, window, start, stop, seen, causal)
        if mask is not None:
            shape = (rows, groups, share, stop - start, seen)
            scores = jnp.where(mask[:, None, None], scores.reshape(shape), _NEVER).reshape(scores.shape)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _LOWEST)
        e = jnp.exp(scores - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        # Dividing after the product touches K numbers per query instead of S.
        mixed.append((_dot(e, v[:, :, :seen], 3, 2) / total).reshape(rows, groups, share, stop - start, width))
        lse.append((top + jnp.log(total)).reshape(rows, groups, share, stop - start))
    return _join(jnp.concatenate(mixed, axis=3)).astype(dtype), jnp.concatenate(lse, axis=3).reshape(
        rows, heads, length
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | None,
    mixed: jax.Array,
    lse: jax.Array,
    d_mixed: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (q, k, v), given what `forward` returned (Dao 2023, algorithm 2)."""
    (rows, length, heads, width), groups, dtypes = q.shape, k.shape[2], (q.dtype, k.dtype, v.dtype)
    share = heads // groups
    q, k, v = _split(q, groups) * scale, _split(k, groups)[:, :, 0], _split(v, groups)[:, :, 0]
    d_mixed = _split(d_mixed, groups)
    # sum_s P_ls dP_ls = <dO_l, O_l>: one pass over K numbers per query instead of S.
    delta = jnp.sum(_split(mixed, groups) * d_mixed, axis=-1)  # [B, G, R, L]
    lse = lse.reshape(rows, groups, share, length)
    d_q, d_k, d_v = [], [], []
    for start, stop, seen in _blocks(length, causal, BACKWARD):
        q_block, d_block = _take(q, start, stop), _take(d_mixed, start, stop)  # [B, G, R * l, K]
        # Keys before queries, and d_q with K before L: no product then has to transpose a block of scores.
        shape = (rows, groups, seen, share, stop - start)
        scores = _dot(k[:, :, :seen], q_block, 3, 3).reshape(shape)
        mask = _mask(segments, window, start, stop, seen, causal)
        if mask is not None:
            scores = jnp.where(mask.swapaxes(1, 2)[:, None, :, None], scores, _NEVER)
        p = jnp.exp(scores - lse[:, :, None, :, start:stop])
        d_p = _dot(v[:, :, :seen], d_block, 3, 3).reshape(shape)
        d_scores = p * (d_p - delta[:, :, None, :, start:stop])
        p, d_scores = (x.reshape(rows, groups, seen, -1) for x in (p, d_scores))
        d_v.append(_dot(p, d_block, 3, 2))
        d_k.append(_dot(d_scores, q_block, 3, 2))
        d_q.append(_dot(k[:, :, :seen], d_scores, 2, 2).reshape(rows, groups, width, share, stop - start))
    d_q = jnp.concatenate(d_q, axis=4).transpose(0, 1, 3, 4, 2) * scale
    grads = _join(d_q), _join(_sum(d_k)[:, :, None]), _join(_sum(d_v)[:, :, None])
    return grads[0].astype(dtypes[0]), grads[1].astype(dtypes[1]), grads[2].astype(dtypes[2])


def _blocks(length: int, causal: bool, least: int) -> list[tuple[int, int, int]]:
    """Returns (first query, end of queries, end of keys) of every block; the last one may be shorter."""
    step = max(least, -(-length // MOST_BLOCKS))
    stops = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [(start, stop, stop if causal else length) for start, stop in stops]


def _split(x: jax.Array, groups: int) -> jax.Array:
    """Returns x [B, L, H, K] as [B, G, R, L, K] with R = H / G, float32 or wider.

    Batch and heads stay apart, so that each may be sharded.
    """
    rows, length, heads, width = x.shape
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(rows, length, groups, heads // groups, width)
    return x.transpose(0, 2, 3, 1, 4)


def _join(x: jax.Array) -> jax.Array:
    """Returns x [B, G, R, L, K] as [B, L, G * R, K]."""
    rows, groups, share, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, groups * share, width)


def _take(x: jax.Array, start: int, stop: int) -> jax.Array:
    """Returns a block of x [B, G, R, L, K] as [B, G, R * l, K]."""
    rows, groups, share, _, width = x.shape
    return x[:, :, :, start:stop].reshape(rows, groups, share * (stop - start), width)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a [B, G, m, n] with axis j of b; unlike einsum it never exchanges the operands."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))))


def _mask(
    segments: jax.Array | None, window: jax.Array | None, start: int, stop: int, seen: int, causal: bool
) -> jax.Array | None:
    """Returns which of the first `seen` keys each query of a block may see, bool [B or 1, l, s]; None = all."""
    shape, masks = (1, stop - start, seen), []
    query = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    if causal:
        masks.append(key <= query)
    if window is not None:
        masks.append((query - key < window) | (window <= 0))
    if segments is not None:
        own = segments[:, start:stop, None]
        masks.append((own == segments[:, None, :seen]) & (own > 0))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _sum(parts: list[jax.Array]) -> jax.Array:
    """Returns the sum of arrays [B, G, s, K] of growing s, each over the first s keys."""
    total = parts[-1]
    for part in parts[:-1]:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total
