"""Documents of files of any kind, chosen by their names: what commands that need no manifest read."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence

from jaxcl.data.sources import Source, array_record, files, jsonl, parquet, text, text_of_document
from jaxcl.schema import UserError

_KINDS = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "parquet": (".parquet",),
    "array_record": (".array_record", ".arrayrecord"),
}


def documents_of(paths: str | Sequence[str], *columns: str | None) -> Iterator[str]:
    """Returns the text of files, globs, or both, in sorted order; what cannot be read is said before the first.

    Args:
      paths: .txt and .md (a document each), .jsonl and .json with .gz or .zst, .parquet, .array_record.
      columns: of the text, in files that have columns, 'text' unless given; each file must have all of them. For
        ArrayRecord, None if the records are text.

    Raises:
      UserError: no such file, or a name that says no known kind; later, what the sources of these kinds raise.
    """
    made = [source for path in files(paths) for source in _sources(path, columns or ("text",))]
    return (text_of_document(document) for source in made for document in source.documents())


def _sources(path: str, columns: Sequence[str | None]) -> list[Source]:
    """Returns the sources of one file."""
    kind = next((kind for kind, ends in _KINDS.items() if path.lower().endswith(ends)), None)
    if kind is None:
        known = ", ".join(end for ends in _KINDS.values() for end in ends)
        raise UserError(f"{path}: its name does not tell what it is; rename it to end in {known}")
    path = glob.escape(path)
    if kind == "text":
        return [text.make(path=path)]
    make = {"jsonl": jsonl.make, "parquet": parquet.make, "array_record": array_record.make}[kind]
    return [make(path=path, column=column) for column in columns]
