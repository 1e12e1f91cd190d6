r"""FeCAM: a row belongs to the class whose mean is nearest by the Mahalanobis distance of that class's own covariance.

    t(x) = sign(x) |x|^power                                   Tukey's transformation, power 1/2; features that are >= 0
    C_c  = covariance of t(x) in class c                       every row, by merged means and scatters
    C_c <- C_c + gamma1 v1 I + gamma2 v2 (1 - I)               v1, v2: means of the diagonal, and beside it
    C_c <- C_c / (s s^T),  s = sqrt(diag C_c)                  a correlation, so that classes compare
    argmin_c  u^T C_c^-1 u,   u = t(x) / |t(x)| - t(mean_c) / |t(mean_c)|

Source: Goswami et al. 2023, and its published code for what is normalised when. Needs
`config.adapter=dict(name='analytic', expansion='none', head='mahalanobis', power=0.5)`; with `shared=True` in it one
covariance, that within the classes, serves all of them.
Memory: 4 C d^2 bytes and as much for the head; 4 d^2 if shared. Compute: 2 C d^2 b a step, an eigendecomposition for
every class at the end of a task.

Deviations. The first task has covariances too, where the published code measures Euclidean distances in it. A shared
covariance is that around the means of the classes, where published is one around the mean of all rows of a task,
averaged over tasks by their number of classes. A class of one row has the identity. Features may have either sign.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.models import analytic
from jaxcl.ridge import learner, moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState

Around = tuple[jax.Array, jax.Array, jax.Array]  # means [C, d], scatters [C or 1, d, d], rows [C]


def make(setting: Setting, *, gamma1: float = 1.0, gamma2: float = 1.0, correlation: bool = True) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model whose head is one of distances; its optimiser is not used.
      gamma1: shrinkage towards the identity.
      gamma2: shrinkage towards equal covariances.
      correlation: whether covariances become correlations.

    Raises:
      UserError: an option out of range, or a model without such a head.
    """
    made = learner.analytic_of(setting, "fecam", head="mahalanobis")
    for name, value in (("gamma1", gamma1), ("gamma2", gamma2)):
        if not 0 <= value < math.inf:
            raise UserError(f"config.method fecam.{name}={value}: must not be negative, and finite")
    width, classes = made.width, made.classes

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"cross": pair.zeros(width, classes), "counts": pair.zeros(classes)}
        memory |= {"means": jnp.zeros((classes, width)), "scatter": jnp.zeros_like(params["precision"])}
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, memory = learner.rows_of(setting, state.params, batch), state.memory
        metrics = learner.told(setting, state.params, batch, rows, gradient=False)
        before = memory["counts"].high
        cross, counts = moments.add_classes(memory["cross"], memory["counts"], *rows.counted)
        turned = rows._replace(x=analytic.powered(rows.x, made.power))
        means, scatter = merged(memory["means"], memory["scatter"], before, turned)
        memory = {"cross": cross, "counts": counts, "means": means, "scatter": scatter}
        return TrainState(state.step + 1, state.params, (), memory), metrics | {"rows": jnp.sum(counts.high)}

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch, key
        memory = state.memory
        n = memory["counts"].high
        spread = jnp.sum(jnp.maximum(n - 1, 0.0))[None] if made.shared else n - 1
        precision = precisions(memory["scatter"], spread, gamma1, gamma2, correlation)
        means = analytic.powered(learner.means_of(memory["cross"], memory["counts"]).high, made.power)
        params = learner.written(state.params, analytic.unit(means.T).T, memory["counts"], precision=precision)
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def merged(means: jax.Array, scatter: jax.Array, counts: jax.Array, rows: learner.Rows) -> tuple[jax.Array, jax.Array]:
    """Returns means [C, d] and scatters [C or 1, d, d] of the classes with rows added (Chan et al. 1979).

    Args:
      means: float32 [C, d].
      scatter: float32, sums of (x - mean)(x - mean)^T of each class, or of all.
      counts: float32 [C], rows before.
      rows: their features are those that the scatters are of.
    """
    own = rows.weights[:, None] * jax.nn.one_hot(rows.labels, counts.shape[0])  # [B, C]
    new = jnp.sum(own, axis=0)
    fresh = pair.contract(own, rows.x, 0, 0) / jnp.where(new > 0, new, 1.0)[:, None]
    away = rows.x - pair.contract(jax.nn.one_hot(rows.labels, counts.shape[0]), fresh, 1, 0)
    if scatter.shape[0] == counts.shape[0]:
        inside = _sums("bc,bd,be->cde", own, away, away)
    else:
        inside = _sums("b,bd,be->de", rows.weights, away, away)[None]
    return joined((means, scatter, counts), (fresh, inside, new))


def _sums(which: str, *x: jax.Array) -> jax.Array:
    return jnp.einsum(which, *x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def joined(a: Around, b: Around) -> tuple[jax.Array, jax.Array]:
    """Returns means and scatters of the rows of both."""
    gap, total = b[0] - a[0], a[2] + b[2]
    share = b[2] / jnp.where(total > 0, total, 1.0)
    if a[1].shape[0] == total.shape[0]:
        between = (a[2] * share)[:, None, None] * gap[:, :, None] * gap[:, None, :]
    else:
        between = _sums("c,cd,ce->de", a[2] * share, gap, gap)[None]
    return a[0] + share[:, None] * gap, a[1] + b[1] + between


def merger(**_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""

    def add(a: learner.Sums, b: learner.Sums) -> learner.Sums:
        means, scatter = joined(*((one["means"], one["scatter"], one["counts"].high) for one in (a, b)))
        sums = {name: pair.add(a[name], b[name]) for name in ("cross", "counts")}
        return {**sums, "means": means, "scatter": scatter}

    return add


def precisions(scatter: jax.Array, freedom: jax.Array, gamma1: float, gamma2: float, correlation: bool) -> jax.Array:
    """Returns the inverses of shrunk covariances, float32 [K, d, d]; the identity where there is no covariance.

    Args:
      scatter: float32 [K, d, d].
      freedom: float32 [K], rows less means.
      gamma1, gamma2, correlation: see `make`.
    """
    size = scatter.shape[1]
    eye = jnp.eye(size)

    def one(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        total, n = both
        c = total / jnp.maximum(n, 1.0)
        beside = jnp.where(eye == 0, c, 0.0)
        used = jnp.maximum(jnp.sum(beside != 0.0), 1)  # a feature that never varies takes no part in the mean
        c = c + gamma1 * jnp.mean(jnp.diagonal(c)) * eye + gamma2 * jnp.sum(beside) / used * (1 - eye)
        deviation = jnp.sqrt(jnp.diagonal(c))
        if correlation:
            scale = jnp.where(deviation > 0, deviation, 1.0)
            c = c / (scale[:, None] * scale[None])
        known = (n > 0) & jnp.any(deviation > 0)
        return jnp.where(known, jnp.linalg.pinv(jnp.where(known, c, eye), hermitian=True), eye)

    return jax.lax.map(one, (scatter, freedom))
