"""Plain attention: the definition that the fast versions are tested against."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


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
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    frozen: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Returns softmax(cap(scale * q k^T) + bias + mask) v with grouped heads: query head h reads key head h // (H / G).

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
      soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap) (Gemma 2, 2408.00118); None = as they are.
      bias: float [B or 1, H or 1, L or 1, S or 1], added to the scaled and capped scores (as jax.nn does) before the
        mask.
      scale: factor on the scores; None = 1 / sqrt(K).
      frozen: bool [B, L], for S = L: no gradient passes through the query, key, value and result of these tokens.
      return_lse: whether to return the logsumexp of the scores too; both have a derivative.

    Returns:
      [B, L, H, K] in the dtype of `q`. Scores and softmax are float32 (float64 for float64 inputs). With return_lse
      also the logsumexp [B, H, L] in that dtype, -1e30 for a query that sees no key.

    Raises:
      ValueError: shapes or arguments that do not fit together.
    """
    places = {"segments": segments, "kv_segments": kv_segments, "positions": positions, "kv_positions": kv_positions}
    check(q, k, v, soft_cap=soft_cap, bias=bias, frozen=frozen, scale=scale, window=window, **places)
    (rows, length, heads, width), slots = q.shape, k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mask = visible(length, slots, causal=causal, window=window, **places)
    q, k, v = (_stop(x, frozen, 1) for x in (q, k, v))
    scores = _scores(q, k, 1 / math.sqrt(width) if scale is None else scale, soft_cap, bias, wide)
    weights, lse = masked_softmax(scores, None if mask is None else mask[:, None, None])  # [B, G, H/G, L, S]
    mixed = jnp.einsum("bgrls,bsgk->blgrk", weights.astype(v.dtype), v, preferred_element_type=wide)
    mixed = _stop(mixed.reshape(rows, length, heads, width).astype(q.dtype), frozen, 1)
    return (mixed, _stop(lse.reshape(rows, heads, length), frozen, 2)) if return_lse else mixed


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    soft_cap: float | None,
    bias: jax.Array | None,
    frozen: jax.Array | None,
    scale: float | None = None,
    window: jax.Array | int | None = None,
    **places: jax.Array | None,
) -> None:
    """Raises ValueError if the arguments of `attention` do not fit together.

    `places` are segments and positions, each [B, L] or, with kv_ before the name, [B, S].
    """
    check_operands(q, k, v)
    (rows, length, heads, _), slots = q.shape, k.shape[1]
    for name, x in {**places, "frozen": frozen}.items():
        size = slots if name.startswith("kv_") else length
        if x is not None and x.shape != (rows, size):
            raise ValueError(f"{name} of shape {x.shape}: give [{rows}, {size}], one entry per token")
        kind = jnp.bool_ if name == "frozen" else jnp.signedinteger
        if x is not None and not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{name} of dtype {x.dtype}: give {'bool' if name == 'frozen' else 'int32'}")
    if frozen is not None and slots != length:
        raise ValueError(f"frozen with {length} queries and {slots} keys: it is for rows that attend to themselves")
    check_numbers(soft_cap, scale, window)
    full = (rows, heads, length, slots)
    if bias is not None and (bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, full, strict=True))):
        raise ValueError(f"bias of shape {bias.shape}: give four axes, each 1 or that of {list(full)}")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias of dtype {bias.dtype}: give a float; masks are made of segments, window and causal")


def check_operands(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError if q, k and v do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} of shape {x.shape}: give [batch, length, heads, width], one axis each")
    (rows, _, heads, width), groups = q.shape, k.shape[2]
    if v.shape != k.shape:
        raise ValueError(f"v of shape {v.shape} but k of shape {k.shape}: give both the same")
    if k.shape[0] != rows or k.shape[3] != width:
        raise ValueError(
            f"k of shape {k.shape} but q of shape {q.shape}: give the same batch and the same width (last)"
        )
    if 0 in (heads, groups, width):
        raise ValueError(f"q of shape {q.shape} and k of shape {k.shape}: give at least one head and a width of 1")
    if heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key heads: repeat k and v or change q")
    if len(kinds := {x.dtype.name for x in (q, k, v)}) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v of dtype {', '.join(sorted(kinds))}: give one floating dtype for all")


def check_numbers(soft_cap: float | None, scale: float | None, window: jax.Array | int | None) -> None:
    """Raises ValueError for a soft cap or scale that is no number, and a window that is no integer of 32 bits."""
    for name, number, least in (("soft_cap", soft_cap, 0.0), ("scale", scale, -math.inf)):
        if isinstance(number, Tracer):
            raise ValueError(f"{name} is traced: it is part of the program; give a number")
        if number is not None and not least < number < math.inf:
            raise ValueError(f"{name}={number}: give a finite number{' above 0' * (least == 0)}, or None")
    if window is None:
        return
    shape, kind = jnp.shape(window), getattr(window, "dtype", None)
    if shape != () or not (isinstance(window, int) if kind is None else jnp.issubdtype(kind, jnp.integer)):
        raise ValueError(f"window={window}: give one integer, or None for all")
    if not isinstance(window, jax.Array) and not -(2**31) <= int(window) < 2**31:
        raise ValueError(f"window={window}: give a number of tokens below 2**31, or None for all")


def _scores(
    q: jax.Array, k: jax.Array, scale: float, soft_cap: float | None, bias: jax.Array | None, wide: Any
) -> jax.Array:
    """Returns the scores [B, G, H / G, L, S] in dtype `wide`, before the mask."""
    (rows, length, heads, width), groups = q.shape, k.shape[2]
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    scores = scale * jnp.einsum("blgrk,bsgk->bgrls", grouped, k, preferred_element_type=wide)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is None:
        return scores
    share = (1, 1) if bias.shape[1] == 1 else (groups, heads // groups)
    return scores + bias.astype(wide).reshape(bias.shape[0], *share, *bias.shape[2:])


def _stop(x: jax.Array, frozen: jax.Array | None, axis: int) -> jax.Array:
    """Returns x [B, ...] with no gradient at the frozen tokens, which lie along `axis`."""
    if frozen is None:
        return x
    shape = [x.shape[a] if a in (0, axis) else 1 for a in range(x.ndim)]
    return jnp.where(frozen.reshape(shape), jax.lax.stop_gradient(x), x)


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


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the softmax over the last axis of `scores` where `mask` holds, zeros where it holds nowhere, and the
    logsumexp of the scores without that axis, -1e30 where the mask holds nowhere.
    """
    if mask is None:
        return jax.nn.softmax(scores, axis=-1), jax.nn.logsumexp(scores, axis=-1)
    low = jnp.finfo(scores.dtype).min  # finite: a row of -inf would make NaN of the difference to its maximum
    scores = jnp.where(mask, scores, low)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return weights / total, jnp.where(some, top + jnp.log(total), -1e30)[..., 0]
