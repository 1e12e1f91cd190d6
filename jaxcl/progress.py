"""Live progress of a run on the console: one calm panel on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.metrics import Record, plain

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Shows records as they are written; a `jaxcl.metrics.Writer`. Goes to standard error.

    It needs no thread: the panel is redrawn when a record arrives, a few times per second at the most.
    """

    def __init__(
        self,
        steps: int,
        stages: Sequence[str] = (),
        *,
        start: int = 0,
        unit: str = "tokens",
        every_s: float = 5.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begins to show.

        Args:
          steps: steps of the whole run.
          stages: names of the tasks in their order.
          start: step from which this process continues, so that the time left is measured on its own steps.
          unit: what `tokens_per_s` counts: a row of a table is one token.
          every_s: seconds between plain lines when the output is not a terminal.
          console: where to write; standard error by default.
          clock: seconds, for tests.
        """
        from rich.console import Console  # noqa: PLC0415  only runs that show progress pay for it
        from rich.live import Live  # noqa: PLC0415

        self._console = console or Console(stderr=True)
        self._steps, self._stages, self._start, self._unit = steps, list(stages), start, unit
        self._clock, self._first = clock, (0, 0.0)  # step and second of the first record: compiling comes before it
        self._every, self._shown = every_s, float("-inf")
        self._train: dict[str, Any] = {}
        self._losses: dict[str, list[float | None]] = {}  # domain -> [first, last] loss, or share that is right
        self._right = False  # problems and classes are right or wrong; the loss of a head in closed form says little
        self._news = False  # since something was shown
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def write(self, record: Record) -> None:
        """Takes a record and shows the state of the run if it is time to, events at once."""
        record = dict(plain(record))
        kind = record["kind"]
        if kind == "train":
            self._first = self._first if self._train else (record["step"], self._clock())
            self._train = record
            self._show()
        elif kind == "eval":
            self._right = "accuracy" in record
            for domain, loss in record["accuracy" if self._right else "loss"].items():
                self._losses[domain] = [self._losses.get(domain, [loss])[0], loss]
            self._show(force=record.get("boundary") is not None)
        elif kind == "event":
            line = f"step {record['step']:,}  {record.get('event', '')}: {record.get('message', '')}"
            self._console.print(line, style="yellow" if self._live else None, markup=False, highlight=False)

    def sync(self) -> None:
        """Does nothing: nothing is kept back."""

    def close(self) -> None:
        """Shows the last state, unless it is what was shown last, and leaves it on the screen."""
        if self._news:
            self._show(force=True)
        if self._live:
            self._live.stop()
            self._live = None

    def line(self) -> str:
        """Returns the state of the run as one plain line."""
        record = self._train
        parts = [f"step {record.get('step', self._start):,}/{self._steps:,}", *self._figures()]
        losses = ", ".join(f"{domain} {self._score(pair[1])}" for domain, pair in self._losses.items())
        return "  ".join([*parts, f"[{losses}]"] if losses else parts)

    def _score(self, value: float | None) -> str:
        return f"{100 * value:.1f} % right" if self._right and value is not None else _number(value)

    def eta_s(self) -> float | None:
        """Returns the seconds left at the mean speed since the first step of this process; None before its second."""
        step, (first, began) = self._train.get("step", self._start), self._first
        return (self._clock() - began) / (step - first) * (self._steps - step) if step > first > 0 else None

    def _figures(self) -> list[str]:
        record, parts = self._train, []
        if "task" in record:
            task = record["task"]
            name = record.get("stage") or (self._stages[task] if 0 <= task < len(self._stages) else "")
            parts.append(f"task {task + 1}{f'/{len(self._stages)}' if self._stages else ''} {name}".rstrip())
        if "loss" in record:
            parts.append(f"loss {_number(record['loss'])}")
        if record.get("reward") is not None:
            parts.append(f"reward {record['reward']:.3f}")
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.2e}")
        if (speed := record.get("time", {}).get("tokens_per_s")) is not None:
            parts.append(f"{_short(speed)} {self._unit}/s")
        if (share := record.get("time", {}).get("mfu")) is not None:
            parts.append(f"MFU {100 * share:.0f} %")
        eta = self.eta_s()
        return [*parts, f"{duration(eta)} left"] if eta else parts

    def _show(self, *, force: bool = False) -> None:
        now, self._news = self._clock(), True
        if not force and now - self._shown < (0.25 if self._live else self._every):
            return
        self._shown, self._news = now, False
        if self._live:
            self._live.update(self._panel(), refresh=True)
        else:
            self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> Any:
        from rich.console import Group  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        step = self._train.get("step", self._start)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=max(self._steps, 1), completed=step, width=32),
            Text(f"{100 * step / max(self._steps, 1):.0f} %", style="bold"),
            Text(f"step {step:,} of {self._steps:,}"),
        )
        rows: list[Any] = [bar, Text("  ".join(self._figures()))]
        if self._losses:
            table = Table(
                "domain",
                "right" if self._right else "loss",
                "since start",
                box=None,
                padding=(0, 2, 0, 0),
                header_style="dim",
            )
            for column in table.columns[1:]:
                column.justify = "right"
            for domain, (first, last) in self._losses.items():
                change = None if first is None or last is None else last - first
                style = "dim" if not change else "green" if (change < 0) != self._right else "red"
                table.add_row(domain, self._score(last), Text("" if change is None else f"{change:+.3f}", style=style))
            rows.append(table)
        return Group(*rows)


def duration(seconds: float) -> str:
    """Returns seconds in the two largest units: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
