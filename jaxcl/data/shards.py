"""Files of checked, fixed-size records: ArrayRecord shards written once and read at random."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcl.schema import UserError

ROWS_PER_FILE = 1 << 16
# One record per group, so that a row can be read alone; tokens of real text gain little from compression.
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0"  # rows are read at random
_BUFFER = 32768  # bytes


def damaged(file: str, what: str) -> UserError:
    """Returns the error for a file of rows that cannot be used; its folder can always be built anew."""
    return UserError(f"{file}: {what}; delete {os.path.dirname(file)} to have it rebuilt")


def sync(path: str) -> None:
    """Waits until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """Writes records `{split}-00000.array_record`, ... into a folder."""

    def __init__(self, folder: str, split: str):
        self.folder, self.split = folder, split
        self.files: list[dict[str, Any]] = []
        self.room = 0
        self.out: Any = None

    def write(self, words: np.ndarray) -> None:
        """Appends rows, uint32 [n, width]."""
        from array_record.python import array_record_module  # noqa: PLC0415  (only those who use it pay for the import)  # pyright: ignore[reportAttributeAccessIssue]

        for row in words:
            if not self.room:
                self._finish()
                self.files.append({"name": f"{self.split}-{len(self.files):05d}.array_record", "rows": 0})
                self.out = array_record_module.ArrayRecordWriter(self._path(), _WRITE)
                self.room = ROWS_PER_FILE
            data = row.tobytes()
            with self._named():
                self.out.write(zlib.crc32(data).to_bytes(4, "little") + data)
            self.files[-1]["rows"] += 1
            self.room -= 1

    def close(self) -> list[dict[str, Any]]:
        """Finishes and returns name, rows and bytes of every file.

        Raises:
          OSError: the file could not be written, such as on a full disk; also by `write`.
        """
        self._finish()
        return self.files

    def _path(self) -> str:
        return os.path.join(self.folder, self.files[-1]["name"])

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turns what the library raises if it cannot write into an error of the file."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(errno.EIO, " ".join(str(error).split(";")[0].split()), self._path()) from error

    def _finish(self) -> None:
        if self.out is not None:
            with self._named():
                self.out.close()
            self.files[-1]["bytes"] = os.path.getsize(self._path())
            self.out = None


def reader(folder: str, files: Sequence[dict[str, Any]], words: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from row numbers, int64 [n], to rows, uint32 [n, words]; files are opened when first needed.

    Raises:
      UserError: a file is missing or has another size than it was written with; on reading, a record is damaged.
    """
    paths = [os.path.join(folder, file["name"]) for file in files]
    for path, file in zip(paths, files, strict=True):
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if size != file["bytes"]:
            raise damaged(path, "missing" if size < 0 else f"{size} bytes instead of {file['bytes']}")
    ends = np.cumsum([file["rows"] for file in files]) if files else np.zeros(1, np.int64)
    opened: dict[int, Any] = {}

    def read(index: np.ndarray) -> np.ndarray:
        index = np.asarray(index, np.int64)
        if index.size and (index.min() < 0 or index.max() >= ends[-1]):
            raise IndexError(f"row {index.min()} or {index.max()} is outside the {ends[-1]} rows of {folder}")
        out = np.empty((len(index), words), "<u4")
        where = np.searchsorted(ends, index, side="right")
        for k in np.unique(where).tolist():
            mine = np.flatnonzero(where == k)
            first = int(ends[k]) - files[k]["rows"]
            if k not in opened:
                opened[k] = _open(paths[k])
            out[mine] = _records(opened[k], paths[k], (index[mine] - first).tolist(), words)
        return out

    return read


def _open(path: str) -> Any:
    """Opens a file of records."""
    from array_record.python import array_record_module  # noqa: PLC0415  (only those who use it pay for the import)  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return array_record_module.ArrayRecordReader(path, options=_READ, file_reader_buffer_size=_BUFFER)
    except RuntimeError as error:
        raise damaged(path, f"damaged ({error})") from error


def _records(handle: Any, path: str, places: list[int], words: int) -> np.ndarray:
    """Returns records of one file, uint32 [n, words], each checked against its CRC-32."""
    try:
        records = handle.read(places)
    except (RuntimeError, IndexError) as error:
        raise damaged(path, f"damaged ({str(error).splitlines()[0]})") from error
    for place, record in zip(places, records, strict=True):
        if len(record) != 4 * (words + 1) or zlib.crc32(memoryview(record)[4:]) != int.from_bytes(record[:4], "little"):
            raise damaged(path, f"record {place} is damaged")
    return np.frombuffer(b"".join(records), "<u4").reshape(len(places), words + 1)[:, 1:]


def save_counts(path: str, tokens: np.ndarray) -> None:
    """Writes the number of targets of every row."""
    np.save(path, tokens.astype("<u4"))


def load_counts(path: str, rows: int, total: int) -> np.ndarray:
    """Returns the number of targets of every row, int64 [N].

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        tokens = np.load(path).astype(np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, "missing or damaged") from error
    if tokens.shape != (rows,) or tokens.sum() != total:
        raise damaged(path, "damaged")
    return tokens
