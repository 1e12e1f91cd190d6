"""JSON lines, plain, gzip or Zstandard: one document per line."""

from __future__ import annotations

import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from jaxcl.data.sources import Source, files, records
from jaxcl.schema import UserError

LONGEST = 2**27  # characters of a line; a megabyte of gzip can hold a gigabyte of zeros


def make(
    *,
    path: str | list[str],
    column: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    where: Mapping[str, Any] | None = None,
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of files of JSON lines; `.gz` and `.zst` are decompressed as they are read.

    Args:
      path: file, glob pattern, or a list of them.
      column: key of the text in each object; "text" unless the next ones are given.
      messages: key of a list of messages instead.
      prompt: key of a user's turn instead, with `response`.
      response: key of the answer.
      where: key -> value, or list of values, of the lines that are kept.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file; a line that is no JSON object with such columns.
    """
    chosen = records.fields(column, messages, prompt, response, where)
    return records.source("jsonl", {"path": path}, files(path), read, chosen, max_bytes=max_bytes, licence=licence)


def read(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, records.Record]]:
    """Yields place and object of every line that is not blank; all columns are there."""
    try:
        with _open(name) as stream:
            for number, line in enumerate(lines(stream, name), 1):
                if line.strip():
                    yield f"{name}:{number}", parse(line, f"{name}:{number}")
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise records.broken(name, error) from error


def lines(stream: IO[str], name: str) -> Iterator[str]:
    """Yields the lines of a file, which may unpack to far more than its size.

    Raises:
      UserError: a line of more than `LONGEST` characters, before it is in memory.
    """
    for number, line in enumerate(iter(functools.partial(stream.readline, LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise UserError(f"{name}:{number}: a line of more than {LONGEST:,} characters; split it, or leave it out")
        yield line


def _open(name: str) -> IO[str]:
    """Opens a file for reading as text."""
    if name.endswith(".gz"):
        return gzip.open(name, "rt", encoding="utf-8-sig")
    if name.endswith((".zst", ".zstd")):
        import pyarrow  # noqa: PLC0415  (only those who use it pay for the import)

        return io.TextIOWrapper(io.BufferedReader(pyarrow.input_stream(name, compression="zstd")), encoding="utf-8-sig")
    return open(name, encoding="utf-8-sig")


def parse(line: str | bytes, place: str) -> dict[str, Any]:
    """Returns one JSON object.

    Raises:
      UserError: names the place and what is wrong there.
    """
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); repair the line") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(value).__name__}")
    return value
