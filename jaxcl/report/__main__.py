"""Command line of the reports: python -m jaxcl.report RUN [RUN ...] [--out=FILE] [--control=LABEL]."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from jaxcl import report
from jaxcl.report import words
from jaxcl.schema import UserError


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"command line: {message}; see python -m jaxcl.report --help")


def main(argv: list[str]) -> None:
    """Writes the report and shows its main figures."""
    parser = Parser(
        prog="python -m jaxcl.report", description="Builds report.html and report.json from run directories."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a folder of run directories")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write; report.html beside the runs by default")
    parser.add_argument("--control", metavar="LABEL", help="label of the runs that the others are compared with")
    options = parser.parse_args(argv)
    results = report.write(options.runs, out=options.out, control=options.control)
    console = Console()
    console.print(summary(results))
    if not results.get("complete", True):
        console.print("The run is still in progress: the report is partial.", style="yellow")
    target = Path(options.out) if options.out else report.default_target(options.runs)
    console.print(f"Wrote {target} and {target.with_suffix('.json').name}.", highlight=False, soft_wrap=True)


def summary(results: dict[str, Any]) -> Table:
    """Returns the main figures as a table for the terminal."""
    names = ("learned", "retained", "forgetting", "backward_transfer", "gap_depth")
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


def cli() -> None:
    """Entry point: user errors are one line and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
