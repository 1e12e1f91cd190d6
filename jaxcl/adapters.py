"""Adapters of classifiers: from `config.adapter` to a network with boxes of weights, or with a head in closed form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import network as networks
from jaxcl import schema
from jaxcl.data import rows as tables
from jaxcl.models import analytic
from jaxcl.models.analytic import Analytic
from jaxcl.network import Load, Network
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Params, PyTree

ANALYTIC = "analytic"
Draw = Callable[[int, np.random.Generator], Batch]  # that many rows of the first task, as host arrays


def make(
    base: Network,
    model: Mapping[str, Any],
    options: str | Mapping[str, Any],
    example: Batch,
    tasks: int,
    draw: Draw | None = None,
) -> Network:
    """Returns a classifier with an adapter.

    Args:
      base: the classifier that `config.model` makes.
      model: `config.model`.
      options: `config.adapter`: 'analytic', 'hypernetwork', 'weight_boxes' or a dict with that `name` and options.
      example: rows of any task.
      tasks: number of stages.
      draw: rows that the centres of a Gaussian expansion are taken from; None = they are random.

    Raises:
      UserError: no such adapter, an option, or a model that it does not fit.
    """
    name, given = named_options(options)
    if name == ANALYTIC:
        return with_head(base, model, given, example, draw)
    return networks.with_boxes(base, options, example, tasks)


def named_options(options: str | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the name and the options of `config.adapter`."""
    parsed = schema.parse(options, field="adapter") if isinstance(options, str) else [options]
    given = dict(parsed[0]) if len(parsed) == 1 and isinstance(parsed[0], Mapping) else {"name": options}
    return given.pop("name", None), given


def with_head(
    base: Network, model: Mapping[str, Any], given: Mapping[str, Any], example: Batch, draw: Draw | None
) -> Network:
    """Returns a classifier that is frozen below a head in closed form; its own last layer is not used.

    Args:
      base: the classifier.
      model: `config.model`, whose `make` must have an option `output`.
      given: options of `jaxcl.models.analytic.make`.
      example: rows of any task.
      draw: see `make`.

    Raises:
      UserError: see `make`.
    """
    rest = {key: value for key, value in model.items() if key != "start"}
    if "output" not in inspect.signature(schema.maker("jaxcl.models", rest, field="model")).parameters:
        raise UserError(f"config.model.name={rest['name']!r}: tells no features to solve for a head; choose mlp or cnn")
    hidden = schema.make("jaxcl.models", {"output": "hidden", **rest}, field="model")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), example)
    params = jax.eval_shape(base.model.init, jax.eval_shape(lambda: jax.random.key(0)))
    classes = jax.eval_shape(lambda p, rows: base.model.apply(p, rows).logits, params, shapes).shape[-1]
    made = schema.call(analytic.make, given, hidden, shapes, classes, field="adapter")
    return base._replace(model=made.model, analytic=made, load=loading(base.load, made, draw))


def loading(below: Load | None, made: Analytic, draw: Draw | None) -> Load | None:
    """Returns what gives the parameters: those of the base, and centres that are features of rows of the first task.

    Args:
      below: loads the base; None = it is drawn.
      made: the model.
      draw: see `make`.
    """
    centred = made.expansion == "gaussian" and draw is not None
    if below is None and not centred:
        return None

    def load(key: Key, abstract: PyTree) -> Params:
        places = jax.tree.map(lambda x: x.sharding, abstract)
        params = jax.jit(made.model.init, out_shardings=places)(key)
        if below is not None:
            params = {**params, "base": below(key, abstract["base"])}
        if centred:
            assert draw is not None
            random = np.random.default_rng(np.asarray(jax.random.key_data(named(key, "centres"))))
            rows = draw(abstract["expansion"]["centres"].shape[0], random)
            found = jax.jit(made.raw, out_shardings=places["expansion"]["centres"])(params, rows)
            params = {**params, "expansion": {"centres": found}}
        return params

    return load


def drawing(rows: tables.Rows) -> Draw:
    """Returns what draws rows of a table without replacement, and some of them again if there are too few."""

    def draw(count: int, random: np.random.Generator) -> Batch:
        columns = rows.fetch(np.resize(random.permutation(len(rows)), count))
        return tables.batch_of(columns, np.zeros(count, np.int32))

    return draw
