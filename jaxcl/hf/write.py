"""Parameters -> checkpoint folder: sharded safetensors with their index, whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxcl.hf import axes, families, files
from jaxcl.models.config import Config
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import Params

SHARD_BYTES = 5 * 10**9
_ROOM = 2**16  # at most for the table of a shard: some 500 tensors; a shard takes no more
_SPELLED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What belongs to a tokenizer, wherever a folder has it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


class Writer:
    """A folder of safetensors that appears under its name when it is complete; no tensor waits in memory.

    with Writer(Path("out")) as out:
        out.add("model.norm.weight", array)
        out.json("config.json", {...})

    A file of the format opens with a table of its tensors. Room for it is left at the front and filled in last; the
    format allows spaces behind the table.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES, single: str = files.SINGLE):
        """Prepares a folder beside `folder`; `single` is the file of the tensors if they fit in one shard.

        Raises:
          UserError: `folder` exists.
        """
        self.folder = folder.expanduser()
        if self.folder.exists():
            raise UserError(f"{self.folder}: exists; choose another folder, or remove it")
        self.partial = self.folder.parent / f".{self.folder.name}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)  # of an attempt that was cut short
        self.partial.mkdir(parents=True)
        self._limit, self._single = shard_bytes, single
        self._table = min(_ROOM, max(_ROOM // 32, shard_bytes // 8))  # bytes for the table of a shard
        self._shards: list[dict[str, Any]] = []  # the table of each
        self._file: BinaryIO | None = None  # the last of them, while it is open
        self._room = self._size = 0  # bytes left for the table; bytes of tensors in the open shard
        self._bytes = self._elements = 0

    def __enter__(self) -> Writer:
        """Returns itself; leaving the block publishes the folder, or removes it after an error."""
        return self

    def __exit__(self, kind: Any, error: object, trace: object) -> None:
        if kind is not None:
            return self._remove(error)
        try:
            self._publish()
        except BaseException as late:
            self._remove(late)
            raise

    def _remove(self, error: object) -> None:
        """Leaves nothing behind."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk complains once more
                self._file.close()
        shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.folder)  # a failed write does not know its file

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor to the open shard, or to a new one if that is full."""
        entry = {"dtype": _SPELLED[tensor.dtype.name], "shape": list(tensor.shape)}
        needed = len(json.dumps({name: entry})) + 64  # and two offsets
        full = self._size and self._size + tensor.nbytes > self._limit
        # Readers map a file as it is, so every tensor starts at a multiple of its element's size.
        if self._file is None or full or needed > self._room or self._size % tensor.itemsize:
            self._close()
            self._file = open(self.partial / str(len(self._shards)), "wb")  # noqa: SIM115  (closed by _close)
            self._file.seek(8 + self._table)
            self._shards.append({"__metadata__": {"format": "pt"}})
            self._room, self._size = self._table - 64, 0
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        entry["data_offsets"] = [self._size, self._size + tensor.nbytes]
        self._shards[-1][name] = entry
        self._room -= needed
        self._size += tensor.nbytes
        self._bytes += tensor.nbytes
        self._elements += tensor.size

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        (self.partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def copy(self, path: Path) -> None:
        """Copies a file."""
        shutil.copyfile(path, self.partial / path.name)

    def _close(self) -> None:
        """Writes the table of the open shard."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(self._table.to_bytes(8, "little") + json.dumps(self._shards[-1]).encode().ljust(self._table))
        self._file.close()
        self._file = None

    def _publish(self) -> None:
        """Gives the shards their names, writes the index, and gives the folder its name."""
        self._close()
        count = len(self._shards)
        names = (
            [self._single] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        )
        for i, name in enumerate(names):
            os.rename(self.partial / str(i), self.partial / name)
        if count > 1:
            table = {
                tensor: name
                for name, held in zip(names, self._shards, strict=True)
                for tensor in held
                if tensor != "__metadata__"
            }
            total = {"total_size": self._bytes, "total_parameters": self._elements}
            self.json(files.INDEX, {"metadata": total, "weight_map": table})
        for path in [*self.partial.iterdir(), self.partial]:
            _sync(path)
        os.rename(self.partial, self.folder)
        _sync(self.folder.parent)


def _sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors(params: Params, config: Config, kind: families.Family, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a family, without the rows that pad the vocabulary; one layer at a time is on the host.

    Args:
      params: of a transformer of this shape; arrays that this process can reach.
      config: its shape.
      kind: the family.
      dtype: NumPy type of the tensors.
    """
    leaves = dict(named_leaves(params))
    for entry in families.entries(kind, config):
        parsed = axes.parse(entry.axes)
        layers = range(config.layers) if "{}" in entry.tensor else [None]
        for layer in layers:
            leaf = leaves[entry.path] if layer is None else leaves[entry.path][layer]
            array = np.asarray(jax.device_get(leaf)).astype(dtype)
            if "vocab" in parsed.ours:
                array = array.take(range(config.vocab), axis=parsed.ours.index("vocab"))
            yield entry.tensor.format(layer), axes.to_theirs(parsed, array)
