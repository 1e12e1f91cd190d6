"""Methods from parts: terms, one gradient rule, and wrappers around a whole method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcl import grad, schema, tree
from jaxcl.random import named
from jaxcl.types import Batch, Key, Memory, Method, Metrics, Model, Output, Params, TrainState


class Setting(NamedTuple):
    """What a part may know of the run it is made for. No arrays: a method closes over configuration only."""

    model: Model
    tx: optax.GradientTransformation
    example: Batch  # jax.ShapeDtypeStruct leaves of one global batch
    tasks: int  # number of tasks in the stream: storage per task is preallocated
    loss: Callable[[Output, Batch], tuple[jax.Array, jax.Array]]  # (sum, weight) of the rows
    microbatches: int = 1


class Taken(NamedTuple):
    """One step as a part sees it afterwards."""

    batch: Batch  # the incoming rows, before any part changed them
    before: Params
    after: Params
    grads: Params
    key: Key


class Part(NamedTuple):
    """A term or a gradient rule of a gradient method; leave out what it does not do.

    `recall` may replace, append or annotate rows. `loss` is added to the training loss as sum / weight, where the
    weight must not depend on the parameters; a penalty returns (penalty, 1). `project` changes the gradient
    (at most one part of a method may have it). `settle` remembers, once the step is taken. `end_task` gets K
    batches of the task just ended, stacked [K, B, ...].
    """

    init: Callable[[Params], Memory] = lambda params: ()
    recall: Callable[[Memory, Batch, Key], Batch] | None = None
    loss: Callable[[Memory, Params, Output, Batch], tuple[jax.Array, jax.Array]] | None = None
    project: Callable[[Memory, Params, Params, Callable[[Batch], Params], Key], Params] | None = None
    settle: Callable[[Memory, Taken], Memory] | None = None
    end_task: Callable[[Memory, Params, Batch, Key], Memory] | None = None


class Wrapper(NamedTuple):
    """A transformation of a whole method, such as Reptile or an average of weights."""

    wrap: Callable[[Method], Method]


def make(options: Mapping[str, Any] | Sequence[Mapping[str, Any]], setting: Setting) -> Method:
    """Builds the method that `config.method` describes: one dict with a `name`, or a list of them.

    Raises:
      UserError: unknown method or option, or parts that do not go together.
    """
    entries = [options] if isinstance(options, Mapping) else list(options)
    if not entries:
        raise schema.UserError("config.method: empty list; name at least one method, e.g. dict(name='cpt')")
    parts = []
    for i, entry in enumerate(entries):
        field = "method" if isinstance(options, Mapping) else f"method[{i}]"
        parts.append((entry.get("name"), schema.make("jaxcl.methods", entry, setting, field=field)))
    return compose(parts, setting)


def compose(parts: Sequence[tuple[str, Part | Wrapper | Method]], setting: Setting) -> Method:
    """Joins named parts into one method: terms first, then the wrappers in the order given.

    Raises:
      UserError: a part listed twice, two gradient rules, or terms beside a method that has no gradient.
    """
    names = [name for name, _ in parts]
    for name in names:
        if names.count(name) > 1:
            raise schema.UserError(f"config.method: {name!r} is listed twice; list every part once")
    whole = {name: part for name, part in parts if isinstance(part, Method)}
    terms = {name: part for name, part in parts if isinstance(part, Part)}
    rules = [name for name, part in terms.items() if part.project]
    if len(rules) > 1:
        raise schema.UserError(f"config.method: {' and '.join(rules)} both change the gradient; keep one of them")
    if len(whole) > 1 or (whole and terms):
        others = [name for name in names if name not in whole] or list(whole)[1:]
        raise schema.UserError(
            f"config.method: {next(iter(whole))!r} is a complete method of its own; remove {', '.join(others)}"
        )
    method = next(iter(whole.values())) if whole else gradient_method(terms, setting)
    for _, part in parts:
        if isinstance(part, Wrapper):
            method = part.wrap(method)
    return method


def gradient_method(parts: Mapping[str, Part], setting: Setting) -> Method:
    """Returns the method that takes one optimiser step on the training loss plus the losses of `parts`."""

    def init(params: Params) -> TrainState:
        memory = {name: part.init(params) for name, part in parts.items()}
        return TrainState(jnp.zeros((), jnp.int32), params, setting.tx.init(params), memory)

    def losses_of(memory: Memory, params: Params, rows: Batch) -> grad.Losses:
        output = setting.model.apply(params, rows)
        terms = {name: part.loss(memory[name], params, output, rows) for name, part in parts.items() if part.loss}
        return {"loss": setting.loss(output, rows), **terms}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        memory, rows = state.memory, batch
        for name, part in parts.items():
            if part.recall:
                rows = part.recall(memory[name], rows, named(key, f"{name}/recall"))

        def gradient(b: Batch, count: int = setting.microbatches) -> tuple[grad.Losses, Params]:
            return grad.value_and_grad(lambda p, piece: losses_of(memory, p, piece), state.params, b, count)

        values, grads = gradient(rows)
        for name, part in parts.items():
            if part.project:
                grads = part.project(
                    memory[name], grads, state.params, lambda b: gradient(b, 1)[1], named(key, f"{name}/project")
                )
        updates, opt_state = setting.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        memory = dict(memory)
        for name, part in parts.items():
            if part.settle:
                taken = Taken(batch, state.params, params, grads, named(key, f"{name}/settle"))
                memory[name] = part.settle(memory[name], taken)
        metrics = {name: grad.mean(total, weight) for name, (total, weight) in values.items()}
        metrics |= {"grad_norm": tree.norm(grads), "weight": values["loss"][1]}
        return TrainState(state.step + 1, params, opt_state, memory), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        memory = dict(state.memory)
        for name, part in parts.items():
            if part.end_task:
                memory[name] = part.end_task(memory[name], state.params, batch, named(key, f"{name}/end_task"))
        return TrainState(state.step, state.params, state.opt_state, memory)

    return Method(init, step, end_task)
