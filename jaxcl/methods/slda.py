r"""Streaming linear discriminant analysis: means of the classes and one covariance, a classifier from both at any time.

    Sigma  = 1/N sum over rows of (x - mean_y)(x - mean_y)^T
    Lambda = ((1 - epsilon) Sigma + epsilon I)^-1
    W = Lambda M,   bias_c = -mean_c . Lambda mean_c / 2             M: the means as columns

Source: Hayes & Kanan 2020, equations 1 to 5. Needs `config.adapter='analytic'`, in the paper with expansion='none'.
Memory: 8 d (d + C) bytes. Compute: `jaxcl.ridge`; a step costs 6 d^2 b, weights one factorisation.

Deviations. Sigma comes from the sums that a ridge regression needs, A - sum_c n_c mean_c mean_c^T, so it is that of the
final means and does not depend on the order of the rows; published is a running estimate around the means of the time,
N Sigma <- N Sigma + N / (N + 1) (x - mean)(x - mean)^T, which is the same for one class and otherwise larger. There is
no covariance to begin with, fitted to a first part of the data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.ridge import learner, moments, solve
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


def make(setting: Setting, *, epsilon: float = 1e-4, every: int | None = None) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      epsilon: share of the identity in the covariance.
      every: steps between two sets of weights within a task; None = at its end alone.

    Raises:
      UserError: an option out of range, or a model without such a head.
    """
    made = learner.analytic_of(setting, "slda")
    if not 0 < epsilon < 1:
        raise UserError(f"config.method slda.epsilon={epsilon}: must lie between 0 and 1; it is a share, as in 1e-4")
    learner.check_every("slda", every)

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"moments": moments.empty(made.width, made.classes), "bound": jnp.ones(())}
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory | {"age": jnp.zeros((), jnp.int32)})

    def settled(params: Params, memory: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        m = memory["moments"]
        head, bias, bound = discriminant(m, epsilon)
        return learner.written(params, head, m.counts, bias=bias), {**memory, "bound": bound}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, memory, params = learner.rows_of(setting, state.params, batch), state.memory, state.params
        metrics = learner.told(setting, params, batch, rows, gradient=False)
        memory = {**memory, "age": memory["age"] + 1, "moments": moments.add(memory["moments"], *rows.counted)}
        params, memory = learner.when_due(every, settled, params, memory)
        metrics |= {"bound": memory["bound"], "rows": memory["moments"].total}
        return TrainState(state.step + 1, params, (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch, key
        params, memory = settled(state.params, state.memory)
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def merger(**_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    return learner.by_entry(moments=moments.merge, age=jnp.add)


def discriminant(m: Moments, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns W [d, C], bias [C], and the bound on the relative error of W, float32 [].

    ((1 - epsilon) S / N + epsilon I)^-1 M  is a ridge regression: N / (1 - epsilon) (S + gamma I)^-1 M with
    gamma = epsilon N / (1 - epsilon).
    """
    total = jnp.maximum(m.total, 1.0)
    means = learner.means_of(m.cross, m.counts)
    found = solve.normal(learner.scatter_within(m), means, epsilon / (1 - epsilon) * total)
    head = total / (1 - epsilon) * found.weights
    return head, -0.5 * jnp.sum(means.high * head, axis=0), learner.bound_of(found)
