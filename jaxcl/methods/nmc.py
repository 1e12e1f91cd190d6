r"""Nearest mean classifier: a row belongs to the class whose mean feature is nearest; nothing else is learned.

    s_c <- s_c + x,  n_c <- n_c + 1,  q <- q + |x|^2;   mean_c = s_c / n_c          every row
    argmin_c |x - mean_c|^2  =  argmax_c  (x . mean_c - |mean_c|^2 / 2) / v

v is the mean variance of a feature within the classes, which makes logits of the distances and changes no class.

Source: Janson et al. 2022 ("A simple baseline that questions the use of pretrained models in continual learning"), with
`config.adapter=dict(name='analytic', expansion='none', normalise=True)`: features of length 1, means that are not
normalised again. `cosine` compares directions instead (SimpleCIL, Zhou et al. 2023).
Memory: 8 d C bytes. Compute: b d operations for the sums; weights after every step.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.models import analytic
from jaxcl.ridge import learner, moments
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


def make(setting: Setting, *, cosine: bool = False) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      cosine: whether the angle to a mean counts, not the distance.

    Raises:
      UserError: a model without such a head.
    """
    made = learner.analytic_of(setting, "nmc")

    def init(params: Params) -> TrainState:
        memory = {"cross": pair.zeros(made.width, made.classes), "counts": pair.zeros(made.classes)}
        memory["squares"] = pair.zeros()
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory)

    def settled(params: Params, memory: dict[str, Any]) -> Params:
        counts, squares = memory["counts"], memory["squares"]
        means = learner.means_of(memory["cross"], counts).high
        lengths = jnp.sum(means * means, axis=0)  # [C]
        total, inside = jnp.sum(counts.high), squares.high - jnp.sum(counts.high * lengths)
        scale = jnp.minimum(total * made.width / jnp.maximum(inside, 1e-30), learner.SHARPEST)
        if cosine:
            return learner.written(params, analytic.unit(means.T).T, counts, scale=scale)
        return learner.written(params, means, counts, bias=-0.5 * lengths, scale=scale)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, memory = learner.rows_of(setting, state.params, batch), state.memory
        metrics = learner.told(setting, state.params, batch, rows, gradient=False)
        cross, counts = moments.add_classes(memory["cross"], memory["counts"], *rows.counted)
        squares = pair.plus(memory["squares"], jnp.sum(rows.weights[:, None] * rows.x * rows.x))
        memory = {"cross": cross, "counts": counts, "squares": squares}
        metrics |= {"rows": jnp.sum(counts.high)}
        return TrainState(state.step + 1, settled(state.params, memory), (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch, key
        return TrainState(state.step, settled(state.params, state.memory), (), state.memory)  # of a merge they are new

    return Method(init, step, end_task)


def merger(**_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    return learner.by_entry(cross=pair.add, counts=pair.add, squares=pair.add)
