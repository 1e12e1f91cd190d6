"""From the sections of a config to what is trained and how: all of a run but its corpora."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import compose, frozen, losses, ridge, schedules, schema
from jaxcl import guard as guards
from jaxcl import mesh as meshes
from jaxcl import optim as optimisers
from jaxcl.data import stream as streams
from jaxcl.data.rows import Rows
from jaxcl.network import Network
from jaxcl.practice import Practice
from jaxcl.rl.explore import Explorer
from jaxcl.schema import UserError
from jaxcl.types import Batch, Method, Model

BOXED = ("hyperinterval", "intercontinet")  # methods of models whose weights come from boxes


class Plan(NamedTuple):
    """What is trained, how and on which devices: all of a run but its corpora."""

    mesh: jax.sharding.Mesh
    network: Network
    setting: compose.Setting
    learner: Method
    flow: streams.Stream
    rate: schedules.Schedule
    patterns: tuple[str, ...]  # of the parameters that are frozen
    seed: int
    explorer: Explorer | None = None  # of stages that learn from rollouts
    told: Mapping[str, str] = MappingProxyType({})  # method -> what it chose by itself, and why


def make(
    mesh: jax.sharding.Mesh,
    network: Network,
    *,
    stream: Mapping[str, Any],
    optim: dict[str, Any],
    schedule: Mapping[str, Any],
    method: Any = "cpt",
    loss: Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    microbatches: int = 1,
    seed: int = 0,
    practice: Practice | None = None,
) -> Callable[[Mapping[str, Rows]], Plan]:
    """Returns a function from the packed rows of every domain to the plan; the rows give shapes and counts alone."""
    if microbatches < 1:
        raise UserError(f"config.microbatches={microbatches}: must be at least 1")
    check_mesh(mesh, network, practice)
    optim, patterns = frozen_of(optim, network)
    multiple = microbatches * math.prod(mesh.shape[axis] for axis in meshes.BATCH)

    def ready(rows: Mapping[str, Rows]) -> Plan:
        flow = schema.call(stream_of, stream, rows, seed, multiple, field="stream")
        rate = schedules.make(ends=flow.boundaries, **schedule)
        explorer = practice.explorer(mesh, network.model, seed) if practice and "rl" in practice.learns else None
        examples = examples_of(flow, practice, explorer, network)
        check_length(mesh, examples[0])
        tx = optimisers.make(lr=rate, **optim)
        cost, score = practice.loss(checked(loss or {})) if practice else (loss_of(loss or {}), None)
        told = practice.told(cost) if practice else None
        least = min(stage.steps for stage in flow.stages)
        setting = compose.Setting(
            network.model, tx, examples[0], len(flow.stages), cost, microbatches, score, told, network.boxed, least
        )._replace(analytic=network.analytic)
        check_boxed(method, network, patterns, flow)
        check_analytic(method, network, patterns)
        learner = learner_of(method, setting, guard, patterns, network.keyed)
        check_forms(learner, network, examples)
        reasons = compose.explain(method, setting)
        return Plan(mesh, network, setting, learner, flow, rate, patterns, seed, explorer, reasons)

    return ready


def examples_of(
    flow: streams.Stream, practice: Practice | None, explorer: Explorer | None, network: Network
) -> list[Batch]:
    """Returns the shapes of every kind of batch that the stages learn from, those of rollouts and of pairs first."""
    one = flow.at(0, slice(0, 1))
    stages = [0] if practice is None else list(dict.fromkeys(practice.learns.index(how) for how in practice.learns))
    if practice:
        stages.sort(key=lambda stage: {"rl": 0, "dpo": 1}.get(practice.learns[stage], 2))
    found = []
    for stage in stages:
        row = practice.trim(one, stage) if practice else one
        narrow = jax.eval_shape(lambda row=row: jax.tree.map(jnp.asarray, row))
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((flow.width, *x.shape[1:]), x.dtype), narrow)
        if practice and explorer and practice.learns[stage] == "rl":
            params = jax.eval_shape(network.model.init, jax.eval_shape(lambda: jax.random.key(0)))
            rolled = jax.eval_shape(explorer.draw, params, rows, jax.ShapeDtypeStruct((2,), jnp.int32))
            column = jax.ShapeDtypeStruct((flow.width * practice.rollout.group,), jnp.float32)
            rows = jax.eval_shape(explorer.teach, rolled.rollouts, rows, {"advantage": column, "share": column})
        found.append(rows)
    return found


def check_mesh(mesh: jax.sharding.Mesh, network: Network, practice: Practice | None) -> None:
    """Raises UserError if the mesh has an axis that nothing of this run can be cut over."""
    remedy = "leave it at 1, and give the devices to another axis, e.g. --config.mesh.fsdp=-1"
    if (groups := mesh.shape["expert"]) > 1:
        count = getattr(network.shape, "experts", None)
        if count is None:
            raise UserError(
                f"config.mesh.expert={groups}: config.model has no experts; set config.model.experts={groups} or a "
                f"multiple, or {remedy}"
            )
        if count % groups:
            raise UserError(
                f"config.mesh.expert={groups}: does not divide config.model.experts={count}; use e.g. "
                f"--config.mesh.expert={math.gcd(groups, count)}"
            )
    if (parts := mesh.shape["context"]) == 1:
        return
    if practice is not None:
        raise UserError(f"config.mesh.context={parts}: answers are drawn token by token, not cut in length; {remedy}")
    if network.shape is None:
        raise UserError(f"config.mesh.context={parts}: config.model is no transformer of rows of text; {remedy}")


def check_length(mesh: jax.sharding.Mesh, example: Batch) -> None:
    """Raises UserError if rows cannot be cut evenly along their length."""
    parts, length = mesh.shape["context"], math.prod(example.targets.shape[1:])
    if length % parts:
        near = max(length - length % parts, parts)
        raise UserError(
            f"config.mesh.context={parts}: does not divide config.packing.length={length}; "
            f"use e.g. --config.packing.length={near}"
        )


def check_forms(learner: Method, network: Network, examples: Sequence[Batch]) -> None:
    """Raises UserError if the method cannot take rows of one kind and then of another."""
    if len(examples) == 1:
        return
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(learner.init, jax.eval_shape(network.model.init, key))
    for rows in examples:
        try:
            after, _ = jax.eval_shape(learner.step, state, rows, key)
            same = jax.tree.map(lambda a, b: a.shape == b.shape, state, after)
        except (TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"config.method: keeps rows, but the stages learn in different ways ({reason}); choose a method that "
                "keeps none, or one `learn` for all stages"
            ) from error
        if not all(jax.tree.leaves(same)):
            raise UserError("config.method: keeps rows of one kind, but the stages learn in different ways")


def check_boxed(method: Any, network: Network, patterns: Sequence[str], flow: streams.Stream) -> None:
    """Raises UserError if boxes of weights meet a method that knows nothing of them, or batches of several tasks."""
    if network.boxed is None:
        return
    for name in names_of(method):
        if name not in BOXED:
            raise UserError(
                f"config.method={name!r}: trains weights, but config.adapter makes boxes of them; choose one of "
                f"{', '.join(BOXED)}, or leave the adapter out"
            )
    if patterns:
        raise UserError("config.optim.frozen: not with boxes of weights; leave it out, or give no config.adapter")
    for stage, of in zip(flow.stages, flow.plans, strict=True):
        if of.replay.fraction:
            raise UserError(
                f"config.stream.replay: stage {stage.name!r} has rows of earlier tasks beside its own, but boxes of "
                "weights need one task in a batch; leave it out, or give no config.adapter"
            )
    judged: dict[str, str] = {}  # domain -> the stage whose network is looked at with its rows
    for k, stage in enumerate(flow.stages):
        for name, weight in stage.mixture.items():
            if weight:
                judged.setdefault(name, stage.name)
        own = max(stage.mixture, key=lambda name: stage.mixture[name])
        if judged[own] != stage.name:
            raise UserError(
                f"config.stream.stages[{k}] {stage.name!r}: has most rows of {own!r}, on which the network of stage "
                f"{judged[own]!r} is certified, so that its own would never be; boxes of weights need a new source for "
                "the most rows of every stage"
            )


def check_analytic(method: Any, network: Network, patterns: Sequence[str]) -> None:
    """Raises UserError if a head in closed form meets a method that trains weights."""
    if network.analytic is None:
        return
    for name in names_of(method):
        if name not in ridge.METHODS:
            raise UserError(
                f"config.method={name!r}: trains weights, but config.adapter='analytic' solves for them; choose one of "
                f"{', '.join(ridge.METHODS)}, or leave the adapter out"
            )
    if patterns:
        raise UserError("config.optim.frozen: all below a head in closed form is frozen already; leave it out")


def names_of(method: Any) -> list[Any]:
    """Returns the names in `config.method`; what is wrong with it is said elsewhere."""
    entries = schema.parse(method, field="method") if isinstance(method, str) else method
    entries = [entries] if isinstance(entries, Mapping) else entries
    return [entry.get("name") for entry in entries if isinstance(entry, Mapping)]


def frozen_of(optim: dict[str, Any], network: Network) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the options of the optimiser of the trained parameters, and the patterns of the frozen ones."""
    own = optim.get("frozen", ())
    schema.check(optimisers.make, {"lr": 0.0, "frozen": own}, field="optim")
    return {key: value for key, value in optim.items() if key != "frozen"}, (*network.frozen, *own)


def stream_of(
    rows: Mapping[str, Rows],
    seed: int,
    multiple: int,
    *,
    batch: int,
    stages: Sequence[dict[str, Any]],
    steps: int | None = None,
    replay: dict[str, Any] | None = None,
) -> streams.Stream:
    """Returns the stream of a stage table.

    Args:
      rows: domain -> packed rows.
      seed: of every shuffle.
      multiple: of which the number of rows must be one: shards x microbatches.
      batch: B, rows per step.
      stages: dicts with name, mixture (domain -> weight), and optionally steps and replay; one task each.
      steps: of every stage that does not say; refused if all do.
      replay: fraction, mode, over and capacity; see `jaxcl.data.stream`.
    """
    table = []
    for i, stage in enumerate(stages):
        filled = ({} if steps is None else {"steps": steps}) | dict(stage)
        table.append(schema.call(streams.Stage, filled, field=f"stream.stages[{i}]"))
    if steps is not None and stages and all(stage.get("steps") is not None for stage in stages):
        raise UserError(
            f"config.stream.steps={steps}: every stage has its own; set config.stream.stages[0].steps and so on, "
            "and leave config.stream.steps out"
        )
    if batch % multiple:
        raise UserError(f"config.stream.batch={batch}: must be a multiple of {multiple}, shards x microbatches")
    return streams.make(rows, table, batch=batch, seed=seed, replay=replay, multiple=multiple)


def loss_of(options: Mapping[str, Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the training loss: (output, batch) -> (sum, weight)."""
    return functools.partial(losses.cross_entropy, **checked(options))


def checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options of the cross-entropy, if they are."""
    schema.check(losses.cross_entropy, options, field="loss", positional=2)
    if options.get("z_loss", 0.0) < 0:
        raise UserError(f"config.loss.z_loss={options['z_loss']}: must not be negative")
    return options


def learner_of(
    method: Any,
    setting: compose.Setting,
    guard: Mapping[str, Any] | None,
    patterns: Sequence[str] = (),
    keyed: bool = False,
) -> Method:
    """Returns the method, inside its guard if there is one, for the parameters that no pattern freezes."""

    def build(model: Model) -> Method:
        learner = compose.make(method, setting._replace(model=model))
        return learner if guard is None else schema.call(guards.guard, guard, learner, field="guard")

    return frozen.frozen(build, setting.model, patterns, keyed=keyed) if patterns else build(setting.model)
