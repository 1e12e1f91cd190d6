"""What a run has saved, without the run: reads and copies checkpoints.

A checkpoint holds every leaf of the state, with one exception. The base below an adapter never changes: a run that took
it from a folder saves the checksums of its arrays alone (`BASE`), and reads the arrays from that folder again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxcl import manifests
from jaxcl.checksum import checksums
from jaxcl.manifests import MANIFEST
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import Params, PyTree

WEIGHTS = ("params/", "memory/frozen/")  # where the parameters of a model are in a state, trained and frozen
PIECE = 2**26  # bytes of an array that are compressed at once
BASE = "memory/frozen/base/"  # the leaves that a checkpoint may leave to the folder they came from
Base = Callable[[PyTree], Params]  # nested dicts of jax.ShapeDtypeStruct with shardings -> the arrays of the folder


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str], *, step: int | None = None) -> int:
    """Copies one checkpoint, by default the newest, between two directories of checkpoints and returns its step.

    For several processes, call it on one of them before the others look.

    Raises:
      UserError: no such checkpoint, a damaged one, or `target` has one already.
    """
    old, new = epath.Path(source), epath.Path(target)
    if manifests.steps(new):
        raise UserError(f"{target}: has checkpoints already: {manifests.steps(new)}; choose a new directory")
    step, path, manifest = _chosen(old, step)
    for name in manifest["files"]:
        (new / str(step) / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).copy(new / str(step) / name)
    manifests.write(new / str(step) / MANIFEST, (path / MANIFEST).read_text())
    return step


def params(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    base: Base | None = None,
) -> tuple[int, Params]:
    """Returns the step and the parameters of one checkpoint, by default the newest; nothing else of it is read.

    Parameters that are trained and those that are frozen come as one nested dict.

    Args:
      directory: of the checkpoints of a run.
      step: of one of them; None = the newest.
      sharding: of every array; None = all on the first device.
      base: reads the leaves below `BASE`, where the checkpoint does not hold them.

    Raises:
      UserError: no such checkpoint, or a damaged one, or the base is not the one that was trained on.
    """
    step, loaded, _ = read(directory, step=step, sharding=sharding, wanted=WEIGHTS, base=base)
    short = {name.removeprefix(start): x for start in WEIGHTS for name, x in loaded.items() if name.startswith(start)}
    return step, manifests.nest(short)


def read(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    wanted: tuple[str, ...] = ("",),
    base: Base | None = None,
) -> tuple[int, dict[str, jax.Array], dict[str, Any]]:
    """Returns the step, the leaves whose names begin with one of `wanted`, and the host part; see `params`."""
    root = epath.Path(os.path.abspath(directory) if "://" not in str(directory) else directory)
    step, path, manifest = _chosen(root, step)
    place = sharding or SingleDeviceSharding(jax.local_devices()[0])
    try:
        asked = {
            name: jax.ShapeDtypeStruct(shape, kind, sharding=place)
            for name, (shape, kind, _) in manifest["leaves"].items()
            if name.startswith(wanted)
        }
    except TypeError as error:
        raise UserError(f"{path / MANIFEST}: {' '.join(str(error).split())}; choose another checkpoint") from error
    loaded, differ = arrays(path, manifest, asked, base)
    if differ:
        raise UserError(f"{directory}: checkpoint {step}: {differ[0]} differs from what was saved; choose another step")
    return step, loaded, manifests.host(path)


def arrays(
    path: epath.Path, manifest: Mapping[str, Any], asked: Mapping[str, jax.ShapeDtypeStruct], base: Base | None
) -> tuple[dict[str, jax.Array], list[str]]:
    """Returns the arrays of a checkpoint by name, and the names of those whose checksums are not those of the manifest.

    Args:
      path: of the checkpoint.
      manifest: that was verified.
      asked: leaves with shardings, none of them empty.
      base: see `params`.

    Raises:
      UserError: a base is needed and not given, or differs from the one that was trained on.
    """
    without = not manifest.get("base", True)
    names = [name for name in manifest["leaves"] if not (without and name.startswith(BASE))]
    try:
        tree = manifests.nest({name: asked.get(name, ocp.PLACEHOLDER) for name in names})
        with memory(asked.values()):
            loaded = ocp.load(path / "state", tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # a forged manifest, or forged files
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its arrays are not those of its {MANIFEST} ({text}); choose another") from error
    found = {name: x for name, x in named_leaves(loaded) if name in asked}
    below = {name.removeprefix(BASE): leaf for name, leaf in asked.items() if name not in found}
    if below:
        if base is None:
            raise UserError(f"{path}: holds an adapter alone, and the config names no checkpoint as its base")
        found |= {BASE + name: x for name, x in named_leaves(base(manifests.nest(below)))}
    sums = np.asarray(checksums([found[name] for name in asked]).addressable_data(0)).tolist()
    differ = [name for name, total in zip(asked, sums, strict=True) if total != manifest["leaves"][name][2]]
    if changed := [name.removeprefix(BASE) for name in differ if name.removeprefix(BASE) in below]:
        raise UserError(
            f"{path}: {changed[0]} of config.model.checkpoint is not what this adapter was trained on; restore that "
            "folder as it was"
        )
    return {name: found[name] for name in asked}, differ


def memory(leaves: Iterable[Any]) -> ocp.Context:
    """Returns the context in which Orbax reads and writes: beside the arrays, memory for the largest and some pieces.

    Args:
      leaves: what is read or written, with shapes and dtypes.
    """
    largest = max((math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves), default=0)
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = PIECE
    context.memory.read_concurrent_bytes = max(largest, 2**30)
    return context


def _chosen(directory: epath.Path, step: int | None) -> tuple[int, epath.Path, dict[str, Any]]:
    """Returns the number, the path and the manifest of the checkpoint at `step`, or of the newest one for None.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    whole = manifests.completed(directory)
    if not whole or (step is not None and step not in whole):
        asked = "no checkpoint" if step is None else f"no checkpoint at step {step}"
        raise UserError(f"{directory}: {asked}; it has {whole or 'none'}")
    step = whole[-1] if step is None else step
    reason, manifest = manifests.verify(directory / str(step), everything=True)
    if manifest is None:
        others = [other for other in whole if other != step]
        raise UserError(f"{directory}: checkpoint {step} is damaged: {reason}; choose one of {others or 'none'}")
    return step, directory / str(step), manifest
