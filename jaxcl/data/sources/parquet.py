"""Parquet files: one document per row, read in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxcl.data import pages
from jaxcl.data.sources import Source, files, records

BATCH = 1024  # rows in memory at a time, at the most
_BUFFER = 2**20  # bytes read ahead per column, instead of a whole row group


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
    """Returns a source of Parquet files. Only the columns that are named are read.

    Args:
      path: file, glob pattern, or a list of them.
      column: of the text; "text" unless the next ones are given.
      messages: column of lists of messages instead.
      prompt: column of a user's turn instead, with `response`.
      response: column of the answer.
      where: column -> value, or list of values, of the rows that are kept.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file, no such column, or a file that is damaged.
    """
    chosen = records.fields(column, messages, prompt, response, where)
    return records.source("parquet", {"path": path}, files(path), read, chosen, max_bytes=max_bytes, licence=licence)


def read(name: str, columns: Sequence[str]) -> Iterator[tuple[str, records.Record]]:
    """Yields place and row, with these columns alone."""
    import pyarrow  # noqa: PLC0415  (only those who use it pay for the import)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(name, buffer_size=_BUFFER, pre_buffer=False) as table:
            for column in columns:
                if column not in table.schema_arrow.names:
                    raise records.absent(column, table.schema_arrow.names, name)
            number, rows = 0, pages.rows(name, columns, BATCH)
            for batch in table.iter_batches(rows, columns=list(columns)):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise records.broken(name, error) from error
