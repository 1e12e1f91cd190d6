"""Command line of the reports: python -m jaxcl.report RUN [RUN ...] [--out=FILE] [--control=LABEL]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from jaxcl import report
from jaxcl.report import terminal
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
    terminal.show(results, Path(options.out) if options.out else report.default_target(options.runs))


def cli() -> None:
    """Entry point: user errors are one line and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose another folder", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
