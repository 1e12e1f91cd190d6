r"""HyperInterval: train the boxes of weights that a hypernetwork makes, so that all networks in them solve the task.

    z, l, u  logits of the point network, lower and upper logits over box_t with radii gamma_i <= gamma
    worst_y = l_y,  worst_j = u_j (j != y)
    loss     = kappa_i CE(z, y) + (1 - kappa_i) CE(worst, y)  +  beta R  -  spread mean_n log min(radius_n, cap)
    R        = mean over earlier tasks k of |H_k - H_k*|^2,  H* frozen when the task before was over

    R, task networks        sum over weights of (centre - centre*)^2
    R, universal network    the same of lower, middle and upper ends / 3 = (d centre)^2 + 2/3 (d radius)^2

Source: Krukowski et al., 2405.15444, and its published code for the schedules; needs `config.adapter='hypernetwork'`.
Memory: with beta > 0 targets of 2 T N floats. Compute: one pass through V for the current task, its point and all
earlier ones together, so that a step costs the same in the first task and in the last.

What a task was certified for is kept by the ledger of `jaxcl.models.boxed`, not by R: boxes and networks are clipped
into it while training. `project=False` leaves the ledger alone, as published; nothing is guaranteed then.

Deviations. R is averaged over tasks once; `average="twice"` divides it by their number again, as the published code
does. gamma_i rises along a half cosine to gamma at `ramp` of the task and kappa_i falls with it;
`schedule="published"` is a ramp to I / 2 with a jump of kappa to its end; with one universal network the centres of
embeddings, which have gamma as a factor, take part in it, where ours stay. Moments start anew with every task
(`fresh`), as published. `spread` rewards wide boxes, which leave room for later tasks. `point="middle"` trains the
middle of the box, which is no output of the hypernetwork. `select` chooses the generator of a task by the certified
accuracy of rows held back. With `lookahead` R is that of the parameters after the step that the loss of the task alone
would take (von Oswald et al., 1906.00695, eq. 2). At most `sample` earlier tasks enter R in each
step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcl import grad, selection, tree
from jaxcl.compose import Setting
from jaxcl.models import boxed as boxes
from jaxcl.models.boxed import LEDGER, Boxed
from jaxcl.models.interval import Interval
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Method, Metrics, Output, Params, TrainState

SCHEDULES, AVERAGES, POINTS = ("smooth", "published"), ("once", "twice"), ("centre", "middle")
STEPS = 1000  # of a task whose length is not known
ROWS = 256  # that `select` looks at
TINY = 1e-6  # added to radii before the logarithm


class Options(NamedTuple):
    """The options of `make`."""

    steps: int
    beta: float
    kappa: float
    ramp: float
    schedule: str
    average: str
    point: str
    sample: int | None
    lookahead: bool
    project: bool
    spread: float
    cap: float
    ease: float
    fresh: bool
    select: int
    aside: float


def make(
    setting: Setting,
    *,
    steps: int | None = None,
    beta: float = 0.01,
    kappa: float = 0.5,
    ramp: float = 0.5,
    schedule: Literal["smooth", "published"] = "smooth",
    average: Literal["once", "twice"] = "once",
    point: Literal["centre", "middle"] = "centre",
    sample: int | None = None,
    lookahead: bool = False,
    project: bool = True,
    spread: float = 0.0,
    cap: float = 1.0,
    ease: float = 1.0,
    fresh: bool = True,
    select: int = 0,
    aside: float = 0.1,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model of boxes.
      steps: I, steps of a task that the schedules are made for, afterwards they stay at their ends; None = those of the
        shortest stage.
      beta: strength of R.
      kappa: share of the point network in the loss once gamma_i = gamma.
      ramp: share of the steps in which gamma_i rises.
      schedule: of gamma_i and kappa_i.
      average: how often R is divided by the number of earlier tasks.
      point: the network that is trained beside the box; only "centre" is what is deployed.
      sample: at most that many earlier tasks in R, drawn in every step without replacement; all of them while there are
        no more, so that T - 1 or above is the same as None, all.
      lookahead: whether R looks ahead.
      project: whether boxes are clipped into the ledger, and the ledger is kept.
      spread: weight of the mean logarithm of the radii in the first task.
      cap: radius above which `spread` rewards nothing: weights that count for nothing could grow for ever.
      ease: factor on `spread` from one task to the next.
      fresh: whether the optimiser starts anew with every task; its learning rate goes on.
      select: steps from one look at the certified accuracy of rows held back to the next, at full gamma alone; a task
        ends with the generator that did best. 0 = with the last one, and no row is held back.
      aside: share of the rows of a task that `select` holds back.

    Raises:
      UserError: an option out of range, or a model without boxes.
    """
    length = steps_of(setting, steps, "hyperinterval")
    rest = (beta, kappa, ramp, schedule, average, point, sample, lookahead, project, spread, cap, ease, fresh)
    rest = (*rest, select, aside)
    options = Options(length, *rest)
    return _method(setting, _checked(setting, options), options)


def _method(setting: Setting, made: Boxed, options: Options) -> Method:
    """Returns the method of options that were checked."""

    def init(params: Params) -> TrainState:
        trained = params["generator"]
        memory: dict[str, Any] = {"age": jnp.zeros((), jnp.int32)}
        if options.beta:
            memory["targets"] = {part: jnp.zeros((made.tasks, made.size)) for part in ("centre", "radius")}
        if options.select:
            memory["selection"] = selection.start(setting.example, trained, ROWS)
        return TrainState(jnp.zeros((), jnp.int32), params, setting.tx.init(trained), memory)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        task, age = batch.task[0], state.memory["age"]
        params = started(made, state.params, task, age == 0)
        gamma, share = rates(options, age)
        memory = {**state.memory, "age": age + 1}
        if options.select:
            kept, batch = selection.parted(memory["selection"], batch, options.aside, named(key, "aside"))
        losses = _losses(setting, made, options, params, state.memory, gamma, share, task, key)
        if options.lookahead and options.beta:
            old = params["generator"]
            values, grads = _ahead(setting, losses, old, state.opt_state, batch, lambda g: made.keep(g, old, task))
        else:
            values, grads = grad.value_and_grad(losses, params["generator"], batch)
        updates, opt_state = setting.tx.update(grads, state.opt_state, params["generator"])
        moved = made.keep(optax.apply_updates(params["generator"], updates), params["generator"], task)
        metrics = {name: grad.mean(total, weight) for name, (total, weight) in values.items()}
        metrics["loss"] = metrics.pop("task")
        # Behind a barrier, or XLA stores the squares of the gradient, which the second moment needs as well.
        norm = tree.norm(jax.lax.optimization_barrier(grads))
        metrics |= {"grad_norm": norm, "weight": values["task"][1], "scale": gamma, "kappa": share}
        if options.select:
            due = (gamma >= 1) & ((age + 1) % options.select == 0)
            score = functools.partial(_certified, made, params, task)
            memory["selection"] = selection.looked(kept, moved, due, score)
        return TrainState(state.step + 1, {**params, "generator": moved}, opt_state, memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        task, params = batch.task[0, 0], state.params
        memory = {**state.memory, "age": jnp.zeros((), jnp.int32)}
        if options.select:
            best, memory["selection"] = selection.chosen(memory["selection"], params["generator"])
            params = {**params, "generator": best}
        params = boxes.close(made, params, task) if options.project else boxes.over(params, task)
        if options.beta:
            every = jnp.arange(made.tasks)
            centre, radius = made.boxes(params["generator"], every, jnp.ones(made.tasks))
            memory["targets"] = {"centre": centre, "radius": radius}
        opt_state = _anew(setting.tx.init(params["generator"]), state.opt_state) if options.fresh else state.opt_state
        return TrainState(state.step, params, opt_state, memory)

    return Method(init, step, end_task)


def steps_of(setting: Setting, steps: int | None, name: str) -> int:
    """Returns the steps of a task that schedules are made for: those asked for, or those of the shortest stage.

    Raises:
      UserError: there is no such number, or a stage is shorter, so that its schedules would not come to their ends.
    """
    chosen = (setting.steps or STEPS) if steps is None else steps
    if chosen < 1:
        raise UserError(f"config.method {name}.steps={chosen}: must be at least 1")
    if setting.steps is not None and chosen > setting.steps:
        raise UserError(
            f"config.method {name}.steps={chosen}: a stage of config.stream has {setting.steps}, and would end before "
            "the boxes are at their full size; leave it out"
        )
    return chosen


def rates(options: Options, age: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns gamma_i / gamma and kappa_i, float32 []."""
    i = age.astype(jnp.float32)
    if options.schedule == "published":
        half = options.steps // 2
        rising = i < half
        gamma = jnp.where(rising, i / max(half - 1, 1), 1.0)
        return gamma, jnp.where(rising, jnp.maximum(1 - 5e-5 * i, options.kappa), options.kappa)
    part = jnp.minimum(i / max(options.steps * options.ramp, 1), 1.0)
    gamma = (1 - jnp.cos(jnp.pi * part)) / 2
    return gamma, 1 - (1 - options.kappa) * gamma


def started(made: Boxed, params: Params, task: jax.Array, first: jax.Array) -> Params:
    """Returns the parameters with the current task noted, and its embedding begun in its first step."""
    ledger = params[LEDGER]
    before, over = ledger["current"].astype(jnp.int32), ledger["done"][task] > 0
    known = jnp.any(ledger["done"] > 0)
    begun = made.begin(params["generator"], task, before)
    generator = tree.where(first & known & ~over & (task != before), begun, params["generator"])
    return {**params, "generator": generator, LEDGER: {**ledger, "current": task.astype(jnp.float32)}}


def width(found: Interval, cap: float) -> jax.Array:
    """Returns the mean logarithm of the radii of a box, none counted as more than `cap`, float32 []."""
    return jnp.mean(jnp.log(jnp.minimum((found.upper - found.lower) / 2, cap) + TINY))


def drift(
    centre: jax.Array, radius: jax.Array, targets: Memory, which: jax.Array, counted: jax.Array, universal: bool
) -> jax.Array:
    """Returns the sum over the tasks that count of |H_k - H_k*|^2, float32 [].

    Args:
      centre: float32 [S, N].
      radius: float32 [S, N].
      targets: of all tasks, [T, N].
      which: int32 [S], the tasks.
      counted: float32 [S].
      universal: whether radii count.
    """
    moved = jnp.sum(jnp.square(centre - targets["centre"][which]), axis=1)
    if universal:
        moved = moved + 2 / 3 * jnp.sum(jnp.square(radius - targets["radius"][which]), axis=1)
    return jnp.sum(moved * counted)


def _losses(
    setting: Setting,
    made: Boxed,
    options: Options,
    whole: Params,
    memory: Memory,
    gamma: jax.Array,
    share: jax.Array,
    task: jax.Array,
    key: Key,
) -> Callable[[Params, Batch], grad.Losses]:
    """Returns the function (generator, rows) -> losses by name."""
    regular, chosen, counted = bool(options.beta), jnp.zeros((0,), jnp.int32), jnp.zeros((0,))
    before = (whole[LEDGER]["done"] > 0) & (jnp.arange(made.tasks) != task)
    number = jnp.maximum(jnp.sum(before), 1).astype(jnp.float32)
    if regular:
        chosen, counted = _chosen(before, task, options.sample, named(key, "earlier"))
    nested = made.universal and options.schedule == "published"
    factor = options.beta / (jnp.square(number) if options.average == "twice" else number)

    def losses(generator: Params, rows: Batch) -> grad.Losses:
        which = jnp.concatenate([jnp.stack([task, task]), chosen])
        scales = jnp.concatenate([jnp.stack([gamma, jnp.zeros(())]), jnp.ones(chosen.size)])
        nearer = (jnp.ones(which.size).at[:2].set(gamma),) if nested else ()
        centre, radius = made.boxes(generator, which, scales, *nearer)
        where = boxes.limits(made, whole, task)
        held = boxes.inside(centre[1], where)
        found = boxes.around(centre[0], radius[0], held, where)
        trained = held if options.point == "centre" else (found.lower + found.upper) / 2
        output = made.target.apply(made.network(whole, trained), rows)
        total, weight = setting.loss(output, rows)
        bad, _ = setting.loss(Output(_worst(made, whole, found, output, rows, gamma)), rows)
        told = {"task": (share * total + (1 - share) * bad, weight)}
        if regular:
            pull = drift(centre[2:], radius[2:], memory["targets"], chosen, counted, made.universal)
            told["drift"] = (factor * pull, jnp.ones(()))
        if options.spread:
            share_of = options.spread * options.ease ** jnp.sum(before).astype(jnp.float32)
            told["spread"] = (-share_of * width(found, options.cap), jnp.ones(()))
        return told

    return losses


def _certified(made: Boxed, params: Params, task: jax.Array, generator: Params, rows: Batch) -> jax.Array:
    """Returns the certified share of rows with the box that would be promised now, float32 []."""
    params = {**params, "generator": generator}
    found = boxes.box(made, params, task, tight=True)
    sure = boxes.certain(boxes.logits(made, params, found, rows), rows)
    return grad.mean(jnp.sum(rows.weights * sure), jnp.sum(rows.weights))


def _worst(made: Boxed, params: Params, found: Interval, output: Output, rows: Batch, gamma: jax.Array) -> jax.Array:
    """Returns the worst logits of a box; those of the point network itself where the box is that point."""
    return jnp.where(gamma == 0, output.logits, boxes.worst(boxes.logits(made, params, found, rows), rows))


def _chosen(before: jax.Array, task: jax.Array, sample: int | None, key: Key) -> tuple[jax.Array, jax.Array]:
    """Returns the tasks that enter R, int32 [S], and what each counts: all others, or a draw without replacement."""
    tasks = before.size
    if sample is None or sample >= tasks - 1:
        others = jnp.arange(tasks - 1)
        others = others + (others >= task)
        return others, before[others].astype(jnp.float32)
    order = jnp.argsort(jnp.where(before, jax.random.uniform(key, (tasks,)), 2.0))[:sample]
    share = jnp.sum(before) / jnp.maximum(jnp.minimum(jnp.sum(before), sample), 1)
    return order, before[order].astype(jnp.float32) * share


def _ahead(
    setting: Setting,
    losses: Callable[[Params, Batch], grad.Losses],
    params: Params,
    opt_state: Any,
    batch: Batch,
    keep: Callable[[Params], Params],
) -> tuple[grad.Losses, Params]:
    """Returns losses and gradient with R taken after the step that the other losses alone would make."""

    def others(p: Params, rows: Batch) -> grad.Losses:
        return {name: value for name, value in losses(p, rows).items() if name != "drift"}

    def pull(p: Params, rows: Batch) -> grad.Losses:
        return {"drift": losses(p, rows)["drift"]}

    values, grads = grad.value_and_grad(others, params, batch)
    updates, _ = setting.tx.update(grads, opt_state, params)
    more, pulled = grad.value_and_grad(pull, keep(optax.apply_updates(params, updates)), batch)
    return values | more, tree.add(grads, pulled)


def _anew(fresh: Any, old: Any) -> Any:
    """Returns the new state of an optimiser with the count of its schedule, so that the learning rate goes on."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(lambda new, was: was if is_schedule(was) else new, fresh, old, is_leaf=is_schedule)


def _boxes_of(setting: Setting) -> Boxed:
    """Returns the model of boxes, or raises UserError."""
    made = setting.boxed
    if made is None:
        raise UserError(
            "config.method='hyperinterval': trains boxes of weights; set config.adapter='hypernetwork' for config.model"
        )
    if "embedding" not in made.model.axes["generator"]:
        raise UserError(
            "config.method='hyperinterval': trains boxes that a hypernetwork makes, and the radii of config.adapter="
            "'weight_boxes' could fall below 0; set config.method='intercontinet', or config.adapter='hypernetwork'"
        )
    boxes.check_target(made.target, setting.example)
    return made


def _checked(setting: Setting, options: Options) -> Boxed:
    """Returns the model of boxes of options that are in range, or raises UserError."""
    made = _boxes_of(setting)
    where = "config.method hyperinterval."
    for name, known in (("schedule", SCHEDULES), ("average", AVERAGES), ("point", POINTS)):
        if getattr(options, name) not in known:
            raise UserError(f"{where}{name}={getattr(options, name)!r}: must be one of {', '.join(known)}")
    for name in ("beta", "spread"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{where}{name}={getattr(options, name)}: must not be negative, and finite")
    for name in ("cap", "ease"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"{where}{name}={getattr(options, name)}: must be above 0, and finite")
    for name in ("kappa", "ramp"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"{where}{name}={getattr(options, name)}: must lie in [0, 1]; it is a share")
    if options.select < 0:
        raise UserError(f"{where}select={options.select}: must be a number of steps, or 0 for none")
    if options.select and not 0 < options.aside < 1:
        raise UserError(f"{where}aside={options.aside}: must lie between 0 and 1; it is a share of the rows")
    if options.sample is not None and options.sample < 1:
        raise UserError(f"{where}sample={options.sample}: must be at least 1; None takes all earlier tasks")
    return made
