r"""Exponential moving average of the parameters, kept beside them and, if asked, adopted at the end of a task.

    average <- decay average + (1 - decay) theta;   at the end of a task, if adopt:   theta <- average

Memory: one copy of the parameters, in float32. Compute: one pass over the parameters a step.
Source: Polyak & Juditsky 1992; adopted at task ends as in Roth et al., 2408.14471 (merging for continual learning).
Deviation: no bias correction; the average starts at the initial parameters, which in continual learning are trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import Setting, Wrapper, inner, outer
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


def make(setting: Setting, *, decay: float = 0.999, adopt: bool = False) -> Wrapper:
    """Returns the averaging wrapper; the average is `state.memory["average"]`.

    Args:
      setting: of the run.
      decay: weight of the old average per step, in [0, 1].
      adopt: whether training goes on from the average after each task.

    Raises:
      UserError: an option out of range.
    """
    del setting
    if not 0 <= decay <= 1:
        raise UserError(f"config.method ema.decay={decay}: must lie in [0, 1]")

    def wrap(method: Method) -> Method:
        def init(params: Params) -> TrainState:
            state = method.init(params)
            average = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), state.params)
            return outer(state, average=average)

        def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
            new, metrics = method.step(inner(state), batch, key)
            average = tree.lerp(state.memory["average"], new.params, 1.0 - decay)
            return outer(new, average=average), metrics

        def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
            if adopt:
                adopted = jax.tree.map(lambda x, like: x.astype(like.dtype), state.memory["average"], state.params)
                state = dataclasses.replace(state, params=adopted)
            return outer(method.end_task(inner(state), batch, key), average=state.memory["average"])

        return Method(init, step, end_task)

    return Wrapper(wrap)
