"""Packed rows: what a stream reads, wherever the rows lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxcl.types import Batch

NAMES = ("inputs", "targets", "weights", "segments", "positions")
Columns = dict[str, np.ndarray]  # those of NAMES, and what a source adds; the leading axis counts rows
_CHUNK = 2**22  # bytes that are hashed at a time


class Lazy:
    """Some rows of an array that are made when they are asked for: stands for an array [n, ...] in a table."""

    def __init__(self, array: np.ndarray, index: np.ndarray, make: Callable[[np.ndarray], np.ndarray]):
        """Takes rows of an array on disk or in memory, where tables may share it.

        Args:
          array: [N, ...].
          index: of the rows, int64 [n].
          make: [k, ...] as they are -> [k, ...] as they are read, each row by itself.
        """
        self._array, self._index, self._make = array, index, make
        one = make(array[:1])
        self.dtype, self.shape = one.dtype, (len(index), *one.shape[1:])
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: np.ndarray | slice | int) -> np.ndarray:
        picked = self._index[rows]
        made = self._make(self._array[np.atleast_1d(picked)])
        return made if np.ndim(picked) else made[0]


Stored = Mapping[str, np.ndarray | Lazy]  # columns as a source has them


@dataclass(frozen=True)
class Rows:
    """A random-access table of rows.

    `fetch` returns the columns of a `Batch` for any row numbers, so that a stream does not care
    whether a row is text, an image or something else.
    """

    tokens: np.ndarray  # int64 [N] targets of each row that count in the loss
    fetch: Callable[[np.ndarray], Columns]  # row numbers int64 [n] -> columns [n, ...]
    fingerprint: str  # sha256 of the content: equal rows, equal fingerprint
    bytes_per_token: float | None = None  # UTF-8 bytes of text per token, to report bits per byte
    words: Callable[[np.ndarray], np.ndarray] | None = None  # packed rows uint32 [n, width(L)], if they are text
    labels: np.ndarray | None = None  # int [N], of rows of a classifier

    def __len__(self) -> int:
        return len(self.tokens)


def width(length: int) -> int:
    """Returns the number of uint32 words of a packed row of `length` targets: count, tokens, and two planes of bits."""
    return 1 + (length + 1) + 2 * _plane(length)


def _plane(length: int) -> int:
    """Returns the number of words that hold one bit for each token of a row."""
    return -(-(length + 1) // 32)


def pack(tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, trained: np.ndarray | None = None) -> np.ndarray:
    """Packs rows into words.

    Args:
      tokens: uint32 [n, L + 1].
      starts: bool [n, L + 1], True where a document begins.
      counts: int [n], tokens in use; the rest is padding.
      trained: bool [n, L + 1], True where the token is a target; None: every token in use.

    Returns:
      uint32 [n, width(L)].
    """

    def plane(flags: np.ndarray) -> np.ndarray:
        bits = np.zeros((len(flags), _plane(flags.shape[1] - 1) * 4), np.uint8)
        packed = np.packbits(flags, axis=1, bitorder="little")
        bits[:, : packed.shape[1]] = packed
        return bits.view("<u4")

    used = np.arange(tokens.shape[1]) < counts[:, None]
    targets = used if trained is None else used & trained
    return np.concatenate([counts.astype("<u4")[:, None], tokens.astype("<u4"), plane(starts), plane(targets)], axis=1)


def unpack(words: np.ndarray, length: int) -> Columns:
    """Returns the columns of packed rows.

    Targets are the inputs shifted by one within the row. A target has weight 1 if it belongs to the same document
    as its input and is one that is trained, and 0 otherwise: the first token of the next document is never predicted,
    nor what the user of a conversation says. Positions
    restart at 0 with every document, and at the beginning of the row for one that continues from the row before.

    Args:
      words: uint32 [n, width(L)].
      length: L.

    Returns:
      inputs, targets, segments, positions int32 [n, L]; weights float32 [n, L].
    """
    tokens = words[:, 1 : length + 2].astype(np.int32)  # [n, L + 1]
    bits = np.ascontiguousarray(words[:, length + 2 :]).reshape(len(words), 2, _plane(length)).view(np.uint8)
    starts, trained = np.unpackbits(bits, axis=2, bitorder="little", count=length + 1).transpose(1, 0, 2)
    starts = starts.copy()
    starts[:, 0] = 1
    place = np.arange(length + 1, dtype=np.int32)
    used = place < words[:, :1].astype(np.int32)
    segments = np.cumsum(starts, axis=1, dtype=np.int32) * used
    positions = (place - np.maximum.accumulate(place * starts, axis=1)) * used
    counted = used[:, 1:] & (trained[:, 1:] > starts[:, 1:])  # both are 0 or 1
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": counted.astype(np.float32),
        "segments": segments[:, :-1],
        "positions": positions[:, :-1],
    }


def from_words(words: np.ndarray, length: int) -> Rows:
    """Returns rows that lie in memory, packed, uint32 [N, width(L)]."""
    words = np.ascontiguousarray(words, "<u4")
    tokens = unpack(words, length)["weights"].sum(axis=1).astype(np.int64)
    fingerprint = hashlib.sha256(f"{length}/".encode() + words.tobytes()).hexdigest()
    return Rows(tokens, lambda index: unpack(words[index], length), fingerprint, words=lambda index: words[index])


def from_columns(columns: Stored) -> Rows:
    """Returns rows that lie as columns [N, ...] in memory or on disk, such as images with their labels."""
    count, targets = len(columns["weights"]), columns["targets"]
    weights = columns["weights"][:].reshape(count, -1)
    digest = hashlib.sha256()
    for name in sorted(columns):
        column = columns[name]
        digest.update(f"{name}/{column.dtype}/{column.shape}/".encode())
        step = max(1, _CHUNK * count // max(column.nbytes, 1))
        for start in range(0, count, step):
            digest.update(np.ascontiguousarray(column[start : start + step]).data.cast("B"))
    tokens = (weights > 0).sum(axis=1).astype(np.int64)
    labels = targets[:] if len(targets.shape) == 1 else None
    return Rows(tokens, lambda index: {k: v[index] for k, v in columns.items()}, digest.hexdigest(), labels=labels)


def batches(rows: Rows, *, size: int, task: int = 0, limit: int | None = None) -> Iterator[Batch]:
    """Yields rows once in order, `size` at a time, for evaluation; the last batch is filled with rows of weight 0.

    Args:
      rows: the table.
      size: B.
      task: number that every row carries.
      limit: stop after this many rows.
    """
    total = len(rows) if limit is None else min(limit, len(rows))
    for start in range(0, total, size):
        columns = rows.fetch(np.arange(start, min(start + size, total)))
        yield batch_of(columns, np.full(size, task, np.int32))


def batch_of(columns: Columns, task: np.ndarray, extra: Columns | None = None) -> Batch:
    """Returns a batch of B = len(task) rows: the columns, then rows of zeros as far as needed.

    `extra` has the columns that are not among NAMES, and those given.
    """
    missing = len(task) - len(columns["inputs"])

    def fill(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x

    added = {name: fill(x) for name, x in columns.items() if name not in NAMES}
    return Batch(*(fill(columns[name]) for name in NAMES), task, added | (extra or {}))  # type: ignore[arg-type]
