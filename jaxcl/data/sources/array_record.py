"""ArrayRecord files whose records are UTF-8 text or JSON objects."""

from __future__ import annotations

from collections.abc import Iterator

from jaxcl.data.sources import Source, describe, files, limited, listing
from jaxcl.data.sources.jsonl import text_of
from jaxcl.schema import UserError

_CHUNK = 1024  # records read at a time


def make(
    *,
    path: str | list[str],
    column: str | None = None,
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of ArrayRecord files, one document per record.

    Args:
      path: file, glob pattern, or a list of them.
      column: key of the text if records are JSON objects; None if they are text.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file, not an ArrayRecord file, or a record without text.
    """
    paths = files(path)

    def documents() -> Iterator[str]:
        for name in paths:
            for number, record in enumerate(_records(name)):
                try:
                    yield text_of(record, column, f"{name}[{number}]") if column else record.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{name}[{number}]: not UTF-8 text; name the column if it is JSON") from error

    options = {"path": path, "column": column, "max_bytes": max_bytes}
    return Source(describe("array_record", options), listing(paths), lambda: limited(documents(), max_bytes), licence)


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
