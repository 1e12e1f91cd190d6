r"""Rewards from parts: length penalties, formats and tags, and two rewards whose mixture changes over the steps.

    overlong   min(-(len - (limit - buffer)) / buffer * factor, 0)            Yu et al., 2503.14476, eq. 13
    curriculum w(t) first + (1 - w(t)) second, w half a cosine from w0 to w1   as in Datarus-R1, 2508.13382

The weights of the latter are not published: w0, w1 and the number of steps are options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.schema import UserError


def overlong(lengths: Any, *, limit: int, buffer: int, factor: float = 1.0) -> Any:
    """Returns a penalty <= 0 for completions that reach into the last `buffer` tokens of the limit.

    Args:
      lengths: integers, completions in tokens (not characters), any shape.
      limit: longest completion; there the penalty is -factor, and it falls on beyond.
      buffer: tokens before the limit over which it grows.
      factor: penalty at the limit.
    """
    xp = jnp if isinstance(lengths, jax.Array) else np
    lengths = xp.asarray(lengths)
    if not xp.issubdtype(lengths.dtype, xp.integer):
        raise UserError(f"overlong lengths of type {lengths.dtype}: expected numbers of tokens, integers")
    if not 0 < buffer <= limit:
        raise UserError(f"config.reward overlong buffer={buffer}: must lie in [1, {limit}], the limit")
    if factor < 0:
        raise UserError(f"config.reward overlong factor={factor}: must not be negative")
    return xp.minimum(-(lengths - (limit - buffer)) / buffer * factor, 0.0)


def formatted(verified: Any, form: Any, *, weight: float, additive: bool = False) -> Any:
    """Returns the reward of the answer with that of its form: verified + weight form, the latter only if verified.

    A form that is paid for by itself teaches the form: lengths and tags drift away from right answers.

    Args:
      verified: reward of the answer; > 0 says that it was verified.
      form: reward of the format or the tags, same shape.
      weight: of the form.
      additive: pays for the form of wrong answers too.
    """
    xp = jnp if isinstance(verified, jax.Array) else np
    verified, form = xp.asarray(verified), xp.asarray(form)
    return verified + weight * (form if additive else xp.where(verified > 0, form, 0))


def tags(text: str, names: Sequence[str]) -> float:
    """Returns the fraction of the tags that are well placed: one `<name>`, one `</name>`, in the order of `names`."""
    if not names:
        raise UserError("config.reward tags=(): name at least one tag")
    good, end = 0, 0
    for name in names:
        opened = [m.start() for m in re.finditer(re.escape(f"<{name}>"), text)]
        closed = [m.end() for m in re.finditer(re.escape(f"</{name}>"), text)]
        if len(opened) == len(closed) == 1 and end <= opened[0] < closed[0]:
            good, end = good + 1, closed[0]
    return good / len(names)


def cosine(step: Any, *, first: float, last: float, steps: int) -> Any:
    """Returns half a cosine from `first` at step 0 to `last` at `steps`, and `last` from there on."""
    for key, value in (("first", first), ("last", last)):
        if not 0 <= value <= 1:
            raise UserError(f"config.schedule {key}={value}: must lie in [0, 1]")
    if steps < 1:
        raise UserError(f"config.schedule steps={steps}: must be 1 or more")
    xp = jnp if isinstance(step, jax.Array) else np
    x = xp.clip(xp.asarray(step) / steps, 0.0, 1.0)
    return last + (first - last) * 0.5 * (1 + xp.cos(math.pi * x))


def curriculum(first: Any, second: Any, step: Any, *, w0: float, w1: float, steps: int) -> Any:
    """Returns w first + (1 - w) second, w = cosine(step) from w0 to w1; e.g. structure first, semantics later."""
    w = cosine(step, first=w0, last=w1, steps=steps)
    return w * first + (1 - w) * second
