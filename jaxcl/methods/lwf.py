r"""Learning without forgetting: on the new rows, stay close to what the model said at the end of the last task.

    L + strength T^2 mean_w KL( softmax(teacher logits / T) || softmax(logits / T) )
    at the end of a task:   teacher <- theta

Source: Li & Hoiem, 1606.09282, eq. 1-4; the factor T^2 keeps gradients comparable (Hinton et al., 1503.02531).

Memory: one copy of the parameters, and the hidden states of a second forward pass. Compute: one more forward
pass a step, none before the end of the first task. Positions count with their weight in the training loss.

Deviations: one shared output for all tasks instead of a head per task, KL instead of cross entropy (same gradient),
and no warm-up phase of the new head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.compose import Part, Setting
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Output, Params


def make(setting: Setting, *, strength: float = 1.0, temperature: float = 2.0) -> Part:
    """Returns the distillation term.

    Args:
      setting: of the run.
      strength: factor of the divergence.
      temperature: T, softens both distributions.

    Raises:
      UserError: an option out of range.
    """
    if strength < 0:
        raise UserError(f"config.method lwf.strength={strength}: must not be negative")
    if temperature <= 0:
        raise UserError(f"config.method lwf.temperature={temperature}: must be positive")

    def init(params: Params) -> Memory:
        return {"teacher": jax.tree.map(jnp.copy, params), "on": jnp.zeros((), bool)}

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del params

        def divergence(own: Output) -> jax.Array:
            return losses.kl(own, setting.model.apply(memory["teacher"], rows), rows, temperature=temperature)[0]

        total = jax.lax.cond(memory["on"], divergence, lambda own: jnp.zeros(()), output._replace(cache=None))
        return strength * temperature**2 * total, jnp.sum(rows.weights)

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        del batch, key
        return {"teacher": jax.tree.map(jnp.copy, params), "on": jnp.ones_like(memory["on"])}

    return Part(init, loss=loss, end_task=end_task)
