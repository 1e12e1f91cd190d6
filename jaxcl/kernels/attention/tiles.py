"""Which tiles of the score matrix hold anything: short lists per tile of queries or keys, made from the segments.

A query i of a packed row sees the keys of one interval: from the start of its document (or of its window) to itself
(or, both ways, to the end of its document). A tile of scores is therefore empty if no interval of its queries
reaches its keys: L * tiles comparisons, never L * L.

    visit [i, J] = min(rank[stop_i], rank[J.stop]) > max(rank[start_i], rank[J.start])    rank = wanted keys before

The queries may be a part of the row, on a device that has no others: all lists then have tiles of that part alone.

Kernels read the lists by scalar prefetch or plain loads: their loops go over `count` slots, and slots past the
count repeat the tile before them, so that a pipeline that copies a tile when its index changes copies nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

SKIP, BOUNDARY, FULL = 0, 1, 2  # no visible pair in the tile; some, so that the kernel has to mask; all


class Part(NamedTuple):
    """Queries that are some of the tokens of a row."""

    first: jax.Array  # int32 [], place of the first
    length: int  # L

    def of(self, x: jax.Array) -> jax.Array:
        """Returns the entries [B, L, ...] of the queries from those of all tokens [B, S, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.length, axis=1)


class Tiles(NamedTuple):
    """The tiles to visit for each of n own tiles, in ascending order.

    Attributes:
      index: int32 [B, n, m], the tile of the other side that a slot visits.
      kind: int32 [B, n, m], SKIP for the slots past `count`, else BOUNDARY or FULL.
      count: int32 [B, n], slots in use.
    """

    index: jax.Array
    kind: jax.Array
    count: jax.Array


def forward(
    segments: jax.Array,
    window: jax.Array | None,
    *,
    causal: bool,
    block_q: int,
    block_kv: int,
    part: Part | None = None,
) -> Tiles:
    """Returns for every tile of queries the tiles of keys that one of its queries sees.

    Exact if the tokens of a document are neighbours. A row in which a segment comes back after another one counts as
    one document here (and its tiles as BOUNDARY where they are mixed): more tiles than needed, never fewer.

    Args:
      segments: int32 [B, L], 0 = padding, in any order.
      window: int32 [] as for attention, or None.
      causal: whether a query is kept from later keys.
      block_q: queries per tile; the last tile may be ragged and is then never FULL.
      block_kv: keys per tile.
      part: which tokens are queries; None = all.
    """
    return _listed(_kinds(segments, window, None, None, causal, block_q, block_kv, part))


def d_queries(
    segments: jax.Array,
    window: jax.Array | None,
    frozen: jax.Array | None,
    *,
    causal: bool,
    block_q: int,
    block_kv: int,
    part: Part | None = None,
) -> Tiles:
    """Returns for every tile of queries the tiles of keys that its gradient needs: those of unfrozen queries.

    Args as for `forward`; frozen: bool [B, L], tokens whose q, k, v and output carry no gradient, or None. FULL does
    not look at `frozen`: the kernel gives those queries a cotangent of zero.
    """
    live = None if frozen is None else ~frozen
    return _listed(_kinds(segments, window, live, None, causal, block_q, block_kv, part))


def d_keys(
    segments: jax.Array,
    window: jax.Array | None,
    frozen: jax.Array | None,
    *,
    causal: bool,
    block_q: int,
    block_kv: int,
    part: Part | None = None,
) -> Tiles:
    """Returns for every tile of keys the tiles of queries that its gradient needs: unfrozen on both sides."""
    live = None if frozen is None else ~frozen
    return _listed(_kinds(segments, window, live, live, causal, block_q, block_kv, part).swapaxes(1, 2))


def _kinds(
    segments: jax.Array,
    window: jax.Array | None,
    queries: jax.Array | None,
    keys: jax.Array | None,
    causal: bool,
    block_q: int,
    block_kv: int,
    part: Part | None,
) -> jax.Array:
    """Returns the kind of every tile, int32 [B, tiles of queries, tiles of keys]; unwanted tokens visit nothing."""
    length = segments.shape[1]
    start, stop = _documents(segments)
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if causal:
        stop = jnp.broadcast_to(place + 1, stop.shape)
    if window is not None:
        start = jnp.where(window > 0, jnp.maximum(start, place - window + 1), start)
    edges = jnp.minimum(jnp.arange(-(-length // block_kv) + 1, dtype=jnp.int32) * block_kv, length)[None]
    wanted = segments > 0
    if queries is not None:
        wanted = wanted & queries
    if keys is not None:
        rank = jnp.pad(jnp.cumsum(keys, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))  # [B, L + 1]
        start, stop = (jnp.take_along_axis(rank, x, axis=1) for x in (start, stop))
        edges = rank[:, edges[0]]
    if part is not None:
        start, stop, wanted = part.of(start), part.of(stop), part.of(wanted)
    below = jnp.minimum(stop[:, :, None], edges[:, None, 1:])
    above = jnp.maximum(start[:, :, None], edges[:, None, :-1])
    visit = _split((below > above) & wanted[:, :, None], block_q).any(axis=2)
    full = _full(segments, window, causal, block_q, block_kv, part)
    return jnp.where(visit, jnp.where(full, FULL, BOUNDARY), SKIP)


def _documents(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first token of every token's document and the one after its last, int32 [B, L] each."""
    length = segments.shape[1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], segments.shape)
    change = segments[:, 1:] != segments[:, :-1]
    first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(last, place + 1, length), axis=1, reverse=True)
    # A document in two pieces spans an interval that is not its own. Ascending ids, the usual case, need no sort.
    ids = jnp.where(first, segments, 0)
    ascending = jnp.all((ids == 0) | (ids > jnp.pad(jax.lax.cummax(ids, axis=1), ((0, 0), (1, 0)))[:, :-1]))

    def repeats(ids: jax.Array) -> jax.Array:
        ids = jnp.sort(ids, axis=1)
        return jnp.any((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0), axis=1, keepdims=True)

    torn = jax.lax.cond(ascending, lambda ids: jnp.any(ids < 0, axis=1, keepdims=True), repeats, ids)
    return jnp.where(torn, 0, start), jnp.where(torn, length, stop)


def _full(
    segments: jax.Array, window: jax.Array | None, causal: bool, block_q: int, block_kv: int, part: Part | None
) -> jax.Array:
    """Returns whether every query of a tile sees every key, bool [B, tiles of queries, tiles of keys]."""

    def ids(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        tiles = _split(segments, block)
        start = jnp.arange(tiles.shape[1], dtype=jnp.int32) * block
        return tiles.min(axis=2), tiles.max(axis=2), start

    (low, high, start), own = ids(segments, block_kv), segments if part is None else part.of(segments)
    q_low, q_high, q_start = ids(own, block_q)
    q_start = q_start if part is None else q_start + part.first
    one = (q_low == q_high) & (q_low > 0)
    full = one[:, :, None] & (low == high)[:, None] & (q_low[:, :, None] == low[:, None])
    if causal:
        full &= (start[None, :] + block_kv - 1 <= q_start[:, None])[None]
    if window is not None:
        full &= ((q_start[:, None] + block_q - 1 - start[None, :] < window) | (window <= 0))[None]
    return full


def _split(x: jax.Array, block: int) -> jax.Array:
    """Returns x [B, L, ...] as [B, tiles, block, ...], with zeros behind the last token."""
    tiles = -(-x.shape[1] // block)
    x = jnp.pad(x, ((0, 0), (0, tiles * block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], tiles, block, *x.shape[2:])


def _listed(kinds: jax.Array) -> Tiles:
    """Returns the lists of a table of kinds [B, n, m]."""
    count = jnp.sum(kinds != SKIP, axis=2, dtype=jnp.int32)
    order = jnp.argsort(kinds == SKIP, axis=2, stable=True).astype(jnp.int32)
    slots = jnp.arange(kinds.shape[2], dtype=jnp.int32)[None, None]
    index = jnp.take_along_axis(order, jnp.minimum(slots, jnp.maximum(count - 1, 0)[:, :, None]), axis=2)
    # A tile without any repeats the last one of the nearest tile before it that has some.
    own = jnp.arange(kinds.shape[1], dtype=jnp.int32)[None]
    before = jax.lax.cummax(jnp.where(count > 0, own, 0), axis=1)
    ends = jnp.take_along_axis(index[:, :, -1], before, axis=1)
    index = jnp.where((count > 0)[:, :, None], index, ends[:, :, None])
    kinds = jnp.where(slots < count[:, :, None], jnp.take_along_axis(kinds, order, axis=2), SKIP)
    return Tiles(index, kinds.astype(jnp.int32), count)
