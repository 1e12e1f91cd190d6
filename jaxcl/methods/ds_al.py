r"""DS-AL: a second ridge regression learns what the first one leaves of the labels of new classes.

    x = relu(f P),  z = tanh(f P)                                    one random projection P of the frozen features
    U = (X^T X + gamma I)^-1 X^T Y                                   main stream: all rows, as in ACIL
    R_k = Y_k - X_k U, columns of classes of earlier tasks zeroed    residue of the rows of task k, when it is over
    V = (Z^T Z + gamma_comp I)^-1 sum_k Z_k^T R_k                    compensation stream
    logits = x U + ratio z V

Source: Zhuang et al. 2024 ("DS-AL: a dual-stream analytic learning for exemplar-free class-incremental learning",
equations 13 to 19 and algorithm 2). Needs config.adapter = dict(name='analytic', expansion='dual'), which has x and z.
Memory: 8 (2 d)^2 + 8 d^2 bytes. Compute: a step costs 6 (2 d)^2 b, weights two factorisations.

Deviations. The residue of a whole task is what the paper takes; its published code takes that of every batch under the
weights of the time, so that V depends on the size of batches (by 45 % between 64 rows and the task). Here it does not,
and no row is kept: Z_k^T R_k = Z_k^T Y_k - Z_k^T X_k U, and both sums over the rows of the task are among the moments
of (x, z). Sums are kept in pairs and not their inverses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge import learner, moments, solve
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


class Options(NamedTuple):
    """The options of `make`."""

    gamma: float
    gamma_comp: float
    ratio: float
    every: int | None


def make(
    setting: Setting,
    *,
    gamma: float = 0.1,
    gamma_comp: float = 0.1,
    ratio: float = 0.6,
    every: int | None = None,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form over a dual expansion.
      gamma: the regularisation of the main stream.
      gamma_comp: that of the compensation stream.
      ratio: of the compensation in the logits, 0 for none; published are 0.6 for CIFAR-100 and 1.5 for ImageNet.
      every: steps between two sets of weights within a task; None = at its end alone.

    Raises:
      UserError: an option out of range, or another model.
    """
    made = learner.analytic_of(setting, "ds_al")
    if made.expansion != "dual":
        raise UserError(f"config.adapter.expansion={made.expansion!r}: 'ds_al' has two streams; set it to 'dual'")
    if made.bias or made.normalise:
        given = "bias=True" if made.bias else "normalise=True"
        raise UserError(f"config.adapter.{given}: 'ds_al' reads both streams as they are; leave it out")
    for name, value in (("gamma", gamma), ("gamma_comp", gamma_comp)):
        if not 0 < value < float("inf"):
            raise UserError(f"config.method ds_al.{name}={value}: must be above 0, and finite; try 0.1 or 100")
    if not 0 <= ratio < float("inf"):
        raise UserError(f"config.method ds_al.ratio={ratio}: must not be negative, and finite; try 0.6")
    learner.check_every("ds_al", every)
    return _method(setting, Options(gamma, gamma_comp, ratio, every))


def _method(setting: Setting, options: Options) -> Method:
    """Returns the method of options that were checked."""
    d, classes = setting.analytic.width // 2, setting.analytic.classes

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"moments": moments.empty(2 * d, classes), "age": jnp.zeros((), jnp.int32)}
        memory |= {
            "before": {"mixed": pair.zeros(d, d), "cross": pair.zeros(d, classes), "counts": pair.zeros(classes)}
        }
        memory |= {"residue": pair.zeros(d, classes), "bound": jnp.ones(())}
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory)

    def settled(params: Params, memory: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        params, residue, bound = _solved(params, memory, options)
        del residue  # of a task that goes on
        return params, {**memory, "bound": bound}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, params, memory = learner.rows_of(setting, state.params, batch), state.params, dict(state.memory)
        metrics = learner.told(setting, params, batch, rows)
        memory |= {"moments": moments.add(memory["moments"], *rows.counted), "age": memory["age"] + 1}
        params, memory = learner.when_due(options.every, settled, params, memory)
        metrics |= {"bound": memory["bound"], "rows": memory["moments"].total}
        return TrainState(state.step + 1, params, (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch, key
        m, memory = state.memory["moments"], dict(state.memory)
        params, memory["residue"], memory["bound"] = _solved(state.params, memory, options)
        x, z = slice(0, d), slice(d, 2 * d)
        memory["before"] = {"mixed": _block(m.gram, z, x), "cross": _block(m.cross, z), "counts": m.counts}
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def _block(x: Pair, row: slice, column: slice = slice(None)) -> Pair:
    """Returns rows and columns of a matrix."""
    return Pair(*(part[row, column] for part in x))


def _solved(params: Params, memory: dict[str, Any], options: Options) -> tuple[Params, Pair, jax.Array]:
    """Returns the parameters with both heads, sum_k Z_k^T R_k with the present task, and a bound on both errors."""
    m, before = memory["moments"], memory["before"]
    d = before["mixed"].high.shape[0]
    x, z = slice(0, d), slice(d, 2 * d)
    own = Moments(_block(m.gram, x, x), _block(m.cross, x), m.counts, m.features)
    main = solve.weights(own, options.gamma)
    mixed = pair.add(_block(m.gram, z, x), pair.negative(before["mixed"]))  # Z_k^T X_k
    cross = pair.add(_block(m.cross, z), pair.negative(before["cross"]))  # Z_k^T Y_k
    left = pair.add(cross, pair.negative(pair.dot(mixed, Pair(main.weights, main.low))))
    new = (before["counts"].high == 0)[None]
    residue = pair.add(memory["residue"], Pair(*(jnp.where(new, part, 0.0) for part in left)))
    side = solve.normal(_block(m.gram, z, z), residue, options.gamma_comp)
    head = jnp.concatenate([main.weights, options.ratio * side.weights])
    bound = jnp.maximum(learner.bound_of(main), learner.bound_of(side))
    scale = learner.sharpness(own, main.weights, options.gamma)  # of the main stream, whose errors are the larger
    return learner.written(params, head, m.counts, scale=scale), residue, bound
