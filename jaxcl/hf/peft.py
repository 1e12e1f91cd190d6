"""LoRA adapters in the format of PEFT, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import jax
import numpy as np

from jaxcl import checksum
from jaxcl.hf import axes, families, files, write
from jaxcl.models import lora
from jaxcl.schema import UserError
from jaxcl.tree import map_named
from jaxcl.types import Params, PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the meaning of the tensors. Every value but these is refused; absent means the first.
_ONLY: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "bias": ("none",),
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "fan_in_fan_out": (False, None),
        "modules_to_save": (None, [], ()),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "layer_replication": (None, []),
        "target_parameters": (None, []),
        "trainable_token_indices": (None, [], {}),
        "exclude_modules": (None, []),
        "alora_invocation_tokens": (None, []),
    }
)
# Variants of LoRA of later versions of PEFT.
_VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
# Ways of initialisation after which the base is another one than its files say.
_MOVED = ("pissa", "olora", "loftq", "corda", "lora_ga")


def options(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns rank, alpha, targets and dropout of an adapter, as `jaxcl.models.lora.make` takes them.

    Raises:
      UserError: no such folder, or an adapter that is more than low-rank changes of projections, all of one rank.
    """
    place, config = Path(folder).expanduser() / CONFIG, files.config(folder, CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type={config.get('peft_type')!r}: jaxcl reads LORA only")
    for key, allowed in _ONLY.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise UserError(f"{place}: {key}={value!r}: jaxcl has no such adapter; train one without it")
    for key in _VARIANTS:
        if config.get(key):
            raise UserError(f"{place}: {key}={config[key]!r}: jaxcl has no such adapter; train a plain LoRA")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVED):
        raise UserError(f"{place}: init_lora_weights={start!r} changes the base; convert it to a plain LoRA in PEFT")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout") or 0.0
    if type(rank) is not int or not 1 <= rank < 2**20 or not _is_number(alpha, 1e9):
        raise UserError(f"{place}: r={rank!r}, lora_alpha={alpha!r}: must be numbers; fetch it again")
    if not _is_number(dropout, 1) or dropout < 0:
        raise UserError(f"{place}: lora_dropout={dropout!r}: must be a number from 0 to below 1; fetch it again")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # alpha / sqrt(r), as alpha / r of another alpha
    tensors = _open(folder)
    parts = {name.rsplit(".lora_", 1)[0] + ".weight" for name in tensors.file_of}
    paths = [entry.path for entry in _projections() if any(_pattern(entry.tensor).fullmatch(name) for name in parts)]
    return {
        "rank": rank,
        "alpha": float(alpha),
        "targets": [f"{path}$" for path in paths],
        "dropout": float(dropout),
    }


def _is_number(value: Any, most: float) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < most  # of NaN, false


def base(folder: str | os.PathLike[str]) -> str:
    """Returns the folder of the model that an adapter changes; a relative path starts at the folder of the adapter.

    Raises:
      UserError: the adapter names no folder that is on this machine.
    """
    place, name = Path(folder).expanduser() / CONFIG, files.config(folder, CONFIG).get("base_model_name_or_path")
    found = place.parent / str(name or "")  # an absolute path stays itself
    if not name or not (found / "config.json").is_file():
        raise UserError(
            f"{place}: base_model_name_or_path={name!r}: no checkpoint at {found}; "
            "set config.model.checkpoint to the folder of the base"
        )
    return str(found.resolve())


def check_base(folder: str | os.PathLike[str], params: Params) -> None:
    """Raises UserError if an adapter was trained on other arrays of the same shapes than `params`, as far as it says.

    Adapters that jaxcl exported hold the checksums of their base.
    """
    if not (Path(folder).expanduser() / "jaxcl.json").is_file():
        return
    told = files.config(folder, "jaxcl.json").get("base_checksums") or {}
    if not isinstance(told, dict) or not all(isinstance(one, list) and len(one) == 3 for one in told.values()):
        raise UserError(f"{folder}: jaxcl.json has base_checksums that are none; fetch it again")
    for name, found in checksum.table(params).items():
        if name in told and told[name][:2] == found[:2] and told[name][2] != found[2]:
            raise UserError(
                f"{folder}: was trained on another base: its {name} differs from that of config.model.checkpoint; "
                "give the base that jaxcl.json names, or remove jaxcl.json to use this one nevertheless"
            )


def load(folder: str | os.PathLike[str], abstract: PyTree) -> Params:
    """Returns the adapter of a folder.

    Args:
      folder: of adapter_config.json and adapter_model.safetensors.
      abstract: jax.ShapeDtypeStruct of the adapter, "lora" of the parameters, with the sharding it is to have.

    Raises:
      UserError: a tensor that is missing, left over or of another shape.
    """
    tensors = _open(folder)
    place = tensors.folder / WEIGHTS
    table = {entry.path: entry for entry in _projections()}
    used: set[str] = set()

    def leaf(name: str, target: Any) -> jax.Array:
        path, _, part = name.rpartition("/")
        parsed = _axes(table[path].axes, part)
        layers = []
        for layer in range(target.shape[0]):
            tensor = _name(table[path].tensor.format(layer), part)
            if tensor not in tensors.file_of:
                raise UserError(
                    f"{place}: has no tensor {tensor!r}; the adapter must change this projection everywhere"
                )
            found, wanted = tensors.shape(tensor), axes.their_shape(parsed, target.shape[1:])
            if found != wanted:
                raise UserError(f"{place}: {tensor!r} is {list(found)}, the model needs {list(wanted)}; another base?")
            used.add(tensor)
            layers.append(
                axes.to_ours(parsed, tensors.read(tensor), dict(zip(parsed.ours, target.shape[1:], strict=True)))
            )
        whole = np.stack(layers).astype(target.dtype)
        where = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback(target.shape, where, lambda index: whole[index])

    params = map_named(leaf, abstract)
    if left := sorted(set(tensors.file_of) - used):
        raise UserError(f"{place}: {left[0]!r} has no place in this model; another base, or no plain LoRA?")
    return params


def export(
    folder: Path,
    adapter: Params,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    base: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    beside: Callable[[write.Writer], None] | None = None,
) -> None:
    """Writes an adapter as a new folder that `peft.PeftModel.from_pretrained` loads; whole or absent.

    Args:
      folder: to make.
      adapter: "lora" of the parameters; arrays that this process can reach.
      rank: r.
      alpha: as in `jaxcl.models.lora.make`.
      dropout: for those who train it further.
      base: path of the model that it changes.
      provenance: what it was trained on, for jaxcl.json.
      beside: writes further files, such as the tokenizer.

    Raises:
      UserError: `folder` exists.
    """
    pairs = lora.pairs_of(adapter)
    entries = [entry for entry in _projections() if entry.path in pairs]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": [entry.tensor.split(".")[-2] for entry in entries],
        "bias": "none",
        "inference_mode": True,
    }
    # One file whatever its size: PEFT knows no index.
    with write.Writer(folder, shard_bytes=sys.maxsize, single=WEIGHTS) as out:
        for entry in entries:
            for part, leaf in pairs[entry.path].items():
                for layer, array in enumerate(np.asarray(jax.device_get(leaf), np.float32)):
                    out.add(_name(entry.tensor.format(layer), part), axes.to_theirs(_axes(entry.axes, part), array))
        out.json(CONFIG, config)
        if provenance is not None:
            out.json("jaxcl.json", provenance)
        if beside is not None:
            beside(out)


def _open(folder: str | os.PathLike[str]) -> files.Tensors:
    """Returns the tensors of an adapter."""
    place = Path(folder).expanduser()
    if not (place / WEIGHTS).exists() and (place / "adapter_model.bin").exists():
        raise UserError(
            f"{place}: holds only adapter_model.bin, a pickle, which is never loaded; save it as safetensors"
        )
    handle = files.open_file(place / WEIGHTS)
    return files.Tensors(place, dict.fromkeys(handle.keys(), WEIGHTS), {WEIGHTS: handle})


def _projections() -> Sequence[families.Entry]:
    """Returns the entries of the projections; they are the same in every family."""
    return [entry for entry in families.FAMILIES["llama"].entries if entry.path in lora.PROJECTIONS]


def _pattern(tensor: str) -> re.Pattern[str]:
    """Returns the expression for the names of a tensor in all layers."""
    return re.compile(re.escape(PREFIX + tensor).replace(r"\{\}", r"\d+"))


def _name(tensor: str, part: str) -> str:
    """Returns what PEFT calls A or B of a tensor."""
    return f"{PREFIX}{tensor.removesuffix('.weight')}.lora_{part.upper()}.weight"


def _axes(spec: str, part: str) -> axes.Axes:
    """Returns the axes of A [rank, in] or B [out, rank], given those of the projection [out, in]."""
    outputs, inputs = axes.parse(spec).theirs
    if part == "a":
        return axes.Axes((("rank",), inputs), (*inputs, "rank"))
    return axes.Axes((outputs, ("rank",)), ("rank", *outputs))
