"""Functions that are recognised as a whole, because bounds of their parts would be loose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.models.interval.normalise import standardise, standardised_upper
from jaxcl.models.interval.span import Interval, Span, span

# Nondecreasing in the first argument while the others are not negative; whether they round.
MONOTONE = {
    "relu": (jax.nn.relu, False),
    "relu6": (jax.nn.relu6, False),
    "leaky_relu": (jax.nn.leaky_relu, True),
    "elu": (jax.nn.elu, True),
    "selu": (jax.nn.selu, True),
    "softplus": (jax.nn.softplus, True),
}
SILU_ARGMIN, SILU_MIN = -1.2784645, -0.2784646  # root of 1 + x (1 - s(x)); value rounded down
ULPS = 16.0  # several operations, each within `primitives.ULPS`


def bounded(eqn: Any, operands: list[Span], outward: bool) -> list[Span] | None:
    """Returns the spans of a call of one of the functions above, or None for any other call.

    A function of the user that has the same name is told apart by its jaxpr.
    """
    name = eqn.params.get("name")
    x, rest = operands[0] if operands else None, operands[1:]
    if x is None or not all(operand.plain and operand.nonnegative for operand in rest):
        return None
    if name in MONOTONE:
        function, rounds = MONOTONE[name]
        if not _is(eqn, function):
            return None
        lower, upper = (function(end, *(operand.lower for operand in rest)) for end in x.ends)
        sign = x.nonnegative or name in ("relu", "relu6", "softplus")
        return [span(lower, upper, outward, steps=ULPS, sign=sign) if rounds else Span(lower, upper, nonnegative=sign)]
    if name == "silu" and _is(eqn, jax.nn.silu):
        return [_silu(x, outward)]
    if name == "standardise":
        return _standardise(eqn, x, outward)
    return None


def _is(eqn: Any, function: Any, **options: Any) -> bool:
    """Returns whether `eqn` calls what `function` traces to."""
    arguments = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    traced = jax.make_jaxpr(lambda *args: function(*args, **options))(*arguments).jaxpr.eqns
    key = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
    return len(traced) == 1 and key in traced[0].params and str(traced[0].params[key]) == str(eqn.params[key])


def _silu(x: Span, outward: bool) -> Span:
    """Bounds x s(x), which falls up to its minimum and grows from there on."""
    lower, upper = x.ends
    low, high = jax.nn.silu(lower), jax.nn.silu(upper)
    inside = (lower <= SILU_ARGMIN) & (upper >= SILU_ARGMIN)
    least = jnp.where(inside, SILU_MIN, jnp.minimum(low, high))
    return span(least, jnp.maximum(low, high), outward, steps=ULPS, sign=x.nonnegative)


def _standardise(eqn: Any, x: Span, outward: bool) -> list[Span] | None:
    """Bounds `standardise`; its axis and epsilon are read off the jaxpr."""
    inner = eqn.params["jaxpr"].jaxpr.eqns
    sums = [step.params["axes"] for step in inner if step.primitive.name == "reduce_sum"]
    literals = [
        float(atom.val)
        for step in inner
        if step.primitive.name == "add"
        for atom in step.invars
        if hasattr(atom, "val")
    ]
    if not sums or len(sums[0]) != 1 or len(literals) != 1:
        return None
    axis, epsilon = sums[0][0], literals[0]
    if not _is(eqn, standardise, axis=axis, epsilon=epsilon):
        return None
    return [standardised(x, axis, epsilon, outward)]


def standardised(x: Span, axis: int, epsilon: float, outward: bool) -> Span:
    """Bounds `standardise`."""
    lower, upper = x.ends

    def highest(low: Any, high: Any) -> Any:
        if not outward:
            return standardised_upper(low, high, axis, epsilon)
        from jaxcl.models.interval import bounds  # noqa: PLC0415  the interpreter imports this module

        rounded = bounds(lambda a, b: standardised_upper(a, b, axis, epsilon), outward=True)
        return rounded(Interval(low, low), Interval(high, high)).upper

    return span(-highest(-upper, -lower), highest(lower, upper), sign=False)
