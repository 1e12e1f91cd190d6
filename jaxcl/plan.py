"""From the sections of a config to what is trained and how: all of a run but its corpora."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import compose, frozen, losses, schedules, schema
from jaxcl import guard as guards
from jaxcl import mesh as meshes
from jaxcl import optim as optimisers
from jaxcl.data import stream as streams
from jaxcl.data.rows import Rows
from jaxcl.network import Network
from jaxcl.schema import UserError
from jaxcl.types import Method, Model


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
) -> Callable[[Mapping[str, Rows]], Plan]:
    """Returns a function from the packed rows of every domain to the plan; the rows give shapes and counts alone."""
    if microbatches < 1:
        raise UserError(f"config.microbatches={microbatches}: must be at least 1")
    optim, patterns = frozen_of(optim, network)
    multiple = microbatches * math.prod(mesh.shape[axis] for axis in meshes.BATCH)

    def ready(rows: Mapping[str, Rows]) -> Plan:
        flow = schema.call(stream_of, stream, rows, seed, multiple, field="stream")
        rate = schedules.make(ends=flow.boundaries, **schedule)
        one = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, flow.at(0, slice(0, 1))))
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((flow.width, *x.shape[1:]), x.dtype), one)
        tx = optimisers.make(lr=rate, **optim)
        setting = compose.Setting(network.model, tx, example, len(flow.stages), loss_of(loss or {}), microbatches)
        learner = learner_of(method, setting, guard, patterns, network.keyed)
        return Plan(mesh, network, setting, learner, flow, rate, patterns, seed)

    return ready


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
      steps: of every stage that does not say.
      replay: fraction, mode, over and capacity; see `jaxcl.data.stream`.
    """
    table = []
    for i, stage in enumerate(stages):
        filled = ({} if steps is None else {"steps": steps}) | dict(stage)
        table.append(schema.call(streams.Stage, filled, field=f"stream.stages[{i}]"))
    if batch % multiple:
        raise UserError(f"config.stream.batch={batch}: must be a multiple of {multiple}, shards x microbatches")
    return streams.make(rows, table, batch=batch, seed=seed, replay=replay, multiple=multiple)


def loss_of(options: Mapping[str, Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the training loss: (output, batch) -> (sum, weight)."""
    schema.check(losses.cross_entropy, options, field="loss", positional=2)
    if options.get("z_loss", 0.0) < 0:
        raise UserError(f"config.loss.z_loss={options['z_loss']}: must not be negative")
    return functools.partial(losses.cross_entropy, **options)


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
