"""Attention of a few new tokens to a key-value cache, in the layout that reads the cache fastest.

The keys of one head lie together, [B, G, S, K], so that scores and mixture are matrix products batched over rows and
heads, without a transposed copy of the cache. It is plain XLA on every platform: one pass over the cache bounds its
time, and XLA reads it once. `jaxcl.kernels.attention.attention` is the same function in the layout of training.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcl.kernels.attention import reference


def attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    segments: jax.Array,
    kv_segments: jax.Array,
    positions: jax.Array,
    kv_positions: jax.Array,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Returns causal attention to the slots of a cache whose segment is that of the query.

    Slots may lie in any order: `kv_positions` say which come before a query. A query that sees no slot gets zeros.

    Args:
      q: float [B, L, H, K]; query head h reads key head h // (H / G).
      keys: float [B, G, S, K], those of the queries included.
      values: float [B, G, S, K].
      segments, positions: int32 [B, L]; segment 0 is padding.
      kv_segments, kv_positions: int32 [B, S].
      window, soft_cap, scale: see `reference.attention`.

    Returns:
      [B, L, H, K] in the dtype of `q`. Scores and softmax are float32; products have the dtype of the cache.

    Raises:
      ValueError: shapes or arguments that do not fit together.
    """
    places = {"segments": segments, "kv_segments": kv_segments, "positions": positions, "kv_positions": kv_positions}
    plain = (jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (keys, values))
    reference.check(q, *plain, soft_cap=soft_cap, bias=None, frozen=None, **places)  # pyright: ignore[reportArgumentType]
    (rows, length, heads, width), (groups, slots) = q.shape, keys.shape[1:3]
    mask = reference.visible(length, slots, causal=True, window=window, **places)
    assert mask is not None
    wide = jnp.promote_types(q.dtype, jnp.float32)
    share = heads // groups
    scale = 1 / math.sqrt(width) if scale is None else scale
    # All queries that read a key head are rows of one matrix: [B, G, L * H / G, K].
    grouped = q.reshape(rows, length, groups, share, width).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(rows, groups, length * share, width).astype(keys.dtype)
    scores = scale * jnp.einsum("bgqk,bgsk->bgqs", grouped, keys, preferred_element_type=wide)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    mask = jnp.repeat(mask, share, axis=1)[:, None]  # [B, 1, L * H / G, S]
    weights, _ = reference.masked_softmax(scores, mask)
    mixed = jnp.einsum("bgqs,bgsk->bgqk", weights.astype(values.dtype), values, preferred_element_type=wide)
    mixed = mixed.reshape(rows, groups, length, share, width).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(rows, length, heads, width).astype(q.dtype)
