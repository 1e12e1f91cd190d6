r"""Model selection within training: rows that are held back from it, and the best parameters on these.

    aside    rows whose hash is below share * 2^32: the same ones in every pass, on every device, without a list of them
    best     <- params    if score(params, rows kept) >= the best score so far; the later of two that are equal

A method that selects trains on the other rows, keeps some of the rows aside in its memory (a reservoir, so that any row
of the task is as likely to be kept) and scores its parameters on them now and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl import memory as store
from jaxcl import tree
from jaxcl.types import Batch, Key, Memory, Params

NONE = -1.0  # score of nothing


def aside(batch: Batch, share: float) -> jax.Array:
    """Returns which rows are held back, bool [B]; equal inputs are on the same side.

    Args:
      batch: float or int inputs [B, ...].
      share: of all rows, about.
    """
    rows = batch.inputs.reshape(batch.inputs.shape[0], -1)
    whole = jnp.issubdtype(rows.dtype, jnp.integer)
    bits = rows.astype(jnp.uint32) if whole else jax.lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(rows.shape[1], dtype=jnp.uint32) + 1
    # Products by odd numbers keep all bits; the rest is the last step of MurmurHash3 (Appleby 2011), modulo 2^32.
    bits = (bits ^ (bits >> 15)) * jnp.broadcast_to(odd * jnp.uint32(0x9E3779B1), bits.shape)
    number = jnp.sum(bits ^ (bits >> 16), axis=1, dtype=jnp.uint32)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number = (number ^ (number >> 16)) * jnp.uint32(factor)
    return (number ^ (number >> 16)) < jnp.uint32(min(share, 1) * (2**32 - 1))


def start(example: Batch, params: Params, rows: int) -> Memory:
    """Returns the memory of a selection: `rows` rows like those of `example`, none kept yet, and no best parameters."""
    best = jax.tree.map(jnp.zeros_like, params)
    return {"kept": store.reservoir(example, rows), "best": best, "score": jnp.float32(NONE)}


def parted(memory: Memory, batch: Batch, share: float, key: Key) -> tuple[Memory, Batch]:
    """Returns the memory that some rows held back are kept in, and the batch, in which they have no weight."""
    out = aside(batch, share)
    kept = store.write(memory["kept"], _weighed(batch, out), key)
    return {**memory, "kept": kept}, _weighed(batch, ~out)


def looked(memory: Memory, params: Params, due: jax.Array, score: Callable[[Params, Batch], jax.Array]) -> Memory:
    """Returns the memory after a look at new parameters.

    Args:
      memory: of the selection.
      params: new ones.
      due: bool [], whether to look.
      score: (params, rows) -> float32 [], at least 0; rows that are not there have no weight.
    """

    def look() -> tuple[Params, jax.Array]:
        new = score(params, memory["kept"]["rows"])
        better = new >= memory["score"]
        return tree.where(better, params, memory["best"]), jnp.where(better, new, memory["score"])

    best, found = jax.lax.cond(due, look, lambda: (memory["best"], memory["score"]))
    return {**memory, "best": best, "score": found}


def chosen(memory: Memory, params: Params) -> tuple[Params, Memory]:
    """Returns the best parameters, those given if none was scored, and the memory without rows and scores."""
    best = tree.where(memory["score"] > NONE, memory["best"], params)
    rows = memory["kept"]["rows"]
    empty = dataclasses.replace(rows, weights=jnp.zeros_like(rows.weights))
    kept = {"rows": empty, "seen": jnp.zeros_like(memory["kept"]["seen"])}
    return best, {"kept": kept, "best": memory["best"], "score": jnp.full_like(memory["score"], NONE)}


def _weighed(batch: Batch, where: jax.Array) -> Batch:
    keep = where.reshape(-1, *[1] * (batch.weights.ndim - 1))
    return dataclasses.replace(batch, weights=jnp.where(keep, batch.weights, 0))
