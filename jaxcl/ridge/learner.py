"""What methods with a head in closed form share: rows of frozen features in, sums kept, a head written.

    rows = rows_of(setting, state.params, batch)            features, labels, weights; what cannot count has weight 0
    m = moments.add(m, *rows.counted)                       in `step`
    params = written(params, solve.weights(m, gamma).weights, m.counts)      in `end_task`, or every k steps

The base and the expansion are parameters too, so that a checkpoint is the whole model, but nothing moves them: there is
no optimiser state. A row that is not finite, or whose label the head does not have, is left out and counted, since one
such row would destroy the sums of all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import grad, mesh
from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge import moments, solve
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Metrics, Output, Params

Sums = dict[str, Any]  # the entries of a memory that are sums over rows
Merger = Callable[[Sums, Sums], Sums]  # see `jaxcl.compose.merger`
By = Literal["gcv", "loo", "held_out"]
LONGEST = 1e34  # squared length of a row: sums of squares of longer ones overflow; of NaN it is no comparison true
POOR = 0.01  # bound from which a run says that digits are lost
SHARPEST = 1e3  # scale of logits, at most
GAMMAS = tuple(10.0**n for n in range(-4, 5))  # a path to choose from


class Rows(NamedTuple):
    """Rows of a batch as sums take them."""

    x: jax.Array  # float32 [b, d]
    labels: jax.Array  # int32 [b]
    weights: jax.Array  # float32 [b]; 0 = not counted
    left_out: jax.Array  # float32 [], rows that had weight and could not be counted

    @property
    def counted(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what `moments.add` takes."""
        return self.x, self.labels, self.weights


def analytic_of(setting: Setting, name: str, head: str = "linear") -> Any:
    """Returns the `jaxcl.models.analytic.Analytic` of a setting.

    Args:
      setting: of the run.
      name: of the method.
      head: that it writes.

    Raises:
      UserError: the model has no head in closed form, or another one.
    """
    made = setting.analytic
    if made is None:
        raise UserError(f"config.method={name!r}: solves for the head of a frozen model; set config.adapter='analytic'")
    if made.head != head:
        raise UserError(f"config.adapter.head={made.head!r}: {name!r} writes another one; set it to {head!r}")
    return made


def rows_of(setting: Setting, params: Params, batch: Batch) -> Rows:
    """Returns the rows of a batch; see `Rows`."""
    made = setting.analytic
    raw = made.raw(params, batch)
    x = made.expand(params, raw)
    short = [jnp.sum(f * f, axis=1) < LONGEST for f in (raw, x)]  # a bounded expansion may hide what raw features are
    good = short[0] & short[1] & (batch.targets >= 0) & (batch.targets < made.classes)
    weights = jnp.where(good, batch.weights, 0.0)
    lost = jnp.sum(((batch.weights > 0) & ~good).astype(jnp.float32))
    return Rows(jnp.where(weights[:, None] > 0, x, 0.0), jnp.where(good, batch.targets, 0), weights, lost)


def flat(batch: Batch) -> Batch:
    """Returns the batches that `end_task` gets, [K, B, ...], as one of K B rows."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def last(rows: Rows, count: int) -> Rows:
    """Returns the rows, of which all but the last `count` do not count."""
    number = jnp.arange(rows.weights.shape[0]) - rows.weights.shape[0] + count
    return rows._replace(weights=jnp.where(number >= 0, rows.weights, 0.0))


def told(setting: Setting, params: Params, batch: Batch, rows: Rows, *, gradient: bool = True) -> Metrics:
    """Returns the metrics of every method: those of the head before these rows are taken in.

    `loss` is the training loss of the run, `grad_norm` the norm of the gradient of the rows' mean squared error in the
    head, which no step follows; 0 without `gradient`. `left_out`: see `Rows`.
    """
    kept = dataclasses.replace(batch, targets=rows.labels, weights=rows.weights)
    total, weight = setting.loss(Output(setting.analytic.read(params, rows.x)), kept)
    norm = jnp.zeros(())
    if gradient:
        away = pair.contract(rows.x, params["head"], 1, 0) - jax.nn.one_hot(rows.labels, params["head"].shape[1])
        pull = pair.contract(rows.x, rows.weights[:, None] * away, 0, 0)
        norm = grad.mean(jnp.sqrt(jnp.sum(pull * pull)), jnp.sum(rows.weights))
    return {"loss": grad.mean(total, weight), "grad_norm": norm, "weight": weight, "left_out": rows.left_out}


def written(
    params: Params,
    head: jax.Array,
    counts: Pair,
    *,
    bias: jax.Array | None = None,
    scale: jax.Array | float = 1.0,
    **more: jax.Array,
) -> Params:
    """Returns the parameters with another head.

    Args:
      params: of `jaxcl.models.analytic`.
      head: float32 [d, C].
      counts: of the rows of every class, [C]; those above 0 are seen.
      bias: float32 [C]; None = 0.
      scale: of the logits, float32 []; it changes the loss and not the class.
      **more: other parameters of the head, such as `precision`.
    """
    seen = (counts.high > 0).astype(jnp.float32)
    bias = jnp.zeros_like(seen) if bias is None else bias
    return {**params, "head": head, "bias": bias, "scale": jnp.float32(scale), "seen": seen, **more}


def solved(memory: Any) -> dict[str, dict[str, float]]:
    """Returns what a method's memory knows of the head that it has solved for, on the host: for a record.

    `solve` has its `bound` and, if it has one, `gamma`. Empty for methods that do not solve.
    """
    while isinstance(memory, dict) and "inner" in memory:
        memory = memory["inner"]
    if not isinstance(memory, dict) or "bound" not in memory:
        return {}
    found = mesh.fetch({name: memory[name] for name in ("bound", "gamma") if name in memory})
    return {"solve": {name: float(value) for name, value in found.items()}}


def inexact(record: Mapping[str, Any]) -> str | None:
    """Returns what to say of a record with what `solved` returns; None unless digits are lost."""
    bound = record.get("solve", {}).get("bound", 0.0)
    if bound < POOR:
        return None
    off = f"the weights of the head can be off by {100 * bound:.2g} %"
    off = off if bound < 1 else "nothing is known of the weights of the head"
    return f"{off} (bound {bound:.2g}): look for features that are far larger than the rest, or regularise more"


def bound_of(found: solve.Solution) -> jax.Array:
    """Returns a bound on the relative error of float32 weights from a solve; 1 = nothing is known of them."""
    return jnp.minimum(found.bound + 2.0**-24, 1.0)


def sharpness(m: Moments, w: jax.Array, gamma: solve.Gamma) -> jax.Array:
    """Returns the scale at which ridge outputs are logits: 1 / variance of their errors, float32 [].

    If the errors of one-hot targets are Gaussian with variance v in each of K seen classes, then
    log p(class c | x) = -|e_c - x W|^2 / 2 v + ... = (x W)_c / v + what no class differs in. v = RSS / (N K), of the
    rows seen, with RSS = N - sum W B - gamma |W|^2.
    """
    seen = jnp.maximum(jnp.sum(m.counts.high > 0), 1)
    errors = m.total - jnp.sum(w * m.cross.high) - pair.of(gamma).high * jnp.sum(w * w)
    return jnp.where(m.total > 0, jnp.minimum(m.total * seen / jnp.maximum(errors, 1e-30), SHARPEST), 1.0)


def when_due(
    every: int | None, settle: Callable[[Params, Any], tuple[Params, Any]], params: Params, memory: Any
) -> tuple[Params, Any]:
    """Returns what `settle` makes of parameters and memory after every so many steps, otherwise both as they are.

    Args:
      every: steps; None = never within a task.
      settle: (params, memory) -> the same with new weights.
      params: of the model.
      memory: with `age`, int32 [], the number of steps so far.
    """
    if not every:
        return params, memory
    return jax.lax.cond(memory["age"] % every == 0, settle, lambda *both: both, params, memory)


def by_entry(**adders: Callable[[Any, Any], Any]) -> Merger:
    """Returns a merger of memories from those of their entries, by name."""
    return lambda a, b: {name: add(a[name], b[name]) for name, add in adders.items()}


def check_sums(name: str, gamma: float | str) -> None:
    """Raises UserError if a regularisation is chosen by rows, of which a merge of runs has none."""
    if isinstance(gamma, str) and gamma != "gcv":
        raise UserError(
            f"config.method {name}.gamma={gamma!r}: is chosen by rows, of which a merge has none; give a number, or "
            "'gcv', which looks at the sums"
        )


def check_every(name: str, every: int | None) -> None:
    """Raises UserError for a number of steps below 1."""
    if every is not None and every < 1:
        raise UserError(f"config.method {name}.every={every}: must be at least 1; None has weights after tasks alone")


def means_of(cross: Pair, counts: Pair) -> Pair:
    """Returns the means of the classes, [d, C]; zeros for one without rows."""
    share = pair.inverse(counts)
    return pair.times(cross, Pair(*(jnp.broadcast_to(part[None], cross.high.shape) for part in share)))


def scatter_within(m: Moments) -> Pair:
    """Returns the sum over rows of w (x - mean_y)(x - mean_y)^T, [d, d], as A - sum_c B_c mean_c^T."""
    means = means_of(m.cross, m.counts)
    between = pair.dot(m.cross, Pair(means.high.T, means.low.T))
    return pair.add(m.gram, pair.negative(between))


def choose(m: Moments, rows: Rows | None, gammas: tuple[float, ...], by: By) -> jax.Array:
    """Returns one gamma of a path, float32 [].

    gcv        generalised cross-validation over all rows so far, which needs the sums alone
    loo        squared error of the given rows, each under the weights of all other rows
    held_out   squared error of the given rows under the weights without them

    Args:
      m: moments that the given rows are part of.
      rows: of the task just ended, for the last two.
      gammas: [G].
      by: what is least.
    """
    path = jnp.asarray(gammas, jnp.float32)
    if by == "gcv":
        score = solve.path(m, path).gcv.high
    elif by == "loo":
        assert rows is not None
        score = jnp.sum(solve.leave_one_out(m, *rows.counted, path) * rows.weights[None], axis=1)
    else:
        assert rows is not None
        score = _held_out(moments.remove(m, *rows.counted), rows, path)
    return path[jnp.argmin(jnp.where(jnp.isfinite(score), score, jnp.inf))]


def _held_out(m: Moments, rows: Rows, path: jax.Array) -> jax.Array:
    """Returns the squared error of rows that are no part of the moments, float32 [G]."""
    targets = jax.nn.one_hot(rows.labels, m.counts.high.shape[0])

    def one(w: jax.Array) -> jax.Array:
        away = pair.contract(rows.x, w, 1, 0) - targets
        return jnp.sum(rows.weights * jnp.sum(away * away, axis=1))

    return jax.lax.map(one, solve.path(m, path).weights.high)


def check_gammas(name: str, gamma: float | str, gammas: tuple[float, ...]) -> None:
    """Raises UserError unless gamma, or every number of the path that it is chosen from, is positive."""
    if not gammas:
        raise UserError(f"config.method {name}.gammas: empty; name at least one number to choose from")
    field, values = ("gamma", (gamma,)) if not isinstance(gamma, str) else ("gammas", gammas)
    for value in values:
        with np.errstate(over="ignore", under="ignore"):
            single = np.float32(value)
        if not 0 < single < np.inf:
            raise UserError(f"config.method {name}.{field}={value}: must be above 0, and finite; try 0.1 or 100")
