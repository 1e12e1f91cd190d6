"""Sums of products under intervals: matrix products, convolutions, sums and windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.models.interval.span import Span, dot_error, finfo, negative, positive, span

Product = Callable[[Any, Any], Any]


def dot_general(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a matrix product."""
    a, b = operands
    return [bilinear(product(eqn), a, b, count(eqn), outward)]


def convolution(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a convolution; every layout, dilation and number of groups, because it is linear in both operands."""
    a, b = operands
    return [bilinear(product(eqn), a, b, count(eqn), outward)]


def bilinear(product: Product, a: Span, b: Span, terms: int, outward: bool) -> Span:
    """Bounds sum_k a_k b_k, with a+ = max(a, 0) and a- = min(a, 0) and l, u the ends, by

        lower = sum al+ bl+ + au+ bl- + al- bu+ + au- bu-
        upper = sum au+ bu+ + al+ bu- + au- bl+ + al- bl-

    It is exact (some a, b in the intervals attain it) unless both factors of a term straddle zero, and sound there too.
    Where an operand is plain or nonnegative whatever its values, the products that vanish are not formed. Rounding is
    monotone and both sums have the same order, so that rounded bounds keep lower <= upper, and wider operands give
    wider bounds; bounds from centres and radii do not have that.
    """
    # Sums of products rather than one product of concatenated operands: no copy of a kernel is made.
    lower: Any = sum(product(x, y) for x, y in _pairs(a, b, upper=False))
    upper: Any = sum(product(x, y) for x, y in _pairs(a, b, upper=True))
    slack: Any = 0.0
    if outward:
        limits = finfo(lower.dtype)
        # Subnormal operands may be read as zero: with c > epsilon, c * extra * |other operand| makes up for it.
        extra = float(limits.tiny) / float(limits.eps)
        slack = product(a.magnitude + extra, b.magnitude + extra) * dot_error(terms, lower.dtype)
        slack = slack + 8.0 * terms * float(limits.tiny)
    return span(lower, upper, outward, slack=slack, sign=a.nonnegative and b.nonnegative)


def _pairs(a: Span, b: Span, *, upper: bool) -> list[tuple[Any, Any]]:
    """Returns the factors of the products that make up one bound."""
    (al, au), (bl, bu) = (a.ends, b.ends) if not upper else (a.ends[::-1], b.ends[::-1])
    if a.plain and a.nonnegative:
        return [(al, bl)]
    if b.plain and b.nonnegative:
        return [(al, bl)]
    if a.plain:
        return [(positive(al), bl), (negative(al), bu)]
    if b.plain:
        return [(al, positive(bl)), (au, negative(bl))]
    if a.nonnegative and b.nonnegative:
        return [(al, bl)]
    if a.nonnegative:
        return [(al, positive(bl)), (au, negative(bl))]
    if b.nonnegative:
        return [(positive(al), bl), (negative(al), bu)]
    return [
        (positive(al), positive(bl)),
        (positive(au), negative(bl)),
        (negative(al), positive(bu)),
        (negative(au), negative(bu)),
    ]


def count(eqn: Any) -> int:
    """Returns how many products are summed in an element of a matrix product or a convolution."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    kernel, features = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
    return math.prod(kernel) // max(kernel[features], 1)


def product(eqn: Any) -> Product:
    """Returns the primitive of `eqn` as a function of both operands, at full precision."""
    params = eqn.params | {"precision": (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    if eqn.primitive.name == "dot_general" and params["preferred_element_type"] is None:
        params["preferred_element_type"] = eqn.outvars[0].aval.dtype
    return lambda a, b: eqn.primitive.bind(a, b, **params)


def total(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a sum over axes, a running sum or the sum of every window."""
    (x,) = operands
    lower, upper = (eqn.primitive.bind(end, **eqn.params) for end in x.ends)
    slack: Any = 0.0
    if outward:
        counted = terms(eqn)
        slack = eqn.primitive.bind(x.magnitude, **eqn.params) * dot_error(counted, lower.dtype)
        slack = slack + 8.0 * counted * float(finfo(lower.dtype).tiny)
    return [span(lower, upper, outward, slack=slack, sign=x.nonnegative)]


def terms(eqn: Any) -> int:
    """Returns how many elements are summed."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if "window_dimensions" in params:
        return math.prod(params["window_dimensions"])
    return math.prod(shape[i] for i in params["axes"]) if "axes" in params else shape[params["axis"]]


def multiply(a: Span, b: Span, outward: bool) -> Span:
    """Bounds the product of two spans, elementwise."""
    (al, au), (bl, bu) = a.ends, b.ends
    slack: Any = 0.0
    if outward:  # a subnormal factor may be read as zero
        slack = float(finfo(bl.dtype).tiny) * (a.magnitude + b.magnitude)
    sign = a.nonnegative and b.nonnegative
    if sign or (a.nonnegative and a.plain) or (b.nonnegative and b.plain):
        return span(al * bl, au * bu, outward, slack=slack, sign=sign)
    ends = (al * bl, au * bu)
    if not a.plain and not b.plain:
        ends = (*ends, al * bu, au * bl)
    return span(_least(ends), _largest(ends), outward, slack=slack, sign=False)


def divide(a: Span, b: Span, outward: bool) -> Span:
    """Bounds the quotient of two spans, elementwise; it is infinite both ways where the divisor may be 0."""
    (al, au), (bl, bu) = a.ends, b.ends
    zero = (bl <= 0) & (bu >= 0)
    bl, bu = jnp.where(zero, 1, bl), jnp.where(zero, 1, bu)  # its derivative must not become NaN either
    ends = (al / bl, au / bu, al / bu, au / bl)
    lower, upper = _least(ends), _largest(ends)
    lower, upper = jnp.where(zero, -jnp.inf, lower), jnp.where(zero, jnp.inf, upper)
    slack: Any = 0.0
    if outward:  # a subnormal dividend may be read as zero
        slack = float(finfo(lower.dtype).tiny) / jnp.minimum(jnp.abs(bl), jnp.abs(bu))
    return span(lower, upper, outward, slack=slack, sign=a.nonnegative and b.nonnegative)


def square(a: Span, outward: bool) -> Span:
    """Bounds a^2, elementwise: tighter than the product of two spans that need not be equal."""
    lower, upper = a.ends
    near, far = jnp.maximum(positive(lower), -negative(upper)), jnp.maximum(-lower, upper)
    return span(near * near, far * far, outward, sign=True)


def _least(values: tuple[Any, ...]) -> Any:
    """Returns the elementwise minimum; NaN if any is."""
    low = values[0]
    for value in values[1:]:
        low = jnp.minimum(low, value)
    return low


def _largest(values: tuple[Any, ...]) -> Any:
    """Returns the elementwise maximum; NaN if any is."""
    high = values[0]
    for value in values[1:]:
        high = jnp.maximum(high, value)
    return high
