r"""RanPAC: ridge regression on a wide random projection; a held-out part of every task chooses the regularisation.

    G <- G + h h^T,   Q <- Q + h y^T                     every row; h: random features, N(0, 1) under a ReLU
    lambda = least squared error of held-out rows under the weights of the others      a task is over
    W = (G + lambda I)^-1 Q

Source: McDonnell et al. 2023, and its published code for the choice of lambda. Needs `config.adapter`, in the paper
dict(name='analytic', expansion='relu', scale='normal', width=10000); its training of the backbone in the first session
is a run of its own, that `config.model.start` names.
Memory: 8 d (d + C) bytes. Compute: `jaxcl.ridge`; a step costs 6 d^2 b, the end of a task one eigendecomposition.

Deviations. Held out are the last rows of the task, at most a fifth of the shortest one, and the weights they are tried
on are of all other rows so far, not of that task alone: the sums without these rows are exact
(`jaxcl.ridge.moments.remove`). `gamma="gcv"` needs no rows and looks at all tasks. Sums are pairs of float32 and the
solve is refined, where float32 sums and LU were published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.ridge import learner, moments, solve
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState

GAMMAS = tuple(10.0**n for n in range(-8, 9))  # as published
HELD_OUT = 5  # one row in so many of the shortest task, as published, or fewer


def make(
    setting: Setting,
    *,
    gamma: float | Literal["held_out", "loo", "gcv"] = "held_out",
    gammas: Sequence[float] = GAMMAS,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      gamma: lambda, or what chooses it among `gammas` when a task is over: rows of that task, under weights without
        them ("held_out") or each under those of all other rows ("loo"); or generalised cross-validation ("gcv").
      gammas: to choose from.

    Raises:
      UserError: a regularisation that is not positive, or a model without such a head.
    """
    made = learner.analytic_of(setting, "ranpac")
    path = tuple(gammas)
    learner.check_gammas("ranpac", gamma, path)

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"moments": moments.empty(made.width, made.classes), "bound": jnp.ones(())}
        memory["gamma"] = jnp.float32(path[len(path) // 2] if isinstance(gamma, str) else gamma)
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, memory = learner.rows_of(setting, state.params, batch), state.memory
        metrics = learner.told(setting, state.params, batch, rows) | {k: memory[k] for k in ("bound", "gamma")}
        memory = {**memory, "moments": moments.add(memory["moments"], *rows.counted)}
        return TrainState(state.step + 1, state.params, (), memory), metrics | {"rows": memory["moments"].total}

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del key
        m, memory = state.memory["moments"], dict(state.memory)
        if isinstance(gamma, str):
            rows = learner.rows_of(setting, state.params, learner.flat(batch))
            if gamma == "held_out" and setting.steps is not None:  # the end of a short task may be all of it
                rows = learner.last(rows, max(setting.steps * batch.targets.shape[1] // HELD_OUT, 1))
            memory["gamma"] = learner.choose(m, rows, path, gamma)
        number = memory["gamma"] if isinstance(gamma, str) else gamma
        found = solve.weights(m, number)
        memory["bound"] = learner.bound_of(found)
        scale = learner.sharpness(m, found.weights, number)
        return TrainState(state.step, learner.written(state.params, found.weights, m.counts, scale=scale), (), memory)

    return Method(init, step, end_task)


def merger(*, gamma: float | str = "held_out", **_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    learner.check_sums("ranpac", gamma)
    return learner.by_entry(moments=moments.merge)
