"""Methods from parts: terms, one gradient rule, and wrappers around a whole method."""

from __future__ import annotations

import importlib
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
    score: Callable[[Output, Batch], jax.Array] | None = None  # [B, L] log-probabilities, of rollouts and of pairs
    told: Callable[[Output, Batch], tuple[Any, grad.Losses]] | None = None  # `loss`, and (sum, weight) of more metrics
    boxed: Any = None  # `jaxcl.models.boxed.Boxed`, if the weights of the model come from boxes
    steps: int | None = None  # of the shortest stage
    analytic: Any = None  # `jaxcl.models.analytic.Analytic`, if the model is frozen below a head in closed form


class Taken(NamedTuple):
    """One step as a part sees it afterwards."""

    batch: Batch  # the incoming rows, before any part changed them
    rows: Batch  # the rows trained on, before any part annotated them
    before: Params
    after: Params
    grads: Params
    key: Key


class Part(NamedTuple):
    """A term or a gradient rule of a gradient method; leave out what it does not do.

    `recall` may replace or append rows. `annotate` adds or changes columns of `extra` once all rows are there, replayed
    ones too; what a part stores does not have these changes. `loss` is added to the training loss as sum / weight,
    where the weight must not depend on the parameters; a penalty returns (penalty, 1). `project` changes the gradient,
    given the incoming rows and a function from rows to the gradient of the training loss alone (at most one part of a
    method may have it).
    `settle` remembers, once the step is taken. `end_task` gets K batches of the task just ended, stacked [K, B, ...];
    they are annotated, by the memories of before, so that they have the training loss of a step.
    `metrics` names scalars of the rows trained on; they are reported as `part/name`.
    """

    init: Callable[[Params], Memory] = lambda params: ()
    recall: Callable[[Memory, Batch, Key], Batch] | None = None
    annotate: Callable[[Memory, Batch], Batch] | None = None
    loss: Callable[[Memory, Params, Output, Batch], tuple[jax.Array, jax.Array]] | None = None
    project: Callable[[Memory, Params, Batch, Callable[[Batch], Params], Key], Params] | None = None
    settle: Callable[[Memory, Taken], Memory] | None = None
    end_task: Callable[[Memory, Params, Batch, Key], Memory] | None = None
    metrics: Callable[[Memory, Batch], Metrics] | None = None


class Wrapper(NamedTuple):
    """A transformation of a whole method, such as Reptile or an average of weights.

    Its memory is a dict with its own entries and, under `inner`, the memory of the method it wraps.
    """

    wrap: Callable[[Method], Method]


def inner(state: TrainState) -> TrainState:
    """Returns the state of the method inside a wrapper, given the wrapper's."""
    return TrainState(state.step, state.params, state.opt_state, state.memory["inner"])


def outer(state: TrainState, **own: Memory) -> TrainState:
    """Returns the wrapper's state, given that of the method inside it and the wrapper's own memory."""
    return TrainState(state.step, state.params, state.opt_state, {**own, "inner": state.memory})


def make(options: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], setting: Setting) -> Method:
    """Builds the method that `config.method` describes: `'er(capacity=4) + reptile'`, a dict with a `name`, or a list.

    Raises:
      UserError: unknown method or option, or parts that do not go together.
    """
    options = schema.parse(options, field="method") if isinstance(options, str) else options
    if not isinstance(options, (Mapping, Sequence)):
        raise schema.UserError(
            f"config.method={options!r}: write it as in 'er(capacity=4) + reptile' or as a list of dicts"
        )
    single = isinstance(options, Mapping)
    parts = []
    for i, entry in enumerate([options] if single else options):
        part = schema.make("jaxcl.methods", entry, setting, field="method" if single else f"method[{i}]")
        parts.append((entry["name"], part))
    return compose(parts, setting)


def explain(options: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], setting: Setting) -> dict[str, str]:
    """Returns name -> what the methods of checked options chose by themselves, and why, for the report.

    A module of jaxcl.methods has `explain(setting, **options) -> str` if it chooses something.
    """
    entries = schema.parse(options, field="method") if isinstance(options, str) else options
    found = {}
    for entry in [entries] if isinstance(entries, Mapping) else entries:
        module = importlib.import_module(f"jaxcl.methods.{entry['name']}")
        if hasattr(module, "explain"):
            found[entry["name"]] = module.explain(setting, **{k: v for k, v in entry.items() if k != "name"})
    return found


def merger(options: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Callable[[Memory, Memory], Memory]:
    """Returns what adds the memories of two runs of one method, if its memory is made of sums over rows.

    A module of jaxcl.methods has `merger(**options) -> ((a, b) -> memory)` then. The result has the entries that are
    sums; those of a new run take their place beside them, and its `end_task`, which needs no rows, makes weights of it.

    Raises:
      UserError: the method, or what an option makes it keep, is no sum over rows.
    """
    entries = schema.parse(options, field="method") if isinstance(options, str) else options
    name, *others = [entry["name"] for entry in ([entries] if isinstance(entries, Mapping) else entries)]
    module = importlib.import_module(f"jaxcl.methods.{name}")
    if others or not hasattr(module, "merger"):
        raise schema.UserError(
            f"config.method={' + '.join([name, *others])!r}: what it keeps is no sum over rows, so that runs do not "
            "add up; train them with a method whose head follows from sums alone, such as 'acil'"
        )
    entry = entries if isinstance(entries, Mapping) else entries[0]
    return module.merger(**{k: v for k, v in entry.items() if k != "name"})


def compose(parts: Sequence[tuple[str, Part | Wrapper | Method]], setting: Setting) -> Method:
    """Joins named parts into one method: terms first, then the wrappers in the order given.

    Raises:
      UserError: no part, a part listed twice, two gradient rules, terms beside a method that has no gradient, or
        rows that the microbatches do not divide.
    """
    names = [name for name, _ in parts]
    if not names:
        raise schema.UserError("config.method: empty list; name at least one method, e.g. dict(name='cpt')")
    for name in names:
        if names.count(name) > 1:
            raise schema.UserError(f"config.method: {name!r} is listed twice; list every part once")
    whole = {name: part for name, part in parts if isinstance(part, Method)}
    terms = {name: part for name, part in parts if isinstance(part, Part)}
    rules = [name for name, part in terms.items() if part.project]
    if len(rules) > 1:
        raise schema.UserError(f"config.method: {' and '.join(rules)} both change the gradient; keep one of them")
    if len(whole) > 1 or (whole and terms):
        first, *others = [*whole, *terms]
        raise schema.UserError(f"config.method: {first!r} is a complete method of its own; remove {', '.join(others)}")
    if whole and setting.microbatches > 1:
        raise schema.UserError(
            f"config.microbatches={setting.microbatches}: {next(iter(whole))!r} makes its own passes; set it to 1"
        )
    method = next(iter(whole.values())) if whole else gradient_method(terms, setting)
    for _, part in parts:
        if isinstance(part, Wrapper):
            method = part.wrap(method)
    return method


def gradient_method(parts: Mapping[str, Part], setting: Setting) -> Method:
    """Returns the method that takes one optimiser step on the training loss plus the losses of `parts`."""
    _check_rows(parts, setting)

    def init(params: Params) -> TrainState:
        memory = {name: part.init(params) for name, part in parts.items()}
        return TrainState(jnp.zeros((), jnp.int32), params, setting.tx.init(params), memory)

    def plain(params: Params, rows: Batch) -> grad.Losses:
        output = setting.model.apply(params, rows)
        return {"loss": setting.loss(output, rows), **(output.terms or {})}

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        memory, recalled = state.memory, _recall(parts, state.memory, batch, key)
        rows = _annotate(parts, memory, recalled)

        def losses(params: Params, piece: Batch) -> grad.Losses:
            output = setting.model.apply(params, piece)
            terms = {name: part.loss(memory[name], params, output, piece) for name, part in parts.items() if part.loss}
            loss, more = setting.told(output, piece) if setting.told else (setting.loss(output, piece), {})
            return {"loss": loss, **terms, **jax.lax.stop_gradient(more), **(output.terms or {})}

        values, grads = grad.value_and_grad(losses, state.params, rows, setting.microbatches)
        for name, part in parts.items():
            if part.project:
                grads = part.project(
                    memory[name],
                    grads,
                    batch,
                    lambda other: grad.value_and_grad(plain, state.params, _annotate(parts, memory, other))[1],
                    named(key, f"{name}/project"),
                )
        updates, opt_state = setting.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: grad.mean(total, weight) for name, (total, weight) in values.items()}
        metrics |= {"grad_norm": tree.norm(grads), "weight": values["loss"][1]}
        after = dict(memory)
        for name, part in parts.items():
            if part.metrics:
                metrics |= {f"{name}/{k}": v for k, v in part.metrics(memory[name], rows).items()}
            if part.settle:
                taken = Taken(batch, recalled, state.params, params, grads, named(key, f"{name}/settle"))
                after[name] = part.settle(memory[name], taken)
        return TrainState(state.step + 1, params, opt_state, after), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        memory = dict(state.memory)
        if any(part.annotate for part in parts.values()):  # one batch at a time, as in a step
            batch = jax.lax.map(lambda rows: _annotate(parts, state.memory, rows), batch)
        for name, part in parts.items():
            if part.end_task:
                memory[name] = part.end_task(memory[name], state.params, batch, named(key, f"{name}/end_task"))
        return TrainState(state.step, state.params, state.opt_state, memory)

    return Method(init, step, end_task)


def _recall(parts: Mapping[str, Part], memory: Memory, batch: Batch, key: Key) -> Batch:
    """Returns the rows to train on."""
    for name, part in parts.items():
        if part.recall:
            batch = part.recall(memory[name], batch, named(key, f"{name}/recall"))
    return batch


def _annotate(parts: Mapping[str, Part], memory: Memory, rows: Batch) -> Batch:
    """Returns the rows with the columns that the parts add or change."""
    for name, part in parts.items():
        if part.annotate:
            rows = part.annotate(memory[name], rows)
    return rows


def _check_rows(parts: Mapping[str, Part], setting: Setting) -> None:
    """Raises UserError unless the microbatches divide the rows trained on. Shapes only: nothing is computed."""

    def rows(key: Key, batch: Batch) -> Batch:
        params = setting.model.init(key)
        return _recall(parts, {name: part.init(params) for name, part in parts.items()}, batch, key)

    count = setting.example.task.shape[0]
    if any(part.recall for part in parts.values()):
        count = jax.eval_shape(rows, jax.eval_shape(lambda: jax.random.key(0)), setting.example).task.shape[0]
    if count % setting.microbatches:
        raise schema.UserError(
            f"config.microbatches={setting.microbatches}: does not divide the {count} rows of a step "
            f"({setting.example.task.shape[0]} incoming, the rest replayed); choose a divisor of {count}"
        )
