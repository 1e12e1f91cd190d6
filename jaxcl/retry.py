"""Why a job ended, and what to do: end, go on at once, go on elsewhere, or wait and go on.

    python -m jaxcl.retry -- python -m jaxcl.main --config=FILE --workdir=FOLDER

runs the command until it has finished or must not be repeated. `tpu/babysit.sh` asks the same questions of `judge`, for
jobs on machines that are elsewhere. Exit statuses are those of `jaxcl.train.run`; what they leave open is read from
the end of the log, and from the ledger of time in the folder of the run (`jaxcl.goodput`).

A step at which two attempts have failed is not left to chance a third time: its rows or the settings are at fault, or
the machine repeats its mistake. Waits double, and lie between half and the whole of that (jitter), by a key: jobs that
fail together do not come back together. All of it is a function of what has happened; only `main` acts.

Source: actions by cause are what SIGMA (2025) has a table of exit statuses for; the jitter is "equal jitter" of
Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxcl import console, goodput
from jaxcl.schema import UserError

STOPPED = 75  # JAXCL_STOPPED, see jaxcl.distributed
HEALTHY_S = 3600.0  # a job that ran so long breaks the row of failures
HOUR_S = 3600.0
TAIL = 16_384  # bytes of a log that are looked at
LEFT_OPEN = ("finished", "SIGTERM", "SIGINT")  # causes in a ledger that name no failed step


class Policy(NamedTuple):
    """What follows from a cause.

    Attributes:
      action: `end`; `now`: the same command at once; `elsewhere`: on other machines, where there are any; `wait`.
      limit: retries in a row for this cause; None = only those for all causes count.
      why: the cause in words.
    """

    action: str
    limit: int | None
    why: str


# From the most to the least telling: of several processes, the first of these that one of them names is the cause.
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "user": Policy("end", 0, "bad input: the same command would fail again"),
        "training": Policy("end", 0, "training cannot go on; it went back to a checkpoint itself"),
        "interrupted": Policy("end", 0, "interrupted by hand"),
        "memory": Policy("wait", 2, "out of memory"),
        "disk": Policy("wait", 2, "a disk is full or fails"),
        "machine": Policy("elsewhere", 3, "a fault of the machine"),
        "hang": Policy("wait", 3, "no step for too long"),
        "crash": Policy("wait", 3, "the process crashed"),
        "killed": Policy("wait", None, "killed: the machine is gone, or its memory was full"),
        "unknown": Policy("wait", None, "the job failed"),
        "cloud": Policy("wait", None, "the machines could not be had or reached"),
        "coordinator": Policy("wait", None, "another process or the coordinator is gone"),
        "preempted": Policy("now", None, "stopped with its state saved"),
        "finished": Policy("end", 0, "finished"),
    }
)
CHANCE = ("preempted", "coordinator", "cloud")  # strike anywhere: twice at one step says nothing of the step
STATUSES: Mapping[int, str] = MappingProxyType(
    {0: "finished", 2: "user", 3: "training", STOPPED: "preempted", 130: "interrupted", 143: "preempted"}
    | dict.fromkeys((132, 134, 135, 136, 139), "crash")  # SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV
)
SIGNS = (
    ("machine", re.compile(r"devices hold different copies|ECC_UNCORRECTABLE")),
    ("hang", re.compile(r"no step for \d+ s after step")),
    ("disk", re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error")),
    ("memory", re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|MemoryError|oom-kill")),
    ("coordinator", re.compile(r"another process or its machine is gone|[Cc]oordination service|Barrier timed out")),
)


def classify(status: int, log: str = "", ended: str | None = None) -> str:
    """Returns the cause, a key of POLICIES.

    Args:
      status: exit status; 128 + n or -n after signal n.
      log: its end.
      ended: the cause that the ledger of time names.
    """
    status = 128 - status if status < 0 else status
    if status in STATUSES:
        known = STATUSES[status]
        if known != "crash":
            return known
    signs = [name for name, pattern in SIGNS if pattern.search(log)]
    if status == 4:  # the run itself says that it is the machine
        return next((name for name in signs if name in ("machine", "hang", "coordinator")), ended_by(ended, "machine"))
    if signs:
        return signs[0]
    return STATUSES.get(status) or ("killed" if status == 137 else ended_by(ended, "unknown"))


def ended_by(ended: str | None, otherwise: str) -> str:
    """Returns the cause that a ledger's word stands for."""
    return {"hang": "hang", "machine": "machine", "not saved": "disk", "MemoryError": "memory"}.get(
        ended or "", otherwise
    )


def worst(causes: Iterable[str]) -> str:
    """Returns the most telling of the causes of several processes."""
    found = set(causes)
    return next(name for name in POLICIES if name in found)


class Entry(NamedTuple):
    """How one attempt ended.

    Attributes:
      at: second at which.
      cause: key of POLICIES.
      step: at which it failed, if that is known exactly.
      ran: seconds that it ran.
    """

    at: float
    cause: str
    step: int | None = None
    ran: float = 0.0


class Limits(NamedTuple):
    """How patient to be.

    Attributes:
      retries: failures in a row after which to give up.
      backoff: seconds before the first retry, twice as many before each further one.
      most: the longest wait in seconds.
      hour: starts in an hour, for any cause; the next one waits until an hour has passed since the first.
    """

    retries: int = 5
    backoff: float = 30.0
    most: float = 900.0
    hour: int = 30


class Verdict(NamedTuple):
    """What to do: `action` of a Policy, after `wait` seconds; `text` says why and how often that was so."""

    action: str
    wait: float
    text: str


def decide(history: Sequence[Entry], limits: Limits, key: str = "", why: str = "") -> Verdict:
    """Returns what follows from the last entry of a history, given those before it.

    Args:
      history: all attempts that ended, the oldest first.
      limits: see there.
      key: of the jitter; the same key and history give the same wait.
      why: the cause in words, in place of those of its policy.
    """
    last = history[-1]
    policy = POLICIES[last.cause]
    why = why or policy.why
    if policy.action == "end":
        return Verdict("end", 0.0, why)
    recent = sum(last.at - entry.at < HOUR_S for entry in history)
    pause = max(history[-limits.hour].at + HOUR_S - last.at, 0.0) if recent >= limits.hour else 0.0
    if policy.action == "now":
        return Verdict("now", pause, why)
    if (step := repeated(history)) is not None:
        text = f"{why}, at step {step} as before: its rows, the settings or the code are at fault; not tried again"
        return Verdict("end", 0.0, text)
    row = in_a_row(history)
    same = sum(entry.cause == last.cause for entry in row)
    if len(row) > limits.retries or (policy.limit is not None and same > policy.limit):
        return Verdict("end", 0.0, f"{why}; gave up after {len(row) - 1} retries")
    whole = min(limits.backoff * 2.0 ** (len(row) - 1), limits.most)
    seconds = max(whole * (0.5 + 0.5 * uniform(f"{key}/{len(history)}")), pause)
    return Verdict(policy.action, seconds, f"{why}; retry {len(row)} of {limits.retries}")


def in_a_row(history: Sequence[Entry]) -> list[Entry]:
    """Returns the failures since the job last ran for an hour or was stopped with its state saved."""
    row: list[Entry] = []
    for entry in history:
        begun = [] if entry.ran >= HEALTHY_S else row
        row = [] if entry.cause == "preempted" else [*begun, entry]
    return row


def repeated(history: Sequence[Entry]) -> int | None:
    """Returns the step at which the last two failures lie, if it is one step, and they were no chance."""
    failures = [entry for entry in history if entry.cause not in CHANCE][-2:]
    if len(failures) < 2 or history[-1].cause in CHANCE or failures[0].step != failures[1].step:
        return None
    return failures[1].step


def uniform(key: str) -> float:
    """Returns a number in [0, 1) that a text determines."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2.0**48


def failed_at(run: Path | None, since: float) -> tuple[str | None, int | None]:
    """Returns (cause, step) that the ledger of a run names for an attempt that ended after `since`; None = unknown."""
    last = goodput.last_line(run) if run else None
    if not last or last["event"] != "end" or last["time"] < since or last["cause"] in LEFT_OPEN:
        return None, None
    return last["cause"], last["step"]


def folder_of(command: Sequence[str]) -> Path | None:
    """Returns the folder of the run that a command names with --workdir."""
    named = [word.split("=", 1)[1] for word in command if re.match(r"--?workdir=.", word)]
    return Path(named[-1]) if named else None


def tail(path: str | None) -> str:
    """Returns the end of a log, of what its last start wrote (tpu/worker.sh marks them); nothing if there is none."""
    if path is None or not os.path.exists(path):
        return ""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - TAIL, 0))
        return re.split(r"(?m)^== \S+: starts$", file.read().decode(errors="replace"))[-1]


def attend(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command to its end and returns its status and the end of what it wrote to stderr, which passes through.

    SIGTERM and Ctrl-C reach the command, which may save; then SystemExit has its status.
    """
    kept: collections.deque[str] = collections.deque(maxlen=200)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, "JAXCL_STOPPED": str(STOPPED)}
    )
    seen: list[int] = []

    def forward(number: int, frame: object) -> None:
        seen.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def read() -> None:
        assert process.stderr
        with process.stderr as lines:
            for line in lines:
                kept.append(line)
                sys.stderr.write(line)
                sys.stderr.flush()

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait()
        reader.join(timeout=5)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    if seen:
        raise SystemExit(128 - status if status < 0 else status)
    return status, "".join(kept)


def see_through(command: Sequence[str], limits: Limits, sleep: Callable[[float], object] = time.sleep) -> int:
    """Runs a command until it has finished or must not be repeated; returns its last exit status."""
    history: list[Entry] = []
    run, key = folder_of(command), f"{os.getpid()}/{' '.join(command)}"
    while True:
        began = time.time()
        status, log = attend(command)
        ended, step = failed_at(run, began)
        cause = classify(status, log, ended)
        history.append(Entry(time.time(), cause, step, time.time() - began))
        verdict = decide(history, limits, key)
        code = 128 - status if status < 0 else status
        if verdict.action == "end":
            if code:
                print(f"retry: exit status {code}: {verdict.text}", file=sys.stderr, flush=True)
            return code
        print(f"retry: exit status {code}: {verdict.text} in {verdict.wait:.0f} s", file=sys.stderr, flush=True)
        sleep(verdict.wait)


def read(report: str) -> tuple[str, int, int | None]:
    """Returns the most telling cause that workers report, its exit status, and the step at which the job failed.

    Args:
      report: a line of each, with `state=exit code=N cause=NAME step=N`, the last two if they are known, or state=lost.
    """
    found = [("killed", 137, None) for _ in re.findall(r"\bstate=lost\b", report)]
    for code, cause, step in re.findall(r"\bstate=exit code=(\d+)(?: cause=(\w+))?(?: step=(\d+))?", report):
        known = cause if cause in POLICIES else classify(int(code))
        found.append((known, int(code), int(step) if step else None))
    if not found:
        raise UserError(f"--report={report}: no worker has ended; judge them when one has")
    cause = worst(one for one, _, _ in found)
    steps = [step for _, _, step in found if step is not None]
    return cause, next(code for one, code, _ in found if one == cause), max(steps, default=None)


def judge(options: argparse.Namespace) -> str:
    """Returns `ACTION SECONDS STATUS TEXT`, the seconds whole, and enters the end into the file --history."""
    path = Path(options.history) if options.history else None
    history = [Entry(*json.loads(line)) for line in path.read_text().splitlines()] if path and path.exists() else []
    now = time.time() if options.now is None else options.now
    if options.cause:
        if options.cause not in POLICIES:
            raise UserError(f"--cause={options.cause}: no such cause; choose from {', '.join(POLICIES)}")
        cause, code, step = options.cause, 1, None
    else:
        cause, code, step = read(options.report)
    why = options.why or f"{POLICIES[cause].why}, exit status {code}"
    history.append(Entry(now, cause, step, options.ran))
    if path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in history[-1000:]))
    found = decide(history, limits_of(options), options.key, why)
    return f"{found.action} {found.wait:.0f} {code} {found.text}"


def limits_of(options: argparse.Namespace) -> Limits:
    """Returns the limits that a command line sets."""
    for name, least in (("retries", 0), ("backoff", 0.0), ("most", 0.0), ("hour", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {least}")
    return Limits(options.retries, options.backoff, options.most, options.hour)


def main(argv: Sequence[str]) -> None:
    """Sees a command through; or, as `judge` and `name`, answers for those that do it themselves."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    command = argv[cut + 1 :]
    parser = console.Parser(prog="python -m jaxcl.retry", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("verb", nargs="?", choices=("run", "judge", "name"), default="run", help="default: run")
    parser.add_argument("--retries", type=int, default=5, help="failures in a row before it gives up")
    parser.add_argument("--backoff", type=float, default=30.0, help="seconds before the first retry")
    parser.add_argument("--most", type=float, default=900.0, help="seconds of the longest wait")
    parser.add_argument("--hour", type=int, default=30, help="starts in an hour")
    parser.add_argument("--status", type=int, default=0, help="name: the exit status")
    parser.add_argument("--log", help="name: the log; its end is read")
    parser.add_argument("--ran", type=float, default=0.0, help="judge, name: seconds")
    parser.add_argument("--report", default="", help="judge: what the workers say")
    parser.add_argument("--cause", help="judge: in place of a report")
    parser.add_argument("--why", default="", help="judge: the cause in words")
    parser.add_argument("--now", type=float, help="judge: the time, in place of the clock's")
    parser.add_argument("--key", default="", help="judge: of the jitter")
    parser.add_argument("--history", help="judge: a file of its own, which it writes")
    options = parser.parse_args(argv[:cut])
    if options.verb == "judge":
        print(judge(options))
    elif options.verb == "name":
        ended, step = failed_at(folder_of(command), time.time() - options.ran - 1)
        cause = classify(options.status, tail(options.log), ended)
        print(f"cause={cause}" + ("" if step is None else f" step={step}"))
    elif not command:
        raise UserError("command line: no command; write python -m jaxcl.retry -- COMMAND ARG...")
    else:
        sys.exit(see_through(command, limits_of(options)))


if __name__ == "__main__":
    console.cli(main)
