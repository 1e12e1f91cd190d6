r"""AEF-OCL: ridge regression that balances unequal classes by features it makes up, without keeping any row.

    n_c, mu_c, sigma_c^2 of the features f of the frozen network, every row (Welford)
    A <- A + x x^T,   B <- B + x y^T                              x: expansion of f
    a head is due: N = max_c n_c; for every class N - n_c rows f = mu_c + noise sigma_c eps are expanded and added to a
    copy of (A, B); W = (A' + gamma I)^-1 B' of the copy, which is then dropped

Source: Zhuang et al. 2024 ("Online analytic exemplar-free continual learning with large models for imbalanced
autonomous driving task") with its pseudo-features generator. Needs `config.adapter='analytic'`.
Memory: 8 d (d + C) + 20 C D bytes. Compute: a step costs 6 d^2 b, weights 6 d^2 (C N - rows) if drawn, about as much as
C classes of D (expect, gaussian) or C rows (expect, none), and one factorisation.

Deviations. Variances come from Chan's update in pairs of float32; published are sums of squares, which lose all digits
where a mean is large. Sums are kept rather than the inverse. `how='expect'` draws nothing: it adds (N - n_c) times the
expected x x^T and x of a class, in closed form, the mean of all draws; for the expansions "none" and "gaussian".
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.random import named
from jaxcl.ridge import classes as spreads
from jaxcl.ridge import expected, learner, moments, solve
from jaxcl.ridge.classes import Spread
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Params, TrainState


class Options(NamedTuple):
    """The options of `make`."""

    gamma: float
    noise: float
    how: str
    every: int | None


def make(
    setting: Setting,
    *,
    gamma: float = 0.1,
    noise: float = 1.0,
    how: Literal["draw", "expect"] = "draw",
    every: int | None = None,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      gamma: the regularisation.
      noise: factor of the deviations of what is made up; 0 repeats the means.
      how: whether features are drawn, as published, or their expectation is taken.
      every: steps between two sets of weights within a task; None = at its end alone.

    Raises:
      UserError: an option out of range, a model without such a head, or one whose expectation is not known.
    """
    made = learner.analytic_of(setting, "aef_ocl")
    learner.check_gammas("aef_ocl", gamma, (gamma,))
    learner.check_every("aef_ocl", every)
    if not 0 <= noise < float("inf"):
        raise UserError(f"config.method aef_ocl.noise={noise}: must not be negative, and finite")
    if how == "expect" and (made.expansion not in expected.KNOWN or made.normalise):
        given = "normalise=True" if made.normalise else f"expansion={made.expansion!r}"
        raise UserError(f"config.method aef_ocl.how='expect': not known of {given}; set how='draw'")
    return _method(setting, Options(gamma, noise, how, every))


def _method(setting: Setting, options: Options) -> Method:
    """Returns the method of options that were checked."""
    made = setting.analytic

    def init(params: Params) -> TrainState:
        memory: dict[str, Any] = {"moments": moments.empty(made.width, made.classes)}
        memory |= {"spread": spreads.empty(made.inputs, made.classes), "age": jnp.zeros((), jnp.int32)}
        return TrainState(
            jnp.zeros((), jnp.int32), params, (), memory | {"bound": jnp.ones(()), "made_up": jnp.zeros(())}
        )

    def settled(params: Params, memory: dict[str, Any], key: Key) -> tuple[Params, dict[str, Any]]:
        m, s = memory["moments"], memory["spread"]
        missing = lacking(s.counts)
        add = balanced_by_draws if options.how == "draw" else balanced_by_expectation
        copy = add(setting, params, m, s, missing, options.noise, key)
        found = solve.weights(copy, options.gamma)
        told = {"bound": learner.bound_of(found), "made_up": jnp.sum(missing)}
        scale = learner.sharpness(copy, found.weights, options.gamma)
        return learner.written(params, found.weights, m.counts, scale=scale), {**memory, **told}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        rows, params, memory = learner.rows_of(setting, state.params, batch), state.params, dict(state.memory)
        metrics = learner.told(setting, params, batch, rows)
        memory["moments"] = moments.add(memory["moments"], *rows.counted)
        memory["spread"] = spreads.add(memory["spread"], made.raw(params, batch), rows.labels, rows.weights)
        memory["age"] = memory["age"] + 1
        params, memory = learner.when_due(
            options.every, lambda p, m: settled(p, m, named(key, "pseudo")), params, memory
        )
        metrics |= {name: memory[name] for name in ("bound", "made_up")} | {"rows": memory["moments"].total}
        return TrainState(state.step + 1, params, (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del batch
        params, memory = settled(state.params, state.memory, named(key, "pseudo"))
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def merger(**_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    return learner.by_entry(moments=moments.merge, spread=spreads.merge, age=jnp.add)


def lacking(counts: Pair) -> jax.Array:
    """Returns how many rows each class lacks of the largest, whole numbers float32 [C]; 0 for one that was not seen."""
    number = counts.high
    return jnp.where(number > 0, jnp.round(jnp.max(number) - number), 0.0)


def balanced_by_draws(
    setting: Setting, params: Params, m: Moments, s: Spread, missing: jax.Array, noise: float, key: Key
) -> Moments:
    """Returns the moments with drawn rows added, `missing` [C] of each class; in blocks, as many as it takes."""
    deviation = noise * jnp.sqrt(spreads.variance(s).high)
    ends = jnp.cumsum(missing.astype(jnp.int32))
    size, classes = pair.ROWS, missing.shape[0]

    def body(carry: tuple[jax.Array, Moments]) -> tuple[jax.Array, Moments]:
        block, m = carry
        place = block * size + jnp.arange(size)
        label = jnp.minimum(jnp.searchsorted(ends, place, side="right"), classes - 1).astype(jnp.int32)
        drawn = jax.random.normal(jax.random.fold_in(key, block), (size, deviation.shape[1]))
        rows = setting.analytic.expand(params, s.mean.high[label] + deviation[label] * drawn)
        return block + 1, moments.add(m, rows, label, (place < ends[-1]).astype(jnp.float32))

    return jax.lax.while_loop(lambda carry: carry[0] * size < ends[-1], body, (jnp.int32(0), m))[1]


def balanced_by_expectation(
    setting: Setting, params: Params, m: Moments, s: Spread, missing: jax.Array, noise: float, key: Key
) -> Moments:
    """Returns the moments with `missing` [C] times the expected moments of a row of each class added."""
    del key
    made = setting.analytic
    variance = noise**2 * spreads.variance(s).high
    add = expected.KNOWN[made.expansion]
    return add(m, params.get("expansion", {}), s.mean.high, variance, missing, sigma=made.sigma, bias=made.bias)
