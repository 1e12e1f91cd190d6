"""JSON lines, plain or gzip: one document per line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from jaxcl.data.sources import Source, describe, files, limited, listing
from jaxcl.schema import UserError, nearest


def make(
    *,
    path: str | list[str],
    column: str = "text",
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of `.jsonl` and `.jsonl.gz` files.

    Args:
      path: file, glob pattern, or a list of them.
      column: key of the text in each object.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file; a line that is no JSON object with text under `column`.
    """
    paths = files(path)

    def documents() -> Iterator[str]:
        for name in paths:
            opener = gzip.open if name.endswith(".gz") else open
            try:
                with opener(name, "rt", encoding="utf-8") as stream:
                    for number, line in enumerate(stream, 1):
                        if line.strip():
                            yield text_of(line, column, f"{name}:{number}")
            except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
                raise UserError(f"{name}: cannot be read ({error}); replace the file or leave it out") from error

    options = {"path": path, "column": column, "max_bytes": max_bytes}
    return Source(describe("jsonl", options), listing(paths), lambda: limited(documents(), max_bytes), licence)


def text_of(line: str | bytes, column: str, place: str) -> str:
    """Returns the text under `column` of one JSON object.

    Raises:
      UserError: names the place and what is wrong there.
    """
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); repair the line") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(value).__name__}")
    if column not in value:
        raise UserError(f"{place}: no column {column!r}{nearest(column, list(value))}")
    if not isinstance(value[column], str):
        raise UserError(f"{place}: column {column!r} holds {type(value[column]).__name__}, not text; choose another")
    return value[column]
