r"""Averaged gradient episodic memory: take out of the gradient what would raise the loss on rows from memory.

    r = grad mean loss(theta, rows ~ M);   if <g, r> < 0:   g <- g - (<g, r> / <r, r>) r;   M <- reservoir(M, new)

Source: Chaudhry et al., 1812.00420, eq. 11. Memory: `capacity` rows. Compute: a second forward and backward pass on
`rows` rows a step, and one more copy of the gradient.

Deviations: a reservoir instead of a ring buffer per task. The projection comes before the optimiser, as in the paper,
so the step of an adaptive optimiser may still have a component against r. The reference is the gradient of the
training loss alone, while g includes the penalties of other parts. With `tasks="past"` (the paper) rows of tasks in
the incoming batch are not drawn, so nothing happens during the first task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl import memory as store
from jaxcl import tree
from jaxcl.compose import Part, Setting, Taken
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Params


def make(
    setting: Setting, *, capacity: int = 1024, rows: int | None = None, tasks: Literal["past", "seen"] = "past"
) -> Part:
    """Returns the gradient rule.

    Args:
      setting: of the run.
      capacity: N, rows the reservoir holds.
      rows: rows of the reference batch; as many as in a batch if None.
      tasks: `past` draws only from tasks that are absent from the incoming batch, `seen` from every stored row.

    Raises:
      UserError: an option out of range.
    """
    count = setting.example.task.shape[0] if rows is None else rows
    if capacity < 1:
        raise UserError(f"config.method agem.capacity={capacity}: must be at least 1")
    if count < 1:
        raise UserError(f"config.method agem.rows={rows}: must be at least 1")

    def init(params: Params) -> Memory:
        del params
        return store.reservoir(setting.example, capacity)

    def project(memory: Memory, grads: Params, batch: Batch, gradient: Callable[[Batch], Params], key: Key) -> Params:
        absent = store.present(batch, setting.tasks) if tasks == "past" else None
        return conflict_free(grads, gradient(store.draw(memory, count, key, absent)))

    def settle(memory: Memory, taken: Taken) -> Memory:
        return store.write(memory, store.fresh(taken.rows), taken.key)

    return Part(init, project=project, settle=settle)


def conflict_free(grads: Params, reference: Params) -> Params:
    """Returns `grads` without its component against `reference`; unchanged if there is none."""
    inner, square = tree.dot(grads, reference), tree.dot(reference, reference)
    scale = jnp.where((inner < 0) & (square > 0), inner / jnp.where(square > 0, square, 1.0), 0.0)
    return jax.tree.map(lambda g, r: jnp.where(scale < 0, g - (scale * r).astype(g.dtype), g), grads, reference)
