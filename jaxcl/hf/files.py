"""A folder of safetensors files as one table of tensors, read by ranges."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.schema import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensors(NamedTuple):
    """The tensors of a folder; nothing is read before `read`."""

    folder: Path
    file_of: Mapping[str, str]  # tensor -> file
    handles: Mapping[str, Any]  # file -> open file

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor as safetensors spells it: F32, BF16, F16 ..."""
        return self._slice(name).get_dtype()

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns a tensor, or a piece of it: only the pages that hold the piece are read.

        The file is mapped anew, so that those pages leave the memory of the process with the mapping.
        """
        return open_file(self.folder / self.file_of[name]).get_slice(name)[... if where is None else where]

    def _slice(self, name: str) -> Any:
        return self.handles[self.file_of[name]].get_slice(name)


def config(folder: str | os.PathLike[str], name: str = "config.json") -> dict[str, Any]:
    """Returns a JSON file of a checkpoint folder.

    Raises:
      UserError: no such folder or file, or no JSON object.
    """
    path = Path(folder).expanduser() / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a folder that holds a Hugging Face checkpoint") from None
    except NotADirectoryError:
        raise UserError(f"{path.parent}: is a file; name the folder of the checkpoint") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; fetch it again")
    return value


def open_folder(folder: str | os.PathLike[str]) -> Tensors:
    """Returns the tensors of a folder.

    Raises:
      UserError: no safetensors files; a shard that is missing or cut short; an index that names what is not there.
    """
    place = Path(folder).expanduser()
    if (place / INDEX).exists():
        table = config(place, INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError(f"{place / INDEX}: has no weight_map; fetch it again")
    elif (place / SINGLE).exists():
        table = dict.fromkeys(open_file(place / SINGLE).keys(), SINGLE)
    else:
        other = [*place.glob("*.bin"), *place.glob("*.pt"), *place.glob("*.pth")]
        found = f"only {other[0].name}, a pickle, which is never loaded" if other else "none"
        raise UserError(f"{place}: holds no safetensors files ({found}); save the model in that format")
    for file in table.values():
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", "..") or "\0" in file:
            raise UserError(
                f"{place / INDEX}: names {file!r}, which is no file of its folder; do not use this checkpoint"
            )
    if not table:
        raise UserError(f"{place / SINGLE}: holds no tensors; fetch it again")
    handles = {file: open_file(place / file) for file in sorted(set(table.values()))}
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in table.items():
        if name not in held[file]:
            raise UserError(f"{place / file}: lacks the tensor {name!r} that {INDEX} expects there; fetch it again")
    return Tensors(place, table, handles)


def open_file(path: Path) -> Any:
    """Opens one file; its header is checked against its size."""
    import safetensors  # noqa: PLC0415  (only those who import a checkpoint pay for it)

    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete, fetch this shard") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from None
