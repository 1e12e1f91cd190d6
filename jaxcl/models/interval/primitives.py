"""Which primitives behave alike, and which results cannot be negative, both known when tracing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

# Results are copies of elements of the operands, the same ones whatever the values of the first operands.
STRUCTURAL = frozenset(
    [
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "pad",
        "rev",
        "gather",
        "split",
        "copy",
        "copy_p",
        "name",
        "sharding_constraint",
        "device_put",
        "optimization_barrier",
        "expand_dims",
    ]
)
# Nondecreasing in every operand, and exact in floating-point arithmetic.
EXACT = frozenset(
    [
        "max",
        "min",
        "clamp",
        "sign",
        "floor",
        "ceil",
        "round",
        "reduce_max",
        "reduce_min",
        "cummax",
        "cummin",
        "reduce_window_max",
        "reduce_window_min",
        "stop_gradient",
    ]
)
# Nondecreasing in their one operand, and rounded.
MONOTONE = frozenset(["exp", "expm1", "log1p", "tanh", "logistic", "erf", "cbrt", "asinh", "atan"])
RANGES = {"tanh": (-1.0, 1.0), "logistic": (0.0, 1.0), "erf": (-1.0, 1.0), "exp": (0.0, None)}
COMPARISONS = frozenset(["lt", "le", "gt", "ge", "eq", "ne"])
# Linear sums of their operand.
TOTALS = frozenset(["reduce_sum", "cumsum", "reduce_window_sum"])
# Their results are the same in every arithmetic, so that plain operands stay plain under outward rounding.
KEPT = (
    STRUCTURAL
    | EXACT
    | COMPARISONS
    | frozenset(["neg", "abs", "select_n", "iota", "and", "or", "not", "argmax", "argmin", "is_finite"])
)

# What XLA's transcendental functions may be wrong by, in units of the epsilon; checked on CPU over 10^5 points each.
ULPS = 8.0

POSITIVE = frozenset(["abs", "square", "exp", "logistic", "sqrt", "rsqrt", "erfc"])
KEEP_SIGN = (
    STRUCTURAL
    | TOTALS
    | frozenset(
        [
            "min",
            "clamp",
            "sign",
            "floor",
            "ceil",
            "round",
            "reduce_max",
            "reduce_min",
            "cummax",
            "cummin",
            "stop_gradient",
        ]
    )
    | frozenset(
        [
            "reduce_window_max",
            "reduce_window_min",
            "add",
            "add_any",
            "mul",
            "div",
            "dot_general",
            "conv_general_dilated",
        ]
    )
    | frozenset(
        [
            "convert_element_type",
            "tanh",
            "erf",
            "log1p",
            "expm1",
            "cbrt",
            "asinh",
            "atan",
            "pow",
            "integer_pow",
            "max",
        ]
    )
)


def nonnegative(eqn: Any, flags: list[bool]) -> bool:
    """Returns whether the results of `eqn` cannot be negative, given which operands cannot."""
    name = eqn.primitive.name
    if name in POSITIVE or (name == "integer_pow" and eqn.params["y"] % 2 == 0):
        return True
    if name == "max":
        return any(flags)
    if name == "select_n":
        return all(flags[1:])
    data = [flag for flag, x in zip(flags, eqn.invars, strict=True) if jnp.issubdtype(x.aval.dtype, jnp.inexact)]
    return name in KEEP_SIGN and bool(data) and all(data)


def known_nonnegative(value: Any) -> bool:
    """Returns whether a literal is known not to be negative."""
    return isinstance(value, (int, float, np.number, np.ndarray)) and bool(np.all(np.asarray(value) >= 0))
