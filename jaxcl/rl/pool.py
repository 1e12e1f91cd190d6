"""Verification in worker processes: an answer that hangs, crashes or fills the memory costs the sample, never the run.

  with Pool(verify.make("math"), workers=2, timeout=5.0) as pool:
      rewards, events = pool.rewards(golds, answers)

A cheap verifier of `verify` is called here instead. Rewards are in the order of the answers and do not depend on which
worker gave them; a worker that is killed is replaced. Workers are processes started afresh, not forked: a fork of a
process with JAX's threads may deadlock.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.rl import worker
from jaxcl.rl.verify import Answer, Verifier
from jaxcl.schema import UserError

EVENTS: tuple[str, ...] = ("timeout", "crash", "memory", "error", "value")  # why an answer gets no reward but 0
START = 120.0  # seconds that a worker may take to load its verifier
# What a worker keeps of the environment: what finds programs and libraries, and how text is read. Not the rest, where
# keys are: an answer may make a verifier tell what it knows.
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
_CHUNK = 1 << 16


class Verdicts(NamedTuple):
    """Rewards of a list of answers."""

    rewards: np.ndarray  # float32 [N]
    failed: np.ndarray  # bool [N]: could not be judged; the reward is 0 then
    events: dict[str, int]  # how many answers got 0 for each of EVENTS
    message: str | None  # what the first of them was


class Pool:
    """Workers for one verifier. Not for several threads at once."""

    def __init__(self, verifier: Verifier, *, workers: int = 2, timeout: float = 5.0, memory: int = 1024) -> None:
        """Starts nothing before the first answers, but a first worker if the verifier is not cheap.

        Args:
          verifier: what rewards.
          workers: processes at most.
          timeout: seconds per answer.
          memory: MiB that a worker may use beyond what it uses when it has started.

        Raises:
          UserError: bad options, or a verifier that cannot be loaded.
        """
        for name, value in (("workers", workers), ("timeout", timeout), ("memory", memory)):
            if value <= 0:
                raise UserError(f"config.verifier.{name}={value}: must be positive")
        self.verifier, self.timeout = verifier, timeout
        setup = {"place": verifier.place, "options": verifier.options, "memory": memory << 20, "seconds": timeout}
        self._setup = _line(setup)
        self._workers: list[_Worker | None] = [None] * (0 if verifier.cheap else workers)
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        if self._workers:
            self._workers[0] = _start(self._setup)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers; none is left. May be called twice."""
        self._finalizer()

    def rewards(self, golds: Sequence[Answer], answers: Sequence[Answer]) -> Verdicts:
        """Returns the rewards of N answers.

        Args:
          golds: N right answers, texts or lists of ints.
          answers: N answers of the same kind.

        Raises:
          UserError: the pool is closed, or a worker can no longer be started.
        """
        if not self._finalizer.alive:
            raise UserError("verifier: the pool is closed; make another")
        pairs = list(zip(golds, answers, strict=True))
        jobs = [{"gold": _plain(gold), "answer": _plain(answer)} for gold, answer in pairs]
        if self.verifier.cheap:
            replies = [_here(self.verifier, job) for job in jobs]
        else:
            replies = self._ask([_line(job) for job in jobs])
        events = {event: sum(reply.get("event") == event for reply in replies) for event in EVENTS}
        message = next((r.get("message") or r["event"] for r in replies if "event" in r), None)
        rewards = np.array([reply.get("reward", 0.0) for reply in replies], np.float32)
        return Verdicts(rewards, np.array(["event" in reply for reply in replies], bool), events, message)

    def _ask(self, lines: list[bytes]) -> list[dict[str, Any]]:
        """Returns the reply to each line."""
        replies: list[dict[str, Any]] = [{} for _ in lines]
        waiting = collections.deque(range(len(lines)))
        try:
            while waiting or any(w is not None and w.job >= 0 for w in self._workers):
                for i, one in enumerate(self._workers):
                    if waiting and (one is None or one.job < 0):
                        if one is not None and one.process.poll() is not None:  # killed by others while idle
                            one.end()
                            one = None  # noqa: PLW2901
                        self._workers[i] = one = one or _start(self._setup)  # noqa: PLW2901
                        one.give(waiting[0], lines[waiting.popleft()], time.monotonic() + self.timeout)
                busy = [w for w in self._workers if w is not None and w.job >= 0]
                _exchange(busy, max(0.0, min(w.deadline for w in busy) - time.monotonic()))
                for i, one in enumerate(self._workers):
                    reply = one.reply() if one is not None and one.job >= 0 else None
                    if one is not None and reply is not None:
                        replies[one.job], one.job = reply, -1
                        if reply.get("event") in ("timeout", "crash", "memory"):
                            one.end()
                            self._workers[i] = None
        except BaseException:  # an interrupted pool has workers that owe replies: nobody may take these for others
            self.close()
            raise
        return replies


class _Worker:
    """A process and what is under way to and from it."""

    def __init__(self) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # a script's own folder is not in the environment
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, **own, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that its children end with it, and Ctrl-C is the training's to handle
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.source, self.sink = self.process.stdout.fileno(), self.process.stdin.fileno()
        os.set_blocking(self.source, False)
        os.set_blocking(self.sink, False)
        self.job, self.deadline, self.unsent, self.received, self.broken = -1, 0.0, b"", b"", False

    def give(self, job: int, line: bytes, deadline: float) -> None:
        """Notes what is to be sent."""
        self.job, self.deadline, self.unsent, self.received = job, deadline, line, b""

    def move(self) -> None:
        """Sends and receives what can be without waiting."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.sink, self.unsent[:_CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.source, _CHUNK)
            self.broken |= not chunk
            self.received += chunk

    def reply(self) -> dict[str, Any] | None:
        """Returns the reply if it is there, or the event that keeps it from ever being there; else None."""
        if self.received.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                return json.loads(self.received)
            self.broken = True
        if self.broken:
            return {"event": "crash", "message": "the verifier ended its process"}
        if time.monotonic() >= self.deadline:
            return {"event": "timeout", "message": "the verifier took too long"}
        return None

    def end(self) -> None:
        """Kills the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


def _start(setup: bytes) -> _Worker:
    """Returns a worker that is ready."""
    one = _Worker()
    try:
        one.give(0, setup, time.monotonic() + START)
        while (reply := one.reply()) is None:
            _exchange([one], max(0.0, one.deadline - time.monotonic()))
        if "ready" not in reply:
            raise UserError(str(reply.get("failed") or f"verifier: its process did not start: {reply.get('message')}"))
    except BaseException:
        one.end()
        raise
    one.job = -1
    return one


def _exchange(workers: Sequence[_Worker], seconds: float) -> None:
    """Waits until something can be sent or received, at most so long, and does it."""
    with selectors.DefaultSelector() as selector:
        for one in workers:
            selector.register(one.source, selectors.EVENT_READ, one)
            if one.unsent:
                selector.register(one.sink, selectors.EVENT_WRITE, one)
        for one in {key.data for key, _ in selector.select(seconds)}:
            one.move()


def _end_all(workers: list[_Worker | None]) -> None:
    for i, one in enumerate(workers):
        if one is not None:
            one.end()
            workers[i] = None


def _here(verifier: Verifier, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the reply of a cheap verifier."""
    return worker.rewarded(verifier.score, job, {})


def _plain(answer: Answer) -> Any:
    """Returns an answer for JSON."""
    return answer if isinstance(answer, str) else [int(token) for token in answer]


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
