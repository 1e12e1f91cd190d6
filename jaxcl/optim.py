"""Optimisers as optax chains, from keywords: clipping, decay masks, frozen parameters, rates per parameter.

  tx = make(name="adamw", lr=schedule, weight_decay=0.1, clip=1.0, frozen=["^embed"], multipliers={"head": 0.1})
  opt_state = tx.init(params)            counters and moments only; frozen parameters have none
  rate(schedule, opt_state)              the learning rate of the next update, for the log

The step of the schedule is the optimiser's own count of updates, so it is saved, restored and held back with the
moments: an update that is thrown away does not advance the schedule either. Parameters are addressed by
regular expressions, searched for in names such as `layers/mlp/up`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl import schema
from jaxcl.schema import UserError
from jaxcl.tree import map_named, named_leaves
from jaxcl.types import Params, PyTree

# Not decayed unless told otherwise: decay pulls weights to 0, which is no neutral value for gains, offsets and tables.
NO_DECAY = ("norm", "bias", "scale", "embed", "^gate/decay$")


def _check_options(options: Mapping[str, Any], field: str) -> None:
    """Raises UserError for numbers that no optimiser can use; types are checked elsewhere."""
    ranges = {"weight_decay": (0.0, math.inf), "b1": (0.0, 1.0), "b2": (0.0, 1.0), "momentum": (0.0, 1.0)}
    for name, (low, high) in ranges.items():
        value = options.get(name)
        if isinstance(value, (int, float)) and not low <= value < high:
            raise UserError(f"config.{field}.{name}={value!r}: must be at least {low:g} and below {high:g}")
    if isinstance(eps := options.get("eps"), (int, float)) and eps <= 0:
        raise UserError(f"config.{field}.eps={eps!r}: must be above 0")


def make(
    *,
    lr: float | Callable[[Any], Any],
    name: str = "adamw",
    clip: float | None = 1.0,
    no_decay: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    multipliers: Mapping[str, float] | None = None,
    field: str = "optim",
    **options: Any,
) -> optax.GradientTransformation:
    """Returns the optimiser `name`.

    Args:
      lr: learning rate or schedule of the number of finished updates.
      name: adamw, adam, lion or sgd.
      clip: global norm that the gradient of the trainable parameters is scaled down to; None = no clipping.
      no_decay: patterns of parameters without weight decay; None = norms, biases, scales, embeddings, Lambda of a gate.
      frozen: patterns of parameters that are not trained; they have no optimiser state and do not count in `clip`.
      multipliers: pattern -> factor on the learning rate; where several match, their product.
      field: the configuration field, for messages.
      **options: keywords of the function of that name below.

    Raises:
      UserError: unknown name or option, bad value; and, from `init`, a pattern that matches no parameter.
    """
    choices = {f.__name__: f for f in (adamw, adam, lion, sgd)}
    if name not in choices:
        raise UserError(f"config.{field}.name={name!r}: no such optimiser{schema.nearest(name, list(choices))}")
    given = {"lr": lr, "clip": clip, "no_decay": no_decay, "frozen": frozen, "multipliers": multipliers}
    schema.check(make, given, field=field)
    for pattern in (*(no_decay or ()), *frozen, *(multipliers or {})):
        _compile(pattern, field)
    if clip is not None and clip <= 0:
        raise UserError(f"config.{field}.clip={clip!r}: must be above 0; use None for no clipping")
    _check_options(options, field)
    if not callable(lr) and lr <= 0:
        raise UserError(f"config.{field}.lr={lr!r}: must be above 0")

    def decayed(params: Params) -> PyTree:
        return _matches(params, NO_DECAY if no_decay is None else no_decay, hit=False)

    scale, decay = schema.call(choices[name], options, field=field)
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    chain.append(scale)
    if decay:
        chain.append(optax.add_decayed_weights(decay, mask=decayed))
    if multipliers:
        chain.append(_multiply(multipliers))
    chain.append(optax.scale_by_learning_rate(lr if callable(lr) else optax.constant_schedule(lr)))
    tx = optax.chain(*chain)
    tx = _freeze(tx, frozen) if frozen else tx
    wanted = {"no_decay": no_decay or (), "frozen": frozen, "multipliers": tuple(multipliers or ())}

    def init(params: Params) -> PyTree:
        _check_patterns(params, wanted, field)
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


def adamw(
    *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1
) -> tuple[optax.GradientTransformation, float]:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 1711.05101); the first moment is float32."""
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32), weight_decay


def adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> tuple[optax.GradientTransformation, float]:
    """Adam (Kingma and Ba, 1412.6980)."""
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32), 0.0


def lion(*, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.1) -> tuple[optax.GradientTransformation, float]:
    """Lion: the sign of an interpolated momentum (Chen et al., 2302.06675)."""
    return optax.scale_by_lion(b1, b2, mu_dtype=jnp.float32), weight_decay


def sgd(
    *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> tuple[optax.GradientTransformation, float]:
    """Stochastic gradient descent; the decay is added after the momentum, so it is decoupled as in AdamW."""
    return (optax.trace(momentum, nesterov) if momentum else optax.identity()), weight_decay


def count(opt_state: PyTree) -> jax.Array:
    """Returns the number of updates behind `opt_state`, int32 []; that is the step of the schedule.

    Raises:
      ValueError: no state of a schedule in `opt_state`.
    """
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_schedule):
        if is_schedule(node):
            return node.count
    raise ValueError("opt_state has no count of updates: it was not made by jaxcl.optim.make")


def rate(lr: float | Callable[[Any], Any], opt_state: PyTree) -> jax.Array:
    """Returns the learning rate that the next update will use, float32 []."""
    return jnp.asarray(lr(count(opt_state)) if callable(lr) else lr, jnp.float32)


def _freeze(tx: optax.GradientTransformation, frozen: Sequence[str]) -> optax.GradientTransformation:
    """Returns `tx` for the parameters that no pattern matches, and updates of 0 for the rest."""
    return optax.chain(
        optax.masked(tx, lambda params: _matches(params, frozen, hit=False)),
        optax.masked(optax.set_to_zero(), lambda params: _matches(params, frozen)),
    )


def _multiply(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
    """Returns the transformation that scales updates by the factors whose patterns match."""

    def leaf(name: str, value: jax.Array) -> jax.Array:
        factor = math.prod(scale for pattern, scale in multipliers.items() if re.search(pattern, name))
        return value * factor

    return optax.stateless(lambda updates, params: map_named(leaf, updates))


def _matches(params: Params, patterns: Sequence[str], *, hit: bool = True) -> PyTree:
    """Returns a tree of bools: `hit` where any pattern matches the name of the parameter, else not `hit`."""
    return map_named(lambda name, _: any(re.search(pattern, name) for pattern in patterns) == hit, params)


def _check_patterns(params: Params, wanted: Mapping[str, Sequence[str]], field: str) -> None:
    """Raises UserError for a pattern that matches nothing, and if all parameters are frozen."""
    names = [name for name, _ in named_leaves(params)]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    for option, patterns in wanted.items():
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(f"config.{field}.{option}: {pattern!r} matches no parameter; their names are {shown}")
    frozen = wanted["frozen"]
    if frozen and all(jax.tree.leaves(_matches(params, frozen))):
        raise UserError(f"config.{field}.frozen={list(frozen)!r}: freezes every parameter; nothing is left to train")


def _compile(pattern: str, field: str) -> None:
    """Raises UserError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.{field}: {pattern!r} is no regular expression: {error}") from None
