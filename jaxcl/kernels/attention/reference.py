"""Plain attention: the definition that the fast versions are tested against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    causal: bool = True,
    window: jax.Array | int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Returns softmax(scale * q k^T + mask) v with grouped heads: query head h reads key head h // (H / G).

    A query that may see no key gets zeros, and zero gradient.

    Args:
      q: float [B, L, H, K].
      k: float [B, S, G, K]; H is a multiple of G.
      v: float [B, S, G, K].
      segments: int32 [B, L] document of every query, 0 = padding; None = one document without padding.
      kv_segments: int32 [B, S] document of every key; None = `segments`.
      positions: int32 [B, L] position of every query; only read together with `kv_positions`.
      kv_positions: int32 [B, S] position of every key (a cache). Then causal means kv_positions <= positions;
        without it, causal means that the index of the key in the row is at most that of the query.
      causal: whether a query is kept from later keys.
      window: int or int32 []: a query sees keys that lie less than this many places before it (Mistral: the last
        `window` tokens, its own included); None, 0 or below = all.
      scale: factor on the scores; None = 1 / sqrt(K).

    Returns:
      [B, L, H, K] in the dtype of `q`. Scores and softmax are float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or arguments that do not fit together.
    """
    (rows, length, heads, width), (slots, groups) = q.shape, k.shape[1:3]
    if heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key heads")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mask = visible(
        length,
        slots,
        segments=segments,
        kv_segments=kv_segments,
        positions=positions,
        kv_positions=kv_positions,
        causal=causal,
        window=window,
    )
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    scores = jnp.einsum("blgrk,bsgk->bgrls", grouped, k, preferred_element_type=wide)
    scores = scores * (1 / math.sqrt(width) if scale is None else scale)
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None])  # [B, G, H/G, L, S]
    mixed = jnp.einsum("bgrls,bsgk->blgrk", weights.astype(v.dtype), v, preferred_element_type=wide)
    return mixed.reshape(rows, length, heads, width).astype(q.dtype)


def visible(
    length: int,
    slots: int,
    *,
    segments: jax.Array | None,
    kv_segments: jax.Array | None,
    positions: jax.Array | None,
    kv_positions: jax.Array | None,
    causal: bool,
    window: jax.Array | int | None = None,
) -> jax.Array | None:
    """Returns which key every query may see, bool [B or 1, L, S], or None if it may see all; see `attention`."""
    mask = None
    if segments is None and kv_segments is not None:
        raise ValueError("kv_segments without segments")
    if segments is not None:
        keys = segments if kv_segments is None else kv_segments
        if keys.shape[1] != slots:
            raise ValueError(f"{slots} keys but segments for {keys.shape[1]}; give kv_segments")
        # A key of the same document as a query outside padding is itself outside padding.
        mask = (segments[:, :, None] == keys[:, None, :]) & (segments[:, :, None] > 0)
    if causal:
        if kv_positions is not None and positions is None:
            raise ValueError("kv_positions without positions")
        if kv_positions is not None and positions is not None:
            past = kv_positions[:, None, :] <= positions[:, :, None]
        elif length == slots:
            past = jnp.tril(jnp.ones((1, length, slots), bool))
        else:
            raise ValueError(f"causal attention of {length} queries to {slots} keys needs kv_positions")
        mask = past if mask is None else mask & past
    if window is not None:
        if kv_positions is not None and positions is not None:
            distance = positions[:, :, None] - kv_positions[:, None, :]
        else:  # within a document, places in the row differ as positions do
            distance = (jnp.arange(length)[:, None] - jnp.arange(slots)[None, :])[None]
        near = (distance < window) | (jnp.asarray(window) <= 0)
        mask = near if mask is None else mask & near
    return mask


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the softmax over the last axis of `scores` where `mask` holds, and zeros where it holds nowhere."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    low = jnp.finfo(scores.dtype).min  # finite: a row of -inf would make NaN of the difference to its maximum
    scores = jnp.where(mask, scores, low)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
