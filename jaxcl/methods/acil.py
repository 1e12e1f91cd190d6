r"""ACIL and G-ACIL: the head is the ridge regression of all rows ever seen, whatever their order; nothing is forgotten.

    A <- A + x x^T,   B <- B + x y^T                     every row, y one-hot
    W = (A + gamma I)^-1 B                               a task is over, or every k steps

    recursion    R <- R - R X^T (I + X R X^T)^-1 X R,    W <- W + R X^T (Y - X W)        the same weights, every step

Source: ACIL (Zhuang et al. 2022, equations 8 to 10); G-ACIL (Zhuang et al. 2024, equations 8 to 12) for classes that
come again, which is the same method. Needs `config.adapter='analytic'`.
Memory: 8 d (d + C) bytes, with a recursion 4 d (d + C) more. Compute: `jaxcl.ridge`; a step costs 6 d^2 b. On a mesh no
matrix travels, unless gamma is chosen, which gathers A.

Deviations. The sums are kept, in pairs of float32, and not the inverse alone: half the work, an error that is known and
does not grow, rows that may be merged or taken out. The recursion is by Cholesky, in blocks, and starts anew from
the sums at 1.5 d rows and with every task. `gain=False` is the ablation of G-ACIL without the exposed-class label gain:
rows of classes of earlier tasks enter A and not B. `decompose` measures that gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import tree
from jaxcl.compose import Setting
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge.pair import Pair
from jaxcl.ridge import choice, learner, moments, recursion, solve
from jaxcl.ridge.moments import Moments
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Method, Metrics, Params, TrainState

GROWN = 1.1  # rows over those of the factor, from which on weights are solved for anew and not refreshed
STEPS = 1000  # of a task whose length is not known


class Options(NamedTuple):
    """The options of `make`; `how` is no longer 'auto'."""

    gamma: float | str
    every: int | None
    how: str
    gain: bool
    decompose: bool
    gammas: tuple[float, ...]


def make(
    setting: Setting,
    *,
    gamma: float | Literal["gcv", "loo"] = 0.1,
    every: int | None = None,
    how: Literal["auto", "solve", "refresh", "recursion"] = "auto",
    gain: bool = True,
    decompose: bool = False,
    gammas: Sequence[float] = learner.GAMMAS,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form; its optimiser is not used.
      gamma: the regularisation; "gcv" chooses one of `gammas` whenever weights are solved for, by generalised
        cross-validation over all rows; "loo" at the end of every task, by the errors of rows of that task under the
        weights of all others.
      every: steps between two sets of weights within a task; None = at its end alone.
      how: weights come from a solve, from a few iterations with an older factor, or from the recursion, which has them
        after every step; "auto" is what `jaxcl.ridge.choice` says is cheapest.
      gain: whether labels of classes of earlier tasks count.
      decompose: whether the share of the weights that is due to these labels is measured, which costs a solve a task.
      gammas: to choose from.

    Raises:
      UserError: an option out of range, options that do not go together, or a model without such a head.
    """
    made = learner.analytic_of(setting, "acil")
    learner.check_gammas("acil", gamma, tuple(gammas))
    chosen = plan(setting, gamma, every, how, gain).name
    return _method(setting, made.width, made.classes, Options(gamma, every, chosen, gain, decompose, tuple(gammas)))


def plan(setting: Setting, gamma: float | str, every: int | None, how: str, gain: bool) -> choice.Choice:
    """Returns which way to the weights is taken and why.

    Raises:
      UserError: options that do not go together.
    """
    made = learner.analytic_of(setting, "acil")
    learner.check_every("acil", every)
    for bound, name in ((isinstance(gamma, str), f"gamma={gamma!r}"), (not gain, "gain=False")):
        if bound and how not in ("auto", "solve"):
            raise UserError(
                f"config.method acil.how={how!r}: {name} needs weights that are solved for; set how='solve'"
            )
        if bound:
            return choice.Choice("solve", f"solve: {name} needs it", {})
    if how != "auto":
        return choice.Choice(how, f"{how}: as asked for", {})
    rows = setting.example.task.shape[0]
    return choice.choose(made.width, rows, made.classes, every or setting.steps or STEPS)


def explain(
    setting: Setting,
    *,
    gamma: float | str = 0.1,
    every: int | None = None,
    how: str = "auto",
    gain: bool = True,
    **_: object,
) -> str:
    """Returns how the weights are come by, and why."""
    return plan(setting, gamma, every, how, gain).why


def merger(*, gamma: float | str = 0.1, gain: bool = True, **_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    learner.check_sums("acil", gamma)
    if not gain:
        raise UserError("config.method acil.gain=False: which labels count depends on the order; leave it out to merge")
    return learner.by_entry(moments=moments.merge, age=jnp.add)


def _method(setting: Setting, width: int, classes: int, options: Options) -> Method:
    """Returns the method of options that were checked."""
    compared = options.decompose or not options.gain

    def init(params: Params) -> TrainState:
        m = moments.empty(width, classes)
        first = options.gammas[len(options.gammas) // 2] if isinstance(options.gamma, str) else options.gamma
        memory: dict[str, Memory] = {"moments": m, "age": jnp.zeros((), jnp.int32), "bound": jnp.ones(())}
        memory |= {"gamma": jnp.float32(first), "least": jnp.float32(first)}
        if compared:
            memory["before"] = {"cross": pair.zeros(width, classes), "counts": pair.zeros(classes)}
        if options.decompose:
            memory["gain"] = jnp.zeros(())
        if options.how == "recursion":
            inverse = jnp.eye(width) / jnp.float32(first)
            memory["inverse"] = recursion.Inverse(inverse, jnp.zeros((width, classes)))
        if options.how == "refresh":
            memory |= {"factor": jnp.eye(width) * jnp.sqrt(jnp.float32(first)), "factored": jnp.zeros(())}
        return TrainState(jnp.zeros((), jnp.int32), params, (), memory)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rows, params = learner.rows_of(setting, state.params, batch), state.params
        metrics = learner.told(setting, params, batch, rows)
        memory = {**state.memory, "age": state.memory["age"] + 1, "moments": _added(state.memory, rows, options)}
        if options.how == "recursion":
            memory |= _followed(state.memory, memory["moments"], rows, options)
            m, w = memory["moments"], memory["inverse"].w
            params = learner.written(params, w, m.counts, scale=learner.sharpness(m, w, _gamma(memory, options)))
        else:
            params, memory = learner.when_due(options.every, lambda *s: _settled(s[0], s[1], options), params, memory)
        told = {name: memory[name] for name in ("bound", "gamma", "gain") if name in memory}
        metrics |= told | {"rows": memory["moments"].total}
        return TrainState(state.step + 1, params, (), memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del key
        memory, rows = dict(state.memory), None
        if options.gamma == "loo":
            rows = learner.rows_of(setting, state.params, learner.flat(batch))
            memory["gamma"] = learner.choose(memory["moments"], rows, options.gammas, "loo")
        if options.decompose:
            memory["gain"] = _gain(memory, options)
        params, memory = _settled(state.params, memory, options, last=True)
        if compared:
            memory["before"] = {name: getattr(memory["moments"], name) for name in ("cross", "counts")}
        return TrainState(state.step, params, (), memory)

    return Method(init, step, end_task)


def _gamma(memory: Memory, options: Options) -> solve.Gamma:
    """Returns the regularisation; a number of the config with all its digits."""
    return memory["gamma"] if isinstance(options.gamma, str) else options.gamma


def _added(memory: Memory, rows: learner.Rows, options: Options) -> Moments:
    """Returns the moments with rows added; without the gain labels of exposed classes do not count."""
    before: Moments = memory["moments"]
    m = moments.add(before, *rows.counted)
    if options.gain:
        return m
    exposed = (memory["before"]["counts"].high > 0)[None]
    return Moments(m.gram, Pair(*tree.where(exposed, before.cross, m.cross)), m.counts, m.features)


def _other(memory: Memory, options: Options) -> jax.Array | bool:
    """Returns whether what is kept is of another gamma: a branch may have another one than its run."""
    return not isinstance(options.gamma, str) and memory["gamma"] != jnp.float32(options.gamma)


def _followed(memory: Memory, m: Moments, rows: learner.Rows, options: Options) -> Memory:
    """Returns the inverse with rows added and what is known of its weights; anew once there are enough rows."""
    enough, gamma = recursion.ENOUGH * m.gram.high.shape[0], _gamma(memory, options)
    crossed = (memory["moments"].total < enough) & (m.total >= enough)

    def anew() -> Memory:
        found = solve.weights(m, gamma)
        return {"inverse": recursion.begun(found), **_known(found, gamma)}

    def updated() -> Memory:
        inverse = recursion.update(memory["inverse"], *rows.counted)
        bound = jnp.where(jnp.any(rows.weights > 0), 1.0, memory["bound"])  # nothing is known of these weights
        return {"inverse": inverse, "bound": bound} | {name: memory[name] for name in ("least", "gamma")}

    return jax.lax.cond(crossed | _other(memory, options), anew, updated)


def _known(found: solve.Solution, gamma: solve.Gamma) -> Memory:
    """Returns what is kept of a solve."""
    return {"bound": learner.bound_of(found), "least": found.least, "gamma": jnp.float32(gamma)}


def _settled(params: Params, memory: Memory, options: Options, *, last: bool = False) -> tuple[Params, Memory]:
    """Returns the parameters with weights of all rows so far, and the memory with what is known of them."""
    m, memory = memory["moments"], dict(memory)
    if options.gamma == "gcv":
        memory["gamma"] = learner.choose(m, None, options.gammas, "gcv")
    gamma = _gamma(memory, options)

    def solved(memory: Memory) -> tuple[jax.Array, Memory]:
        found = solve.weights(m, gamma)
        more = {"factor": found.factor, "factored": m.total} if "factor" in memory else {}
        more |= {"inverse": recursion.begun(found)} if "inverse" in memory else {}
        return found.weights, {**memory, **_known(found, gamma), **more}

    def refreshed(memory: Memory) -> tuple[jax.Array, Memory]:
        w = solve.refresh(m, gamma, memory["factor"], params["head"])
        return w, {**memory, "bound": jnp.minimum(solve.bound(m, gamma, w, memory["least"]), 1.0)}  # rows raise least

    if options.how == "refresh" and not last:
        old = (m.total > GROWN * memory["factored"]) | _other(memory, options)
        w, memory = jax.lax.cond(old, solved, refreshed, memory)
    else:
        w, memory = solved(memory)
    return learner.written(params, w, m.counts, scale=learner.sharpness(m, w, gamma)), memory


def _gain(memory: Memory, options: Options) -> jax.Array:
    """Returns the share of the label gain of the task just ended in the weights, by Frobenius norms."""
    after, before = memory["moments"], memory["before"]
    parts = solve.decompose(
        Moments(after.gram, before["cross"], before["counts"], after.features), after, _gamma(memory, options)
    )
    gain, rest = (jnp.sqrt(jnp.sum(part.high * part.high)) for part in (parts.gain, parts.unexposed))
    return gain / jnp.maximum(gain + rest, jnp.finfo(jnp.float32).tiny)
