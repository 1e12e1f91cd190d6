r"""Affine forms as a transform of functions: bounds of values that depend on the same few unknowns.

    value = centre + slope d + e,      d = sum_s eps_s g_s,  |eps_s| <= 1,      |e| <= radius

A box forgets that its numbers move together; forms do not, so that what cancels does cancel: between the weights that a
hypernetwork makes of one embedding, and between the logits that they lead to. d has K coordinates, and slopes are kept
for these rather than for the symbols eps_s, of which there are more: the slope of a weight is then its row of the last
layer of the hypernetwork, which is read where it is, and sum_s |slope g_s| is formed only where a bound is needed.

    linear functions    of centre and slope, and of the radius with |coefficients|
    a product a b       centre a_c b_c, slope a_c b_s + b_c a_s, and of what is left the radius
                        (|a_s d| + a_r) (|b_s d| + b_r) + |a_c| b_r + a_r |b_c|
    relu on [l, u]      share x + [0, top], share = u / (u - l), top = max(-share l, (1 - share) u), where l < 0 < u

Source: Singh et al. 2018 (DeepZ), section 4; products of two forms as in Stolfi & de Figueiredo 1997, section 3. All
else is bounded by interval arithmetic, which is carried along, so that a bound is the better of the two everywhere.

Rounding is covered as with `bounds(..., outward=True)`: centres and slopes are rounded to nearest, and what that may be
wrong by is added to the radius. For that a form knows its `mass`, a bound of sum_k |slope_k| sum_s |g_sk|.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.kernels import boxes
from jaxcl.models.interval import known, primitives, products, rules, trace
from jaxcl.models.interval.span import Interval, Span, dot_error, finfo

LINEAR = primitives.STRUCTURAL | primitives.TOTALS | {"add", "add_any", "sub", "neg"}
EXACT = primitives.STRUCTURAL | {"neg"}
PRODUCTS = ("mul", "div", "dot_general", "conv_general_dilated")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["span", "centre", "slope", "mass", "reach", "radius"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Form:
    """A value of the traced function, float32 [...]. What is None is 0; `reach` may just not be known yet."""

    span: Span  # what interval arithmetic says
    centre: Any
    slope: Any = None  # [..., K]
    mass: Any = None
    reach: Any = None  # sum_s |slope g_s|, rounded up
    radius: Any = None

    @staticmethod
    def of(centre: Any, slope: Any, reach: Any, mass: Any, ends: Interval, symbols: int) -> Form:
        """Returns centre + slope d where it lies in a box.

        Args:
          centre: float32 [...].
          slope: float32 [..., K].
          reach: float32 [...], sum_s |slope g_s|, to nearest.
          mass: float32 [...], |slope| sum_s |g_s|, to nearest.
          ends: bounds that hold as well.
          symbols: S.
        """
        error = dot_error(symbols + slope.shape[-1], centre.dtype)
        return Form(Span(*ends), centre, slope, mass * (1 + error), reach + mass * error)

    @property
    def size(self) -> Any:
        """What no value of the form exceeds, up to rounding."""
        return _sum(jnp.abs(self.centre), self.mass, self.radius)


def affine_bounds(function: Callable[..., Any], generators: Any) -> Callable[..., Interval]:
    """Returns `function` for arguments in which any array may be a Form; its result is one array.

    Args:
      function: of pytrees of arrays, traceable.
      generators: float32 [S, K], g_s.

    Raises:
      UserError: (on the call) what `jaxcl.models.interval.bounds` refuses.
    """

    def bounded(*args: Any) -> Interval:
        leaves, structure = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Form))
        values = [leaf if isinstance(leaf, Form) else Span(jnp.asarray(leaf)) for leaf in leaves]
        example = [value.centre if isinstance(value, Form) else value.lower for value in values]
        closed = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(structure, flat)))(*example)
        (result,) = _evaluate(closed.jaxpr, closed.consts, values, generators)
        return Interval(*_cut(_form(result), generators).span.ends)

    return bounded


def _evaluate(jaxpr: Any, consts: Any, inputs: list[Any], generators: Any) -> list[Any]:
    """Evaluates an open jaxpr on forms, and on spans that depend on no form."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {var: Span(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}
    for eqn in trace.needed(jaxpr):
        results = _equation(eqn, [trace.read(atom, values) for atom in eqn.invars], generators)
        values |= zip(eqn.outvars, results, strict=True)
    return [trace.read(atom, values) for atom in jaxpr.outvars]


def _equation(eqn: Any, operands: list[Any], generators: Any) -> list[Any]:
    """Evaluates one equation."""
    if not any(isinstance(x, Form) for x in operands):
        return trace.equation(eqn, operands, True)
    name = eqn.primitive.name
    if name in trace.CALLS:
        whole = eqn.params.get("name") != "relu" and known.bounded(eqn, [_span(x) for x in operands], True)
        if not whole:
            return _evaluate(*trace.called(eqn), operands, generators)
    rule = _rule(eqn, operands)
    if rule is None or name == "max":
        operands = [_cut(x, generators) if isinstance(x, Form) else x for x in operands]
    spans = trace.equation(eqn, [_span(x) for x in operands], True)
    if rule is None:
        return [x if x.independent else _form(x) for x in spans]
    return [dataclasses.replace(one, span=x) for one, x in zip(rule(eqn, operands, generators), spans, strict=True)]


def _rule(eqn: Any, operands: list[Any]) -> Callable[..., list[Form]] | None:
    """Returns how forms go through a primitive; None = by their bounds."""
    name, forms = eqn.primitive.name, [isinstance(x, Form) for x in operands]
    if name in LINEAR or (name == "select_n" and not forms[0] and operands[0].plain):
        return _linear
    if name in PRODUCTS and not (name == "div" and forms[1]):
        return _product
    plain = [x for x in operands if isinstance(x, Span) and x.plain]
    return _most if name == "max" and len(plain) == 1 else None


def _linear(eqn: Any, operands: list[Any], generators: Any) -> list[Form]:
    """Moves the parts of forms through a linear primitive; positions and choices are plain."""
    name = eqn.primitive.name
    numbers = [jnp.issubdtype(x.aval.dtype, jnp.floating) for x in eqn.invars]
    forms: list[Any] = [_form(x) if is_number else x for x, is_number in zip(operands, numbers, strict=True)]

    def bind(parts: list[Any]) -> list[Any]:
        given = iter(parts)
        return rules.bind(eqn, [next(given) if n else x.lower for x, n in zip(forms, numbers, strict=True)])

    def absolute(parts: list[Any]) -> list[Any]:
        return [_sum(*parts)] if name in ("neg", "sub") else bind(parts)

    own = [x for x, is_number in zip(forms, numbers, strict=True) if is_number]
    none = [jnp.zeros_like(x.centre) for x in own]

    def filled(part: str) -> list[Any]:
        found = [getattr(x, part) for x in own]
        if all(value is None for value in found):
            return [None] * len(eqn.outvars)
        return absolute([zero if value is None else value for zero, value in zip(none, found, strict=True)])

    wide = [jnp.zeros((*x.centre.shape, generators.shape[1])) if x.slope is None else x.slope for x in own]
    slopes: list[Any] = [None] * len(eqn.outvars)
    if any(x.slope is not None for x in own):
        slopes = jax.vmap(lambda *parts: bind([*parts]), in_axes=-1, out_axes=-1)(*wide)
    parts = [bind([x.centre for x in own]), slopes, filled("mass")]
    parts += [filled("reach") if name in EXACT else [None] * len(eqn.outvars), filled("radius")]
    found = [Form(Span(centre), centre, *rest) for centre, *rest in zip(*parts, strict=True)]
    if name in EXACT or name == "select_n":
        return found
    sizes = absolute([x.size for x in own])
    terms = products.terms(eqn) if name in primitives.TOTALS else 2
    return [_wider(x, size, terms) for x, size in zip(found, sizes, strict=True)]


def _product(eqn: Any, operands: list[Any], generators: Any) -> list[Form]:
    """Multiplies two forms, or divides one by what is none."""
    a, b = (_form(x) for x in operands)
    name = eqn.primitive.name
    if name == "div":
        one = Span(jnp.ones_like(b.centre), nonnegative=True)
        b = _form(products.divide(one, operands[1], True))
    summed = name in ("dot_general", "conv_general_dilated")
    product = products.product(eqn) if summed else jnp.multiply

    def times(x: Any, y: Any, axes: tuple[Any, Any] | None = None) -> Any:
        if x is None or y is None:
            return None
        return product(x, y) if axes is None else jax.vmap(product, in_axes=axes, out_axes=-1)(x, y)

    size_a, size_b = jnp.abs(a.centre), jnp.abs(b.centre)
    apart = None
    if all(x.slope is not None or x.radius is not None for x in (a, b)):
        apart = times(*(_sum(_reach(x, generators), x.radius) for x in (a, b)))
    centre = product(a.centre, b.centre)
    found = Form(
        Span(centre),
        centre,
        slope=_sum(times(a.slope, b.centre, (-1, None)), times(a.centre, b.slope, (None, -1))),
        mass=_sum(times(a.mass, size_b), times(size_a, b.mass)),
        radius=_sum(apart, times(size_a, b.radius), times(a.radius, size_b)),
    )
    limits = finfo(centre.dtype)
    tiny = float(limits.tiny) / float(limits.eps)  # a subnormal operand may be read as zero
    return [_wider(found, product(a.size + tiny, b.size + tiny), products.count(eqn) if summed else 1)]


def _most(eqn: Any, operands: list[Any], generators: Any) -> list[Form]:
    """Returns max(x, p) of a form and of what is plain: p + relu(x - p)."""
    del eqn, generators
    x, other = operands if isinstance(operands[0], Form) else operands[::-1]
    p = other.lower
    lower, upper = (end - p for end in x.span.ends)
    undecided = (lower < 0) & (upper > 0)
    share = jnp.where(undecided, upper / jnp.where(undecided, upper - lower, 1), (lower >= 0).astype(lower.dtype))
    finite = jnp.isfinite(lower) & jnp.isfinite(upper)
    share = jnp.where(finite, jnp.clip(share, 0, 1), 0)  # any number in [0, 1] is right
    half = jnp.where(finite, jnp.maximum(jnp.maximum(-share * lower, (1 - share) * upper), 0) / 2, jnp.inf)
    centre = share * x.centre + (1 - share) * p + half
    parts = {part: getattr(x, part) for part in ("mass", "reach", "radius")}
    parts = {part: None if value is None else share * value for part, value in parts.items()}
    parts["radius"] = _sum(parts["radius"], half)
    slope = None if x.slope is None else share[..., None] * x.slope
    return [_wider(Form(Span(centre), centre, slope, **parts), x.size + jnp.abs(p) + half, 4)]


def _cut(x: Form, generators: Any) -> Form:
    """Returns the form with both bounds in its span; where the form knows nothing it is made of these."""
    reach = _reach(x, generators)
    far = _sum(jnp.zeros_like(x.centre), reach, x.radius)
    limits = finfo(x.centre.dtype)
    far = far + 4 * (float(limits.eps) * (jnp.abs(x.centre) + far) + float(limits.tiny))
    ends = x.span.ends
    lower, upper = jnp.fmax(x.centre - far, ends[0]), jnp.fmin(x.centre + far, ends[1])
    new = _form(Span(lower, upper, nonnegative=x.span.nonnegative))
    lost = ~jnp.isfinite(x.centre + far)
    parts = {part: getattr(x, part) for part in ("slope", "mass")} | {"reach": reach}
    for part, value in parts.items():
        if value is not None:
            parts[part] = jnp.where(lost[..., None] if part == "slope" else lost, 0, value)
    radius = jnp.where(lost, new.radius, 0 if x.radius is None else x.radius)
    return Form(new.span, jnp.where(lost, new.centre, x.centre), radius=radius, **parts)


def _reach(x: Form, generators: Any) -> Any:
    """Returns sum_s |slope g_s| or more; None without a slope."""
    if x.slope is None or x.reach is not None:
        return x.reach
    sums = boxes.row_sums(x.slope.reshape(-1, generators.shape[1]), generators).reshape(x.centre.shape)
    return sums + dot_error(sum(generators.shape), x.centre.dtype) * x.mass


def _wider(x: Form, size: Any, terms: int) -> Form:
    """Returns the form with room for the rounding errors of sums of so many products."""
    dtype = x.centre.dtype
    slack = dot_error(terms, dtype) * size + 8.0 * terms * float(finfo(dtype).tiny)
    return dataclasses.replace(x, radius=_sum(x.radius, slack))


def _form(x: Form | Span) -> Form:
    """Returns a span as the form that knows its ends alone."""
    if isinstance(x, Form):
        return x
    if x.plain:
        return Form(x, x.lower)
    lower, upper = x.ends
    sure = jnp.isfinite(lower) & jnp.isfinite(upper)
    centre = jnp.where(sure, lower / 2 + upper / 2, 0)
    half = jnp.maximum(upper - centre, centre - lower)
    limits = finfo(lower.dtype)
    half = half * (1 + 4 * float(limits.eps)) + 4 * float(limits.tiny)
    return Form(x, centre, radius=jnp.where(sure, half, jnp.inf))


def _span(x: Form | Span) -> Span:
    return x.span if isinstance(x, Form) else x


def _sum(*parts: Any) -> Any:
    """Returns the sum of the parts that are there; None of none."""
    total = None
    for part in parts:
        total = part if total is None else total if part is None else total + part
    return total
