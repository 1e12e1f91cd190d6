"""More tokens: new rows in embedding and head, in their optimiser state, and in all else that is shaped like them.

    params = grow(params, model.axes, 32000, 32100, how="mean", key=key)
    state = grow_state(state, model.axes, 32000, 32100, how="mean", key=key)

Rows that were there stay as they are, bit for bit. The size of an array may be larger than its vocabulary, so that a
mesh divides it; rows behind the vocabulary are zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcl.random import named
from jaxcl.tree import map_named, named_leaves
from jaxcl.types import Key, Params, PyTree, TrainState

How = Literal["mean", "normal", "zeros"]
COPIES = ("anchor", "teacher", "average")  # what the methods call their copies of parameters
_BATCH = 64  # rows drawn at a time


def grow(
    tree: Params, axes: PyTree, old: int, new: int, *, how: How = "mean", key: Key, size: int | None = None
) -> Params:
    """Returns parameters with the rows `old` to `new` of every dimension named "vocab" initialised.

    Args:
      tree: float arrays.
      axes: `Model.axes`.
      old: number of tokens there are.
      new: number of tokens there will be; `old` or more.
      how: "mean": the mean of the old rows, so that a new token is at first as likely as an average one; "normal":
        draws from the normal distribution that has mean and covariance of the old rows (Hewitt 2021, "Initializing
        New Word Embeddings for Pretrained Language Models"); "zeros".
      key: of the draws.
      size: rows of the result; by default as many as there are, or `new` if that is more.

    The covariance of "normal" is the full one and never formed: a draw is the mean plus a combination of the centred
    rows with independent normal weights over sqrt(old - 1). It costs old * D multiplications for each new row.
    """

    def leaf(name: str, x: jax.Array, names: Any) -> jax.Array:
        axis = _axis(names)
        return x if axis is None else _grown(x, axis, old, new, how, named(key, name), size)

    return map_named(leaf, tree, axes)


def grow_state(
    state: TrainState, axes: PyTree, old: int, new: int, *, how: How = "mean", key: Key, size: int | None = None
) -> TrainState:
    """Returns a training state that has grown like its parameters.

    A leaf whose path ends with that of a parameter with a vocabulary, and which has its shape, possibly behind one more
    axis, grows with it: copies of parameters (a path with one of COPIES in it) get the new rows of the parameter, all
    else (moments, Fisher information, path integrals) zeros. Other leaves stay as they are.

    Args:
      state: with a parameter of every leaf of `axes`.
      axes, old, new, how, key, size: see `grow`.
    """
    params = grow(state.params, axes, old, new, how=how, key=key, size=size)
    places = dict(named_leaves(jax.tree.map(lambda x, names: -1 if (a := _axis(names)) is None else a, params, axes)))
    before, after = dict(named_leaves(state.params)), dict(named_leaves(params))

    def leaf(name: str, x: Any) -> Any:
        parts = name.split("/")
        for start in range(1, len(parts)):  # the longest tail first
            path = "/".join(parts[start:])
            axis = places.get(path, -1)
            if axis < 0 or x.shape[-before[path].ndim :] != before[path].shape or x.ndim > before[path].ndim + 1:
                continue
            extra = x.ndim - before[path].ndim
            grown = _grown(x, axis + extra, old, new, "zeros", key, after[path].shape[axis])
            if not set(COPIES) & set(parts[:start]):
                return grown
            rows = _rows(grown.shape, axis + extra)
            return jnp.where((rows >= old) & (rows < new), after[path].astype(x.dtype)[(None,) * extra], grown)
        return x

    rest = map_named(leaf, {"opt_state": state.opt_state, "memory": state.memory})
    return dataclasses.replace(state, params=params, **rest)


def _axis(names: Any) -> int | None:
    """Returns which dimension is the vocabulary."""
    return names.index("vocab") if names and "vocab" in names else None


def _rows(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns the number of its row for every element of an array of `shape`, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _grown(x: jax.Array, axis: int, old: int, new: int, how: How, key: Key, size: int | None) -> jax.Array:
    """Returns one array with its new rows."""
    size = max(x.shape[axis], new) if size is None else size
    if not 0 < old <= new <= size or old > x.shape[axis]:
        raise ValueError(f"vocabulary of {old} in {x.shape[axis]} rows cannot become one of {new} in {size}")
    kept = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    pad = [(0, size - kept.shape[i] if i == axis else 0) for i in range(x.ndim)]
    whole, rows = jnp.pad(kept, pad), _rows((*x.shape[:axis], size, *x.shape[axis + 1 :]), axis)
    blank = jnp.where(rows < old, whole, jnp.zeros((), x.dtype))
    if how == "zeros" or new == old:
        return blank
    table = jnp.moveaxis(jax.lax.slice_in_dim(x, 0, old, axis=axis), axis, 0).astype(jnp.float32)  # [old, ...]
    mean = jnp.mean(table, axis=0, keepdims=True)
    fresh = jnp.broadcast_to(mean, (new - old, *mean.shape[1:]))
    if how == "normal":
        fresh = fresh + _deviations(table - mean, new - old, key)
    fresh = jnp.moveaxis(fresh, 0, axis).astype(x.dtype)
    where: list[Any] = [slice(None)] * x.ndim
    where[axis] = slice(old, new)
    return blank.at[tuple(where)].set(fresh)


def _deviations(centred: jax.Array, count: int, key: Key) -> jax.Array:
    """Returns draws with the covariance of `centred` [old, ...], float32 [count, ...]."""
    old = centred.shape[0]

    def draw(number: jax.Array) -> jax.Array:
        weights = jax.random.normal(jax.random.fold_in(key, number), (old,))
        return jnp.tensordot(weights, centred, 1) / jnp.sqrt(jnp.float32(max(old - 1, 1)))

    return jax.lax.map(draw, jnp.arange(count), batch_size=_BATCH)
