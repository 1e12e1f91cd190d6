"""Where the time of a run went: productive steps, and what was lost to starts, saves, faults and repeated steps.

GOODPUT.JSONL in the folder of a run gets a line when a process starts, when it is ready, every second while it
trains, and when it ends; none of them is ever removed, however often the run starts again. From these lines:

    productive   = time of training steps whose progress survived
    repeated     = time of steps that a later attempt had to take again
    start        = from the start of a process to its first step, compiling included
    evaluation, save, other = inside attempts;    down = between two attempts
    effective utilisation   = productive / everything from the first start to the last line

    python -m jaxcl.goodput RUN [RUN ...]

Effective utilisation is what SIGMA (2025) reports for a cluster; the classes of lost time are those of Google's
ml-goodput-measurement. Time of devices that no process of the run held counts as `down`: the machine was there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl import console
from jaxcl.schema import UserError

FILE = "goodput.jsonl"
EVERY_S = 1.0  # between two lines of a process that trains
SPENT: tuple[str, ...] = ("step", "evaluation", "save")
LOST = ("repeated", "start", "evaluation", "save", "other", "down")


class Ledger:
    """One process's entries. Everything is a line of its own, flushed at once, so that a kill loses seconds only."""

    def __init__(self, folder: Path | None, *, clock: Callable[[], float] = time.time):
        """Opens the file of a run at the first entry; with None nothing is written."""
        self._path, self._clock = folder and folder / FILE, clock
        self._spent = dict.fromkeys(SPENT, 0.0)
        self._last = float("-inf")

    def started(self, at: float) -> None:
        """Enters the start of a process, at a time that lies before this object."""
        self._write("start", 0, at=at)

    def ready(self, step: int) -> None:
        """Enters that a state is there, which has taken `step` steps: a start, or a return to a checkpoint."""
        self._spent = dict.fromkeys(SPENT, 0.0)
        self._write("ready", step)

    def took(self, step: int, seconds: float) -> None:
        """Adds the time of one training step."""
        self._spent["step"] += seconds
        if self._clock() - self._last >= EVERY_S:
            self._write("beat", step)

    def beat(self, step: int) -> None:
        """Enters how far the run is."""
        self._write("beat", step)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Adds the time of a block to `evaluation` or `save`."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[what] += self._clock() - began

    def ended(self, step: int, cause: str) -> None:
        """Enters why the attempt is over."""
        self._write("end", step, cause=cause)

    def _write(self, event: str, step: int, *, at: float | None = None, **more: Any) -> None:
        self._last = self._clock()
        if self._path is None:
            return
        line = {"event": event, "time": round(self._last if at is None else at, 3), "step": step, **more}
        line["spent"] = {name: round(value, 4) for name, value in self._spent.items()}
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")


class Attempt(NamedTuple):
    """From a start, or a return to a checkpoint, to its end.

    Attributes:
      began: second at which it began.
      ready: second at which training began; None if it never did.
      over: last sign of life.
      first: steps taken when training began.
      beats: (second, step, seconds spent in steps so far) of every entry while it trained.
      spent: seconds by kind, at the end.
      cause: of the end; 'killed' if nothing was entered.
    """

    began: float
    ready: float | None
    over: float
    first: int
    beats: list[tuple[float, int, float]]
    spent: dict[str, float]
    cause: str

    @property
    def last(self) -> int:
        """The step that is known to have been reached."""
        return self.beats[-1][1] if self.beats else self.first

    def at(self, step: int, column: int) -> float:
        """Returns the second (column 0) or the time spent in steps (column 2) when a step was reached, interpolated."""
        known = [(self.ready if self.ready is not None else self.began, self.first, 0.0), *self.beats]
        for before, after in itertools.pairwise(known):
            if after[1] >= step:
                share = (step - before[1]) / max(after[1] - before[1], 1)
                return before[column] + min(max(share, 0.0), 1.0) * (after[column] - before[column])
        return known[-1][column]


def attempts(folder: Path) -> list[Attempt]:
    """Returns the attempts of a run in their order.

    Raises:
      UserError: no ledger there, or one that is damaged.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; it is written by a training run")
    found: list[Attempt] = []
    lines = path.read_bytes().splitlines()
    for number, text in enumerate(lines, 1):
        line, torn = _entry(text)
        if line is None:
            after = _entry(lines[number])[0] if number < len(lines) else None
            if torn and (number == len(lines) or (after and after["event"] == "start")):
                continue  # by a kill: nothing follows, or the next attempt
            raise UserError(f"{path}:{number}: no entry of a ledger; remove the line")
        event, at, step, spent = line["event"], line["time"], line["step"], line["spent"]
        if event == "start":
            found.append(Attempt(at, None, at, 0, [], {}, "killed"))
        elif not found:
            continue
        elif event == "ready" and found[-1].ready is not None:  # back to a checkpoint in the same process
            found[-1] = found[-1]._replace(over=at, cause="rolled back")
            found.append(Attempt(at, at, at, step, [], {}, "killed"))
        elif event == "ready":
            found[-1] = found[-1]._replace(ready=at, over=at, first=step)
        else:
            last = found[-1]
            beats = [*last.beats, (at, step, spent["step"])] if last.ready is not None else last.beats
            found[-1] = last._replace(over=at, beats=beats, spent=spent, cause=line.get("cause", "killed"))
    return found


def _entry(text: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Returns a line of a ledger, or None and whether it may be the beginning of one."""
    try:
        line = json.loads(text)
    except ValueError:
        return None, True
    except RecursionError:
        return None, False
    return (line if _is_entry(line) else None), False


def _is_entry(line: Any) -> bool:
    """Returns whether a line is what `Ledger` writes."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and abs(value) < 2**53

    if not isinstance(line, dict) or not isinstance(line.get("spent"), dict) or not isinstance(line.get("event"), str):
        return False
    numbers = [line.get("time"), line.get("step"), *(line["spent"].get(name) for name in SPENT)]
    return all(map(is_number, numbers)) and isinstance(line.get("cause", ""), str)


def last_line(folder: Path) -> dict[str, Any] | None:
    """Returns the last whole line of a ledger; None if there is none."""
    path = folder / FILE
    for text in reversed(path.read_bytes().splitlines() if path.exists() else []):
        if line := _entry(text)[0]:
            return line
    return None


def summary(folder: Path) -> dict[str, Any]:
    """Returns seconds by class, effective utilisation, failures, and mean times between them and to mend them.

    `mttr_s` is from the last sign of life to the moment at which the step that was reached before is reached again.

    Raises:
      UserError: no ledger there.
    """
    whole = attempts(folder)
    seconds = dict.fromkeys(("productive", *LOST), 0.0)
    mended: list[float] = []
    causes: dict[str, int] = {}
    repeated = 0
    for i, one in enumerate(whole):
        later = whole[i + 1] if i + 1 < len(whole) else None
        begun = [other.first for other in whole[i + 1 :] if other.ready is not None]
        kept = max(one.first, min([one.last, *begun]))
        productive = one.at(kept, 2)
        inside = {name: one.spent.get(name, 0.0) for name in SPENT}
        start = (one.over if one.ready is None else one.ready) - one.began
        seconds["start"] += start
        seconds["productive"] += productive
        seconds["repeated"] += inside["step"] - productive
        repeated += one.last - kept
        for name in ("evaluation", "save"):
            seconds[name] += inside[name]
        seconds["other"] += max(one.over - one.began - start - sum(inside.values()), 0.0)
        if later is not None:
            seconds["down"] += max(later.began - one.over, 0.0)
        if one.cause not in ("finished", "SIGTERM", "SIGINT") and (later is not None or one.cause != "killed"):
            causes[one.cause] = causes.get(one.cause, 0) + 1
            again = next(
                (other for other in whole[i + 1 :] if other.ready is not None and other.last >= one.last), None
            )
            if again is not None:
                mended.append(again.at(one.last, 0) - one.over)
    total, failures = sum(seconds.values()), sum(causes.values())
    return {
        "attempts": len(whole),
        "seconds": seconds,
        "total_s": total,
        "utilisation": seconds["productive"] / total if total else 0.0,
        "repeated_steps": repeated,
        "failures": causes,
        "mtbf_s": (total - seconds["down"]) / failures if failures else None,
        "mttr_s": sum(mended) / len(mended) if mended else None,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Returns a summary as text."""
    total = max(found["total_s"], 1e-9)
    text = [f"effective utilisation {100 * found['utilisation']:.1f} % of {found['total_s']:,.0f} s"]
    for name, value in found["seconds"].items():
        text.append(f"  {name:<11}{value:>10,.1f} s  {100 * value / total:5.1f} %")
    causes = ", ".join(f"{count} {name}" for name, count in found["failures"].items()) or "none"
    text.append(f"  attempts {found['attempts']}, failures: {causes}; {found['repeated_steps']} steps repeated")
    for name, what in (("mtbf_s", "between failures"), ("mttr_s", "to be where it was")):
        if found[name] is not None:
            text.append(f"  mean time {what} {found[name]:,.1f} s")
    return text


def main(argv: Sequence[str]) -> None:
    """Prints the summary of every run that is named."""
    parser = console.Parser(prog="python -m jaxcl.goodput", description="Shows where the time of runs went.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    found = {name: summary(Path(name)) for name in options.runs}
    for name, one in found.items():
        if not one["attempts"]:
            raise UserError(f"{Path(name) / FILE}: has no start of a run; it is damaged, or the run has not begun")
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, one in found.items():
        print("\n".join([name, *lines(one)]))


if __name__ == "__main__":
    console.cli(main)
