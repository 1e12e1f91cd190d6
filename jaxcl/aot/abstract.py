"""The train step of a config from shapes alone: no corpus, no weights and no device is needed."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl import adapters, domains, flops, frozen, plan, program, schema, sweep, train, tree
from jaxcl import mesh as meshes
from jaxcl import network as networks
from jaxcl.data import rows as tables
from jaxcl.data import tokenizer as tokenizers
from jaxcl.data.sources import Table
from jaxcl.hf import read
from jaxcl.kernels import attention, ridge
from jaxcl.models import transformer
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class Step(NamedTuple):
    """One train step on a mesh. Shapes are those of the run; the leaves are jax.ShapeDtypeStruct with shardings."""

    plan: plan.Plan
    state: TrainState
    batch: Batch
    run: Any  # the jitted step: (state, batch) -> (state, metrics)
    length: int  # L
    notes: tuple[str, ...]  # what was assumed

    def no_kernel(self, platform: str) -> str | None:
        """Returns why attention, or the update of ridge sums, is no Pallas kernel on a platform; None if it is one."""
        if (made := self.plan.network.analytic) is not None:
            if not any(name.endswith("gram/high") for name, _ in tree.named_leaves(self.state.memory)):
                return "the method updates no matrix of products"
            with jax.sharding.use_abstract_mesh(self.plan.mesh.abstract_mesh):
                found = ridge.refused(made.width, self.plan.flow.width, platform=platform)
            return found and f"ridge sums: {found}"
        if (shape := self.plan.network.shape) is None:
            return "no attention in the model"
        how = {"part": self.plan.mesh.shape["context"] > 1, "implementation": shape.attention}
        found = attention.refused(platform, shape.head_dim, shape.compute_dtype, **how)
        return found and f"config.model: {found}"

    @property
    def remat(self) -> str | None:
        """Returns what a language model computes again in the backward pass; None for other models."""
        return getattr(self.plan.network.shape, "remat", None)

    def facts(self) -> dict[str, Any]:
        """Returns the sizes that the program follows from."""
        mesh, params = self.plan.mesh, frozen.whole(self.state)
        trained = dict(tree.named_leaves(self.state.params))
        learning = tree.map_named(lambda name, _: name in trained, params)
        active = getattr(self.plan.network.shape, "active", 1.0)
        cost = flops.of_model(self.plan.setting.model.axes, params, self.length, learning, active=active)
        tokens = self.plan.flow.width * self.length
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        return {
            "parameters": tree.size(params),
            "trained_parameters": tree.size(self.state.params),
            "state_bytes_per_device": meshes.device_bytes(self.state, shardings),
            "state_leaves": len(jax.tree.leaves(self.state)),
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "devices": mesh.size,
            "rows_per_step": self.plan.flow.width,
            "length": self.length,
            "microbatches": self.plan.setting.microbatches,
            "tokens_per_step": tokens,
            "flops_per_step": round(cost * tokens),
        }


def one_run(config: Mapping[str, Any], variant: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns the config of one run, and what there is to say of the choice: a sweep has a run for every variant.

    Raises:
      UserError: there is no such variant.
    """
    if "variants" not in config:
        if variant is not None:
            raise UserError(f"--variant={variant}: the config is no sweep; leave it out")
        return dict(config), []
    runs = {run["label"]: run for run in reversed(sweep.expand(config))}  # of several seeds the first
    labels = [entry["label"] for entry in config["variants"]]
    chosen = labels[0] if variant is None else variant
    if chosen not in runs:
        raise UserError(f"--variant={variant}: no such variant{schema.nearest(chosen, labels)}")
    return runs[chosen], [f"variant {chosen!r} of {len(labels)}"]


def make(config: Mapping[str, Any], devices: Sequence[Any]) -> Step:
    """Returns the train step of a config on these devices, which may be those of `jaxcl.aot.topology`.

    The sources are not opened. A tokenizer whose file is not here is taken to have the vocabulary of the model, and of
    a checkpoint folder config.json is enough.

    Raises:
      UserError: what a run of the config would say, as far as that does not take its data.
    """
    pieces = train.split(config)[1]
    sources = pieces.pop("sources")
    if not sources:
        raise UserError("config.sources: empty; name at least one, although it is not read here")
    if domains.practising(sources):
        raise UserError("config.sources: problems; only runs on text and tables are compiled for machines elsewhere")
    for key in ("policy", "objective", "rollout"):
        pieces.pop(key, None)
    mesh = schema.call(meshes.make, {**(pieces.pop("mesh", None) or {}), "devices": list(devices)}, field="mesh")
    chosen = schema.call(program.Evaluation, pieces.pop("evaluation", None) or {}, field="evaluation")
    program.check_options(pieces["schedule"], pieces["optim"], chosen, len(sources))
    model, batch = pieces.pop("model"), pieces["stream"].get("batch")
    text = {key: pieces.pop(key, None) for key in ("tokenizer", "packing", "adapter")}
    tables_alone = {key: text[key] for key in ("tokenizer", "packing")}
    of = _tabular if domains.of_tables(_kinds(sources), **tables_alone) else _text
    network, table, length, notes = of(model, max(batch, 1) if isinstance(batch, int) else 1, **text)
    if of is _tabular and text["adapter"]:
        stages = program.stages_of(pieces["stream"])
        example = next(tables.batches(table, size=1))
        network = adapters.make(network, model, text["adapter"], example, len(stages))
    made = plan.make(mesh, network, **pieces)(dict.fromkeys(sources, table))
    ready = program.compiled(made)
    cut = jax.tree.map(lambda x: meshes.batch_sharding(mesh, shape=x.shape), made.setting.example)
    rows = meshes.with_shardings(made.setting.example, cut)
    params = jax.eval_shape(network.model.init, jax.eval_shape(lambda: jax.random.key(0)))
    notes += meshes.explain(mesh, network.model.axes, params)
    return Step(made, ready["abstract"], rows, ready["step"], length, tuple(notes))


def _kinds(sources: Mapping[str, Any]) -> dict[str, bool]:
    """Returns for every domain whether it is a table, by what its source says it returns."""
    made = {name: schema.maker("jaxcl.data.sources", x, field=f"sources.{name}") for name, x in sources.items()}
    return {name: typing.get_type_hints(make).get("return") is Table for name, make in made.items()}


Known = tuple[networks.Network, tables.Rows, int, list[str]]  # the model, blank rows for it, L, notes


def _text(model: Mapping[str, Any], count: int, *, tokenizer: Any, packing: Any, adapter: Any) -> Known:
    """Returns what is known of a language model and its rows."""
    length = schema.call(domains.Packing, packing or {}, field="packing").length
    words, notes = _words(tokenizer, model)
    return networks.make(model, words, length, adapter), blank(length, count), length, notes


def _tabular(model: Mapping[str, Any], count: int, **_: None) -> Known:
    """Returns what is known of a classifier and its rows, whose features are as many as the model's `inputs`."""
    size = model.get("inputs")
    if "checkpoint" not in model and not (isinstance(size, int) and size > 0):
        raise UserError(
            f"config.model.inputs={size!r}: of tables, which are not read here, the number of features must be known; "
            "give it, to a model that has this option, such as 'mlp'"
        )

    def fetch(index: np.ndarray) -> tables.Columns:
        whole = {name: np.zeros(len(index), np.int32) for name in ("targets", "segments", "positions")}
        features = np.zeros((len(index), size or 1), np.float32)
        return {"inputs": features, "weights": np.ones(len(index), np.float32), **whole}

    rows = tables.Rows(np.ones(count, np.int64), fetch, "blank")
    network = networks.classifier(model, next(tables.batches(rows, size=1)), classes=1)
    return network, rows, 1, [f"rows of {size:,} features are assumed, in one dimension"]


def blank(length: int, count: int) -> tables.Rows:
    """Returns `count` packed rows of padding."""

    def words(index: np.ndarray) -> np.ndarray:
        return np.zeros((len(index), tables.width(length)), np.uint32)

    numbers = np.ones(count, np.int64)
    return tables.Rows(numbers, lambda index: tables.unpack(words(index), length), "blank", words=words)


def _words(options: Mapping[str, Any] | None, model: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, list[str]]:
    """Returns the tokenizer, or one of as many tokens as the model has if its file is not here; and a note then."""
    path = (options or {}).get("path") or ("" if options else model.get("checkpoint"))
    places = [path, *(os.path.join(path, name) for name in TOKENIZERS)] if isinstance(path, str) and path else []
    if not places or any(os.path.isfile(place) for place in places):
        return networks.tokenizer_of(options, model), []
    if "checkpoint" in model:
        vocab = model.get("vocab") or read.fields(model["checkpoint"])["vocab"]
    else:
        fields = {key: value for key, value in model.items() if key != "name"}
        schema.check(transformer.make, fields, field="model")
        vocab = transformer.shape(**fields).vocab
    return tokenizers.make()._replace(vocab=vocab), [f"no tokenizer at {path}: {vocab:,} tokens are assumed"]
