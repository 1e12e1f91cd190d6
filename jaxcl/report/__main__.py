"""Command line of the reports: python -m jaxcl.report RUN [RUN ...] [--out=FILE] [--control=LABEL] [--serve]."""

from __future__ import annotations

import contextlib
from pathlib import Path

from jaxcl import console, report
from jaxcl.report import serve, terminal
from jaxcl.schema import UserError


def main(argv: list[str]) -> None:
    """Writes the report and shows its main figures."""
    parser = console.Parser(
        prog="python -m jaxcl.report", description="Builds report.html and report.json from run directories."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a folder of run directories")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write; report.html beside the runs by default")
    parser.add_argument("--control", metavar="LABEL", help="label of the runs that the others are compared with")
    parser.add_argument("--serve", action="store_true", help="show it in a browser and keep it up to date; no file")
    parser.add_argument("--port", type=int, default=8000, help="of --serve, on this machine alone")
    options = parser.parse_args(argv)
    if options.serve:
        if options.out:
            raise UserError("--out: --serve writes no file; leave one of them out")
        with serve.server(options.runs, options.port, options.control) as web:
            print(f"http://{serve.HOST}:{web.server_address[1]}/  (Ctrl-C ends it)", flush=True)
            if reason := serve.Live(options.runs, options.control).waiting():
                print(reason, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                web.serve_forever()
        return
    results = report.write(options.runs, out=options.out, control=options.control)
    terminal.show(results, Path(options.out) if options.out else report.default_target(options.runs))


if __name__ == "__main__":
    console.cli(main)
