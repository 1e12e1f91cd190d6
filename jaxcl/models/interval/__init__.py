"""Sound interval arithmetic as a transform of functions and a combinator of models.

Every value that an array of an Interval could take leads to a result within the bounds (Moore 1966): what a network
computes is bounded over all weights and all inputs of a box at once.

    box = Interval(lower, upper)
    logits = bounds(network)(box, images)               # an Interval
    certain = logits.lower[i, y] > logits.upper[i, j]   # for every network of the box

The transform traces the function and evaluates its jaxpr on pairs of arrays, by JAX operations; it composes with jit,
grad, vmap and itself. Both ends of matrix products and convolutions are sums of one to four products at full precision,
so that a forward pass costs 2 to 8 times a plain one and twice its memory.

Rounding: by default results are rounded to nearest, so that a bound may be wrong by the rounding error of the plain
computation. With outward=True they contain the exact result, of real arithmetic, for the arguments and constants given:
elementwise arithmetic moves outward by an ulp or two, sums by their a-priori error bound (Higham 2002, eq. 3.5), other
functions by 8 epsilon. This assumes IEEE arithmetic with products summed in any order but not transformed (no Winograd
convolution), and transcendental functions of XLA within 8 epsilon; both are tested on CPU. The bounds of sums use one
more product of magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcl.models.interval.affine import Form, affine_bounds
from jaxcl.models.interval.known import standardised
from jaxcl.models.interval.normalise import standardise
from jaxcl.models.interval.products import multiply
from jaxcl.models.interval.span import Interval, Span, span
from jaxcl.models.interval.trace import evaluate
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output, Params

__all__ = ["Form", "Interval", "affine_bounds", "bounds", "check_rows", "interval", "layer_norm_bounds", "standardise"]


def bounds(function: Callable[..., Any], *, outward: bool = False) -> Callable[..., Any]:
    """Returns `function` for arguments in which any array may be an Interval.

    Results that depend on an Interval are Intervals, the others are as `function` returns them. Where nothing is known
    (a division by an interval that holds 0, a root of a negative number) the bounds are infinite, never NaN.

    Args:
      function: of pytrees of arrays, traceable; its integer and boolean arguments must be plain.
      outward: whether rounding errors are covered too.

    Raises:
      UserError: (on the call) an Interval whose ends differ in shape or dtype, are not float or cross (untraced); a
        primitive that has no interval rule, a position or an integer or boolean result that depends on an Interval.
    """

    def bounded(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_interval)
        inputs = [_input(leaf) for leaf in leaves]

        def flat(*values: Any) -> Any:
            args, kwargs = jax.tree.unflatten(structure, values)
            return function(*args, **kwargs)

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*[value.lower for value in inputs])
        results = evaluate(closed.jaxpr, closed.consts, inputs, outward)
        return jax.tree.unflatten(jax.tree.structure(shapes), [_result(value) for value in results])

    return bounded


def interval(model: Model, *, outward: bool = False) -> Model:
    """Returns `model` for parameters and inputs that may be Intervals.

    `apply(params, batch)` takes Intervals in place of arrays of `params` and of float arrays of `batch`, and returns an
    Output whose `hidden` are the logits, an Interval of float32 [..., V] (plain if nothing was an Interval), no head.

    Raises:
      UserError: (on apply) a cache, or what `bounds` refuses.
    """

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        if cache is not None:
            raise UserError("interval: a key-value cache cannot hold intervals; call apply(params, batch)")
        return Output(bounds(lambda params, batch: model.apply(params, batch).logits, outward=outward)(params, batch))

    return Model(model.init, apply, model.axes)


def layer_norm_bounds(x: Interval, epsilon: float, scale: Any, bias: Any) -> Interval:
    """Bounds standardise(x, epsilon) * scale + bias over the last axis.

    Args:
      x: float [..., D].
      epsilon: added to the variance.
      scale: float [D], an Interval or plain.
      bias: float [D], an Interval or plain.
    """
    factor, offset = _input(scale), _input(bias)
    row = (1,) * (x.lower.ndim - 1)
    wide = [jax.tree.map(lambda end: end.reshape(row + end.shape), value) for value in (factor, offset)]
    product = multiply(standardised(_input(x), x.lower.ndim - 1, epsilon, False), wide[0], False)
    (low, high), (bias_low, bias_high) = product.ends, wide[1].ends
    return _result(span(low + bias_low, high + bias_high, sign=False))


def check_rows(model: Model, params: Params, example: Batch) -> None:
    """Refuses a model whose logits of a row depend on another row, such as normalisation by the mean of the batch.

    Bounds of such a model hold for that batch alone, so that nothing follows from them for a row in other company.
    Row 0 of the float inputs is perturbed (or its tokens shifted by one); all other logits must stay as they were.

    Args:
      model: plain, not under `interval`.
      params: plain.
      example: at least two rows.

    Raises:
      UserError: another row moved, or there is one row only.
    """
    inputs = example.inputs
    if inputs.shape[0] < 2:
        raise UserError("check_rows: example has one row; give at least two")
    moved = inputs[0] ^ 1 if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs[0] * 1.5 + 1
    other = Batch(**{**vars(example), "inputs": inputs.at[0].set(moved)})
    before, after = (model.apply(params, batch).logits[1:] for batch in (example, other))
    change = float(jnp.max(jnp.abs(before - after)))
    if not change <= 1e-5 * float(1 + jnp.max(jnp.abs(before))):
        raise UserError(
            f"interval: config.model mixes the rows of a batch (row 0 moved the others by {change:.3g}); "
            "use frozen statistics (BatchNorm with use_running_average=True) or LayerNorm"
        )


def _is_interval(x: Any) -> bool:
    return isinstance(x, Interval)


def _input(leaf: Any) -> Span:
    """Returns an argument as a span."""
    if not isinstance(leaf, Interval):
        return Span(jnp.asarray(leaf))
    lower, upper = jnp.asarray(leaf.lower), jnp.asarray(leaf.upper)
    if lower.shape != upper.shape or lower.dtype != upper.dtype:
        raise UserError(
            f"Interval: lower is {lower.dtype}{list(lower.shape)}, upper {upper.dtype}{list(upper.shape)}; "
            "give ends of one shape and dtype"
        )
    if not jnp.issubdtype(lower.dtype, jnp.floating):
        raise UserError(f"Interval: ends are {lower.dtype}; only float arrays can be intervals")
    known = not (isinstance(lower, Tracer) or isinstance(upper, Tracer))
    if known and (crossed := int(jnp.sum(lower > upper))):
        raise UserError(
            f"Interval: lower is above upper in {crossed} of {lower.size} places; a radius must not be negative"
        )
    return Span(lower, upper)


def _result(value: Span) -> Any:
    """Returns a span as the caller sees it."""
    if value.independent:
        return value.value
    lower, upper = value.ends
    if not jnp.issubdtype(lower.dtype, jnp.floating):
        raise UserError(
            f"bounds: a result is {lower.dtype} and depends on an Interval; return what it is computed from "
            "and compare its lower and upper ends"
        )
    return Interval(lower, upper)
