"""What all sources of records share: the columns that make a document, the rows that are kept, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.sources import Chat, Document, Source, describe, limited, listing
from jaxcl.schema import UserError, nearest

Record = Mapping[str, Any]
Reader = Callable[[str, Sequence[str]], Iterable[tuple[str, Record]]]  # file, columns -> (place, record) in order

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # of ShareGPT files


class Fields(NamedTuple):
    """How a record becomes a document: the text of `column`, or a conversation; rows are kept `where` values fit."""

    column: str | None = None
    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    where: Mapping[str, Any] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of all columns that are read, each once."""
        return list(dict.fromkeys([*filter(None, self[:4]), *(self.where or {})]))

    @property
    def options(self) -> dict[str, Any]:
        """What the description of a source says of it."""
        return self._asdict() | {"where": dict(self.where) if self.where else None}


def fields(
    column: str | None,
    messages: str | None,
    prompt: str | None,
    response: str | None,
    where: Mapping[str, Any] | None,
) -> Fields:
    """Returns checked fields; the column is "text" if nothing else is named.

    Args:
      column: holds the text.
      messages: holds a list of {"role", "content"} or {"from", "value"}.
      prompt: holds the user's turn; needs `response`.
      response: holds the assistant's turn; needs `prompt`.
      where: column -> value, or list of values, that a row must have to be kept.

    Raises:
      UserError: more than one of the three forms, or half of the last.
    """
    if (prompt is None) != (response is None):
        lacking, given = ("prompt", "response") if prompt is None else ("response", "prompt")
        raise UserError(f"config.sources: {given}={prompt or response!r}: needs {lacking}= as well, another column")
    given = {"column": column, "messages": messages, "prompt": prompt}
    named = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"config.sources: {' and '.join(named)}: give one of column, messages, prompt with response")
    return Fields(column if named else "text", messages, prompt, response, where)


def source(
    name: str,
    options: Mapping[str, Any],
    paths: Sequence[str],
    read: Reader,
    chosen: Fields,
    *,
    max_bytes: int | None,
    licence: str | None,
) -> Source:
    """Returns a source whose documents are the records of files, one file after the other."""

    def documents() -> Iterator[Document]:
        for path in paths:
            yield from documents_of(read(path, chosen.columns), chosen, path)

    about = describe(name, {**options, **chosen.options, "max_bytes": max_bytes})
    return Source(about, listing(paths), lambda: limited(documents(), max_bytes), licence)


def documents_of(records: Iterable[tuple[str, Record]], chosen: Fields, path: str) -> Iterator[Document]:
    """Yields the documents of one file; rows without a value (null) give none.

    Raises:
      UserError: no records at all, a column that is absent or holds something else.
    """
    empty = True
    for place, record in records:
        empty = False
        if kept(record, chosen.where, place) and (document := document_of(record, chosen, place)) is not None:
            yield document
    if empty:
        raise UserError(f"{path}: holds no records; replace the file or leave it out")


def kept(record: Record, where: Mapping[str, Any] | None, place: str) -> bool:
    """Returns whether the record has one of the values asked for in every column of `where`."""
    for column, wanted in (where or {}).items():
        value = _plain(value_of(record, column, place), column, place)
        if value not in (wanted if isinstance(wanted, (list, tuple)) else [wanted]):
            return False
    return True


def document_of(record: Record, chosen: Fields, place: str) -> Document | None:
    """Returns the document of a record, None if its column is null."""
    if chosen.messages:
        return _chat(record, chosen.messages, place)
    if chosen.prompt and chosen.response:
        pair = _text(record, chosen.prompt, place), _text(record, chosen.response, place)
        return None if None in pair else Chat((("user", pair[0] or ""), ("assistant", pair[1] or "")))
    return _text(record, chosen.column or "text", place)


def value_of(record: Record, column: str, place: str) -> Any:
    """Returns a column of a record.

    Raises:
      UserError: no such column; the line names the nearest.
    """
    if column not in record:
        raise absent(column, list(record), place)
    return record[column]


def absent(column: str, known: Sequence[str], place: str) -> UserError:
    """Returns the error of a column that is not there."""
    return UserError(f"{place}: no column {column!r}{nearest(column, known)}")


def broken(path: str, error: Exception) -> UserError:
    """Returns the error of a file that cannot be read, in one line."""
    with open(path, "rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            return UserError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: cannot be read ({reason}); replace the file or leave it out")


def _plain(value: Any, column: str, place: str) -> Any:
    """Returns bytes as text, arrays as lists and NumPy's numbers as Python's."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: column {column!r} holds bytes that are not UTF-8; choose another") from error
    return value.tolist() if hasattr(value, "tolist") else value


def _text(record: Record, column: str, place: str) -> str | None:
    """Returns the text of a column, None if it is null."""
    value = _plain(value_of(record, column, place), column, place)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {type(value).__name__}, not text; choose another")
    return value


def _chat(record: Record, column: str, place: str) -> Chat | None:
    """Returns the conversation of a column, None if it is null."""
    found = _plain(value_of(record, column, place), column, place)
    if isinstance(found, Mapping) and any(isinstance(value, str | bytes) for value in found.values()):
        raise UserError(f"{place}: column {column!r} holds a single message; put it in a list")
    if isinstance(found, Mapping):  # a table of columns: the same, stored the other way round
        parts = [_plain(value, column, place) for value in found.values()]
        if not all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
            raise UserError(f"{place}: column {column!r} holds columns that are no lists of one length; choose another")
        found = [dict(zip(found, row, strict=True)) for row in zip(*parts, strict=True)]
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise UserError(f"{place}: column {column!r} holds {type(found).__name__}, not a list of messages")
    turns = []
    for message in found:
        role, content = ("from", "value") if "from" in message else ("role", "content")
        turn = [_text(message, key, f"{place}.{column}[{len(turns)}]") for key in (role, content)]
        if None in turn:
            raise UserError(f"{place}.{column}[{len(turns)}]: {role} or {content} is null; choose another column")
        turns.append((_ROLES.get(str(turn[0]), str(turn[0])), str(turn[1])))
    return Chat(tuple(turns))
