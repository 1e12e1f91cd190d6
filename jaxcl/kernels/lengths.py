"""Attention of rows whose length is cut over devices: each has its own queries, and gathers all keys and values.

The idea. Everything else in a transformer is independent between tokens; attention alone has to see other devices. Keys
and values are gathered whole, once for each layer (Llama Team 2024, 2407.21783, section 3.3.2): with grouped heads they
are a fraction of the queries, one collective hides behind the projections better than many small ones, and whatever
hides a key (documents, windows, padding) is decided where all places are known. Backward, their gradients are summed
and each device keeps its own part: a reduce-scatter, in the type of the keys.

Later queries see more keys, so the device with the last part of a long document would work twice as long as the mean.
Each device therefore trades the second half of its queries with its mirror image: of 2N pieces, device i attends for
the pieces 2i and 2N - 1 - 2i, whose keys together are as many for every i. The tokens themselves stay in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "context"


def attention(f: Callable[..., Any], parts: int, *, balanced: bool) -> Callable[..., Any]:
    """Returns what one of `parts` devices does, inside `jax.shard_map` over AXIS.

    Args:
      f: f(q, k, v, *rest, first) -> arrays whose tokens are along axis 1 of [B, L, H, K] or axis 2 of [B, H, L]: the
        attention of queries that stand in their row from the place `first` on, int32 [], to all keys.
      parts: N, size of AXIS.
      balanced: whether devices trade queries; needs an even number of them.

    Returns:
      A function of q [B, L / N, H, K]; k, v [B, L / N, G, K]; the rest for whole rows, the last of them None.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        k, v = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
        length, here = q.shape[1], jax.lax.axis_index(AXIS)
        if not balanced or length % 2:
            return f(q, k, v, *rest[:-1], here * length)
        half = length // 2
        mirror = [(i, parts - 1 - i) for i in range(parts)]
        theirs = jax.lax.ppermute(q[:, half:], AXIS, mirror)
        early = f(q[:, :half], k, v, *rest[:-1], here * length)
        late = f(theirs, k, v, *rest[:-1], (parts - 1 - here) * length + half)
        late = jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, mirror), late)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1 if a.ndim == 4 else 2), early, late)

    return run
