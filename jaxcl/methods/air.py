r"""AIR: ridge regression in which every class weighs the same, however many rows it has.

    A_c = sum of x x^T,  n_c = number,  m_c = mean of the rows of class c;      K classes were seen
    w_c = K / n_c / sum_j 1 / n_j                                       so that classes weigh the same and the mean is 1
    W = (sum_c w_c A_c + gamma I)^-1 [w_c n_c m_c]  =  (S + gamma sum_j 1 / n_j / K  I)^-1 [m_c],    S = sum_c A_c / n_c

Source: Fang et al. 2024 ("AIR: Analytic imbalance rectifier for continual learning"). Needs config.adapter='analytic'.
Memory: 8 d^2 (slots + 1) + 8 d C bytes. Compute: a step costs 6 d^2 b for each class in it, weights one factorisation.

Deviations. Published are sums A_c of all classes at all times, 8 d^2 C bytes. The weights of all classes have the one
factor K / sum_j 1 / n_j in common, so a class that is over can be added to S for good, and `slots` sums are enough,
as many as a task brings classes: the weights are the same. Where a task brings more, those over share the last slot
and weigh the same together, not each (metric `crowded`). Where a class comes again after its task, its new rows get the
weight of its present number and the old ones keep theirs (metric `again`, the rows of such classes). slots=None is one
for each class, the published state, exact on every stream.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge import learner, moments, solve
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


def make(setting: Setting, *, gamma: float = 0.1, slots: int | None = None, every: int | None = None) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      gamma: the regularisation, relative to rows whose mean weight is 1 over classes.
      slots: classes whose sums are kept apart while their task lasts; None = all classes, always.
      every: steps between two sets of weights within a task; None = at its end alone.

    Raises:
      UserError: an option out of range, or a model without such a head.
    """
    made = learner.analytic_of(setting, "air")
    learner.check_gammas("air", gamma, (gamma,))
    learner.check_every("air", every)
    if slots is not None and slots < 1:
        raise UserError(f"config.method air.slots={slots}: must be at least 1; None has one for each class")
    count = made.classes if slots is None else min(slots, made.classes)
    return _method(setting, gamma, count, every)


def _method(setting: Setting, gamma: float, count: int, every: int | None) -> Method:
    """Returns the method of options that were checked; `count` is the number of slots."""
    d, classes = setting.analytic.width, setting.analytic.classes
    folds = count < classes

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"cross": pair.zeros(d, classes), "counts": pair.zeros(classes)}
        memory |= {"open": _empty(count, d), "used": jnp.zeros((), jnp.int32), "age": jnp.zeros((), jnp.int32)}
        memory["slot"] = jnp.full(classes, -1, jnp.int32) if folds else jnp.arange(classes, dtype=jnp.int32)
        if folds:
            memory |= {"closed": pair.zeros(d, d), "over": jnp.zeros(classes)}
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory | {"bound": jnp.ones(())})

    def settled(params: Params, memory: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        counts = memory["counts"]
        share = pair.inverse(counts)
        known = pair.inverse(pair.of(jnp.sum((counts.high > 0).astype(jnp.float32))))
        scaled = pair.times(pair.times(pair.of(gamma), pair.total(share)), known)
        scaled = Pair(*tree.where(known.high > 0, scaled, pair.of(gamma)))  # of no rows, any will do
        one = pair.of((counts.high > 0).astype(jnp.float32))  # the weight of every class
        m = Moments(_balanced(memory), learner.means_of(memory["cross"], counts), one, jnp.int32(0))
        found = solve.weights(m, scaled)
        scale = learner.sharpness(m, found.weights, scaled)
        return learner.written(params, found.weights, counts, scale=scale), {**memory, "bound": learner.bound_of(found)}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, params, memory = learner.rows_of(setting, state.params, batch), state.params, dict(state.memory)
        metrics = learner.told(setting, params, batch, rows)
        memory["cross"], memory["counts"] = moments.add_classes(memory["cross"], memory["counts"], *rows.counted)
        if folds:
            memory["slot"], memory["used"] = _assigned(memory, rows, count)
            metrics["crowded"] = jnp.maximum(memory["used"] - count, 0).astype(jnp.float32)
            metrics["again"] = jnp.sum(rows.weights * memory["over"][rows.labels])
        memory |= {"open": _added(memory, rows), "age": memory["age"] + 1}
        params, memory = learner.when_due(every, settled, params, memory)
        metrics |= {"bound": memory["bound"], "rows": jnp.sum(memory["counts"].high)}
        return TrainState(state.step + 1, params, (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch, key
        params, memory = settled(state.params, state.memory)
        if folds:
            memory |= {"closed": _balanced(memory), "open": _empty(count, d), "used": jnp.zeros((), jnp.int32)}
            memory |= {
                "slot": jnp.full(classes, -1, jnp.int32),
                "over": (memory["counts"].high > 0).astype(jnp.float32),
            }
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def merger(*, slots: int | None = None, **_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    if slots is not None:
        raise UserError(
            f"config.method air.slots={slots}: sums of classes that are over have lost their numbers of rows; merge "
            "runs that were trained with slots=None"
        )
    return learner.by_entry(cross=pair.add, counts=pair.add, open=moments.merge, age=jnp.add)


def _empty(count: int, d: int) -> Moments:
    """Returns the moments of no rows of one class, stacked."""
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), moments.empty(d, 1))


def _assigned(memory: dict[str, Any], rows: learner.Rows, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the slot of every class, -1 for none, and how many were given; new classes get the next ones."""
    slot = memory["slot"]
    here = jax.ops.segment_sum((rows.weights > 0).astype(jnp.int32), rows.labels, slot.shape[0]) > 0
    new = (here & (slot < 0)).astype(jnp.int32)
    following = memory["used"] + jnp.cumsum(new) - 1
    return jnp.where(new > 0, jnp.minimum(following, count - 1), slot), memory["used"] + jnp.sum(new)


def _added(memory: dict[str, Any], rows: learner.Rows) -> Moments:
    """Returns the sums of the slots with rows added; a slot without a row is left alone."""
    slot = memory["slot"][jnp.clip(rows.labels, 0, memory["slot"].shape[0] - 1)]

    def one(entry: tuple[jax.Array, Moments]) -> Moments:
        number, m = entry
        own = jnp.where(slot == number, rows.weights, 0.0)
        return jax.lax.cond(
            jnp.any(own > 0), lambda m: moments.add(m, rows.x, jnp.zeros_like(rows.labels), own), lambda m: m, m
        )

    numbers = jnp.arange(memory["open"].counts.high.shape[0])
    return jax.lax.map(one, (numbers, memory["open"]))


def _balanced(memory: dict[str, Any]) -> Pair:
    """Returns S, [d, d]: the sum over classes of A_c / n_c."""
    opened, counts, slot = memory["open"], memory["counts"], memory["slot"]
    size = opened.counts.high.shape[0]
    place = jnp.where((slot >= 0) & (counts.high > 0), slot, size)  # beyond the last: dropped

    def by_slot(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, place, size + 1)[:-1]

    number = by_slot(jnp.ones_like(counts.high))
    share = pair.times(pair.inverse(Pair(*map(by_slot, counts))), pair.of(number))

    def one(into: Pair, entry: tuple[Pair, Pair]) -> tuple[Pair, None]:
        gram, weight = entry
        return pair.add(into, pair.times(gram, Pair(*(jnp.broadcast_to(w, gram.high.shape) for w in weight)))), None

    begin = memory["closed"] if "closed" in memory else pair.zeros(*opened.gram.high.shape[1:])
    return jax.lax.scan(one, begin, (opened.gram, share))[0]
