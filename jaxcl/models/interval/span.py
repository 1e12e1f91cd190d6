"""The value that the interpreter computes with, and rounding of its ends."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.schema import UserError


class Interval(NamedTuple):
    """All arrays between two arrays; float, of one shape and dtype, lower <= upper everywhere.

    It stands in the place of an array among the arguments of a function that `bounds` has transformed. The two must be
    different objects only if they may differ: to say "exactly x" pass x itself, which is cheaper and bit-exact.
    """

    lower: Any  # jax.Array
    upper: Any  # jax.Array

    def astype(self, dtype: Any) -> Interval:
        """Casts both ends, to the nearest value of the new dtype."""
        return Interval(self.lower.astype(dtype), self.upper.astype(dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["lower", "upper", "origin"], meta_fields=["nonnegative"])
@dataclasses.dataclass(frozen=True)
class Span:
    """One value of the traced function: a plain array (no `upper`) or the ends of an interval.

    A boolean span is a comparison that may be undecided: `lower` is True where it certainly holds, `upper` where it
    may.
    """

    lower: Any
    upper: Any = None
    origin: Any = None  # the plain value, if it depends on no Interval but has been rounded (outward rounding only)
    nonnegative: bool = False  # known when tracing, whatever the values

    @property
    def plain(self) -> bool:
        """Whether it is one array."""
        return self.upper is None

    @property
    def ends(self) -> tuple[Any, Any]:
        """Lower and upper end; the same array twice if it is plain."""
        return self.lower, self.lower if self.upper is None else self.upper

    @property
    def independent(self) -> bool:
        """Whether it depends on no Interval."""
        return self.upper is None or self.origin is not None

    @property
    def value(self) -> Any:
        """The plain value of an independent span."""
        return self.lower if self.origin is None else self.origin

    @property
    def magnitude(self) -> Any:
        """Largest absolute value in the span."""
        lower, upper = self.ends
        return jnp.abs(lower) if self.plain else jnp.maximum(jnp.abs(lower), jnp.abs(upper))


def span(lower: Any, upper: Any, outward: bool = False, *, steps: float = 1, slack: Any = 0.0, sign: bool) -> Span:
    """Returns the span of two computed ends.

    An end that could not be computed (NaN: inf - inf, 0 * inf, a NaN among the operands) is infinite: nothing is known.

    Args:
      lower: lower end, float [...].
      upper: upper end.
      outward: whether to move both ends outward, past all error that the caller made.
      steps: error of an end relative to itself, in units of the machine epsilon, which is one to two ulp.
      slack: absolute error of an end beyond that of `steps` and of underflow; a scalar or like the ends.
      sign: whether no value can be negative.
    """
    if outward:
        limits = finfo(lower.dtype)
        # No nextafter: it has no derivative, and one subnormal step from 0 is flushed back to 0 by most hardware.
        lower, upper = jnp.minimum(lower, limits.max), jnp.maximum(upper, -limits.max)
        lower = lower - (jnp.abs(lower) * float(steps * limits.eps) + 4 * float(limits.tiny) + slack)
        upper = upper + (jnp.abs(upper) * float(steps * limits.eps) + 4 * float(limits.tiny) + slack)
    elif steps > 1:  # other functions than sums and products need not be monotone to the last bit
        upper = jnp.maximum(upper, lower)
    lower = jnp.where(jnp.isnan(lower), -jnp.inf, lower)
    upper = jnp.where(jnp.isnan(upper), jnp.inf, upper)
    if sign:
        lower = jnp.maximum(lower, 0)
    return Span(lower, upper, nonnegative=sign)


def finfo(dtype: Any) -> Any:
    """Returns the limits of a dtype whose arithmetic outward rounding knows.

    Raises:
      UserError: not float32 or float64.
    """
    if dtype not in (jnp.float32, jnp.float64):
        raise UserError(f"outward=True: no error bound for {dtype}; compute in float32 or pass outward=False")
    return np.finfo(dtype)


def dot_error(terms: int, dtype: Any) -> float:
    """Returns c with |computed - exact| <= c * sum of |computed terms| for a sum of so many products, in any order.

    gamma_n = n u / (1 - n u) with u half the epsilon (Higham 2002, eq. 3.5); n leaves room for the sum of four partial
    sums, for the error of the sum of magnitudes itself and for the product by c; an interval that straddles zero times
    another counts every term twice.

    Raises:
      UserError: more terms than the bound holds for.
    """
    roundings = (terms + 16) * float(finfo(dtype).eps) / 2
    if roundings > 0.1:
        raise UserError(f"outward=True: a sum of {terms} terms has no useful error bound in {dtype}; use float64")
    gamma = roundings / (1 - roundings)
    return 2 * gamma * (1 + gamma) * 1.01


def positive(x: Any) -> Any:
    """Returns max(x, 0)."""
    return jnp.maximum(x, 0)


def negative(x: Any) -> Any:
    """Returns min(x, 0)."""
    return jnp.minimum(x, 0)
