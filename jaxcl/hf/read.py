"""Checkpoint folder -> parameters on the devices: every process reads the ranges of the pieces that it holds.

There is no conversion step. A piece of a parameter is read from the ranges of the tensors that it consists of, layer by
layer, turned into our layout and put on its device; at any time one piece of one parameter is in transit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxcl.hf import axes, families, files
from jaxcl.models.config import Config
from jaxcl.schema import UserError
from jaxcl.tree import map_named, named_leaves
from jaxcl.types import Params, PyTree

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_THREADS = 8  # tensors in transit at the most
_ROWS = 16  # rows turned into columns at a time: as many as a cache line holds; five times faster than all at once
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}


def fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options of `jaxcl.models.transformer.make` for the checkpoint in `folder`.

    Raises:
      UserError: see `families.fields`; or a checkpoint that is quantised.
    """
    place = os.path.join(os.path.expanduser(folder), "config.json")
    config = files.config(folder)
    if config.get("quantization_config"):
        raise UserError(f"{place}: quantization_config: quantised weights cannot be trained; take the original ones")
    return families.fields(config, place)


def load(folder: str | os.PathLike[str], config: Config, abstract: PyTree) -> Params:
    """Returns the parameters of a checkpoint.

    Rows of the vocabulary that the files do not have are zeros: padding, and tokens that the caller adds.

    Args:
      folder: of config.json and safetensors files.
      config: the shape of the model; its vocabulary may be larger than that of the files.
      abstract: jax.ShapeDtypeStruct of every parameter, with the sharding that it is to have (none: first device).

    Raises:
      UserError: a tensor that is missing, left over, or of another shape or type than config.json says.
    """
    described = files.config(folder)
    kind = families.family(described, os.path.join(folder, "config.json"))
    tensors = files.open_folder(folder)
    table = {entry.path: entry for entry in families.entries(kind, config)}
    check(tensors, config, list(table.values()), abstract, described["vocab_size"])

    def leaf(name: str, target: Any) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            return piece(tensors, table[name], target.shape, index, target.dtype)

        where = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with jax.transfer_guard_host_to_device("allow"):
            return jax.block_until_ready(jax.make_array_from_callback(target.shape, where, read))

    return map_named(leaf, abstract)


def stored_dtype(folder: str | os.PathLike[str]) -> Any:
    """Returns the NumPy type that most elements of the checkpoint have; without weights, the one config.json names."""
    described = files.config(folder)
    named = str(described.get("dtype") or described.get("torch_dtype") or "")
    suffixes = {path.suffix for path in Path(folder).expanduser().iterdir()}
    if named and suffixes.isdisjoint(WEIGHTS):
        return {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(named.removeprefix("torch."), np.float32)
    tensors = files.open_folder(folder)
    counts: dict[str, int] = {}
    for name in tensors.file_of:
        kind = tensors.dtype(name)
        counts[kind] = counts.get(kind, 0) + int(np.prod(tensors.shape(name)))
    return DTYPES.get(max(counts, key=lambda kind: counts[kind]), np.float32)


def check(
    tensors: files.Tensors, config: Config, table: Sequence[families.Entry], abstract: PyTree, vocab: int
) -> None:
    """Raises UserError unless the tensors are those of `table`, with the shapes of `abstract` and `vocab` tokens.

    Reads headers only, and a head that is stored although it is tied.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract)}
    for entry in table:
        layered = "{}" in entry.tensor
        parsed = axes.parse(entry.axes)
        theirs = axes.their_shape(parsed, shapes[entry.path][layered:])
        if parsed.theirs[0] == ("vocab",):  # ours is padded, and may have grown
            theirs = (vocab, *theirs[1:])
        for layer in range(config.layers if layered else 1):
            name = entry.tensor.format(layer)
            if name not in tensors.file_of:
                raise UserError(
                    f"{tensors.folder}: has no tensor {name!r}; the checkpoint does not fit its config.json"
                )
            wanted[name] = theirs
    for name, shape in wanted.items():
        found = tensors.shape(name)
        if found != shape:
            raise UserError(
                f"{tensors.folder / tensors.file_of[name]}: {name!r} is {list(found)}, but config.json means "
                f"{list(shape)}; take the config.json that came with the weights"
            )
        if tensors.dtype(name) not in DTYPES:
            raise UserError(
                f"{tensors.folder / tensors.file_of[name]}: {name!r} is {tensors.dtype(name)}; "
                f"jaxcl reads {', '.join(DTYPES)}"
            )
    for name in tensors.file_of:
        known = name in wanted or name.endswith("rotary_emb.inv_freq")  # a constant that old versions stored
        if name == HEAD and config.tied:
            _check_tied(tensors)
        elif not known:
            raise UserError(
                f"{tensors.folder / tensors.file_of[name]}: {name!r} has no place in the model that config.json "
                "describes; a merged adapter or another architecture?"
            )


def _check_tied(tensors: files.Tensors) -> None:
    """Raises UserError if the stored head is not the embedding."""
    rows = tensors.shape(HEAD)[0]
    same = tensors.shape(HEAD) == tensors.shape(EMBEDDING)
    for start in range(0, rows if same else 0, 4096):
        part = (slice(start, min(start + 4096, rows)), slice(None))
        same &= bool(np.array_equal(tensors.read(HEAD, part), tensors.read(EMBEDDING, part)))
    if not same:
        raise UserError(
            f"{tensors.folder / tensors.file_of[HEAD]}: {HEAD!r} differs from {EMBEDDING!r}, but config.json says "
            "tie_word_embeddings; set that to false, or remove the tensor"
        )


def piece(
    tensors: files.Tensors, entry: families.Entry, shape: Sequence[int], index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    """Returns the piece `index` of our parameter of `shape`, in the NumPy type `dtype`."""
    out = np.empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    parsed = axes.parse(entry.axes)
    if "{}" not in entry.tensor:
        _fill(out, tensors, entry.tensor, parsed, shape, index)
        return out
    layers = range(*index[0].indices(shape[0]))

    def fill(place: int) -> None:
        _fill(out[place], tensors, entry.tensor.format(layers[place]), parsed, shape[1:], index[1:])

    with ThreadPoolExecutor(_THREADS) as pool:  # copies of arrays do not hold the interpreter's lock
        for _ in pool.map(fill, range(len(layers))):
            pass
    return out


def _fill(
    out: np.ndarray,
    tensors: files.Tensors,
    name: str,
    parsed: axes.Axes,
    shape: Sequence[int],
    index: tuple[slice, ...],
) -> None:
    """Writes a piece of one tensor to `out`, in our layout; where the tensor ends before our array does, zeros."""
    where, sizes, kept = axes.piece(parsed, shape, index)
    wanted, found = [w.stop - w.start for w in where], tensors.shape(name)
    held = tuple(slice(w.start, min(w.stop, n)) for w, n in zip(where, found, strict=True))
    if any(part.stop <= part.start for part in held):  # a piece of nothing but padding
        out[...] = 0
        return
    tensor = tensors.read(name, held)
    if list(tensor.shape) != wanted:
        tensor = np.pad(tensor, [(0, n - m) for n, m in zip(wanted, tensor.shape, strict=True)])
    ours = axes.to_ours(parsed, tensor, sizes)[kept]
    turned = tensor.ndim == 2 and parsed.ours == (*parsed.theirs[1], *parsed.theirs[0])
    if turned and ours.size == tensor.size:
        flat = out.reshape(tensor.shape[1], tensor.shape[0])
        for start in range(0, len(tensor), _ROWS):
            flat[:, start : start + _ROWS] = tensor[start : start + _ROWS].T
    else:
        out[...] = ours
