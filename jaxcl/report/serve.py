"""The report of runs that are under way, in a browser: rebuilt when their records change, for this machine alone."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jaxcl import report
from jaxcl.schema import UserError

HOST = "127.0.0.1"  # reports name files and settings: they are for who may log in here
REFRESH_S = 5  # seconds between two looks of a page
# Asks whether the records have changed and loads the page anew only then, where the reader was.
SCRIPT = """
let seen = null;
setInterval(async () => {
  try {
    const now = await (await fetch("version")).text();
    if (seen !== null && now !== seen) location.reload();
    seen = now;
  } catch (error) { document.title = "(stopped) " + document.title.replace("(stopped) ", ""); }
}, %d);
"""

ICON = '<link rel="icon" href="data:,">'  # browsers ask for one


def script() -> str:
    """Returns the script of the page."""
    return SCRIPT % (1000 * REFRESH_S)


def policy() -> str:
    """Returns what a browser may do with the page: run this one script, and ask this server; load nothing."""
    own = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    parts = [f"script-src 'sha256-{own}'", "style-src 'unsafe-inline'", "connect-src 'self'", "img-src data:"]
    return "; ".join(["default-src 'none'", *parts, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


class Live:
    """Runs and the page about them."""

    def __init__(self, paths: Sequence[str], control: str | None):
        self._paths, self._control = paths, control
        self._lock, self._page, self._of = threading.Lock(), "", ""

    def waiting(self) -> str | None:
        """Returns which folder has no records yet, as a line; None if all have some."""
        empty = [folder for folder in report.expand([Path(path) for path in self._paths]) if not _begun(folder)]
        return f"{empty[0]}: no run has written records there yet; the page waits for the first" if empty else None

    def version(self) -> str:
        """Returns a text that changes when records are added."""
        files = [folder / "metrics.jsonl" for folder in report.expand([Path(path) for path in self._paths])]
        return json.dumps([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()])

    def page(self) -> str:
        """Returns the report, or why there is none yet; nothing is written to the runs."""
        with self._lock:
            version = self.version()
            if version != self._of or not self._page:
                try:
                    text, _ = report.build(self._paths, control=self._control)
                except UserError as error:
                    reason = html.escape(self.waiting() or str(error))
                    text = f"<!doctype html><title>jaxcl</title><body><p>{reason}</p></body>"
                self._page = text.replace("</body>", f"{ICON}<script>{script()}</script></body>")
                self._of = version
            return self._page


def server(paths: Sequence[str], port: int, control: str | None = None) -> ThreadingHTTPServer:
    """Returns a server of the report of `paths` on 127.0.0.1; call its `serve_forever`.

    Args:
      paths: as for `jaxcl.report.write`.
      port: 0 = any that is free.
      control: as for `jaxcl.report.write`.

    Raises:
      UserError: no run there, or the port is taken.
    """
    live = Live(paths, control)
    for folder in report.expand([Path(path) for path in paths]):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder of a run, or one that holds runs")

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            """Answers until the client goes away, which is no error."""
            with contextlib.suppress(ConnectionError):
                super().handle()

        def finish(self) -> None:
            """Sends what is left, unless the client is gone."""
            with contextlib.suppress(ConnectionError):
                super().finish()

        def do_GET(self) -> None:
            """Answers with the page or its version; nothing else can be read."""
            own = {f"{name}:{self.connection.getsockname()[1]}" for name in (HOST, "localhost")}
            if self.headers.get("Host") not in own:  # a name that a web page has made to point here
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            answers: dict[str, tuple[str, Callable[[], str]]] = {
                "/": ("text/html", live.page),
                "/version": ("text/plain", live.version),
            }
            if self.path not in answers:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, make = answers[self.path]
            body = make().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", policy())
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps requests off the terminal."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port={port}: {error}; choose another, or 0 for any that is free") from None


def _begun(folder: Path) -> bool:
    """Returns whether a run has records."""
    return (folder / "metrics.jsonl").exists()
