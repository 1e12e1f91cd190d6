r"""Online elastic weight consolidation: pull parameters to the last task's, each as hard as the Fisher says it matters.

    L + strength / 2 sum_j F_j (theta_j - anchor_j)^2
    at the end of a task:   F <- decay F + mean_rows (grad log p(row))^2;   anchor <- theta

Sources: Kirkpatrick et al., 1612.00796, eq. 3; online form Schwarz et al., 1805.06370, eq. 9 (decay is their gamma).

Memory: two copies of the parameters, and `chunk` more while the Fisher is computed. Compute: one pass over the
parameters a step; at the end of a task one backward pass per row of the K batches given.

Choices and deviations:
- The Fisher squares the gradient of each row by itself. Squaring batch gradients, as many libraries do, gives a
  quantity that falls with the batch size.
- A row of text is one example: its log-likelihood is the sum over its tokens.
- `labels="data"` uses the given targets (the empirical Fisher); `labels="model"` draws them from the model, one draw a
  position, which estimates the Fisher of the paper and needs a loss that is the negative log-likelihood of `logits`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl import grad, tree
from jaxcl.compose import Part, Setting
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Output, Params


def make(
    setting: Setting,
    *,
    strength: float = 1.0,
    decay: float = 1.0,
    labels: Literal["data", "model"] = "data",
    chunk: int = 1,
) -> Part:
    """Returns the penalty.

    Args:
      setting: of the run.
      strength: factor of the penalty.
      decay: share of the old Fisher that stays when a new one is added, in [0, 1].
      labels: targets behind the Fisher.
      chunk: rows whose gradients are computed at a time; divides the batch. 1 is fastest where memory is the limit.

    Raises:
      UserError: an option out of range.
    """
    size = setting.example.task.shape[0]
    if strength < 0:
        raise UserError(f"config.method ewc.strength={strength}: must not be negative")
    if not 0 <= decay <= 1:
        raise UserError(f"config.method ewc.decay={decay}: must lie in [0, 1]; 1 adds up all tasks")
    if chunk < 1 or size % chunk:
        raise UserError(f"config.method ewc.chunk={chunk}: must be a divisor of the batch of {size} rows")

    def init(params: Params) -> Memory:
        return {"fisher": jax.tree.map(jnp.zeros_like, params), "anchor": jax.tree.map(jnp.copy, params)}

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del output, rows
        return 0.5 * strength * penalty(memory["fisher"], params, memory["anchor"]), jnp.ones(())

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [K * B, ...]
        if labels == "model":
            rows = _imagine(setting, params, rows, key, chunk)
        fisher = grad.squares(lambda p, row: setting.loss(setting.model.apply(p, row), row), params, rows, chunk)
        return {"fisher": tree.add(fisher, memory["fisher"], decay), "anchor": jax.tree.map(jnp.copy, params)}

    return Part(init, loss=loss, end_task=end_task)


def penalty(importance: Params, params: Params, anchor: Params) -> jax.Array:
    """Returns the sum of importance * (params - anchor)^2, float32 []."""
    terms = jax.tree.map(lambda f, p, a: jnp.sum(f * jnp.square(p - a)), importance, params, anchor)
    return jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def _imagine(setting: Setting, params: Params, rows: Batch, key: Key, chunk: int) -> Batch:
    """Returns `rows` with targets drawn from the model."""

    def one(piece: Batch, k: Key) -> jax.Array:
        return jax.random.categorical(k, setting.model.apply(params, piece).logits).astype(piece.targets.dtype)

    count = rows.task.shape[0] // chunk
    targets = jax.lax.map(lambda pair: one(*pair), (grad.split(rows, count), jax.random.split(key, count)))
    return dataclasses.replace(rows, targets=targets.swapaxes(0, 1).reshape(rows.targets.shape))
