r"""Certificates of boxes of weights: what every network of a box gets right, and whether the promises are kept.

    certified  share of held-out rows on which the least logit of the target, over the whole box, is above the greatest
               of any other class: every network in the box gets them right
    promised   the same of the box in the ledger, which the deployed network cannot leave
    joint      the same of the networks that the generator makes, which do not fill their box: affine forms go on
               through the target network. The ledger keeps boxes, so that this is no promise

Bounds are rounded outward (`jaxcl.models.interval`), so that they hold in exact arithmetic; the deployed network itself
is computed in float32, and differs only on rows whose margin is within its rounding error.

  python -m jaxcl.certify RUN      checks the ledger of a run again, from its checkpoint and its held-out rows
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models import boxed as boxes
from jaxcl.models.boxed import LEDGER, Boxed
from jaxcl.models.interval import Interval
from jaxcl.schema import UserError
from jaxcl.types import Batch, Params

ROWS = 32  # at a time through affine forms, which take K numbers for each activation
Rows = Mapping[str, Sequence[Batch]]  # domain -> batches [B, ...] with the number of their task


def make(made: Boxed, rows: Rows, fetch: Callable[[Any], Any] = jax.device_get) -> Callable[[Params], dict[str, Any]]:
    """Returns the function from parameters to what is certified of every domain.

    Args:
      made: the model.
      rows: held-out rows on the devices.
      fetch: arrays to the host.

    Returns:
      A function that gives, for each domain: `task`; `over`, whether it has been learned; `deployed`, the accuracy of
      the deployed network; `promised`, the certified accuracy of its box in the ledger, None without one; `interval`
      and `affine`, those of its present box by interval arithmetic and by affine forms, before any clipping; `joint`,
      what all networks get right that the generator makes of the present embedding, None of a generator whose weights
      do not depend on each other and before the task is over; `radius`
      and `affine_radius`, mean radii of the boxes; `kept_radius`, that in the ledger; `clipped`, the share of the
      weights of the point network that the ledger moves; and, of task networks, `guessed` and `guessed_interval`: the
      share of rows of which task and class are right if the task is that of the least (interval) entropy.

    Raises:
      UserError: the network mixes rows, see `jaxcl.models.boxed.check_target`.
    """
    boxes.check_target(made.target, next(iter(rows.values()))[0])
    parts = (_points, _boxes, _counts, _shape, _guesses)
    point, find, count, shape, guess = (jax.jit(functools.partial(f, made)) for f in parts)
    joint = _joint(made, fetch)
    # All rows of a domain are of one task, so that those of this process say which.
    task_of = {domain: int(batches[0].task.addressable_data(0)[0]) for domain, batches in rows.items()}

    def total(values: Sequence[jax.Array]) -> list[float]:
        return np.asarray(fetch(values), np.float64).sum(axis=0).tolist()

    def run(params: Params) -> dict[str, Any]:
        found: dict[str, Any] = {}
        over = fetch(params[LEDGER]["done"]) > 0
        points = point(params)  # once: a network may cost more to make than to use
        for domain, batches in rows.items():
            task = task_of[domain]
            made_boxes = find(params, points, batches[0])
            numbers, unsure = zip(*[count(params, points, made_boxes, batch) for batch in batches], strict=True)
            deployed, promised, wide, tight, weight = total(numbers)
            sizes = {name: float(value) for name, value in fetch(shape(params, made_boxes, batches[0])).items()}
            kept = math.isfinite(sizes["kept_radius"])
            one: dict[str, Any] = {"task": task, "over": bool(over[task]), "deployed": deployed / weight}
            one["promised"] = promised / weight if over[task] and kept else None
            one |= {"interval": wide / weight, "affine": tight / weight, "joint": None}
            if made.layer and over[task]:
                one["joint"] = (tight + joint(params, batches, unsure)) / weight
            one |= sizes | ({} if kept else {"kept_radius": None})
            if not made.universal and over.sum() > 1:
                plain, interval, weight = total([guess(params, points, batch) for batch in batches])
                one |= {"guessed": plain / weight, "guessed_interval": interval / weight}
            found[domain] = one
        return {"certificate": found}

    return run


def common(made: Boxed, params: Params, tasks: Sequence[str]) -> Interval:
    """Returns what the present boxes of all tasks that are over have in common, float32 [N], by interval arithmetic.

    Args:
      made: the model.
      params: of it.
      tasks: names.

    Raises:
      UserError: no task is over, or nothing is common to them: the task whose box misses those before it.
    """
    over = np.flatnonzero(np.asarray(jax.device_get(params[LEDGER]["done"])) > 0)
    if not over.size:
        raise UserError("certificate: no task is over; finish one first")
    ranks = jnp.asarray(over, jnp.int32)
    centre, radius = made.boxes(params["generator"], ranks, jnp.ones(over.size))
    lower, upper = (np.asarray(end) for end in (centre - radius, centre + radius))
    for k in range(1, over.size):
        empty = float(np.mean(lower[: k + 1].max(0) > upper[: k + 1].min(0)))
        if empty:
            raise UserError(
                f"certificate: the box of {tasks[over[k]]} misses those of the tasks before it in {100 * empty:.3g} % "
                "of the weights, so that no network is in all of them and nothing is guaranteed; train with "
                "--config.method.project=true"
            )
    return Interval(jnp.asarray(lower.max(0)), jnp.asarray(upper.min(0)))


def _points(made: Boxed, params: Params) -> jax.Array:
    """Returns the weights of the deployed network of every task, [T, N]; [1, N] where one serves all."""
    tasks = jnp.arange(1 if made.universal else made.tasks)
    return jax.lax.map(lambda task: boxes.point(made, params, task), tasks)


def _ledger(made: Boxed, params: Params, points: jax.Array, task: jax.Array) -> Interval:
    """Returns the box that was promised, [N]; where nothing was, that of the deployed network alone."""
    held, where = points[0 if made.universal else task], boxes.limits(made, params, task)
    kept = jnp.isfinite(where.lower) & jnp.isfinite(where.upper)
    return Interval(jnp.where(kept, where.lower, held), jnp.where(kept, where.upper, held))


def _raw(made: Boxed, params: Params, task: jax.Array) -> tuple[Interval, Interval]:
    """Returns the present box of a task by interval arithmetic and by affine forms, without the ledger, [N]."""
    own = boxes.shown(made, params, task)
    centre, radius = made.boxes(params["generator"], own[None], jnp.ones(1))
    middle, near = made.tight(params["generator"], own)
    return Interval(centre[0] - radius[0], centre[0] + radius[0]), Interval(middle - near, middle + near)


def _boxes(made: Boxed, params: Params, points: jax.Array, batch: Batch) -> tuple[Interval, Interval, Interval]:
    """Returns the boxes of the task of a batch: of the ledger, by interval arithmetic, by affine forms; [N] each."""
    task = batch.task[0]
    return _ledger(made, params, points, task), *_raw(made, params, task)


def _counts(
    made: Boxed, params: Params, points: jax.Array, found: Sequence[Interval], batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns numbers of rows, float32 [5]: deployed right, promised, certified by both arithmetics; weight.

    And the rows that count and that the last box does not certify, bool [B].
    """
    weights, held = batch.weights, points[0 if made.universal else batch.task[0]]
    right = made.target.apply(made.network(params, held), batch).logits.argmax(-1) == batch.targets
    sure = [boxes.certain(boxes.logits(made, params, box, batch, outward=True), batch) for box in found]
    numbers = jnp.stack([*(jnp.sum(weights * one) for one in (right, *sure)), jnp.sum(weights)])
    return numbers, (weights > 0) & ~sure[-1]


def _joint(made: Boxed, fetch: Callable[[Any], Any]) -> Callable[..., float]:
    """Returns the function (params, batches, unsure) -> number of unsure rows that affine forms certify.

    Rows that the box certifies need no forms, which cost a hundred times as much: only the others are looked at.
    """
    gather = jax.jit(_gathered)
    whole = jax.jit(lambda params, batch: boxes.zonotope(made, params, batch.task[0]))

    @jax.jit
    def together(params: Params, found: boxes.Zonotope, rows: Batch) -> jax.Array:
        return jnp.sum(rows.weights * boxes.together(made, params, rows.task[0], found, rows))

    def run(params: Params, batches: Sequence[Batch], unsure: Sequence[jax.Array]) -> float:
        pieces, count = gather(list(batches), list(unsure))
        pieces = pieces[: -(-int(fetch(count)) // ROWS)]
        if not pieces:
            return 0.0
        found = whole(params, batches[0])
        return float(sum(fetch([together(params, found, rows) for rows in pieces])))

    return run


def _gathered(batches: Sequence[Batch], flags: Sequence[jax.Array]) -> tuple[list[Batch], jax.Array]:
    """Returns all rows, ROWS at a time, the flagged ones first, and how many these are, int32 [].

    Only flagged rows have a weight; the last piece is filled with others.
    """
    rows, chosen = jax.tree.map(lambda *x: jnp.concatenate(x), *batches), jnp.concatenate(flags)
    order, count = jnp.argsort(~chosen), jnp.sum(chosen)
    order = jnp.concatenate([order, jnp.zeros(-len(order) % ROWS, order.dtype)])
    rows = jax.tree.map(lambda x: x[order], rows)
    rows = dataclasses.replace(rows, weights=jnp.where(jnp.arange(len(order)) < count, rows.weights, 0))
    starts = range(0, len(order), ROWS)
    return [jax.tree.map(lambda x, i=i: x[i : i + ROWS], rows) for i in starts], count


def _shape(
    made: Boxed, params: Params, found: tuple[Interval, Interval, Interval], batch: Batch
) -> dict[str, jax.Array]:
    """Returns the sizes of the boxes of the task of a batch."""
    (_, wide, tight), task = found, batch.task[0]
    where, raw = boxes.limits(made, params, task), boxes.shown(made, params, task)
    point, _ = made.boxes(params["generator"], raw[None], jnp.zeros(1))
    return {
        "radius": jnp.mean(wide.upper - wide.lower) / 2,
        "affine_radius": jnp.mean(tight.upper - tight.lower) / 2,
        "kept_radius": jnp.mean(where.upper - where.lower) / 2,
        "clipped": jnp.mean((point[0] < where.lower) | (point[0] > where.upper)),
    }


def _guesses(made: Boxed, params: Params, points: jax.Array, batch: Batch) -> jax.Array:
    """Returns numbers of rows, float32 [3]: task and class right by entropy, by interval entropy; weight.

    The entropy of a task is that of the probabilities of its point network; the interval entropy divides each term by
    the width of its logit + 0.001 (Krukowski et al., published code). Tasks that are not over do not take part.
    """
    task = batch.task[0]

    def one(k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = dataclasses.replace(batch, task=jnp.full_like(batch.task, k))
        logits = made.target.apply(made.network(params, points[k]), rows).logits
        term = jax.scipy.special.entr(jax.nn.softmax(logits))  # -p log p, 0 at 0
        spread = boxes.logits(made, params, _ledger(made, params, points, k), rows, outward=True)
        return jnp.sum(term, -1), jnp.sum(term / (1e-3 + spread.upper - spread.lower), -1), logits.argmax(-1)

    plain, interval, classes = jax.lax.map(one, jnp.arange(made.tasks))  # [T, B]
    waiting = (params[LEDGER]["done"] <= 0)[:, None]
    right = []
    for entropy in (plain, interval):
        chosen = jnp.argmin(jnp.where(waiting, jnp.inf, entropy), axis=0)
        own = jnp.take_along_axis(classes, chosen[None], axis=0)[0]
        right.append(jnp.sum(batch.weights * ((chosen == task) & (own == batch.targets))))
    return jnp.stack([*right, jnp.sum(batch.weights)])
