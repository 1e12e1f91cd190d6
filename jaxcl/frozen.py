"""Frozen parameters: a method learns the rest, as if there were nothing else.

`TrainState.params` holds what is trained, under its full names; the memory is {"frozen": what is not, "inner": of the
method}. In every step the method is built anew around a model that knows the frozen arrays, so gradient, optimiser,
penalties, slow weights and replay see the trained parameters alone. Memory: the frozen parameters once. Compute: their
forward pass, and backward only what lies behind them.

This is the outermost layer of a method, so that the frozen parameters are found in checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.compose import inner, outer
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import Batch, Key, Method, Metrics, Model, Output, Params, PyTree, TrainState


def frozen(build: Callable[[Model], Method], model: Model, patterns: Sequence[str], *, keyed: bool = False) -> Method:
    """Returns the method that `build` makes for the parameters of `model` that no pattern matches.

    Args:
      build: makes the method of a model; called whenever a function of the method is traced.
      model: with all parameters.
      patterns: regular expressions, searched for in the names of the parameters.
      keyed: whether `model.apply` takes a key. In `step` it gets one that differs between steps and between batches
        and is the same for the same batch in one step; in `end_task` and in evaluation it gets none.

    Raises:
      UserError: see `check`.
    """
    check(model, patterns)

    def init(params: Params) -> TrainState:
        trained, kept = split(params, patterns)
        return outer(build(bind(model, kept, patterns)).init(trained), frozen=kept)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        kept = state.memory["frozen"]
        bound = bind(model, kept, patterns, named(key, "dropout") if keyed else None)
        new, metrics = build(bound).step(inner(state), batch, key)
        return outer(new, frozen=kept), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        kept = state.memory["frozen"]
        return outer(build(bind(model, kept, patterns)).end_task(inner(state), batch, key), frozen=kept)

    return Method(init, step, end_task)


def bind(model: Model, kept: Params, patterns: Sequence[str], key: Key | None = None) -> Model:
    """Returns the model of the trained parameters.

    Args:
      model: of all parameters.
      kept: the frozen ones.
      patterns: that match them.
      key: of the randomness in `apply`, which also depends on the rows; None = none.
    """

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        more = {} if key is None else {"key": jax.random.fold_in(key, _digest(batch.inputs))}
        return model.apply(join(params, kept), batch, cache, **more)

    return Model(lambda seed: split(model.init(seed), patterns)[0], apply, split(model.axes, patterns)[0])


def split(params: PyTree, patterns: Sequence[str]) -> tuple[PyTree, PyTree]:
    """Returns the trained and the frozen part of nested dicts, without empty branches."""

    def part(node: PyTree, path: str, hit: bool) -> PyTree:
        if not isinstance(node, dict):
            return node if any(re.search(pattern, path) for pattern in patterns) == hit else None
        found = {key: part(value, f"{path}/{key}" if path else key, hit) for key, value in node.items()}
        return {key: value for key, value in found.items() if value is not None} or None

    return part(params, "", False) or {}, part(params, "", True) or {}


def join(a: PyTree, b: PyTree) -> PyTree:
    """Returns the union of two nested dicts without a common leaf."""
    both = {key: join(a[key], b[key]) for key in a if key in b}
    return {**a, **b, **both}


def whole(state: TrainState) -> Params:
    """Returns all parameters of a state, trained and frozen; of any state."""
    memory = state.memory
    kept = memory["frozen"] if isinstance(memory, dict) and set(memory) == {"frozen", "inner"} else {}
    return join(state.params, kept) if kept else state.params


def check(model: Model, patterns: Sequence[str]) -> None:
    """Raises UserError for a pattern that is none or matches nothing, and if nothing is left to train."""
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    names = [name for name, _ in named_leaves(shapes)]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    for pattern in patterns:
        try:
            hit = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"config.optim.frozen: {pattern!r} is no regular expression: {error}") from None
        if not hit:
            raise UserError(f"config.optim.frozen: {pattern!r} matches no parameter; their names are {shown}")
    if not split(shapes, patterns)[0]:
        raise UserError(f"config.optim.frozen={list(patterns)!r}: freezes every parameter; nothing is left to train")


def _digest(inputs: jax.Array) -> jax.Array:
    """Returns a number that tells batches apart, uint32 []; the same on any mesh."""
    bits = (
        inputs
        if jnp.issubdtype(inputs.dtype, jnp.integer)
        else jax.lax.bitcast_convert_type(inputs.astype(jnp.float32), jnp.uint32)
    )
    places = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
