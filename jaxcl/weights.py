"""The weights of a run at any of its checkpoints: what evaluation, export and merging start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxcl import folder, manifests, network, saved
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.random import key_for
from jaxcl.rl import gate
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import Params


class Weights(NamedTuple):
    """A model as a checkpoint of a run has it."""

    network: network.Network
    params: Params  # those that are trained and those that are not, as `network.model.apply` takes them
    tokenizer: Tokenizer
    step: int
    about: dict[str, Any]  # run.json
    ledger: dict[str, dict[str, int]]  # source -> new and replayed rows and tokens up to the step


def load(run: Path, *, step: int | None = None, sharding: jax.sharding.Sharding | None = None) -> Weights:
    """Returns the weights of a run.

    Args:
      run: folder of the run.
      step: of a checkpoint; None = the newest.
      sharding: of every array; None = all on the first device.

    Raises:
      UserError: no run, no such checkpoint, or a damaged one.
    """
    about = folder.about(run)
    config = about["config"]
    length = length_of(run, about)
    model = network.based(config["model"], config.get("adapter"))
    words = network.tokenizer_of(config.get("tokenizer"), model)
    made = network.make(model, words, length, config.get("adapter"))
    key = key_for(config.get("seed", 0), "init")
    step, leaves = saved.params(run / "checkpoints", step=step, sharding=sharding, base=made.base_of(key))
    names = {name for name, _ in named_leaves(jax.eval_shape(made.model.init, jax.random.key(0)))}
    if gate.NAME in leaves and config.get("policy"):
        raise UserError(
            f"{run}: was trained with the gate of hrpo, which evaluation, export and merging have no place for; train "
            "with another config.policy to use them"
        )
    if names != {name for name, _ in named_leaves(leaves)}:
        raise UserError(f"{run}: checkpoint {step} holds another model than run.json describes; restore run.json")
    host = manifests.host(epath.Path(run / "checkpoints" / str(step)))
    return Weights(made, leaves, words, step, about, host["ledger"])


def length_of(run: Path, about: Mapping[str, Any]) -> int:
    """Returns the tokens of a row that a language model was trained on.

    Raises:
      UserError: the run is not one of a language model with a tokenizer.
    """
    config = about["config"]
    if packing := config.get("packing"):
        return packing["length"]
    if (length := about["facts"].get("row_length")) is None:
        raise UserError(f"{run}: a classifier; evaluation, export and merging are for language models")
    if any(source.get("name") != "questions" for source in config["sources"].values()):
        raise UserError(f"{run}: its problems make their own vocabulary; evaluation, export and merging are for text")
    return length
