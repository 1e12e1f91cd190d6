"""A bounded uniform sample of a stream on disk, for data that may not be kept.

    r = make("runs/x/reservoir", capacity=100_000, width=rows.width(length), seed=0)
    r.add(words, start_index=r.count)      # rows of the stream, uint32 [n, width], in order
    r.commit()                             # from here on they can be sampled, and no crash loses them
    words, index = r.sample(step, 16)      # a function of (seed, step, committed count)
    words = r.read(index)                  # the same rows, by their numbers
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
_CHUNK = 1 << 16  # rows hashed at a time


def slots_of(index: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """Returns the slot that algorithm R gives to rows of the stream, int64 [n]; -1 = the row is not kept.

    The modulus of a 64-bit hash favours small numbers by less than (i + 1) / 2^64.
    """
    rank = np.asarray(index, np.uint64)
    draw = (fold_in(key_of(_FORMAT, seed, "reservoir"), rank) % (rank + np.uint64(1))).astype(np.int64)
    slot = np.where(rank < capacity, rank.astype(np.int64), draw)
    return np.where(slot < capacity, slot, -1)


class Contents:
    """Which rows algorithm R holds after any number of rows, by hashing alone: nothing is read.

    A function of the count; the last two answers are kept because the next one starts from them.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity, self.seed = capacity, seed
        self._known: tuple[tuple[int, np.ndarray], ...] = ()

    def at(self, count: int) -> np.ndarray:
        """Returns the number of the row in each slot after `count` rows, int64 [min(count, M)]; not to be changed."""
        known = [(0, np.zeros(0, np.int64)), *self._known]  # one reading: two threads may ask
        since, index = max((k for k in known if k[0] <= count), key=lambda k: k[0])
        if since == count:
            return index
        index = np.concatenate([index, np.full(min(count, self.capacity) - len(index), -1)])
        for start in range(since, count, _CHUNK):
            number = np.arange(start, min(start + _CHUNK, count))
            slots = slots_of(number, self.capacity, self.seed)
            index[slots[slots >= 0]] = number[slots >= 0]  # of equal slots, the last stays
        self._known = (*known[1:][-1:], (count, index))
        return index

    def draw(self, step: int, n: int, count: int) -> np.ndarray:
        """Returns the numbers of n rows drawn uniformly without replacement (with, once all have come), int64 [n].

        Args:
          step: training step; another step draws other rows.
          n: number of rows.
          count: rows of the stream that have come, at least 1.
        """
        index = self.at(count)
        rounds, rank = np.divmod(np.arange(n), len(index))
        key = fold_in(fold_in(key_of(_FORMAT, self.seed, "sample"), step), rounds)
        return index[permute(rank, len(index), key)]


class Reservoir:
    """See the module's docstring; made by `make`."""

    def __init__(self, path: str, capacity: int, seed: int, stripes: list[Stripe]):
        self.path, self.capacity, self.seed, self.stripes = path, capacity, seed, stripes
        self.count = self.committed  # rows of the stream decided on, committed or not
        self.contents = Contents(capacity, seed)
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

    def refresh(self) -> int:
        """Reads what other processes have committed and returns the committed count."""
        for stripe in self.stripes:
            if not stripe.owned:
                stripe.refresh()
        return self.committed

    def held(self, count: int | None = None) -> np.ndarray:
        """Returns the number of the row in each slot at a committed count, int64 [min(count, M)].

        Args:
          count: default: the committed count.

        Raises:
          UserError: some stripe is not committed up to `count`, or `count` was released.
        """
        high, low = self.refresh(), max(stripe.head.floor for stripe in self.stripes)
        count = high if count is None else count
        if not low <= count <= high:
            raise UserError(
                f"{self.path}: holds the states from row {low} to {high}, not {count}; commit on every process first"
            )
        return self.contents.at(count)

    def sample(self, step: int, n: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns n rows drawn as by `Contents.draw`.

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
        count = self.refresh() if count is None else count
        if not len(self.held(count)):
            raise UserError(f"{self.path}: nothing committed yet; add rows and commit before sampling")
        index = self.contents.draw(step, n, count)
        return self.read(index), index

    def read(self, index: np.ndarray) -> np.ndarray:
        """Returns the rows of these numbers in the stream, uint32 [n, width].

        Raises:
          UserError: a row is damaged, or held in no state that was committed and not released.
        """
        for _ in range(10):
            try:
                return self._read(index)
            except FileNotFoundError:  # the owner has compacted a log since its header was read
                self.refresh()
        raise UserError(f"{self.path}: a log is missing; restore a copy, or delete the reservoir and start over")

    def _read(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), self.stripes[0].width), np.uint32)
        owner = slots_of(index, self.capacity, self.seed) % len(self.stripes)
        for k, stripe in enumerate(self.stripes):
            mine = np.flatnonzero(owner == k)
            out[mine] = stripe.read(stripe.find(index[mine]))
        return out

    def _owned(self) -> list[Stripe]:
        return [stripe for stripe in self.stripes if stripe.owned]


def shape_of(path: str) -> dict[str, int]:
    """Returns what the reservoir in a folder was made with: capacity, width, seed, stripes; empty if there is none.

    Raises:
      UserError: the file that says so is damaged.
    """
    file = os.path.join(path, "reservoir.json")
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file} is damaged; restore a copy, or delete {path} and start over") from error


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
    found = shape_of(path)
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
