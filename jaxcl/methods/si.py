r"""Synaptic intelligence: importance of a parameter is its share in the fall of the loss along the path of training.

    every step:   w_j <- w_j - g_j (theta'_j - theta_j);      L + strength sum_j O_j (theta_j - anchor_j)^2
    at the end of a task:   O_j <- O_j + max(w_j, 0) / ((theta_j - anchor_j)^2 + damping);   w <- 0;   anchor <- theta

Source: Zenke et al., 1703.04200, eq. 3-5. Memory: three copies of the parameters. Compute: two passes over them a step.

Deviations: the optimiser's actual displacement is used, so momentum and clipping are in it. `g` is the gradient of the
training loss: that of the own penalty is subtracted in closed form, but other terms beside this one stay in it.
Negative contributions are cut off at the end of the task (as in the authors' code), or the penalty could be unbounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import Part, Setting, Taken
from jaxcl.methods.ewc import penalty
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Output, Params


def make(setting: Setting, *, strength: float = 0.1, damping: float = 0.1) -> Part:
    """Returns the penalty.

    Args:
      setting: of the run.
      strength: c of the paper.
      damping: xi of the paper, keeps the importance of parameters that hardly moved finite.

    Raises:
      UserError: an option out of range.
    """
    del setting
    if strength < 0:
        raise UserError(f"config.method si.strength={strength}: must not be negative")
    if damping <= 0:
        raise UserError(f"config.method si.damping={damping}: must be positive")

    def init(params: Params) -> Memory:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {
            "importance": zeros,
            "path": jax.tree.map(jnp.copy, zeros),
            "anchor": jax.tree.map(jnp.copy, params),
        }

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del output, rows
        return strength * penalty(memory["importance"], params, memory["anchor"]), jnp.ones(())

    def settle(memory: Memory, taken: Taken) -> Memory:
        def leaf(path: jax.Array, g: jax.Array, own: jax.Array, moved: jax.Array) -> jax.Array:
            return path - (g - 2 * strength * own) * moved

        own = jax.tree.map(lambda o, p, a: o * (p - a), memory["importance"], taken.before, memory["anchor"])
        moved = tree.add(taken.after, taken.before, -1.0)
        path = jax.tree.map(leaf, memory["path"], taken.grads, own, moved)
        return {**memory, "path": path}

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        del batch, key

        def leaf(o: jax.Array, w: jax.Array, p: jax.Array, a: jax.Array) -> jax.Array:
            return o + jnp.maximum(w, 0.0) / (jnp.square(p - a) + damping)

        importance = jax.tree.map(leaf, memory["importance"], memory["path"], params, memory["anchor"])
        return {
            "importance": importance,
            "path": jax.tree.map(jnp.zeros_like, params),
            "anchor": jax.tree.map(jnp.copy, params),
        }

    return Part(init, loss=loss, settle=settle, end_task=end_task)
