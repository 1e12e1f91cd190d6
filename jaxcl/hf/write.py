"""Parameters -> checkpoint folder: sharded safetensors with their index, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.hf import axes, families, files
from jaxcl.models.config import Config
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import Params

SHARD_BYTES = 5 * 10**9
# What belongs to a tokenizer, wherever a folder has it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


class Writer:
    """A folder of safetensors that appears under its name when it is complete.

    with Writer(Path("out")) as out:
        out.add("model.norm.weight", array)
        out.json("config.json", {...})
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
        self._limit, self._single, self._pending, self._size = shard_bytes, single, {}, 0
        self._shards: list[list[str]] = []
        self._bytes = self._elements = 0

    def __enter__(self) -> Writer:
        """Returns itself; leaving the block publishes the folder, or removes it after an error."""
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind is None:
            self._publish()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes a tensor; it is written when its shard is full."""
        if self._pending and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor)
        self._size += tensor.nbytes
        self._bytes += tensor.nbytes
        self._elements += tensor.size

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        (self.partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def copy(self, path: Path) -> None:
        """Copies a file."""
        shutil.copyfile(path, self.partial / path.name)

    def _flush(self) -> None:
        """Writes the pending tensors as one shard, whose final name is not yet known."""
        from safetensors import numpy as safetensors  # noqa: PLC0415  (only those who export pay for it)

        safetensors.save_file(self._pending, self.partial / str(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._size = {}, 0

    def _publish(self) -> None:
        """Gives the shards their names, writes the index, and gives the folder its name."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        names = (
            [self._single] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        )
        for i, name in enumerate(names):
            os.rename(self.partial / str(i), self.partial / name)
        if count > 1:
            table = {tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held}
            total = {"total_size": self._bytes, "total_parameters": self._elements}
            self.json(files.INDEX, {"metadata": total, "weight_map": table})
        for path in [*self.partial.iterdir(), self.partial]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.rename(self.partial, self.folder)


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
