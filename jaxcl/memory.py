"""Reservoirs of past rows that live on the device: write, draw and count as pure functions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcl.types import Batch, Key, Memory

REPLAYED = "replayed"  # column of Batch.extra, float32 [B]: 1 for rows that came out of a memory

_MOST = jnp.iinfo(jnp.int32).max


def reservoir(example: Batch, capacity: int) -> Memory:
    """Returns an empty reservoir of `capacity` rows shaped like those of `example`.

    Layout: `rows`, a Batch with leaves [N, ...] (sharded like a batch), and `seen`, int32 [], the number of rows
    offered so far. The fill level is min(seen, N), so the two can never disagree.
    """
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), example)
    return {"rows": rows, "seen": jnp.zeros((), jnp.int32)}


def capacity(memory: Memory) -> int:
    """Returns N, the number of slots."""
    return memory["rows"].weights.shape[0]


def filled(memory: Memory) -> jax.Array:
    """Returns the number of slots in use, int32 []."""
    return jnp.minimum(memory["seen"], capacity(memory))


def has_weight(batch: Batch) -> jax.Array:
    """Returns which rows carry any weight, bool [B]; the others are padding."""
    return jnp.any(batch.weights.reshape(batch.weights.shape[0], -1) > 0, axis=1)


def slots(seen: jax.Array, valid: jax.Array, size: int, key: Key, extra: int = 0) -> jax.Array:
    """Returns the slot each row goes to, int32 [B]; `size` means nowhere.

    Algorithm R (Vitter 1985): the row offered as number t = 0, 1, ... goes to slot t while there is room,
    and later to slot j ~ uniform{0..t} if j < N. Then every row seen is in the reservoir with probability N / seen.

    Args:
      seen: int32 [], rows offered before these.
      valid: bool [B]; rows that are not valid are not offered.
      size: N.
      key: of this call.
      extra: 1 draws j from {0..t+1}, as the code of Riemer et al. (2019) does; 0 is right.
    """
    count = jnp.cumsum(valid.astype(jnp.int32)) - 1  # [B]
    number = seen + jnp.minimum(count, _MOST - 2 - seen)  # saturates instead of wrapping round
    drawn = jax.random.randint(key, valid.shape, 0, number + 1 + extra)
    slot = jnp.where(number < size, number, drawn)
    return jnp.where(valid & (slot < size), slot, size)


def write(memory: Memory, batch: Batch, key: Key, extra: int = 0) -> Memory:
    """Offers the rows of `batch` to the reservoir in order; rows without weight are not offered.

    The result is that of offering them one by one: of two rows that draw the same slot the later one stays.
    Columns of `batch.extra` that the reservoir does not have are dropped. Cost: O(N) integers and B rows.
    Beyond 2^31 rows `seen` stands still, so the inclusion probability stops falling at N / 2^31.
    """
    size, valid = capacity(memory), has_weight(batch)
    slot = slots(memory["seen"], valid, size, key, extra)  # [B]
    order = jnp.arange(slot.shape[0], dtype=jnp.int32)
    last = jnp.full((size,), -1, jnp.int32).at[slot].max(order, mode="drop")  # [N] last row that wants each slot
    # Scatters with repeated indices have no defined order on accelerators, so only the winners are written.
    slot = jnp.where(last.at[slot].get(mode="fill", fill_value=-1) == order, slot, size)
    columns = {name: batch.extra[name] for name in memory["rows"].extra}
    rows = jax.tree.map(
        lambda kept, new: kept.at[slot].set(new.astype(kept.dtype), mode="drop"),
        memory["rows"],
        dataclasses.replace(batch, extra=columns),
    )
    offered = jnp.sum(valid.astype(jnp.int32))
    return {"rows": rows, "seen": memory["seen"] + jnp.minimum(offered, _MOST - 2 - memory["seen"])}


def draw(memory: Memory, count: int, key: Key, absent: jax.Array | None = None) -> Batch:
    """Draws `count` rows uniformly with replacement; all weights are 0 if there is nothing to draw from.

    Args:
      memory: a reservoir.
      count: number of rows.
      key: of this call.
      absent: bool [T], tasks whose rows must not be drawn; None draws from all.
    """
    rows = memory["rows"]
    if absent is None:
        total = filled(memory)
        index = jax.random.randint(key, (count,), 0, jnp.maximum(total, 1))
    else:
        eligible = (jnp.arange(capacity(memory)) < filled(memory)) & ~absent[rows.task]
        ends = jnp.cumsum(eligible.astype(jnp.int32))  # [N]
        total = ends[-1]
        rank = jax.random.randint(key, (count,), 0, jnp.maximum(total, 1))
        index = jnp.minimum(jnp.searchsorted(ends, rank, side="right"), capacity(memory) - 1)
    drawn = jax.tree.map(lambda x: x[index], rows)
    return dataclasses.replace(drawn, weights=jnp.where(total > 0, drawn.weights, 0.0))


def present(batch: Batch, tasks: int) -> jax.Array:
    """Returns which tasks occur in `batch`, bool [T]."""
    return jnp.zeros((tasks,), bool).at[batch.task].set(True)


def replayed(batch: Batch) -> jax.Array:
    """Returns the column that marks replayed rows, float32 [B]; zeros if no part has replayed anything."""
    return batch.extra.get(REPLAYED, jnp.zeros((batch.task.shape[0],), jnp.float32))


def append(batch: Batch, drawn: Batch) -> Batch:
    """Returns `batch` followed by the drawn rows, marked as replayed."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *_alike(batch, drawn))


def substitute(batch: Batch, drawn: Batch, where: jax.Array) -> Batch:
    """Returns `batch` with the rows `where` (bool [B]) taken from `drawn` instead, marked as replayed."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return jax.tree.map(leaf, *_alike(batch, drawn))


def fresh(batch: Batch) -> Batch:
    """Returns `batch` with the weights of replayed rows set to 0, so that `write` offers only new rows."""
    keep = (replayed(batch) == 0).reshape(-1, *[1] * (batch.weights.ndim - 1))
    return dataclasses.replace(batch, weights=jnp.where(keep, batch.weights, 0.0))


def _alike(batch: Batch, drawn: Batch) -> tuple[Batch, Batch]:
    """Returns both with the replay mark, and `drawn` with zeros in the columns that only `batch` has."""
    count = drawn.task.shape[0]
    columns = {name: jnp.zeros((count, *x.shape[1:]), x.dtype) for name, x in batch.extra.items()}
    columns |= {**drawn.extra, REPLAYED: jnp.ones((count,), jnp.float32)}
    marked = dataclasses.replace(batch, extra={**batch.extra, REPLAYED: replayed(batch)})
    return marked, dataclasses.replace(drawn, extra=columns)
