r"""Experience replay: train on past rows, drawn from a reservoir on the device, beside the new ones.

    past ~ M;   theta <- theta + optimiser(grad mean loss(theta, new + past));   M <- reservoir(M, new)

Source: Chaudhry et al., 1902.10486; as a share of the batch in continual pre-training, Abbes et al., 2508.01908.

Cost: `capacity` rows of every column (20 bytes a token for packed text), sharded like a batch. `extend` lengthens
the step by 1 / (1 - fraction); `replace` does not, but gives up as many incoming rows as it replays.

Choices:
- Rows are drawn before the current ones are stored, so no row is replayed in the step that brings it.
- `tasks="seen"` draws from all that was stored, earlier rows of the current task included: the method then needs
  no task labels. `tasks="past"` draws only rows of tasks that are absent from the incoming batch.
- `fraction` is the share of trained rows that are replayed, in both modes. It is exact over time, not rounded once:
  the part of a row that a step cannot replay is carried over to the next step.
- Until there is something to draw, `replace` keeps the incoming rows and the rows `extend` appends have weight 0.
"""

from __future__ import annotations

import dataclasses
import fractions
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl import memory as store
from jaxcl.compose import Part, Setting, Taken
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Metrics, Params


def make(
    setting: Setting,
    *,
    capacity: int = 1024,
    fraction: float = 0.25,
    rows: int | None = None,
    mode: Literal["replace", "extend"] = "replace",
    tasks: Literal["seen", "past"] = "seen",
) -> Part:
    """Returns replay from a reservoir.

    Args:
      setting: of the run.
      capacity: N, rows the reservoir holds.
      fraction: share of the trained rows that are replayed, in [0, 1).
      rows: replayed rows per step instead of `fraction`.
      mode: `replace` swaps incoming rows for replayed ones, `extend` appends replayed rows.
      tasks: `seen` draws from every stored row, `past` from tasks that are absent from the incoming batch.

    Raises:
      UserError: an option out of range.
    """
    size = setting.example.task.shape[0]
    per_step = _per_step(size, capacity, fraction, rows, mode)  # exact number of rows, maybe not whole
    most = -(-per_step.numerator // per_step.denominator)

    def init(params: Params) -> Memory:
        del params
        return {**store.reservoir(setting.example, capacity), "owed": jnp.zeros((), jnp.int32)}

    def due(memory: Memory) -> jax.Array:
        return (memory["owed"] + per_step.numerator) // per_step.denominator  # int32 []

    def recall(memory: Memory, batch: Batch, key: Key) -> Batch:
        absent = store.present(batch, setting.tasks) if tasks == "past" else None
        if mode == "extend":
            drawn = store.draw(memory, most, key, absent)
            weights = jnp.where(_leading(jnp.arange(most) < due(memory), drawn.weights), drawn.weights, 0.0)
            return store.append(batch, dataclasses.replace(drawn, weights=weights))
        drawn = store.draw(memory, size, key, absent)
        # Replaced rows are spread evenly, so that every device that holds a part of the batch replaces its share.
        bound = jnp.arange(size + 1) * due(memory) // size  # [B + 1]
        return store.substitute(batch, drawn, (bound[1:] > bound[:-1]) & store.has_weight(drawn))

    def settle(memory: Memory, taken: Taken) -> Memory:
        written = store.write(memory, store.fresh(taken.rows), taken.key)
        return {**written, "owed": (memory["owed"] + per_step.numerator) % per_step.denominator}

    def metrics(memory: Memory, rows: Batch) -> Metrics:
        del memory
        mark = store.replayed(rows)
        weight = jnp.sum(jnp.where(_leading(mark > 0, rows.weights), rows.weights, 0.0))
        return {"replayed_rows": jnp.sum(mark * store.has_weight(rows)), "replayed_weight": weight}

    return Part(init, recall, settle=settle, metrics=metrics)


def _per_step(size: int, capacity: int, fraction: float, rows: int | None, mode: str) -> fractions.Fraction:
    """Returns how many rows a step replays, after checking the options."""
    if capacity < 1:
        raise UserError(f"config.method er.capacity={capacity}: must be at least 1; leave out 'er' for no replay")
    if not 0 <= fraction < 1:
        raise UserError(f"config.method er.fraction={fraction}: must lie in [0, 1); 0.25 replays a quarter of the rows")
    if rows is not None and (rows < 0 or (mode == "replace" and rows > size)):
        raise UserError(f"config.method er.rows={rows}: must lie in [0, {size}], the rows of a batch")
    share = fractions.Fraction(fraction).limit_denominator(10_000)
    share = share if mode == "replace" else share / (1 - share)
    return share * size if rows is None else fractions.Fraction(rows)


def _leading(condition: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `condition` [B] with unit axes appended up to the rank of `like`."""
    return condition.reshape(-1, *[1] * (like.ndim - 1))
