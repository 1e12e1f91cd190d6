r"""L2 anchor: a quadratic pull of every parameter towards where the last task, or training, left it.

    L + strength / 2 sum_j (theta_j - anchor_j)^2;   at the end of a task:   anchor <- theta

Memory: one copy of the parameters. Compute: one pass over the parameters a step.
Source: the L2 baseline of Kirkpatrick et al., 1612.00796, and of Smith et al., 2203.17269, who find it strong when
training starts from pre-trained parameters. Since the anchor starts at the initial parameters, it acts from the
first task on; `anchor="init"` keeps it there for ever.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.compose import Part, Setting
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Output, Params


def make(setting: Setting, *, strength: float = 0.01, anchor: Literal["task", "init"] = "task") -> Part:
    """Returns the penalty.

    Args:
      setting: of the run.
      strength: factor of half the squared distance, per parameter.
      anchor: `task` moves the anchor to the parameters at the end of each task, `init` never moves it.

    Raises:
      UserError: a negative strength.
    """
    del setting
    if strength < 0:
        raise UserError(f"config.method l2.strength={strength}: must not be negative")

    def init(params: Params) -> Memory:
        return {"anchor": jax.tree.map(jnp.copy, params)}

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del output, rows
        terms = jax.tree.map(lambda p, a: jnp.sum(jnp.square(p - a)), params, memory["anchor"])
        return 0.5 * strength * jnp.sum(jnp.stack(jax.tree.leaves(terms))), jnp.ones(())

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        del batch, key
        return {"anchor": jax.tree.map(jnp.copy, params)} if anchor == "task" else memory

    return Part(init, loss=loss, end_task=end_task)
