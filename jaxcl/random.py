"""Keys as pure functions of (seed, name, step): all randomness is derived, none is stored."""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp

from jaxcl.types import Key


def key_for(seed: int, name: str, step: jax.Array | int = 0) -> Key:
    """Returns `fold_in(fold_in(key(seed), crc32(name)), step)`; `step` may be traced."""
    return jax.random.fold_in(named(jax.random.key(seed), name), step)


def named(key: Key, name: str) -> Key:
    """Returns the stream of `key` that belongs to `name`, so that parts of a step draw independently."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def categorical(key: Key, logits: jax.Array) -> jax.Array:
    """Draws from softmax(logits [..., V]), int32 [...]: a block of about sqrt(V) numbers first, then one of the block.

    It takes two uniform numbers and one exponential for each logit, where the largest of V perturbed logits
    (`jax.random.categorical`) takes V random numbers and two logarithms for each; on a CPU that is ten times the work.
    What has a probability of 0 is never drawn. Sums are those of the dtype, float32 or wider: shares of a block, and of
    a number in it, are off by about 1e-7.
    """
    size = logits.shape[-1]
    width = 1 << math.ceil(math.log2(max(size, 1)) / 2)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, -size % width)])
    weights = weights.reshape(*logits.shape[:-1], -1, width)  # [..., blocks, width]
    points = jax.random.uniform(key, (2, *logits.shape[:-1]), logits.dtype)
    block = _bisect(jnp.sum(weights, axis=-1), points[0])
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * width + _bisect(inside, points[1])


def _bisect(weights: jax.Array, point: jax.Array) -> jax.Array:
    """Returns the first number whose running sum of weights [..., K] exceeds `point` [...] times their total, int32."""
    # A weight of 0 gets no sum of its own: those of its neighbours may differ from it by rounding.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    total = jnp.max(sums, axis=-1, keepdims=True)
    return jnp.argmax(sums > point[..., None] * total, axis=-1).astype(jnp.int32)
