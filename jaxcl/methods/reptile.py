r"""Reptile: every few steps, keep only a share of the way gone since the anchor, then move the anchor there.

    if step mod every == 0:   theta <- anchor + keep (theta - anchor);   anchor <- theta

Averaged over the order of the tasks inside one interval, k gradient steps of size a move theta by

    -a grad[ sum_i L_i - (a / 2) sum_{i<j} <grad L_i, grad L_j> ] + O(a^3),

so shrinking a longer way favours parameters on which the gradients of different rows agree. At first order the
meta-update only scales the learning rate by `keep`: compare with a plain run at `keep` times the learning rate.
Sources: Nichol et al., 1803.02999; Riemer et al., 1810.11910; for language models Abbes et al., 2508.01908.

Memory: one copy of the parameters. Compute: one pass over the parameters every `every` steps.

Choices and deviations:
- `keep` is the share of the displacement that is KEPT. The published code of 2508.01908 uses 0.01 in this sense,
  its README describes the opposite (1 - keep); neither is a default here.
- It acts on the float32 parameters that the optimiser moves, so the next step cannot undo it.
- The anchor is part of the state: it survives task boundaries and restarts. Steps are counted by the training step.
- Optimiser moments are left alone: they describe gradients, which the meta-update does not change in expectation.
- `end_task` passes through; an interval may span two tasks, which is where alignment between tasks comes from.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import Setting, Wrapper, inner, outer
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


def make(setting: Setting, *, every: int = 10, keep: float = 0.5) -> Wrapper:
    """Returns the Reptile wrapper.

    Args:
      setting: of the run.
      every: training steps between meta-updates.
      keep: share of the displacement since the anchor that is kept: 1 changes nothing, 0 freezes the parameters.

    Raises:
      UserError: an option out of range.
    """
    del setting
    if every < 1:
        raise UserError(f"config.method reptile.every={every}: must be at least 1 step")
    if not 0 <= keep <= 1:
        raise UserError(f"config.method reptile.keep={keep}: must lie in [0, 1]; it is the share that is kept")

    def wrap(method: Method) -> Method:
        def init(params: Params) -> TrainState:
            state = method.init(params)
            anchor = jax.tree.map(jnp.copy, state.params)  # a copy, or donation would give one buffer away twice
            return outer(state, anchor=anchor)

        def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
            new, metrics = method.step(inner(state), batch, key)

            def meta(params: Params, anchor: Params) -> tuple[Params, Params]:
                mixed = tree.lerp(anchor, params, keep)
                return mixed, mixed

            due = new.step % every == 0
            params, anchor = jax.lax.cond(due, meta, lambda p, a: (p, a), new.params, state.memory["anchor"])
            return outer(dataclasses.replace(new, params=params), anchor=anchor), metrics

        def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
            return outer(method.end_task(inner(state), batch, key), anchor=state.memory["anchor"])

        return Method(init, step, end_task)

    return Wrapper(wrap)
