"""Grouped-query attention over packed rows: one function, and one implementation per platform behind it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.kernels.attention import cpu, reference


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
    """Returns what `reference.attention` returns, with the same arguments and errors.

    Rows that attend to themselves (no `kv_segments`, no `kv_positions`) use the implementation of the platform that
    the program is lowered for and keep no scores for the backward pass; all else is the reference. Self-attention
    has a reverse-mode derivative only.
    """
    own = kv_segments is None and kv_positions is None and q.shape[1] == k.shape[1]
    fits = q.shape[2] % k.shape[2] == 0 and (segments is None or segments.shape[1] == q.shape[1])
    if not own or not fits:
        return reference.attention(
            q,
            k,
            v,
            segments=segments,
            kv_segments=kv_segments,
            positions=positions,
            kv_positions=kv_positions,
            causal=causal,
            window=window,
            scale=scale,
        )
    window = None if window is None else jnp.asarray(window, jnp.int32)
    return _packed(causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, q, k, v, segments, window)


Whole = jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(
    causal: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: Whole, window: Whole
) -> jax.Array:
    return _packed_fwd(causal, scale, q, k, v, segments, window)[0]


def _packed_fwd(
    causal: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: Whole, window: Whole
) -> tuple[Any, Any]:
    def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Whole, window: Whole) -> Any:
        mixed = reference.attention(q, k, v, segments=segments, causal=causal, window=window, scale=scale)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        return mixed, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), wide)  # its backward pass needs no logsumexp

    blockwise = partial(cpu.forward, causal=causal, scale=scale)
    mixed, lse = jax.lax.platform_dependent(q, k, v, segments, window, cpu=blockwise, default=plain)
    return mixed, (q, k, v, segments, window, mixed, lse)


def _packed_bwd(causal: bool, scale: float, saved: Any, d_mixed: jax.Array) -> tuple[Any, ...]:
    def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Whole, window: Whole, *rest: jax.Array) -> Any:
        run = partial(reference.attention, segments=segments, causal=causal, window=window, scale=scale)
        return jax.vjp(run, q, k, v)[1](rest[-1])

    blockwise = partial(cpu.backward, causal=causal, scale=scale)
    return *jax.lax.platform_dependent(*saved, d_mixed, cpu=blockwise, default=plain), None, None


_packed.defvjp(_packed_fwd, _packed_bwd)
