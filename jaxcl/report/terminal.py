"""The main figures of a report on the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxcl.report import words


def show(results: dict[str, Any], target: Path) -> None:
    """Prints the main figures of `report.write` and where the page is."""
    console = Console()
    console.print(summary(results))
    if not results.get("complete", True):
        console.print("The run is still in progress: the report is partial.", style="yellow")
    console.print(f"Wrote {target} and {target.with_suffix('.json').name}.", highlight=False, soft_wrap=True)


def summary(results: dict[str, Any]) -> Table:
    """Returns the main figures as a table for the terminal."""
    names = ("learned", "final", "forgetting", "gap_depth")
    table = Table(
        "method", *(name.replace("_", " ") for name in names), box=None, padding=(0, 2, 0, 0), header_style="bold"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    if results["kind"] == "run":
        values = results["figures"]
        table.add_row(results["label"], *(words.nats(values[name], sign=name == "backward_transfer") for name in names))
        return table
    for group in results["groups"]:
        cells = []
        for name in names:
            value = group["figures"][name]
            half = "" if math.isnan(value["half_width"]) else f" ± {value['half_width']:.3f}"
            cells.append(words.nats(value["mean"], sign=name == "backward_transfer") + half)
        table.add_row(group["label"], *cells)
    return table
