"""Tables of rows as corpora: what `prepare` is for documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxcl.data.prepare import Corpus
from jaxcl.data.rows import Rows, Stored, from_columns
from jaxcl.data.sources import Table


def corpus(table: Table) -> Corpus:
    """Returns the rows of a table; a row is a document of one token."""
    train, held_out = from_columns(table.train), from_columns(table.held_out)
    manifest = {
        "source": table.description,
        "licence": table.licence,
        "tokenizer": {},
        "splits": {"train": _split(train, table.train), "held_out": _split(held_out, table.held_out)},
    }
    return Corpus(train, held_out, manifest, "")


def classes(tables: Iterable[Table]) -> int:
    """Returns one more than the largest label."""
    return 1 + max(int(columns["targets"][:].max()) for table in tables for columns in (table.train, table.held_out))


def _split(rows: Rows, columns: Stored) -> dict[str, Any]:
    """Returns what the manifest says of a split; bytes are those of the inputs."""
    count = len(rows)
    size = int(columns["inputs"].nbytes)
    return {"documents": count, "rows": count, "tokens": count, "bytes": size, "fingerprint": rows.fingerprint}
