"""From the sections of a config to a model: its shape, where its parameters come from, and the tokenizer it needs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import saved, schema, tree, vocabulary
from jaxcl.data import tokenizer as tokenizers
from jaxcl.hf import peft, read
from jaxcl.models import hypernetwork, interval, lora, transformer, weight_boxes
from jaxcl.models.analytic import Analytic
from jaxcl.models.boxed import LEDGER, Boxed
from jaxcl.models.config import Config, resolve
from jaxcl.random import named
from jaxcl.rl import gate
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Params, PyTree

VOCAB_SLACK = 512  # a vocabulary may be padded by this much beyond the tokenizer's, for the sake of round shapes
VOCAB_MULTIPLE = 128  # rows of an imported vocabulary, so that any usual tensor axis divides them
# What a config may say of an imported model; all else is in its config.json.
FREE = (
    "vocab",
    "new_rows",
    "vocab_multiple",
    "max_length",
    "init_std",
    "remat",
    "attention",
    "compute_dtype",
    "unroll",
)
BOXES = MappingProxyType({"hypernetwork": hypernetwork.make, "weight_boxes": weight_boxes.make})
NEW_ROWS = ("mean", "normal", "zeros")


class Adapter(NamedTuple):
    """The options of `jaxcl.models.lora.make`."""

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = lora.ALL
    dropout: float = 0.0


Load = Callable[[Key, PyTree], Params]  # key, abstract parameters with shardings -> the parameters


class Network(NamedTuple):
    """A model and its parameters before training."""

    model: Model
    load: Load | None  # of the parameters of the checkpoint
    shape: Config | None  # if it is a transformer
    checkpoint: str | None = None  # folder that they are imported from
    adapter: Adapter | None = None  # then `model` is the one with the adapter
    load_base: Load | None = None  # of an adapter whose base is a checkpoint: as `load`, for the base alone
    boxed: Boxed | None = None  # then the weights of `model` come from boxes
    start: str | None = None  # folder of a run that they are taken from
    analytic: Analytic | None = None  # then `model` is frozen below a head in closed form

    @property
    def frozen(self) -> tuple[str, ...]:
        """Returns the patterns of the parameters that are not trained."""
        return lora.FROZEN if self.adapter else ()

    @property
    def keyed(self) -> bool:
        """Returns whether `model.apply` is random, given a key."""
        return self.adapter is not None and self.adapter.dropout > 0

    def base_of(self, key: Key) -> Callable[[PyTree], Params] | None:
        """Returns what reads the base below an adapter again, if it came from a checkpoint; `key` as for `load`."""
        return functools.partial(self.load_base, key) if self.load_base else None


def based(model: Mapping[str, Any], adapter: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `config.model`; if its checkpoint is left empty, with that of the base that `config.adapter` names.

    Raises:
      UserError: the adapter names no folder that is on this machine.
    """
    source = adapter.get("checkpoint") if isinstance(adapter, Mapping) else None
    if source and model.get("checkpoint", True) in ("", None):
        return {**model, "checkpoint": peft.base(source)}
    return dict(model)


def tokenizer_of(options: Mapping[str, Any] | None, model: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a config: by default that of the model's checkpoint, and without one plain bytes."""
    if "checkpoint" in model:
        folder = model["checkpoint"]
        if not folder or not isinstance(folder, str):
            raise UserError(f"config.model.checkpoint={folder!r}: give the folder of a Hugging Face checkpoint")
        read.fields(folder)  # a folder that is no checkpoint should not be called a bad tokenizer
        options = options or {"name": "hf", "path": folder}
    return schema.call(tokenizers.make, options or {}, field="tokenizer")


def make(
    options: Mapping[str, Any],
    words: tokenizers.Tokenizer,
    length: int,
    adapter: str | Mapping[str, Any] | None = None,
) -> Network:
    """Returns the model of `config.model`, with `config.adapter` if there is one.

    Args:
      options: `name` of a module of jaxcl.models and the options of its `make`, and `start`, the folder of a run that
        the parameters are taken from; or `checkpoint`, a folder in the
        format of Hugging Face, with options that are named in FREE. A larger `vocab` grows the embedding, by
        `new_rows`: "mean" (the default), "normal" or "zeros", see `jaxcl.vocabulary.grow`.
      words: the tokenizer; a vocabulary that is smaller is refused.
      length: L of the rows that the model must take.
      adapter: 'lora', or a dict with that `name`, options of `jaxcl.models.lora.make`, and `checkpoint`: a folder in
        the format of PEFT that A and B are read from; rank, alpha and targets are then those of the folder.

    Raises:
      UserError: the vocabulary does not fit the tokenizer, the model does not take rows of this length, or the
        checkpoint is not one that jaxcl reads.
    """
    imported = "checkpoint" in options
    found = _imported(dict(options), words, length) if imported else _initialised(options, words, length)
    return found if adapter is None else _adapted(found, {"name": adapter} if isinstance(adapter, str) else adapter)


def classifier(options: Mapping[str, Any], example: Batch, classes: int) -> Network:
    """Returns the model of `config.model` for rows that are not text.

    Args:
      options: `name` of a module of jaxcl.models, the options of its `make`, and `start`: see `make`.
      example: a batch of the rows.
      classes: one more than the largest label.

    Raises:
      UserError: the model does not take these rows, or has fewer logits than there are classes.
    """
    if "checkpoint" in options:
        raise UserError("config.model.checkpoint: a language model, but config.sources are tables; give a model's name")
    if "start" in options:
        rest = {key: value for key, value in options.items() if key != "start"}
        return started(classifier(rest, example, classes), options["start"])
    model = schema.make("jaxcl.models", options, field="model")
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    try:
        found = jax.eval_shape(lambda params: model.apply(params, example).logits, shapes).shape
    except Exception as error:  # layers raise what they like
        check_inputs(options, example.inputs.shape[1:])
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config.model: takes no rows of shape {example.inputs.shape[1:]} ({reason})") from error
    if len(found) != 2:
        raise UserError(f"config.model: gives {found[1:]} numbers for a row; choose one with a logit for each class")
    if found[1] < max(classes, 2):
        given = f"config.model.classes={found[1]}" if "classes" in options else f"config.model: gives {found[1]} logits"
        fault = f"config.sources have labels up to {classes - 1}" if classes > found[1] else "a classifier needs two"
        raise UserError(f"{given}: {fault}; set it to {max(classes, 2)}")
    return Network(model, None, None)


def check_inputs(options: Mapping[str, Any], row: tuple[int, ...]) -> None:
    """Raises UserError if the option `inputs` of a classifier, given or not, is not of rows of this shape."""
    known = inspect.signature(schema.maker("jaxcl.models", options, field="model")).parameters
    if "inputs" not in known:
        return
    size, given = math.prod(row), options.get("inputs", known["inputs"].default)
    if np.prod(given) != size:
        wanted = size if isinstance(given, int) else list(row) if len(row) == 3 else f"three sizes, {size} numbers"
        raise UserError(
            f"config.model.inputs={given!r}: rows of config.sources have the shape {row}; set it to {wanted}"
        )


def with_boxes(base: Network, options: str | Mapping[str, Any], example: Batch, tasks: int) -> Network:
    """Returns a classifier whose weights come from boxes.

    Args:
      base: the classifier.
      options: `config.adapter`: 'hypernetwork', 'weight_boxes' or a dict with that `name` and options of its `make`.
      example: rows of any task.
      tasks: number of stages; an option `tasks` may be larger.

    Raises:
      UserError: no such adapter, an option, or a classifier that no interval arithmetic holds for.
    """
    parsed = schema.parse(options, field="adapter") if isinstance(options, str) else [options]
    given: dict[str, Any] = (
        dict(parsed[0]) if len(parsed) == 1 and isinstance(parsed[0], Mapping) else {"name": options}
    )
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in BOXES:
        known = ", ".join(("analytic", *BOXES))
        raise UserError(f"config.adapter.name={name!r}: is no adapter of a classifier; choose from {known}")
    have = given.setdefault("tasks", tasks)
    if isinstance(have, int) and have < tasks:
        raise UserError(f"config.adapter.tasks={have}: config.stream has {tasks} stages; leave it out")
    made = schema.call(BOXES[name], given, base.model, field="adapter")
    params = base.model.init(jax.random.key(0))
    rows = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * 2), example)
    interval.check_rows(base.model, params, rows)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
    ends = jax.eval_shape(lambda: jax.tree.map(interval.Interval, params, params))
    jax.eval_shape(interval.interval(base.model).apply, ends, shapes)  # refuses a layer that has no bounds
    return base._replace(model=made.model, boxed=made)


def gated(base: Network) -> Network:
    """Returns a transformer with the gate of HRPO, which starts anew if what is loaded has none.

    Raises:
      UserError: it has an adapter.
    """
    if base.adapter is not None:
        raise UserError("config.adapter: 'hrpo' trains a gate beside the whole model; leave the adapter out")
    model, below = gate.gated(base.model), base.load

    def load(key: Key, abstract: PyTree) -> Params:
        assert below
        rest = below(key, abstract if base.start else gate.without(abstract))
        if gate.NAME in rest:
            return rest
        places = jax.tree.map(lambda x: x.sharding, abstract[gate.NAME])
        return {**rest, gate.NAME: jax.jit(lambda: model.init(key)[gate.NAME], out_shardings=places)()}

    return base._replace(model=model, load=load if below else None)


def _adapted(base: Network, options: Mapping[str, Any]) -> Network:
    """Returns `base` with an adapter. The base keeps the type of its files, bit for bit."""
    if options.get("name") != "lora":
        raise UserError(f"config.adapter.name={options.get('name')!r}: there is one, 'lora'")
    given = {key: value for key, value in options.items() if key not in ("name", "checkpoint")}
    source = options.get("checkpoint")
    schema.check(Adapter, given, field="adapter")
    if source is not None:
        found = peft.options(source)
        for key in ("rank", "alpha", "targets"):
            if key in given and (list(given[key]) if key == "targets" else given[key]) != found[key]:
                raise UserError(f"config.adapter.{key}={given[key]!r}: {source} has {found[key]!r}; leave it out")
        given = found | given
    chosen = Adapter(**given)
    plain = base.model
    if base.checkpoint is not None:
        kind = read.stored_dtype(base.checkpoint)
        plain = plain._replace(init=lambda key: tree.cast(base.model.init(key), kind))
    model = lora.make(plain, **chosen._asdict())

    def load(key: Key, abstract: PyTree) -> Params:
        def drawn(part: str) -> Params:
            places = jax.tree.map(lambda x: x.sharding, abstract[part])
            return jax.jit(lambda: model.init(key)[part], out_shardings=places)()

        below = base.load(key, abstract["base"]) if base.load else drawn("base")
        if source is not None:
            peft.check_base(source, below)
        return {
            "base": below,
            "lora": drawn("lora") if source is None else peft.load(source, abstract["lora"]),
        }

    either = load if base.load or source is not None else None
    return base._replace(model=model, load=either, adapter=chosen, load_base=base.load)


def _initialised(options: Mapping[str, Any], words: tokenizers.Tokenizer, length: int) -> Network:
    """Returns the model of a shape, with a vocabulary for the tokenizer."""
    if "start" in options:
        rest = {key: value for key, value in options.items() if key != "start"}
        return started(_initialised(rest, words, length), options["start"])
    model = schema.make("jaxcl.models", options, field="model")
    vocab = _vocab(model, length)
    if not words.vocab <= vocab <= words.vocab + VOCAB_SLACK:
        fitting = -(-words.vocab // 8) * 8
        if "vocab" not in options:  # the preset's yields to the tokenizer
            return _initialised({**options, "vocab": fitting}, words, length)
        fault = "smaller" if vocab < words.vocab else f"more than {VOCAB_SLACK} larger"
        raise UserError(
            f"config.model.vocab={vocab}: {fault} than that of the tokenizer {words.name!r}, "
            f"which has {words.vocab} tokens; set config.model.vocab={fitting}"
        )
    fields = {key: value for key, value in options.items() if key != "name"}
    return Network(model, None, transformer.shape(**fields) if options["name"] == "transformer" else None)


def started(network: Network, folder: Any) -> Network:
    """Returns a network whose parameters are those of another run's newest checkpoint.

    A gate that is asked for and that the run has not is left out of what `load` returns.

    Raises:
      UserError: it is no run; and from `load`, its parameters are not those of this model.
    """
    if not isinstance(folder, str) or not (Path(folder) / "checkpoints").is_dir():
        raise UserError(f"config.model.start={folder!r}: give the folder of a run that has checkpoints")

    def load(key: Key, abstract: PyTree) -> Params:
        del key
        there = saved.params(f"{folder}/checkpoints")[1]
        if gate.NAME in there and gate.NAME not in abstract:
            raise UserError(
                f"config.model.start={folder!r}: was trained with the gate of hrpo; set config.policy='hrpo', or start "
                "from a run without a gate"
            )
        abstract = abstract if gate.NAME in there else gate.without(abstract)
        wanted, found = (dict(tree.named_leaves(one)) for one in (abstract, there))
        for name in [*wanted, *found]:
            shapes = [None if name not in side else tuple(side[name].shape) for side in (wanted, found)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"config.model.start={folder!r}: {name} has the shape {shapes[1]} there and {shapes[0]} here; "
                    "make config.model that of the run"
                )

        over = np.flatnonzero(np.asarray(found.get(f"{LEDGER}/done", 0)))
        if over.size:
            raise UserError(
                f"config.model.start={folder!r}: its ledger has promises for {len(over)} tasks, which would bind those "
                "of this run; leave it out"
            )

        def put(name: str, leaf: Any) -> jax.Array:
            host = np.asarray(found[name])
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda where: host[where])

        return tree.map_named(put, abstract)

    return network._replace(load=load, start=folder)


def _imported(options: dict[str, Any], words: tokenizers.Tokenizer, length: int) -> Network:
    """Returns the model of a checkpoint folder."""
    folder = options.pop("checkpoint")
    name = options.pop("name", "transformer")
    if not isinstance(folder, str) or name != "transformer":
        raise UserError(
            f"config.model: checkpoint={folder!r}, name={name!r}: give the path of a folder, and no other name"
        )
    how = options.pop("new_rows", "mean")
    if how not in NEW_ROWS:
        raise UserError(f"config.model.new_rows={how!r}: unknown{schema.nearest(str(how), NEW_ROWS)}")
    for key in options:
        if key not in FREE:
            raise UserError(f"config.model.{key}: is given by the checkpoint; remove it, or change {', '.join(FREE)}")
    shape = read.fields(folder)
    own = shape["vocab"]
    merged = {"vocab_multiple": VOCAB_MULTIPLE} | shape | options
    schema.check(transformer.make, merged, field="model")
    config = resolve(merged)
    model = transformer.from_config(config)
    if merged["vocab"] < own:
        raise UserError(f"config.model.vocab={merged['vocab']}: the checkpoint has {own}; rows are never removed")
    if words.vocab > merged["vocab"]:
        raise UserError(
            f"config.model.vocab={merged['vocab']}: the tokenizer {words.name!r} has {words.vocab} tokens; "
            f"use that of the checkpoint, or grow the embedding with config.model.vocab={words.vocab}"
        )
    _vocab(model, length)

    def load(key: Key, abstract: PyTree) -> Params:
        params = read.load(folder, config, abstract)
        return params if config.vocab == own else _grown(params, model, own, config.vocab, how, key)

    return Network(model, load, config, folder)


def _grown(params: Params, model: Model, old: int, new: int, how: Any, key: Key) -> Params:
    """Returns parameters with rows for the tokens that the checkpoint does not have, cut over the devices as before."""

    def grow(params: Params) -> Params:
        return vocabulary.grow(params, model.axes, old, new, how=how, key=named(key, "new_rows"))

    with jax.transfer_guard_host_to_device("allow"):
        return jax.jit(grow, out_shardings=jax.tree.map(lambda x: x.sharding, params), donate_argnums=0)(params)


def _vocab(model: Model, length: int) -> int:
    """Returns the number of logits that `model` gives for rows of `length` tokens."""
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))

    def logits(params: Params) -> jax.Array:
        row, task = jnp.zeros((1, length), jnp.int32), jnp.zeros((1,), jnp.int32)
        return model.apply(params, Batch(row, row, jnp.ones((1, length)), row, row, task)).logits

    return jax.eval_shape(logits, shapes).shape[-1]
