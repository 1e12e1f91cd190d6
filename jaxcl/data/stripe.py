"""One stripe of a reservoir on disk: an append-only log of rows with a header that is replaced atomically."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.shards import sync
from jaxcl.schema import UserError

_ENTRY = np.dtype([("index", "<u8"), ("crc", "<u8")])


class Head(NamedTuple):
    """What is committed. Everything in the files beyond `records` is what an interrupted commit left behind."""

    generation: int = 0  # number in the names of the files; compaction writes new ones
    count: int = 0  # rows of the stream decided on, in all stripes
    records: int = 0  # rows in the log
    floor: int = 0  # lowest count whose state can be restored
    rewinds: int = 0


class Stripe:
    """The log of the rows accepted into one stripe, in the order of the stream.

    Nothing that is committed is ever overwritten, so a process may be killed at any moment: rows are appended first,
    and the header that counts them follows. The state at an earlier count is a prefix of the log.
    """

    def __init__(self, path: str, width: int, owned: bool):
        self.path, self.width, self.owned = path, width, owned
        self.head, self.index, self.crc = Head(), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []  # (index, rows) not yet committed
        self.lock = self._own() if owned else None
        try:
            if owned and not self.exists:
                self._write_head(Head(), durable=True)
            self.refresh()
            if owned:
                self._tidy()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process own the stripe."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @property
    def exists(self) -> bool:
        """Whether its owner has created it."""
        return os.path.exists(self._head_path())

    def refresh(self) -> Head:
        """Reads the header again, and what has come to the index of the log since."""
        for _ in range(10):
            head, old = self._read_head(), self.head
            same = (head.generation, head.rewinds) == (old.generation, old.rewinds)
            known = min(len(self.index), head.records) if same else 0
            try:
                entries = self._read_entries(head, known)
            except FileNotFoundError:  # the owner has compacted the log since its header was read
                continue
            self.index = np.concatenate([self.index[:known], entries["index"].astype(np.int64)])
            self.crc = np.concatenate([self.crc[:known], entries["crc"].astype(np.int64)])
            self.head = head
            return head
        raise self._damaged("the log")

    def _read_entries(self, head: Head, first: int) -> np.ndarray:
        """Returns the entries of the log from place `first` on."""
        if head.records == first:
            return np.zeros(0, _ENTRY)
        with open(self._file("index", head), "rb") as stream:
            stream.seek(first * _ENTRY.itemsize)
            data = stream.read((head.records - first) * _ENTRY.itemsize)
        if len(data) != (head.records - first) * _ENTRY.itemsize:
            raise self._damaged("the index")
        return np.frombuffer(data, _ENTRY)

    def append(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Takes rows, uint32 [n, width], with their numbers in the stream; they count once committed."""
        if len(index):
            self.pending.append((index, np.array(rows, "<u4")))

    def commit(self, count: int, *, durable: bool) -> None:
        """Makes the appended rows part of the state at `count`."""
        head, index = self.head, self.index
        if self.pending:
            added = np.concatenate([i for i, _ in self.pending])
            rows = np.concatenate([r for _, r in self.pending])
            entries = _entries(added, rows)
            self._put(head, head.records, entries, rows, durable=durable)
            index, self.crc = (
                np.concatenate([index, added]),
                np.concatenate([self.crc, entries["crc"].astype(np.int64)]),
            )
            self.pending = []
        head = head._replace(count=count, records=len(index))
        self._write_head(head, durable=durable)
        self.head, self.index = head, index

    def rewind(self, count: int) -> None:
        """Returns to the state at an earlier count.

        Raises:
          UserError: the state was released, or never committed.
        """
        if not self.head.floor <= count <= self.head.count:
            raise UserError(
                f"{self.path}: holds the states from row {self.head.floor} to {self.head.count}, not {count}; "
                f"restore a checkpoint in between"
            )
        self.pending = []
        if count < self.head.count:
            kept = int(np.searchsorted(self.index, count))
            self.index, self.crc = self.index[:kept], self.crc[:kept]
            self._write_head(self.head._replace(count=count, records=kept, rewinds=self.head.rewinds + 1), durable=True)
            self.head = self._read_head()

    def release(self, count: int, slot_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """Gives up the states before `count`, and rewrites the log once more than half of it is of no use."""
        floor = max(self.head.floor, min(count, self.head.count))
        if floor == self.head.floor:
            return
        old = np.flatnonzero(self.index < floor)
        slots = slot_of(self.index[old])
        last = old[len(old) - 1 - np.unique(slots[::-1], return_index=True)[1]]  # the last row of every slot
        keep = np.sort(np.concatenate([last, np.flatnonzero(self.index >= floor)]))
        head = self.head._replace(floor=floor)
        if len(keep) <= len(self.index) // 2:
            head = head._replace(generation=head.generation + 1, records=0)
            for start in range(0, len(keep), 1024):
                part = keep[start : start + 1024]
                rows = self.read(part)
                self._put(head, start, _entries(self.index[part], rows), rows, durable=True)
            head = head._replace(records=len(keep))
            self.index, self.crc = self.index[keep], self.crc[keep]
        self._write_head(head, durable=True)
        self.head = head
        self._tidy()

    def find(self, index: np.ndarray) -> np.ndarray:
        """Returns where in the log the rows of these numbers lie, int64 [n].

        Raises:
          UserError: the log lacks one of them.
        """
        place = np.searchsorted(self.index, index)
        lost = place == len(self.index)
        lost[~lost] = self.index[place[~lost]] != index[~lost]
        if lost.any():
            raise UserError(
                f"{self.path}: lacks row {index[lost][0]} of the stream; restore a copy, or delete the reservoir and "
                f"start over"
            )
        return place

    def read(self, places: np.ndarray) -> np.ndarray:
        """Returns rows of the log, uint32 [n, width].

        Raises:
          UserError: a row is not what was written.
        """
        out, size = np.empty((len(places), self.width), "<u4"), 4 * self.width
        if not len(places):
            return out
        with open(self._file("rows", self.head), "rb") as stream:
            for i, place in enumerate(places.tolist()):
                data = os.pread(stream.fileno(), size, place * size)
                if len(data) != size or _crc(int(self.index[place]), data) != self.crc[place]:
                    raise self._damaged(f"row {self.index[place]} of the stream")
                out[i] = np.frombuffer(data, "<u4")
        return out

    def _put(self, head: Head, first: int, entries: np.ndarray, rows: np.ndarray, *, durable: bool) -> None:
        """Writes records from place `first` on."""
        for kind, data in (("rows", np.ascontiguousarray(rows, "<u4")), ("index", entries)):
            handle = os.open(self._file(kind, head), os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(handle, "r+b") as stream:
                stream.seek(first * data.nbytes // len(data))
                stream.write(data.tobytes())
                if durable:
                    stream.flush()
                    os.fsync(handle)

    def _own(self) -> int:
        """Locks the stripe for this process."""
        os.makedirs(self.path, exist_ok=True)
        handle = os.open(os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UserError(f"{self.path}: another process writes it; give every process stripes of its own") from error
        return handle

    def _tidy(self) -> None:
        """Removes files of other generations."""
        current = {os.path.basename(self._file(kind, self.head)) for kind in ("rows", "index")}
        for name in os.listdir(self.path):
            if name.startswith(("rows-", "index-")) and name not in current:
                os.remove(os.path.join(self.path, name))

    def _file(self, kind: str, head: Head) -> str:
        return os.path.join(self.path, f"{kind}-{head.generation:05d}.bin")

    def _head_path(self) -> str:
        return os.path.join(self.path, "head.json")

    def _read_head(self) -> Head:
        try:
            with open(self._head_path(), encoding="utf-8") as stream:
                values: dict[str, Any] = json.load(stream)
            checksum = values.pop("checksum")
            head = Head(**values)
        except FileNotFoundError:
            return Head()
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("head.json") from error
        if checksum != _checksum(head):
            raise self._damaged("head.json")
        return head

    def _write_head(self, head: Head, *, durable: bool) -> None:
        partial = self._head_path() + ".partial"
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump({**head._asdict(), "checksum": _checksum(head)}, stream)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(partial, self._head_path())
        if durable:
            sync(self.path)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what} is damaged; restore a copy, or delete the reservoir and start over")


def _entries(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the entries of the index file for these rows."""
    entries = np.empty(len(index), _ENTRY)
    entries["index"] = index
    entries["crc"] = [_crc(i, row.tobytes()) for i, row in zip(index.tolist(), rows, strict=True)]
    return entries


def _crc(index: int, data: bytes) -> int:
    """Returns the CRC-32 of a row together with its number, so that a row in the wrong place is noticed too."""
    return zlib.crc32(data, index & 0xFFFFFFFF)


def _checksum(head: Head) -> int:
    return zlib.crc32(repr(tuple(head)).encode())
