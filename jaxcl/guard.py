"""A guard around a method: steps with a non-finite or outlying loss or gradient change nothing but the counters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import inner, outer
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState

_FLOOR = 0.05  # least spread as a share of the median, or a loss that hardly varies would be guarded too closely


def guard(method: Method, *, spike: float = 10.0, warmup: int = 32, window: int = 64, patience: int = 4) -> Method:
    """Returns `method` with bad steps undone inside the compiled step.

    A step is bad if its loss or gradient norm is not finite, or if either exceeds median + spike * spread over the
    last `window` accepted steps, where spread = 1.4826 * median absolute deviation. Bad values are never stored, and
    the new state is chosen with `where`, since 0 * NaN is NaN. A skipped step keeps parameters, optimiser state (its
    count included) and memory; the step counter goes on, so the stream moves past the rows.

    Statistics start anew at the end of a task, where the loss jumps for a good reason. After `patience` outliers in
    a row the level is taken to be new: the step is accepted and statistics start anew. (The update before them may
    have led there, and skipping does not lead back.) Non-finite steps never are. Keep `patience` below the loop's
    `rollback`, or outliers end the run before they are believed.

    The memory is {"inner": of the method, "guard": counters and window}. Metrics: `guard/skipped` in total and
    `guard/consecutive` up to this step.

    Args:
      method: reports the metrics `loss` and `grad_norm`.
      spike: spreads above the median that make an outlier; `inf` only looks for non-finite values.
      warmup: accepted steps before outliers are looked for.
      window: accepted steps that the statistics cover.
      patience: outliers in a row after which they are believed.

    Raises:
      UserError: an option out of range.
    """
    if spike <= 0:
        raise UserError(f"config.guard.spike={spike}: must be positive; use inf to look for non-finite values only")
    for name, value in (("warmup", warmup), ("window", window), ("patience", patience)):
        if value < 1:
            raise UserError(f"config.guard.{name}={value}: must be at least 1")

    def init(params: Params) -> TrainState:
        counters = {name: jnp.zeros((), jnp.int32) for name in ("accepted", "skipped", "consecutive", "outliers")}
        return outer(method.init(params), guard={**counters, "window": jnp.zeros((2, window))})

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        old = inner(state)
        new, metrics = method.step(old, batch, key)
        seen = jnp.stack([metrics["loss"], metrics["grad_norm"]]).astype(jnp.float32)  # [2]
        good, own = judge(state.memory["guard"], seen, spike, warmup, patience)
        kept = dataclasses.replace(tree.where(good, new, old), step=new.step)
        metrics = metrics | {f"guard/{name}": own[name].astype(jnp.float32) for name in ("skipped", "consecutive")}
        return outer(kept, guard=own), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        own = state.memory["guard"]
        own = own | {name: jnp.zeros_like(own[name]) for name in ("accepted", "outliers")}
        return outer(method.end_task(inner(state), batch, key), guard=own)

    return Method(init, step, end_task)


def judge(
    own: dict[str, jax.Array], seen: jax.Array, spike: float, warmup: int, patience: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns whether the values `seen`, float32 [2], are acceptable, and the counters and window after them."""
    finite = jnp.all(jnp.isfinite(seen))
    limit = jax.vmap(lambda values: _limit(values, own["accepted"], spike))(own["window"])  # [2]
    high = finite & (own["accepted"] >= warmup) & jnp.any(seen > limit)
    anew = high & (own["outliers"] + 1 >= patience)
    good = finite & (~high | anew)
    count = jnp.where(anew, 0, own["accepted"])
    place = count % own["window"].shape[1]
    return good, {
        "accepted": jnp.where(good, count + 1, own["accepted"]),
        "skipped": own["skipped"] + jnp.where(good, 0, 1),
        "consecutive": jnp.where(good, 0, own["consecutive"] + 1),
        "outliers": jnp.where(high & ~anew, own["outliers"] + 1, 0),
        "window": jnp.where(good, own["window"].at[:, place].set(seen), own["window"]),
    }


def _limit(values: jax.Array, accepted: jax.Array, spike: float) -> jax.Array:
    """Returns the largest value that is no outlier, float32 [], from a ring buffer [W] of accepted values."""
    count = jnp.minimum(accepted, values.shape[0])
    used = jnp.arange(values.shape[0]) < count

    def median(x: jax.Array) -> jax.Array:
        ordered = jnp.sort(jnp.where(used, x, jnp.inf))
        return 0.5 * (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2])

    centre = median(values)
    spread = 1.4826 * median(jnp.abs(values - centre))  # the factor makes it the standard deviation of a normal
    return centre + spike * jnp.maximum(spread, _FLOOR * jnp.abs(centre))
