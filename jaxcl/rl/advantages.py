r"""Advantages from the rewards of groups of rollouts: A = (r - baseline) / scale.

    rloo       r - mean of the others in the group = G / (G - 1) (r - mean)     Ahmadian et al., 2402.14740
    grpo       (r - mean) / (std + epsilon)                                     Shao et al., 2402.03300
    dr_grpo    r - mean                                                         Liu et al., 2503.20783
    remax      r - reward of the greedy rollout                                 Li et al., 2310.10505
    reinforce  r - mean of the batch
    reinforce_plus  (r - mean of the batch) / (std of the batch + epsilon)      Hu, 2501.03262, without its KL

Everything takes NumPy or JAX arrays and returns the same kind, in float32 or, for float64 rewards, in float64.
Standard deviations have ddof = 1 unless told otherwise (0 is the population's).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import schema
from jaxcl.schema import UserError

Baseline = Literal["others", "group", "batch", "greedy"]
Scale = Literal["none", "group", "batch"]


class Advantages(NamedTuple):
    """What a rollout is worth, and whether it is worth anything; flatten both to [P * G] columns of a batch."""

    values: Any  # [P, G]
    share: Any  # [P, G], 1 or 0: 0 for a failed rollout and for all rollouts of a group without a signal


def rloo(rewards: Any, *, valid: Any = None, skip: bool = True) -> Advantages:
    """Leave-one-out baseline. See `estimate`; needs groups of 2 or more."""
    return estimate(rewards, baseline="others", valid=valid, skip=skip)


def grpo(rewards: Any, *, ddof: int = 1, epsilon: float = 1e-6, valid: Any = None, skip: bool = True) -> Advantages:
    """Group mean and standard deviation. See `estimate`; needs groups of 2 or more."""
    return estimate(rewards, baseline="group", scale="group", ddof=ddof, epsilon=epsilon, valid=valid, skip=skip)


def dr_grpo(rewards: Any, *, valid: Any = None, skip: bool = True) -> Advantages:
    """Group mean, not scaled. See `estimate`; needs groups of 2 or more."""
    return estimate(rewards, baseline="group", valid=valid, skip=skip)


def remax(rewards: Any, greedy: Any, *, valid: Any = None, skip: bool = True) -> Advantages:
    """Reward of the greedy rollout, `greedy` [P], as the baseline. See `estimate`; a group may be of 1."""
    return estimate(rewards, baseline="greedy", greedy=greedy, valid=valid, skip=skip)


def reinforce(rewards: Any, *, valid: Any = None, skip: bool = True) -> Advantages:
    """Mean of the batch as the baseline. See `estimate`; a group may be of 1."""
    return estimate(rewards, baseline="batch", valid=valid, skip=skip)


def estimate(
    rewards: Any,
    *,
    baseline: Baseline,
    scale: Scale = "none",
    ddof: int = 1,
    epsilon: float = 1e-6,
    greedy: Any = None,
    valid: Any = None,
    skip: bool = True,
) -> Advantages:
    """Returns (reward - baseline) / scale, and which rollouts count.

    Args:
      rewards: [P, G], G rollouts of each of P prompts; any number where `valid` is False.
      baseline: mean of the others in the group, of the group, of the batch, or the reward of the greedy rollout.
      scale: 1, or standard deviation + epsilon of the group or of all rewards of the batch.
      ddof: n - ddof divides the sum of squares.
      epsilon: added to the standard deviation.
      greedy: [P], for that baseline.
      valid: bool [P, G], False for a rollout that could not be scored; it counts in no mean. None = all.
      skip: gives share 0 to groups without a signal: all rewards equal (or equal to the greedy one; for a batch
        baseline, all of the batch). Their advantages are exactly 0 in any case: this is about the divisor of the loss.

    Raises:
      UserError: shapes that do not fit, or groups too small for the baseline or the standard deviation.
    """
    xp = jnp if isinstance(rewards, jax.Array) else np
    r = xp.asarray(rewards)
    _check(r.shape, baseline, scale, ddof, epsilon, greedy, valid)
    r = r.astype(xp.promote_types(r.dtype, xp.float32)) if r.dtype != xp.float64 else r
    ok = xp.ones(r.shape, bool) if valid is None else xp.asarray(valid).astype(bool)
    r = xp.where(ok, r, 0)  # a failed rollout may carry NaN
    axis = None if baseline == "batch" else 1
    count = xp.maximum(xp.sum(ok, axis=axis, keepdims=True), 1).astype(r.dtype)
    centre = xp.sum(r, axis=axis, keepdims=True) / count
    if baseline == "greedy":
        centre = xp.asarray(greedy).astype(r.dtype)[:, None]
    gap = r - centre
    if baseline == "others":
        gap = gap * count / xp.maximum(count - 1, 1)
    values = gap / (_deviation(xp, r, ok, scale, ddof) + epsilon) if scale != "none" else gap
    # By comparison and not by a deviation of 0, which rounding may miss.
    top = xp.max(xp.where(ok, r, -xp.inf), axis=axis, keepdims=True)
    bottom = xp.min(xp.where(ok, r, xp.inf), axis=axis, keepdims=True)
    signal = (xp.maximum(top, centre) > xp.minimum(bottom, centre)) if baseline == "greedy" else top > bottom
    signal = xp.broadcast_to(signal, r.shape) & ok
    return Advantages(xp.where(signal, values, 0).astype(r.dtype), (signal if skip else ok).astype(r.dtype))


def _deviation(xp: Any, r: Any, ok: Any, scale: Scale, ddof: int) -> Any:
    """Returns the standard deviation of the rewards about their own mean, [P, 1] or [1, 1]."""
    axis = 1 if scale == "group" else None
    count = xp.sum(ok, axis=axis, keepdims=True).astype(r.dtype)
    middle = xp.sum(r, axis=axis, keepdims=True) / xp.maximum(count, 1)
    squares = xp.sum(xp.where(ok, (r - middle) ** 2, 0), axis=axis, keepdims=True)
    return xp.sqrt(squares / xp.maximum(count - ddof, 1))


def _check(
    shape: tuple[int, ...], baseline: str, scale: str, ddof: int, epsilon: float, greedy: Any, valid: Any
) -> None:
    """Raises UserError unless the advantage is defined."""
    for key, value, choices in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        names = list(choices.__args__)
        if value not in names:
            raise UserError(f"config.objective {key}={value!r}: no such {key}{schema.nearest(str(value), names)}")
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"rewards of shape {list(shape)}: expected [prompts, rollouts of each]")
    group = shape[1]
    if group < 2 and (baseline in ("others", "group") or scale == "group"):
        raise UserError(f"group size {group}: a baseline of '{baseline}' needs 2 or more rollouts of each prompt")
    size = group if scale == "group" else shape[0] * group
    if scale != "none" and not 0 <= ddof < size:
        raise UserError(f"config.objective ddof={ddof}: must lie in [0, {size}), the number of rewards")
    if epsilon < 0:
        raise UserError(f"config.objective epsilon={epsilon}: must not be negative")
    if (baseline == "greedy") != (greedy is not None):
        raise UserError("greedy rewards: needed by the baseline 'greedy' (remax), and by no other")
    if greedy is not None and np.shape(greedy) != shape[:1]:
        raise UserError(f"greedy rewards of shape {list(np.shape(greedy))}: expected [{shape[0]}], one for each prompt")
    if valid is not None and np.shape(valid) != shape:
        raise UserError(f"valid of shape {list(np.shape(valid))}: expected that of the rewards, {list(shape)}")
