"""What watches over a run: hangs, devices that disagree, steps that do not repeat, traces, and where the time goes.

    hang       no step for `hang_s` seconds: the stacks of all threads go to hang-PROCESS.txt and the process ends with
               status 4, so that a launcher starts it again; a process that waits for ever costs as much as all others
    digests    if `digest_every` is set, every so many steps and before every save, devices that hold copies of the same
               numbers compare checksums: a bit that has flipped in one copy ends the run before it is saved or spreads
    repeat     a step that the guard rejects is taken again from the last checkpoint; other values the second time
               mean a fault of the machine, equal ones that the data are at fault
    trace      a profile of some steps, for XProf or Perfetto

Source: the attribution of faults by repeating is that of Megatron-LM's rerun state machine and of SIGMA (2025); norms
cannot see a flipped bit of a mantissa, checksums of all bits do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import statistics
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcl import checksum, goodput
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves

MACHINE = 4  # exit status: a fault of the machine; start again, if need be elsewhere
SLOWER = 20  # a step that takes so many times as long as the median is a hang, if `hang_s` have passed as well
WINDOW = 64  # steps that the median covers


class Watch(NamedTuple):
    """The section `config.watch`.

    Attributes:
      hang_s: seconds without a step after which the process ends; compiling and evaluating count. None = never.
      digest_every: steps between two comparisons of the devices' copies; None = never.
      repeat: whether steps that the guard rejects are taken again from the last checkpoint, once each.
      trace: first step of a profile and the step after its last, e.g. (10, 13); it goes to `trace` in the run's folder.
    """

    hang_s: float | None = 3600.0
    digest_every: int | None = None
    repeat: bool = False
    trace: Sequence[int] | None = None


class MachineFault(Exception):
    """Devices that should hold the same numbers do not."""

    cause = "machine"


class Repeat(Exception):
    """A step is to be taken again from the last checkpoint."""


class Watcher:
    """One process's watch over a run."""

    def __init__(self, options: Watch, folder: Path):
        check(options)
        self.options, self.folder = options, folder
        self.hours = goodput.Ledger(None if jax.process_index() else folder)
        self.suspects: dict[int, tuple[float, ...]] = {}  # step -> what it gave when the guard rejected it
        self.past: dict[int, tuple[float, ...]] = {}  # the same of every step since the last checkpoint
        self.found: list[tuple[int, str]] = []  # what repeating steps has shown
        self._busy: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._seen, self._step = time.monotonic(), 0
        self._tracing = self._ready = False
        self._closed = threading.Event()

    @contextlib.contextmanager
    def attempt(self, began: float, step: Callable[[], int]) -> Iterator[None]:
        """Looks for hangs while a block runs, and enters when and why it ends; `began` is the start of the process."""
        self.hours.started(began)
        self.alive()
        if self.options.hang_s is not None:
            threading.Thread(target=self._look, args=(self.options.hang_s,), name="watch", daemon=True).start()
        try:
            yield
            self.hours.ended(step(), "finished")
        except BaseException as error:
            self.hours.ended(step(), getattr(error, "cause", type(error).__name__))
            raise
        finally:
            self._closed.set()
            if self._tracing:
                jax.profiler.stop_trace()
                self._tracing = False

    def back(self) -> None:
        """Says that the run goes on from a checkpoint."""
        self._ready = False

    def alive(self) -> None:
        """Says that the process is getting on with something."""
        self._seen = time.monotonic()

    def took(self, step: int, seconds: float, busy: float, values: Mapping[str, float]) -> None:
        """Notes a step and what it gave.

        Args:
          step: its number, from 1.
          seconds: since the step before.
          busy: those of them in which the process did not wait for its device.
          values: its metrics.

        Raises:
          Repeat: the guard has rejected the step, and it was not repeated before.
        """
        self.alive()
        self._step = step
        if self._ready:  # the first step compiles
            self._recent.append(seconds)
            self._busy.append(busy)
            self.hours.took(step, seconds)
        else:
            self._ready = True
            self.hours.ready(step - 1)
        if not self.options.repeat:
            return
        gave = tuple(values[name] for name in ("loss", "grad_norm"))
        before = self.past.get(step)
        if before is not None and not same(gave, before):
            self.found.append(
                (step, f"gave {show(gave)} after {show(before)}: a fault of the machine, not of the data")
            )
            self.suspects = {k: v for k, v in self.suspects.items() if k < step}
        elif before is not None and step in self.suspects:
            self.found.append((step, f"gives {show(gave)} again: its rows or the settings are at fault"))
        self.past[step] = gave
        if values.get("guard/consecutive", 0) >= 1 and step not in self.suspects:
            self.suspects[step] = gave
            raise Repeat(f"step {step} was rejected")

    def told(self) -> list[tuple[int, str]]:
        """Returns (step, text) of what repeating has shown since the last call."""
        found, self.found = self.found, []
        return found

    def saved(self, step: int) -> None:
        """Notes a checkpoint, and forgets what steps gave up to it: they will not be repeated."""
        self.hours.beat(step)
        self.past = {number: gave for number, gave in self.past.items() if number > step}

    def busiest(self) -> dict[str, float]:
        """Returns what the processes' own seconds a step were since the last call: see `skew`; {} of one process."""
        mean = statistics.fmean(self._busy) if self._busy else 0.0
        self._busy = []
        if jax.process_count() == 1:
            return {}
        return skew(np.asarray(multihost_utils.process_allgather(np.float32(mean))))

    def compare(self, step: int, state: Any, *, now: bool = False) -> None:
        """Compares the copies that devices hold, if it is time to or `now`.

        Raises:
          MachineFault: some differ.
        """
        every = self.options.digest_every
        if every is not None and (now or step % every == 0) and (names := differing(state)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MachineFault(
                f"step {step}: devices hold different copies of {names[0]}{more}: a bit has flipped in memory or on "
                "the way; nothing was saved since the comparison before, the same command continues from there"
            )

    def profile(self, step: int) -> None:
        """Starts and stops the trace before a step."""
        if self.options.trace is None:
            return
        first, end = self.options.trace
        if not self._tracing and first <= step < end:
            jax.profiler.start_trace(str(self.folder / "trace"))
            self._tracing = True
        elif self._tracing and step >= end:
            jax.profiler.stop_trace()
            self._tracing = False

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Enters the time of a block as `evaluation` or `save`."""
        with self.hours.spending(what):
            yield
        self.alive()

    def _look(self, limit: float) -> None:
        while not self._closed.wait(min(1.0, limit / 4)):
            quiet = time.monotonic() - self._seen
            usual = statistics.median(self._recent) if self._recent else 0.0
            if quiet > max(limit, SLOWER * usual):
                hung(self.folder, self._step, quiet, self.hours)


def hung(folder: Path, step: int, quiet: float, hours: goodput.Ledger, leave: Callable[[int], Any] = os._exit) -> None:
    """Writes where all threads stand and ends the process."""
    path = folder / f"hang-{jax.process_index()}.txt"
    with path.open("w") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
    hours.ended(step, "hang")
    print(
        f"error: no step for {quiet:.0f} s after step {step} (config.watch.hang_s); the stacks are in {path}; "
        "the same command continues from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    leave(MACHINE)  # threads that hang cannot be asked to leave


def check(options: Watch) -> None:
    """Raises UserError for values that the types do not exclude."""
    if options.hang_s is not None and not options.hang_s > 0:
        raise UserError(f"config.watch.hang_s={options.hang_s}: must be above 0, or None for never")
    if options.digest_every is not None and options.digest_every < 1:
        raise UserError(f"config.watch.digest_every={options.digest_every}: must be at least 1, or None for never")
    if options.trace is not None:
        whole = len(options.trace) == 2 and all(isinstance(n, int) for n in options.trace)
        if not whole or not 0 <= options.trace[0] < options.trace[1]:
            given = list(options.trace)
            raise UserError(f"config.watch.trace={given}: give its first step and that after its last, as in (10, 13)")


def skew(seconds: np.ndarray) -> dict[str, float]:
    """Returns how uneven processes are, of the mean seconds [P] in which each did not wait for its device.

    All wait for the slowest at every step, so that their steps take equally long; what each does itself tells which one
    it is. `skew` is the greatest over the median, 1 where all are alike; `slowest` is the number of a process.
    """
    middle = float(np.median(seconds))
    return {
        "busy_least_s": float(seconds.min()),
        "busy_median_s": middle,
        "busy_most_s": float(seconds.max()),
        "skew": float(seconds.max()) / middle if middle > 0 else 1.0,
        "slowest": int(seconds.argmax()),
    }


def differing(state: Any) -> list[str]:
    """Returns the names of the leaves of which two devices hold different copies, on any process."""
    names, rows = [], []
    for name, leaf in named_leaves(state):
        if not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and len(leaf.addressable_shards) == 1):
            continue
        key = zlib.crc32(name.encode())
        for shard in leaf.addressable_shards:
            place = zlib.crc32(repr([(s.start, s.stop) for s in shard.index]).encode())
            names.append(name)
            rows.append((key, place, shard.data))
    if not rows:
        return []
    sums = [checksum.checksums([bits_of(data)]) for _, _, data in rows]
    table = np.asarray([(k, p, int(s[0])) for (k, p, _), s in zip(rows, sums, strict=True)], np.int64)
    if jax.process_count() > 1:
        table = np.asarray(multihost_utils.process_allgather(table.astype(np.uint32))).reshape(-1, 3).astype(np.int64)
    seen: dict[tuple[int, int], int] = {}
    bad = {int(k) for k, p, value in table if seen.setdefault((int(k), int(p)), int(value)) != int(value)}
    return sorted({name for name in names if zlib.crc32(name.encode()) in bad})


def bits_of(x: jax.Array) -> jax.Array:
    """Returns an array that has a checksum: a random key as its numbers."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Returns whether numbers are equal; what is not a number equals itself."""
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))


def show(gave: Sequence[float]) -> str:
    """Returns a loss and a norm as text."""
    return f"loss {gave[0]:.6g} and gradient norm {gave[1]:.6g}"
