"""The interpreter: evaluates a jaxpr on spans, with JAX operations, so that it can be transformed like any function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxcl.models.interval import known, primitives, rules
from jaxcl.models.interval.span import Span

CALLS = frozenset(
    ["jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"]
)
REMAT = frozenset(["remat", "remat2", "checkpoint"])


def evaluate(jaxpr: Any, consts: Any, inputs: list[Span], outward: bool) -> list[Span]:
    """Evaluates an open jaxpr.

    Args:
      jaxpr: of the function.
      consts: values of its constvars, arrays.
      inputs: one span for every invar.
      outward: whether every span is rounded outward.

    Raises:
      UserError: a primitive that has no rule meets an Interval.
    """
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {var: Span(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

    for eqn in needed(jaxpr):
        results = equation(eqn, [read(atom, values) for atom in eqn.invars], outward)
        values |= zip(eqn.outvars, results, strict=True)
    return [read(atom, values) for atom in jaxpr.outvars]


def read(atom: Any, values: Mapping[Any, Any]) -> Any:
    """Returns the value of an operand, a span if it is a literal."""
    if not isinstance(atom, Literal):
        return values[atom]
    aval: Any = atom.aval
    return Span(jnp.asarray(atom.val, aval.dtype), nonnegative=primitives.known_nonnegative(atom.val))


def needed(jaxpr: Any) -> list[Any]:
    """Returns the equations that the results depend on: what nothing depends on need not have a rule."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return kept[::-1]


def equation(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates one equation."""
    if all(operand.plain for operand in operands) and (not outward or _exact(eqn)):
        signs = _signs(eqn, [operand.nonnegative for operand in operands])
        results = rules.bind(eqn, [operand.lower for operand in operands])
        return [Span(result, nonnegative=sign) for result, sign in zip(results, signs, strict=True)]
    results = _bounded(eqn, operands, outward)
    if not all(operand.independent for operand in operands):
        return results
    # Under outward rounding a plain value is a span as well, and what it was without is handed back to the caller.
    values = rules.bind(eqn, [operand.value for operand in operands])
    return [
        result if result.plain else Span(*result.ends, value, result.nonnegative)
        for result, value in zip(results, values, strict=True)
    ]


def _exact(eqn: Any) -> bool:
    """Returns whether `eqn` makes no rounding error on plain operands."""
    return eqn.primitive.name in primitives.KEPT or not any(
        jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in (*eqn.invars, *eqn.outvars) if hasattr(x.aval, "dtype")
    )


def _bounded(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates one equation, an operand of which is an interval or whose result is rounded."""
    name = eqn.primitive.name
    if name in CALLS:
        whole = known.bounded(eqn, operands, outward)
        return whole if whole is not None else evaluate(*called(eqn), operands, outward)
    if name in REMAT:
        jaxpr = eqn.params["jaxpr"]
        options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
        return jax.checkpoint(lambda inputs: evaluate(jaxpr, (), inputs, outward), **options)(operands)
    if name == "scan":
        return _scan(eqn, operands, outward)
    if name == "cond":
        return _cond(eqn, operands, outward)
    rule = rules.rule(name)
    if rule is None:
        raise rules.refusal(eqn, "there is no interval rule for it")
    return rule(eqn, operands, outward)


def called(eqn: Any) -> tuple[Any, Any]:
    """Returns the jaxpr of a call and its constants."""
    closed = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    return (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())


def _signs(eqn: Any, flags: list[bool]) -> list[bool]:
    """Returns which results of `eqn` cannot be negative, from which operands cannot."""
    if eqn.primitive.name not in CALLS:
        return [primitives.nonnegative(eqn, flags)] * len(eqn.outvars)
    jaxpr, _ = called(eqn)
    known_signs = dict(zip(jaxpr.invars, flags, strict=True))

    def read(atom: Any) -> bool:
        return primitives.known_nonnegative(atom.val) if isinstance(atom, Literal) else known_signs.get(atom, False)

    for inner in jaxpr.eqns:
        known_signs |= zip(inner.outvars, _signs(inner, [read(atom) for atom in inner.invars]), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _scan(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates a loop by a loop whose carry holds spans."""
    params = eqn.params
    closed = params["jaxpr"]
    if "num_consts" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # newer JAX: trees of the constants, the carry and the rows
        consts, carries, _ = (len(list(part)) for part in params["ft_in"].unpack())
    fixed, carry, rows = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def body(carry: list[Span], row: list[Span]) -> tuple[list[Span], list[Span]]:
        results = evaluate(closed.jaxpr, closed.consts, [*fixed, *carry, *row], outward)
        return results[:carries], results[carries:]

    # What enters plain or nonnegative may come out as an interval; then it must enter as one.
    first = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), row) for row in rows]
    while True:
        after, _ = jax.eval_shape(body, carry, first)
        wider = [_joined(x, y) for x, y in zip(carry, after, strict=True)]
        if jax.tree.structure(wider) == jax.tree.structure(carry):
            break
        carry = wider

    def step(carry: list[Span], row: list[Span]) -> tuple[list[Span], list[Span]]:
        after, out = body(carry, row)
        return [_like(x, y) for x, y in zip(after, carry, strict=True)], out

    options = {"reverse": params["reverse"], "unroll": params["unroll"], "length": params["length"]}
    carry, out = jax.lax.scan(step, carry, rows, **options)
    return [*carry, *out]


def _cond(eqn: Any, operands: list[Span], outward: bool) -> list[Span]:
    """Evaluates a choice between functions, if it is decided."""
    which, rest = operands[0], operands[1:]
    if not which.plain:
        raise rules.refusal(eqn, "which branch it takes depends on an Interval")
    branches = [
        lambda inputs, closed=closed: evaluate(closed.jaxpr, closed.consts, inputs, outward)
        for closed in eqn.params["branches"]
    ]
    shapes = [jax.eval_shape(branch, rest) for branch in branches]
    common = shapes[0]
    for shape in shapes[1:]:
        common = [_joined(x, y) for x, y in zip(common, shape, strict=True)]
    alike = [
        lambda inputs, branch=branch: [_like(x, y) for x, y in zip(branch(inputs), common, strict=True)]
        for branch in branches
    ]
    return jax.lax.switch(which.lower, alike, rest)


def _joined(x: Span, y: Span) -> Span:
    """Returns `x` in the narrowest form that `y` can take too."""
    if x.plain and y.plain:
        return Span(x.lower, nonnegative=x.nonnegative and y.nonnegative)
    origin = x.value if x.independent and y.independent else None
    return Span(*x.ends, origin, x.nonnegative and y.nonnegative)


def _like(x: Span, form: Span) -> Span:
    """Returns `x` in the form of `form`, which is at least as general."""
    if form.plain:
        return Span(x.lower, nonnegative=form.nonnegative)
    return Span(*x.ends, None if form.origin is None else x.value, form.nonnegative)
