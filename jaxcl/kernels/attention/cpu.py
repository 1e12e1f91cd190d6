"""Blockwise self-attention for CPUs: plain matrix products that skip the causal half and keep no scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # queries per block: enough for an efficient matrix product, few enough to skip most of the future
MOST_BLOCKS = 16  # blocks are unrolled, so that longer rows take longer blocks instead of longer programs
_NEVER = -1e30  # score of a key that may not be seen: finite, so that a difference of two is not NaN
_LOWEST = -1e29  # lowest maximum of a row, far above _NEVER: a query that sees nothing gets exp(-9e29) = 0


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, causal: bool, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, L, H, K] in the dtype of `q`, and the logsumexp of the scores [B, H, L].

    See `jaxcl.kernels.attention.attention` for the arguments; rows attend to themselves: S = L. One block of scores
    [B, H, block, L] is held at a time.
    """
    (rows, length, heads, _), groups, dtype = q.shape, k.shape[2], q.dtype
    q, k, v = _split(q, groups) * scale, _split(k, groups)[:, :, 0], _split(v, groups)[:, :, 0]
    mixed, lse = [], []
    for start, stop, seen in _blocks(length, causal):
        scores = jnp.einsum("bgrlk,bgsk->bgrls", q[:, :, :, start:stop], k[:, :, :seen])
        scores = _hide(scores, segments, start, causal)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _LOWEST)
        e = jnp.exp(scores - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        # Dividing after the product touches K numbers per query instead of S.
        mixed.append(jnp.einsum("bgrls,bgsk->bgrlk", e, v[:, :, :seen]) / total)
        lse.append(top + jnp.log(total))
    return _join(jnp.concatenate(mixed, axis=3)).astype(dtype), jnp.concatenate(lse, axis=3).reshape(
        rows, heads, length
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    mixed: jax.Array,
    lse: jax.Array,
    d_mixed: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (q, k, v), given what `forward` returned (Dao 2023, algorithm 2)."""
    (rows, length, heads, _), groups, dtypes = q.shape, k.shape[2], (q.dtype, k.dtype, v.dtype)
    # sum_s P_ls dP_ls = <dO_l, O_l>: one pass over K numbers per query instead of S.
    delta = jnp.sum(_split(mixed, groups) * _split(d_mixed, groups), axis=-1, keepdims=True)  # [B, G, H/G, L, 1]
    lse = lse.reshape(rows, groups, heads // groups, length, 1)
    q, k, v = _split(q, groups) * scale, _split(k, groups)[:, :, 0], _split(v, groups)[:, :, 0]
    d_mixed = _split(d_mixed, groups)
    d_q, d_k, d_v = [], [], []
    for start, stop, seen in _blocks(length, causal):
        q_block, d_block, at = q[:, :, :, start:stop], d_mixed[:, :, :, start:stop], (..., slice(start, stop), slice(1))
        scores = jnp.einsum("bgrlk,bgsk->bgrls", q_block, k[:, :, :seen])
        p = jnp.exp(_hide(scores, segments, start, causal) - lse[at])
        d_p = jnp.einsum("bgrlk,bgsk->bgrls", d_block, v[:, :, :seen])
        d_scores = p * (d_p - delta[at])
        d_v.append(jnp.einsum("bgrls,bgrlk->bgsk", p, d_block))
        d_k.append(jnp.einsum("bgrls,bgrlk->bgsk", d_scores, q_block))
        d_q.append(jnp.einsum("bgrls,bgsk->bgrlk", d_scores, k[:, :, :seen]))
    d_k, d_v = _sum(d_k)[:, :, None], _sum(d_v)[:, :, None]
    grads = _join(jnp.concatenate(d_q, axis=3) * scale), _join(d_k), _join(d_v)
    return grads[0].astype(dtypes[0]), grads[1].astype(dtypes[1]), grads[2].astype(dtypes[2])


def _blocks(length: int, causal: bool) -> list[tuple[int, int, int]]:
    """Returns (first query, end of queries, end of keys) of every block; the last one may be shorter."""
    step = max(BLOCK, -(-length // MOST_BLOCKS))
    stops = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [(start, stop, stop if causal else length) for start, stop in stops]


def _split(x: jax.Array, groups: int) -> jax.Array:
    """Returns x [B, L, H, K] as [B, G, H / G, L, K], float32 or wider.

    Batch and heads stay apart, so that each may be sharded.
    """
    rows, length, heads, width = x.shape
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(rows, length, groups, heads // groups, width)
    return x.transpose(0, 2, 3, 1, 4)


def _join(x: jax.Array) -> jax.Array:
    """Returns x [B, G, R, L, K] as [B, L, G * R, K]."""
    rows, groups, share, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, groups * share, width)


def _hide(scores: jax.Array, segments: jax.Array | None, start: int, causal: bool) -> jax.Array:
    """Returns scores [B, G, R, l, s] of the queries from `start` on, with _NEVER where a key may not be seen."""
    length, seen = scores.shape[-2:]
    mask = None
    if causal:
        query = start + jax.lax.broadcasted_iota(jnp.int32, (1, length, seen), 1)
        mask = jax.lax.broadcasted_iota(jnp.int32, (1, length, seen), 2) <= query
    if segments is not None:
        own = segments[:, start : start + length, None]
        same = (own == segments[:, None, :seen]) & (own > 0)
        mask = same if mask is None else mask & same
    return scores if mask is None else jnp.where(mask[:, None, None], scores, _NEVER)


def _sum(parts: list[jax.Array]) -> jax.Array:
    """Returns the sum of arrays [B, G, s, K] of growing s, each over the first s keys."""
    total = parts[-1]
    for part in parts[:-1]:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total
