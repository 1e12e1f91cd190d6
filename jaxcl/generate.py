"""Greedy generation with a key-value cache: one prefill, then a loop of single tokens that ends when all rows have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.types import Batch, Model, Params


def greedy(
    model: Model, params: Params, prompts: jax.Array, segments: jax.Array, steps: int, stop: jax.Array
) -> jax.Array:
    """Returns the most probable continuation, token by token. Pure: jit it with `model` and `steps` fixed.

    Rows are padded on the left, so that all of them write to the same slot of the cache next; padding has segment 0
    and is never attended to. The cache has L + steps - 1 slots, which `max_length` of the model must allow.

    Args:
      model: takes `cache` as `jaxcl.models.transformer` does.
      params: its parameters.
      prompts: int32 [B, L], padded on the left; every row has at least one token.
      segments: int32 [B, L]: 0 = padding, 1 = prompt.
      steps: tokens to generate, at least 1.
      stop: int32 [S]: tokens that end a row; S may be 0.

    Returns:
      int32 [B, steps]. From its stop token on a row repeats that token.
    """
    rows, length = prompts.shape
    used = (segments > 0).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(used, axis=1) - 1, 0)

    def feed(tokens: jax.Array, inside: jax.Array, places: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        task = jnp.zeros((rows,), jnp.int32)
        batch = Batch(tokens, tokens, jnp.zeros(tokens.shape), inside, places, task)
        output = model.apply(params, batch, cache=cache)
        last = output._replace(hidden=output.hidden[:, -1:])  # logits of one token alone
        return last.logits[:, 0].argmax(-1).astype(jnp.int32), output.cache  # [B]

    def ended(tokens: jax.Array) -> jax.Array:
        return (tokens[:, None] == stop[None]).any(axis=1)  # [B]

    def going(carry: Any) -> jax.Array:
        at, _, done, _, _ = carry
        return (at < steps) & ~done.all()

    def advance(carry: Any) -> Any:
        at, last, done, out, cache = carry
        place = positions[:, -1:] + at  # the first new token follows the last of the prompt
        new, cache = feed(last[:, None], jnp.ones((rows, 1), jnp.int32), place, cache)
        new = jnp.where(done, last, new)
        fill = (jnp.arange(steps) >= at)[None]  # the rest of a row that has ended is filled as well
        return at + 1, new, done | ended(new), jnp.where(fill, new[:, None], out), cache

    first, cache = feed(prompts, used, positions, length + steps - 1)
    out = jnp.broadcast_to(first[:, None], (rows, steps))
    return jax.lax.while_loop(going, advance, (jnp.int32(1), first, ended(first), out, cache))[3]
