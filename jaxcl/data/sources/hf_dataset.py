"""Hugging Face dataset folders: those of `save_to_disk`, and clones of a repository of the hub.

    save_to_disk     state.json, dataset_info.json, data-*.arrow; or dataset_dict.json and one such folder per split
    a clone          README.md and Parquet, JSON lines or Arrow files, whose names (or folders) say the split:
                     data/train-00000-of-00002.parquet, test.jsonl, validation/a.jsonl.gz; all are "train" if none does

They are read with pyarrow; the `datasets` package is not needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.sources import Source, jsonl, parquet, records
from jaxcl.schema import UserError, nearest

_JSON = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_WORDS |= {"evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_WORDS |= {"dev": "validation"}  # the words by which the hub knows a split
_END = b"\xff\xff\xff\xff\0\0\0\0"  # closes a stream of Arrow batches


def make(
    *,
    path: str,
    split: str = "train",
    column: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    where: Mapping[str, Any] | None = None,
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of one split of a dataset folder.

    Args:
      path: the folder; of a repository with several configurations, the folder of one of them.
      split: name of the split.
      column: of the text; "text" unless the next ones are given.
      messages: column of lists of messages instead.
      prompt: column of a user's turn instead, with `response`.
      response: column of the answer.
      where: column -> value, or list of values, of the rows that are kept.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest; read from README.md or dataset_info.json unless given.

    Raises:
      UserError: no such folder, split, file or column; a file that is damaged.
    """
    chosen = records.fields(column, messages, prompt, response, where)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"config.sources: path={path!r}: no such folder; give the folder of a dataset")
    folder, paths = _saved(root, split) if _is_saved(root) else (root, _cloned(root, split))
    options = {"path": path, "split": split}
    licence = licence or _licence(folder) or _licence(root)
    return records.source("hf_dataset", options, paths, _read, chosen, max_bytes=max_bytes, licence=licence)


def _is_saved(root: Path) -> bool:
    """Returns whether `save_to_disk` made the folder."""
    return (root / "dataset_dict.json").exists() or (root / "state.json").exists()


def _saved(root: Path, split: str) -> tuple[Path, list[str]]:
    """Returns the folder of a split that `save_to_disk` wrote, and its files."""
    if (root / "dataset_dict.json").exists():
        splits = _list(root / "dataset_dict.json", "splits", str)
        if split not in splits:
            raise _no_split(root, split, splits)
        root = root / split
    state = _json(root / "state.json")
    own = state.get("_split")  # null for a dataset made of several
    if own and own != split:
        raise _no_split(root, split, [str(own)])
    if state.get("_indices_data_files"):
        raise UserError(
            f"{root / 'state.json'}: is of an old version, rows by an index; save it again with datasets 2+"
        )
    found = [root / str(entry.get("filename")) for entry in _list(root / "state.json", "_data_files", dict)]
    for file in found:
        if file.parent != root or file.name == "..":
            name = os.path.relpath(file, root)
            raise UserError(f"{root / 'state.json'}: names {name!r}, no file of its folder; do not use this dataset")
        if not file.is_file():
            raise UserError(f"{file}: missing, but {root / 'state.json'} names it; copy the folder again")
    if not found:
        raise UserError(f"{root / 'state.json'}: names no files of data; save the dataset again")
    return root, [str(file) for file in found]


def _cloned(root: Path, split: str) -> list[str]:
    """Returns the files of a split of a repository of the hub."""
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.name.endswith((".parquet", ".arrow", *_JSON)) and file.is_file() and not hidden:
            found.setdefault(_split_of(file.relative_to(root)), []).append(file)
    if not found:
        raise UserError(f"{root}: holds no Parquet, JSON lines or Arrow files; check the path")
    if split not in found:
        raise _no_split(root, split, list(found))
    folders = sorted({str(file.parent.relative_to(root)) for file in found[split]})
    if len(folders) > 1:
        raise UserError(f"{root}: split {split!r} lies in {', '.join(folders)}; give one of these folders as path")
    return [str(file) for file in found[split]]


def _split_of(file: Path) -> str:
    """Returns the split that the name of a file, or of a folder above it, says; "train" if none does."""
    if shard := _SHARD.match(file.name):
        return _WORDS.get(shard[1], shard[1])
    for part in reversed(file.parts):
        words = [_WORDS[word] for word in re.split(r"[\W_\d]+", part.lower()) if word in _WORDS]
        if words:
            return words[0]
    return "train"


def _no_split(root: Path, split: str, known: Sequence[str]) -> UserError:
    """Returns the error of a split that is not there."""
    return UserError(f"config.sources: split={split!r}: not in {root}{nearest(split, known)} (has {', '.join(known)})")


def _read(name: str, columns: Sequence[str]) -> Iterator[tuple[str, records.Record]]:
    """Yields place and row of a file of any of the three kinds."""
    if name.endswith(_JSON):
        return jsonl.read(name, columns)
    return parquet.read(name, columns) if name.endswith(".parquet") else _arrow(name, columns)


def _arrow(name: str, columns: Sequence[str]) -> Iterator[tuple[str, records.Record]]:
    """Yields place and row of a stream of Arrow batches; the file is mapped, not loaded."""
    import pyarrow  # noqa: PLC0415  (only those who use it pay for the import)

    try:
        with open(name, "rb") as stream:
            stream.seek(max(0, os.path.getsize(name) - len(_END)))
            if stream.read() != _END:
                raise UserError(f"{name}: cannot be read (truncated); replace the file or leave it out")
        with pyarrow.memory_map(name) as file, pyarrow.ipc.open_stream(file) as batches:
            for column in columns:
                if column not in batches.schema.names:
                    raise records.absent(column, batches.schema.names, name)
            number = 0
            for batch in batches:
                batch.validate(full=True)  # of a forged one the library would read memory that is not the file's
                for start in range(0, len(batch), parquet.BATCH):
                    for row in batch.slice(start, parquet.BATCH).select(list(columns)).to_pylist():
                        yield f"{name}[{number}]", row
                        number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise records.broken(name, error) from error


def _json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: missing or damaged; copy the folder again") from error


def _list(path: Path, key: str, kind: type) -> list[Any]:
    """Returns a list of a JSON file."""
    found = _json(path).get(key) or []
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise UserError(f"{path}: {key} is no list of {kind.__name__}; copy the folder again")
    return found


def _licence(folder: Path) -> str | None:
    """Returns the licence that a README's front matter or dataset_info.json names, None if neither does."""
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = front and re.search(r"^licen[sc]e:[ \t]*(?:\[?(\S[^\]\n]*?)\]?[ \t]*$|\n\s*- *(\S+))", front[1], re.M)
        if found:
            return (found[1] or found[2]).strip("'\"")
    if (folder / "dataset_info.json").is_file():
        found = _json(folder / "dataset_info.json").get("license")
        return found if found and isinstance(found, str) else None
    return None
