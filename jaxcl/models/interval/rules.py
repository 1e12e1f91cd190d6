"""Rules of the elementwise and structural primitives: from the spans of operands to those of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.models.interval import products
from jaxcl.models.interval.primitives import COMPARISONS, EXACT, MONOTONE, RANGES, STRUCTURAL, TOTALS, ULPS, nonnegative
from jaxcl.models.interval.span import Span, finfo, negative, positive, span
from jaxcl.schema import UserError


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluates `eqn` on plain values."""
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def structural(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Moves both ends in the same way."""
    del outward
    return _both(eqn, operands)


def exact(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates a nondecreasing primitive without rounding error on both ends."""
    del outward
    return _both(eqn, operands)


def _both(eqn: Any, operands: list[Span]) -> list[Span]:
    for operand, x in zip(operands, eqn.invars, strict=True):
        if not operand.plain and not jnp.issubdtype(x.aval.dtype, jnp.inexact):
            raise refusal(eqn, "its positions depend on an Interval")
    lower, upper = (bind(eqn, [operand.ends[i] for operand in operands]) for i in (0, 1))
    sign = nonnegative(eqn, [operand.nonnegative for operand in operands])
    return [Span(low, high, nonnegative=sign) for low, high in zip(lower, upper, strict=True)]


def monotone(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates a nondecreasing function of one operand on both ends."""
    lower, upper = (eqn.primitive.bind(end, **eqn.params) for end in operands[0].ends)
    sign = nonnegative(eqn, [operands[0].nonnegative])
    result = span(lower, upper, outward, steps=ULPS, sign=sign)
    floor, ceiling = RANGES.get(eqn.primitive.name, (None, None))
    if not outward or (floor is None and ceiling is None):
        return [result]
    return [Span(jnp.clip(result.lower, floor), jnp.clip(result.upper, None, ceiling), nonnegative=sign)]


def convert(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Casts both ends; from one float type to another it rounds to nearest, which is nondecreasing."""
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(new, jnp.floating):
        raise refusal(eqn, f"an Interval cannot become {new}")
    lower, upper = (eqn.primitive.bind(end, **eqn.params) for end in operands[0].ends)
    widens = not jnp.issubdtype(old, jnp.floating) or jnp.promote_types(old, new) == new
    sign = operands[0].nonnegative
    return [Span(lower, upper, nonnegative=sign) if widens else span(lower, upper, outward, sign=sign)]


def total(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a sum."""
    return products.total(eqn, operands, outward)


def add(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Adds the ends."""
    del eqn
    (al, au), (bl, bu) = (operand.ends for operand in operands)
    return [span(al + bl, au + bu, outward, sign=all(operand.nonnegative for operand in operands))]


def sub(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Subtracts the opposite ends; x - x is not recognised."""
    del eqn
    (al, au), (bl, bu) = (operand.ends for operand in operands)
    return [span(al - bu, au - bl, outward, sign=False)]


def neg(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Swaps the ends."""
    del eqn, outward
    lower, upper = operands[0].ends
    return [Span(-upper, -lower)]


def absolute(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds |x|."""
    del eqn, outward
    lower, upper = operands[0].ends
    return [Span(positive(jnp.maximum(lower, -upper)), jnp.maximum(-lower, upper), nonnegative=True)]


def mul(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a product; x * x is a square."""
    if eqn.invars[0] is eqn.invars[1]:
        return [products.square(operands[0], outward)]
    return [products.multiply(operands[0], operands[1], outward)]


def div(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a quotient."""
    del eqn
    return [products.divide(operands[0], operands[1], outward)]


def square(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds x^2."""
    del eqn
    return [products.square(operands[0], outward)]


def integer_pow(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds x^y for an integer y known when tracing."""
    (x,), y = operands, eqn.params["y"]
    if y < 0:
        power = _power(x, -y, outward)
        return [products.divide(Span(jnp.ones_like(power.lower), nonnegative=True), power, outward)]
    return [_power(x, y, outward)]


def _power(x: Span, y: int, outward: bool) -> Span:
    lower, upper = x.ends
    if y % 2 == 0:
        lower, upper = jnp.maximum(positive(lower), -negative(upper)), jnp.maximum(-lower, upper)
    lower, upper = jax.lax.integer_pow(lower, y), jax.lax.integer_pow(upper, y)
    return span(lower, upper, outward, steps=max(y, 1), sign=x.nonnegative or y % 2 == 0)


def power(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds x^p for a plain p; nothing is known where x may be negative."""
    x, p = operands
    if not p.independent:
        raise refusal(eqn, "its exponent is an Interval")
    lower, upper = x.ends
    ends = [jax.lax.pow(positive(end), p.value) for end in (lower, upper)]
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    low, high = jnp.where(lower < 0, -jnp.inf, low), jnp.where(lower < 0, jnp.inf, high)
    # An error of the logarithm counts as many times as the exponent says.
    slack: Any = 0.0
    if outward:
        limits = finfo(low.dtype)
        slack = jnp.abs(jnp.where(jnp.isfinite(high), high, 0)) * jnp.abs(p.value) * 100 * ULPS * float(limits.eps)
    return [span(low, high, outward, slack=slack, steps=ULPS, sign=x.nonnegative)]


def logarithm(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds log x: -inf where x may be 0 or less."""
    lower, upper = operands[0].ends
    least = float(finfo(lower.dtype).tiny) if outward else 0.0  # a subnormal x may be read as zero
    low = jnp.where(lower > 0, eqn.primitive.bind(jnp.where(lower > 0, lower, 1), **eqn.params), -jnp.inf)
    high = eqn.primitive.bind(jnp.maximum(upper, least), **eqn.params)
    return [span(low, high, outward, steps=ULPS, sign=False)]


def sqrt(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds the root of the part of x that is not negative."""
    del eqn
    lower, upper = operands[0].ends
    least = float(finfo(lower.dtype).tiny) if outward else 0.0
    low, high = _root(lower), _root(jnp.maximum(upper, least))
    return [span(low, high, outward, sign=True)]


def _root(x: Any) -> Any:
    """Returns sqrt(max(x, 0)) with derivative 0 where x <= 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def rsqrt(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds 1 / sqrt(x): from above by inf where x may be 0 or less."""
    lower, upper = operands[0].ends
    least = float(finfo(lower.dtype).tiny) if outward else 0.0

    def inverse(x: Any) -> Any:
        return jnp.where(x > 0, eqn.primitive.bind(jnp.where(x > 0, x, 1), **eqn.params), jnp.inf)

    high = inverse(lower)
    low = inverse(jnp.maximum(upper, least))
    return [span(jnp.where(upper > 0, low, 0), high, outward, steps=ULPS, sign=True)]


def erfc(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a decreasing function."""
    lower, upper = operands[0].ends
    low, high = eqn.primitive.bind(upper, **eqn.params), eqn.primitive.bind(lower, **eqn.params)
    # Where erfc is small it is exp(-x^2) times a factor, and the rounding of x^2 counts x^2 times.
    limits = finfo(low.dtype) if outward else None
    slack = 200 * ULPS * float(limits.eps) * jnp.abs(high) if limits else 0.0
    return [span(low, high, outward, steps=ULPS, slack=slack, sign=True)]


def compare(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Compares spans: where it certainly holds and where it may, exactly. An operand equals itself."""
    del outward
    name = eqn.primitive.name
    if eqn.invars[0] is eqn.invars[1]:
        holds = jnp.full(eqn.outvars[0].aval.shape, name in ("le", "ge", "eq"))
        return [Span(holds, holds)]
    (al, au), (bl, bu) = (operand.ends for operand in operands)
    if name in ("gt", "ge"):
        (al, au), (bl, bu), name = (bl, bu), (al, au), {"gt": "lt", "ge": "le"}[name]
    if name == "lt":
        return [Span(au < bl, al < bu)]
    if name == "le":
        return [Span(au <= bl, al <= bu)]
    certain, possible = (al == bu) & (au == bl), (al <= bu) & (bl <= au)
    return [Span(certain, possible) if name == "eq" else Span(~possible, ~certain)]


def logical(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Combines comparisons that may be undecided."""
    del outward
    if eqn.outvars[0].aval.dtype != jnp.bool_:
        raise refusal(eqn, "its operands depend on an Interval")
    ends = [operand.ends for operand in operands]
    if eqn.primitive.name == "not":
        return [Span(~ends[0][1], ~ends[0][0])]
    return [Span(*(eqn.primitive.bind(*(end[i] for end in ends)) for i in (0, 1)))]


def select(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Selects ends; where the choice is undecided, the span covers both cases."""
    del outward
    which, cases = operands[0], operands[1:]
    sign = all(case.nonnegative for case in cases)
    if which.plain:
        ends = (eqn.primitive.bind(which.lower, *(case.ends[i] for case in cases)) for i in (0, 1))
        return [Span(*ends, nonnegative=sign)]
    if eqn.invars[0].aval.dtype != jnp.bool_ or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise refusal(eqn, "which case it selects depends on an Interval")
    no, yes = cases
    least, largest = jnp.minimum(no.ends[0], yes.ends[0]), jnp.maximum(no.ends[1], yes.ends[1])
    lower = jax.lax.select_n(which.lower, jax.lax.select_n(which.upper, no.ends[0], least), yes.ends[0])
    upper = jax.lax.select_n(which.lower, jax.lax.select_n(which.upper, no.ends[1], largest), yes.ends[1])
    return [Span(lower, upper, nonnegative=sign)]


def window(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Bounds a reduction of windows by a function that is one of max, min and add."""
    names = [inner.primitive.name for inner in eqn.params["jaxpr"].eqns]
    if names not in (["max"], ["min"]) and (names != ["add"] or outward):
        raise refusal(eqn, "its reduction is none of max, min and add, or outward=True with add")
    return _both(eqn, operands)


def refusal(eqn: Any, reason: str) -> UserError:
    """Returns the error for a primitive that cannot be bounded."""
    place = str(getattr(eqn.source_info, "name_stack", ""))
    where = f" in {place}" if place else ""
    return UserError(
        f"bounds: primitive {eqn.primitive.name!r}{where}: {reason}; "
        "rewrite that part of the function with primitives that have a rule in jaxcl/models/interval/rules.py, "
        "or keep the Interval out of it"
    )


def rule(name: str) -> Callable[[Any, list[Span], bool], list[Span]] | None:
    """Returns the rule of a primitive, or None."""
    for names, function in (
        (STRUCTURAL, structural),
        (EXACT, exact),
        (MONOTONE, monotone),
        (COMPARISONS, compare),
        (TOTALS, total),
    ):
        if name in names:
            return function
    return {
        "add": add,
        "add_any": add,
        "sub": sub,
        "neg": neg,
        "abs": absolute,
        "mul": mul,
        "div": div,
        "square": square,
        "integer_pow": integer_pow,
        "pow": power,
        "log": logarithm,
        "sqrt": sqrt,
        "rsqrt": rsqrt,
        "erfc": erfc,
        "and": logical,
        "or": logical,
        "not": logical,
        "select_n": select,
        "convert_element_type": convert,
        "reduce_window": window,
        "dot_general": products.dot_general,
        "conv_general_dilated": products.convolution,
    }.get(name)
