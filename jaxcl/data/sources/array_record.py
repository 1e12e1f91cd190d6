"""ArrayRecord files whose records are UTF-8 text or JSON objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxcl.data.sources import Source, describe, files, limited, listing, records
from jaxcl.data.sources.jsonl import parse
from jaxcl.schema import UserError

_CHUNK = 1024  # records read at a time


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
    """Returns a source of ArrayRecord files, one document per record.

    Records are text unless one of the options from `column` to `where` says that they are JSON objects.

    Args:
      path: file, glob pattern, or a list of them.
      column: key of the text.
      messages: key of a list of messages instead.
      prompt: key of a user's turn instead, with `response`.
      response: key of the answer.
      where: key -> value, or list of values, of the records that are kept.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file, not an ArrayRecord file, or a record without text.
    """
    paths = files(path)
    if any((column, messages, prompt, response, where)):
        chosen = records.fields(column, messages, prompt, response, where)
        return records.source("array_record", {"path": path}, paths, read, chosen, max_bytes=max_bytes, licence=licence)

    def documents() -> Iterator[str]:
        for name in paths:
            yield from texts(name)

    about = describe("array_record", {"path": path, "max_bytes": max_bytes})
    return Source(about, listing(paths), lambda: limited(documents(), max_bytes), licence)


def read(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, records.Record]]:
    """Yields place and object of every record; all columns are there."""
    for number, record in enumerate(_records(name)):
        yield f"{name}[{number}]", parse(_decoded(record, f"{name}[{number}]"), f"{name}[{number}]")


def texts(name: str) -> Iterator[str]:
    """Yields every record as text."""
    for number, record in enumerate(_records(name)):
        yield _decoded(record, f"{name}[{number}]")


def _decoded(record: bytes, place: str) -> str:
    """Returns the text of a record."""
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text; convert the records or leave the file out") from error


def _records(name: str) -> Iterator[bytes]:
    """Yields the records of a file in order."""
    from array_record.python import array_record_module  # noqa: PLC0415  (only those who use it pay for the import)  # pyright: ignore[reportAttributeAccessIssue]

    try:
        reader = array_record_module.ArrayRecordReader(name)
        total = reader.num_records()
        for start in range(0, total, _CHUNK):
            yield from reader.read(start, min(start + _CHUNK, total))
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{name}: not a sound ArrayRecord file ({error}); replace it or leave it out") from error
    if not total:
        raise UserError(f"{name}: no ArrayRecord file, or one without records; replace it or leave it out")
