r"""Reference model: what a KL penalty of an objective compares the policy with, and what dpo does.

    extra["reference"] <- log p(what was drawn; reference)        reference = theta at the start, or of the last task

It is the objective that penalises, by `config.objective.kl`; this part adds the column, float32 [B, L], to rollouts and
pairs, replayed ones too, before the gradient is taken. In a supervised stage it does nothing but, with at="task", take
the parameters at its end.

Source: Ziegler et al., 1909.08593; with the reference renewed at the end of each task it is an anchor of the policy.

Memory: one copy of the parameters. Compute: one more forward pass a step, in as many pieces as there are microbatches,
so that its hidden states take no more memory than theirs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl import grad
from jaxcl.compose import Part, Setting
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Params

SCORED = {"advantage", "rejected"}  # columns of rollouts and of pairs, which have a score


def make(setting: Setting, *, at: Literal["start", "task"] = "start") -> Part:
    """Returns the part that adds the column.

    Args:
      setting: of the run, with `score`.
      at: `start` keeps the first parameters for ever, `task` takes those at the end of each task.

    Raises:
      UserError: a run that learns neither from rollouts nor from pairs.
    """
    score = setting.score
    if score is None or not SCORED & setting.example.extra.keys():
        raise UserError("config.method reference: only for runs with config.objective; leave it out")

    def init(params: Params) -> Memory:
        return {"reference": jax.tree.map(jnp.copy, params)}

    def annotate(memory: Memory, rows: Batch) -> Batch:
        if not SCORED & rows.extra.keys():
            return rows

        def of(piece: Batch) -> jax.Array:
            return score(setting.model.apply(memory["reference"], piece), piece)

        # The rows of a gradient rule need not be a multiple of the microbatches.
        count = math.gcd(rows.task.shape[0], setting.microbatches)
        if count == 1:
            found = of(rows)
        else:
            found = jax.lax.map(of, grad.split(rows, count))  # [count, B / count, L]
            found = found.swapaxes(0, 1).reshape(rows.weights.shape)
        return dataclasses.replace(rows, extra={**rows.extra, "reference": found.astype(jnp.float32)})

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        del batch, key
        return {"reference": jax.tree.map(jnp.copy, params)} if at == "task" else memory

    return Part(init, annotate=annotate, end_task=end_task)
