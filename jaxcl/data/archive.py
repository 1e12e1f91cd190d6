"""The reservoir of a run: filled with the new rows of its stream, read when they are replayed.

    archive = Archive("runs/x/reservoir", stream)
    archive.check(step)                    # can the run continue from a checkpoint at `step`? Writes nothing
    archive.open(step)                     # rewinds to where the run was at `step`
    recall = archive.at(step)              # commits what is due, waits for the other processes
    stream.at(step, recall=recall)         # replayed rows come from the disk, whatever their source holds now
    archive.release(step)                  # no checkpoint before `step` is kept: disk space may be reused

Which rows are replayed is a function of the step (`Stream.index`): those drawn at step s have come before the last
multiple of COMMIT_STEPS, so it does not matter who has committed how much more, or reads ahead. What is in them
is known here only. A new row is read from its source at its own step and again at the next commit, and once more if the
run is continued from a checkpoint before that commit; from then on the run reads it here. (Every start opens the
packed rows of all sources, whose fingerprints it checks, and reads the first batch for its shapes.)
"""

from __future__ import annotations

import time

import numpy as np

from jaxcl.data import reservoir
from jaxcl.data.rows import Columns, unpack, width
from jaxcl.data.stream import Recall, Stream
from jaxcl.schema import UserError

WAIT_SECONDS = 300.0  # processes are a few steps apart at the most; one that is later has died
_CHUNK = 1024  # rows checked at a time


class Archive:
    """See the module's docstring. One thread at a time calls it, except for `release`."""

    def __init__(self, path: str, stream: Stream, *, process: int = 0, processes: int = 1):
        """Nothing is read or written yet.

        Args:
          path: folder, shared by all processes.
          stream: with a reservoir.
          process: number of this one.
          processes: how many there are; it may change from start to start.
        """
        self.path, self.stream, self.process, self.processes = path, stream, process, processes
        self.length = stream.blank()["inputs"].shape[1]
        self.reservoir: reservoir.Reservoir | None = None
        self._oldest = 0  # step of the oldest checkpoint that is kept
        self._ready = 0  # count that all processes are known to have committed
        self._since: float | None = None  # when waiting for them began

    def check(self, step: int) -> None:
        """Finds out whether the state before `step` is there and whole: each process reads its share of the rows.

        Raises:
          UserError: it is not.
        """
        count = self._before(step)
        if not reservoir.shape_of(self.path):
            if count:
                raise self._lost(step, "is missing")
            return
        with self._make(own=False) as found:
            low, high = max(stripe.head.floor for stripe in found.stripes), found.committed
            if not low <= count <= high:
                raise self._lost(step, f"holds the states from row {low} to {high} of the stream, not {count}")
            index = found.held(count)[self.process :: self.processes]
            for start in range(0, len(index), _CHUNK):
                found.read(index[start : start + _CHUNK])

    def open(self, step: int) -> None:
        """Returns to the state before `step`, and creates the folder first if need be.

        Every process must have done so before any goes on to `at`.
        """
        self.reservoir = self.reservoir or self._make(own=True)
        self.reservoir.rewind(self._before(step))
        self._ready, self._since = 0, None

    def at(self, step: int) -> Recall:
        """Commits the rows that are due at `step` and returns how to read what it replays; steps come in order.

        Raises:
          UserError: another process has not committed its part in WAIT_SECONDS.
        """
        count, store = self.stream.stored(step), self._opened()
        if store.count < count:
            total = count - store.count
            store.add(self._words(store.wanted(total)), store.count, total=total)
            store.commit()
            store.release(self._before(self._oldest))
        if self._ready < count:
            self._wait(count)
        return self._columns

    def release(self, step: int) -> None:
        """Says that no checkpoint before `step` is kept; the next commit makes use of it."""
        self._oldest = step

    def close(self) -> None:
        """Lets other processes own the files."""
        if self.reservoir:
            self.reservoir.close()
            self.reservoir = None

    def _before(self, step: int) -> int:
        """Returns the rows that are surely committed when `step` steps are done, whatever was read ahead."""
        return self.stream.stored(step - 1)

    def _opened(self) -> reservoir.Reservoir:
        if self.reservoir is None:
            raise RuntimeError("Archive: call open() first")
        return self.reservoir

    def _make(self, *, own: bool) -> reservoir.Reservoir:
        contents = self.stream.contents
        assert contents is not None
        stripes = reservoir.shape_of(self.path).get("stripes", min(self.processes, contents.capacity))
        return reservoir.make(
            self.path,
            capacity=contents.capacity,
            width=width(self.length),
            seed=contents.seed,
            stripes=stripes,
            own=range(self.process, stripes, self.processes) if own else (),
        )

    def _words(self, number: np.ndarray) -> np.ndarray:
        """Returns new rows of the stream from their sources, uint32 [n, width]."""
        source, row = self.stream.find(number)
        out = np.empty((len(number), width(self.length)), np.uint32)
        for k in np.unique(source):
            words = self.stream.rows[k].words
            assert words is not None
            out[source == k] = words(row[source == k])
        return out

    def _columns(self, number: np.ndarray) -> Columns:
        return unpack(self._opened().read(number), self.length)

    def _wait(self, count: int) -> None:
        """Waits until every process has committed `count` rows."""
        store = self._opened()
        self._since = self._since or time.monotonic()  # kept after a failure: the steps that follow fail at once
        while (committed := store.refresh()) < count:
            if time.monotonic() - self._since > WAIT_SECONDS:
                raise UserError(
                    f"{self.path}: another process has committed {committed} rows of the stream and not {count} in "
                    f"{WAIT_SECONDS:.0f} s; make sure that all processes run and share this folder"
                )
            time.sleep(0.002)
        self._ready, self._since = count, None

    def _lost(self, step: int, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what}, which the checkpoint at step {step} needs; restore it from a copy, or start a new "
            f"--workdir"
        )
