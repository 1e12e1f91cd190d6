"""Plain text files: one document per file or per paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from jaxcl.data.sources import Source, describe, files, limited, listing
from jaxcl.schema import UserError


def make(
    *,
    path: str | list[str],
    split: Literal["file", "paragraph"] = "file",
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of UTF-8 text files.

    Args:
      path: file, glob pattern, or a list of them.
      split: a document is a whole file, or a stretch between blank lines.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: no such file, or a file that is not UTF-8.
    """
    paths = files(path)

    def documents() -> Iterator[str]:
        for name in paths:
            try:
                with open(name, encoding="utf-8-sig") as stream:
                    text = stream.read()
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: not UTF-8 at byte {error.start}; convert the file or leave it out") from error
            yield from [text] if split == "file" else re.split(r"\n[ \t]*\n\s*", text)

    options = {"path": path, "split": split, "max_bytes": max_bytes}
    return Source(describe("text", options), listing(paths), lambda: limited(documents(), max_bytes), licence)
