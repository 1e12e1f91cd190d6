"""Command line of the reports: python -m jaxcl.report RUN [RUN ...] [--out=FILE] [--control=LABEL]."""

from __future__ import annotations

from pathlib import Path

from jaxcl import console, report
from jaxcl.report import terminal


def main(argv: list[str]) -> None:
    """Writes the report and shows its main figures."""
    parser = console.Parser(
        prog="python -m jaxcl.report", description="Builds report.html and report.json from run directories."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a folder of run directories")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write; report.html beside the runs by default")
    parser.add_argument("--control", metavar="LABEL", help="label of the runs that the others are compared with")
    options = parser.parse_args(argv)
    results = report.write(options.runs, out=options.out, control=options.control)
    terminal.show(results, Path(options.out) if options.out else report.default_target(options.runs))


if __name__ == "__main__":
    console.cli(main)
