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


def documents_of(paths: str | Sequence[str], column: str | None = "text") -> Iterator[str]:
    """Returns the text of files, globs, or both, in sorted order; what cannot be read is said before the first.

    Args:
      paths: .txt and .md (a document each), .jsonl and .json with .gz or .zst, .parquet, .array_record.
      column: of the text, in files that have columns; for ArrayRecord, None if the records are text.

    Raises:
      UserError: no such file, or a name that says no known kind; later, what the sources of these kinds raise.
    """
    made = [_source(path, column) for path in files(paths)]
    return (text_of_document(document) for source in made for document in source.documents())


def _source(path: str, column: str | None) -> Source:
    """Returns the source of one file."""
    kind = next((kind for kind, ends in _KINDS.items() if path.lower().endswith(ends)), None)
    path = glob.escape(path)
    if kind == "text":
        return text.make(path=path)
    if kind == "jsonl":
        return jsonl.make(path=path, column=column)
    if kind == "parquet":
        return parquet.make(path=path, column=column)
    if kind == "array_record":
        return array_record.make(path=path, column=column)
    known = ", ".join(end for ends in _KINDS.values() for end in ends)
    raise UserError(f"{path}: its name says no kind of file that is known; rename it: {known}")
