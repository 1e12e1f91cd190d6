"""Sources: one module each, whose `make(**options)` returns a `Source` of documents or a `Table` of rows."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.rows import Stored
from jaxcl.schema import UserError


class Chat(NamedTuple):
    """A conversation: one document that is tokenised by a chat template, not as plain text."""

    turns: tuple[tuple[str, str], ...]  # (role, content); roles are system, user, assistant or what the template knows


Document = str | Chat


def text_of_document(document: Document) -> str:
    """Returns the text of a document; of a conversation, its contents joined by newlines."""
    return document if isinstance(document, str) else "\n".join(content for _, content in document.turns)


class Source(NamedTuple):
    """Where documents come from. Documents are read lazily, always in the same order."""

    description: dict[str, Any]  # JSON: module name and options
    listing: list[list[Any]]  # JSON: name, size, time of change of every file; a change rebuilds the rows
    documents: Callable[[], Iterator[Document]]
    licence: str | None = None
    removed: Callable[[], dict[str, int]] = dict  # documents left out in the latest pass, by reason


class Table(NamedTuple):
    """Rows that no tokenizer makes, such as images with their labels."""

    description: dict[str, Any]  # JSON: module name and options
    train: Stored
    held_out: Stored
    licence: str | None = None


def describe(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the description of a source: its name and the options that are not at None."""
    if (most := options.get("max_bytes")) is not None and most < 1:
        raise UserError(f"config.sources: max_bytes={most}: must be at least 1, or None for all")
    return {"name": name, **{key: value for key, value in options.items() if value is not None}}


def files(path: str | Sequence[str], *, field: str = "path") -> list[str]:
    """Returns the files that a path, a glob pattern (`**` = any folders) or a list of them names, sorted, each once.

    Raises:
      UserError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in [path] if isinstance(path, str) else path:
        matches = {p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)}
        if not matches and os.path.isdir(os.path.expanduser(pattern)):
            raise UserError(f"config.sources: {field}={pattern!r}: is a folder; name its files, as in '{pattern}/*'")
        if not matches:
            raise UserError(f"config.sources: {field}={pattern!r}: no such file; check the path or the pattern")
        found |= matches
    if not found:
        raise UserError(f"config.sources: {field}={path!r}: names no file; give at least one")
    return sorted(found)


def listing(paths: Sequence[str], names: Sequence[str] | None = None) -> list[list[Any]]:
    """Returns name, bytes and modification time (ns) of every file."""
    stats = [os.stat(path) for path in paths]
    return [[name, s.st_size, s.st_mtime_ns] for name, s in zip(names or paths, stats, strict=True)]


def limited(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Yields documents that are not blank, up to `max_bytes` of UTF-8.

    The last text may be cut; a conversation is taken whole or not at all.
    """
    left = max_bytes
    for document in documents:
        text = text_of_document(document)
        if not text.strip():
            continue
        if left is None:
            yield document
            continue
        data = text.encode("utf-8", "surrogatepass")
        if len(data) >= left:
            if isinstance(document, str):
                yield data[:left].decode("utf-8", "ignore")
            elif len(data) == left:
                yield document
            return
        left -= len(data)
        yield document
