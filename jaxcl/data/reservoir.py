"""A bounded uniform sample of a stream on disk, for data that may not be kept.

    r = make("runs/x/reservoir", capacity=100_000, width=rows.width(length), seed=0)
    r.add(words, start_index=r.count)      # rows of the stream, uint32 [n, width], in order
    r.commit()                             # from here on they can be sampled, and no crash loses them
    words, index = r.sample(step, 16)      # a function of (seed, step, committed count)
    r.rewind(count)                        # on resume: exactly the state at the checkpoint
    r.release(count)                       # no checkpoint before `count` will be restored: disk space may be reused

Algorithm R (Vitter, ACM TOMS 11(1), 1985): row i < M goes to slot i; a later row draws j uniformly from 0..i and
replaces the row in slot j if j < M. After N rows every subset of M rows is equally likely to be held. The draw is a
hash of (seed, i), so the content is a function of (seed, rows) and neither of time nor of the number of processes.

Rows are held in stripes (slot mod `stripes`), each an append-only log with one owner (`stripe.py`). Every process is
told of all rows, in the same order, and stores those of its stripes; `wanted` says which these are, so that the
others need not be read. Disk: `capacity` rows, plus the rows replaced since the oldest state that can be
restored, up to twice that before a log is rewritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np

from jaxcl.data.permutation import fold_in, key_of, permute
from jaxcl.data.stripe import Stripe
from jaxcl.schema import UserError

_FORMAT = 1


def slots_of(index: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """Returns the slot that algorithm R gives to rows of the stream, int64 [n]; -1 = the row is not kept.

    The modulus of a 64-bit hash favours small numbers by less than (i + 1) / 2^64.
    """
    rank = np.asarray(index, np.uint64)
    draw = (fold_in(key_of(_FORMAT, seed, "reservoir"), rank) % (rank + np.uint64(1))).astype(np.int64)
    slot = np.where(rank < capacity, rank.astype(np.int64), draw)
    return np.where(slot < capacity, slot, -1)


class Reservoir:
    """See the module's docstring; made by `make`."""

    def __init__(self, path: str, capacity: int, seed: int, stripes: list[Stripe]):
        self.path, self.capacity, self.seed, self.stripes = path, capacity, seed, stripes
        self.count = self.committed  # rows of the stream decided on, committed or not
        self._held = (-1, [], np.zeros(0, np.int64), np.zeros(0, np.int64))  # what `held` said last
        if self.count == 0:
            lost = [stripe.path for stripe in stripes if not stripe.exists]
            if lost and any(stripe.head.count for stripe in stripes):
                raise UserError(f"{lost[0]}: missing; restore it, or delete {path} and start over")
        for stripe in self._owned():
            stripe.rewind(self.count)  # a crash between the commits of two stripes

    @property
    def committed(self) -> int:
        """Number of rows of the stream that the committed state covers."""
        return min(stripe.head.count for stripe in self.stripes)

    def __enter__(self) -> Reservoir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes own the stripes."""
        for stripe in self.stripes:
            stripe.close()

    def wanted(self, n: int) -> np.ndarray:
        """Returns which of the next n rows this process stores: their numbers in the stream, int64, ascending."""
        index = np.arange(self.count, self.count + n)
        slots = slots_of(index, self.capacity, self.seed)
        owned = [k for k, stripe in enumerate(self.stripes) if stripe.owned]
        return index[(slots >= 0) & np.isin(slots % len(self.stripes), owned)]

    def add(self, rows: np.ndarray, start_index: int, total: int | None = None) -> None:
        """Takes the next rows of the stream.

        Args:
          rows: uint32 [n, width], all of them; or, with `total`, only those that `wanted(total)` names.
          start_index: number of the first row in the stream; must be `count`.
          total: number of rows that the stream advances by.

        Raises:
          UserError: rows left out or given twice, or of another width.
        """
        if start_index != self.count:
            raise UserError(
                f"{self.path}: row {start_index} given, row {self.count} expected; rewind({start_index}) after a "
                f"restart, and leave no row out"
            )
        n = len(rows) if total is None else total
        wanted = self.wanted(n)
        width = self.stripes[0].width
        if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.uint32:
            raise UserError(f"{self.path}: rows are {rows.dtype} {list(rows.shape)}; expected uint32 [n, {width}]")
        if total is not None and len(rows) != len(wanted):
            raise UserError(f"{self.path}: {len(rows)} rows given; wanted({total}) names {len(wanted)}")
        chosen = rows if total is not None else rows[wanted - start_index]
        place = slots_of(wanted, self.capacity, self.seed) % len(self.stripes)
        for k, stripe in enumerate(self.stripes):
            if stripe.owned:
                stripe.append(wanted[place == k], chosen[place == k])
        self.count += n

    def commit(self, *, durable: bool = True) -> int:
        """Makes all rows added so far part of the state and returns their number, `count`.

        Args:
          durable: wait until the disk has them, so that a power failure loses nothing either; without it the state
            survives the end of the process only.
        """
        for stripe in self._owned():
            stripe.commit(self.count, durable=durable)
        return self.count

    def rewind(self, count: int) -> None:
        """Returns to the state at a count that was committed and not released; rows after it are forgotten.

        Raises:
          UserError: there is no such state.
        """
        for stripe in self._owned():
            stripe.rewind(count)
        self.count = count

    def release(self, count: int) -> None:
        """Allows the states before `count` to be given up: no checkpoint older than that will be restored."""
        stripes = len(self.stripes)
        for stripe in self._owned():
            stripe.release(count, lambda index: slots_of(index, self.capacity, self.seed) // stripes)

    def held(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns what each slot holds at a committed count.

        Args:
          count: default: the committed count.

        Returns:
          Number of the row in the stream and place in the log of the stripe slot mod `stripes`, int64 [min(count, M)].

        Raises:
          UserError: some stripe is not committed up to `count`.
        """
        for stripe in self.stripes:
            if not stripe.owned:
                stripe.refresh()
        count = self.committed if count is None else count
        low, high = max(stripe.head.floor for stripe in self.stripes), self.committed
        if not low <= count <= high:
            raise UserError(
                f"{self.path}: holds the states from row {low} to {high}, not {count}; commit on every process first"
            )
        logs = [(stripe.head.generation, stripe.head.rewinds) for stripe in self.stripes]
        since, before, index, place = self._held
        if since > count or before != logs:
            since, index, place = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
        missing = np.full(min(count, self.capacity) - len(index), -1, np.int64)
        index, place = np.concatenate([index, missing]), np.concatenate([place, missing])
        for stripe in self.stripes:
            first, end = np.searchsorted(stripe.index, [since, count])
            slots = slots_of(stripe.index[first:end], self.capacity, self.seed)
            index[slots], place[slots] = (
                stripe.index[first:end],
                np.arange(first, end),
            )  # of equal slots, the last stays
        self._held = (count, logs, index, place)
        return index, place

    def sample(self, step: int, n: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns n rows drawn uniformly without replacement (with, once all have come).

        Args:
          step: training step; another step draws other rows.
          n: number of rows.
          count: state to draw from; default: the committed one. Processes that sample together must give it, and wait
            for each other between `commit` and `sample`.

        Returns:
          Rows, uint32 [n, width], and their numbers in the stream, int64 [n].

        Raises:
          UserError: the reservoir is empty, or some stripe is not committed up to `count`.
        """
        index, place = self.held(count)
        if not len(index):
            raise UserError(f"{self.path}: nothing committed yet; add rows and commit before sampling")
        rounds, rank = np.divmod(np.arange(n), len(index))
        key = fold_in(fold_in(key_of(_FORMAT, self.seed, "sample"), step), rounds)
        slots = permute(rank, len(index), key)
        out = np.empty((n, self.stripes[0].width), np.uint32)
        for k, stripe in enumerate(self.stripes):
            mine = np.flatnonzero(slots % len(self.stripes) == k)
            out[mine] = stripe.read(place[slots[mine]])
        return out, index[slots]

    def _owned(self) -> list[Stripe]:
        return [stripe for stripe in self.stripes if stripe.owned]


def make(
    path: str,
    *,
    capacity: int,
    width: int,
    seed: int = 0,
    stripes: int = 1,
    own: Sequence[int] | None = None,
) -> Reservoir:
    """Opens a reservoir, and creates it first if there is none.

    Args:
      path: folder.
      capacity: M, rows that are held.
      width: uint32 words of a row.
      seed: of the draws.
      stripes: number of logs, fixed for the life of the reservoir; at least the number of processes that write.
      own: stripes that this process writes, e.g. `range(process, stripes, processes)`; default: all.

    Raises:
      UserError: the folder holds another reservoir, or another process owns one of the stripes.
    """
    if capacity < 1 or width < 1 or not 1 <= stripes <= capacity:
        raise UserError(
            f"config.reservoir: capacity={capacity}, width={width}, stripes={stripes}: "
            f"need capacity >= stripes >= 1 and width >= 1"
        )
    owned = set(range(stripes) if own is None else own)
    if not owned <= set(range(stripes)):
        raise UserError(f"config.reservoir.own={sorted(owned)}: stripes are numbered 0 to {stripes - 1}")
    shape = {"format": _FORMAT, "capacity": capacity, "width": width, "seed": seed, "stripes": stripes}
    os.makedirs(path, exist_ok=True)
    file = os.path.join(path, "reservoir.json")
    if not os.path.exists(file):
        partial = f"{file}.{os.getpid()}"
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(shape, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)  # processes that create it together write the same
    with open(file, encoding="utf-8") as stream:
        found = json.load(stream)
    if found != shape:
        other = {key: value for key, value in found.items() if value != shape.get(key)}
        raise UserError(f"config.reservoir: {path} was made with {other}; use the same values or another folder")
    logs: list[Stripe] = []
    try:
        for k in range(stripes):
            logs.append(Stripe(os.path.join(path, f"stripe-{k:05d}"), width, k in owned))
        return Reservoir(path, capacity, seed, logs)
    except BaseException:
        for log in logs:
            log.close()
        raise
