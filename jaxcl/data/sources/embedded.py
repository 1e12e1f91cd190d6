"""Real text of three kinds that every Python installation holds: documentation, program code, C headers.

Files are visited in the order of a hash of their names, so that a small `max_bytes` samples all of them, and are cut
at line ends into documents of at most 8 KiB, so that a small corpus has enough documents for a held-out split.
Pieces of one file may therefore lie on both sides of it.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from typing import Literal

from jaxcl.data.sources import Source, describe, limited, listing
from jaxcl.schema import UserError

# Tables, test data and vendored copies, which read neither like documentation nor like code.
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "encodings", "ensurepip", "turtledemo", "_vendor"}
_SKIPPED |= {"config", "site-packages", "dist-packages", "__pycache__"}
_PACKAGES = ("jaxlib", "numpy")  # dependencies of ours that ship C headers
_LICENCE = {"prose": "PSF-2.0", "code": "PSF-2.0", "headers": "PSF-2.0 AND BSD-3-Clause AND Apache-2.0"}
_PIECE = 8192  # characters
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def make(*, domain: Literal["prose", "code", "headers"], max_bytes: int | None = None) -> Source:
    """Returns a source of the running installation's text; no download, no licence question.

    Args:
      domain: "prose": the language reference behind `help()` and the docstrings of the standard library;
        "code": the same modules without their docstrings; "headers": C headers of Python and of our dependencies.
      max_bytes: stop after this many bytes of text.

    Raises:
      UserError: the installation lacks the files.
    """
    paths, names = _headers() if domain == "headers" else _modules()
    if not paths:
        raise UserError(
            f"config.sources: domain={domain!r}: this Python installation has no such files; choose another"
        )
    read = {"prose": _prose, "code": _code, "headers": _text}[domain]

    def documents() -> Iterator[str]:
        for path in paths:
            for text in read(path):
                yield from _pieces(text)

    entries = [[sys.version], *listing(paths, names)]
    description = describe("embedded", {"domain": domain, "max_bytes": max_bytes})
    return Source(description, entries, lambda: limited(documents(), max_bytes), _LICENCE[domain])


def _modules() -> tuple[list[str], list[str]]:
    """Returns paths and names of the standard library's modules, in hashed order."""
    root = sysconfig.get_paths()["stdlib"]
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                found[os.path.relpath(path, root)] = path
    return _shuffled(found)


def _headers() -> tuple[list[str], list[str]]:
    """Returns paths and names of C headers, in hashed order; works without Python's own development files."""
    roots = [("python", sysconfig.get_paths()["include"])]
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            roots.append((package, os.path.dirname(spec.origin)))
    found = {}
    for label, root in roots:
        for path in glob.glob(os.path.join(root, "**", "*.h"), recursive=True):
            found[f"{label}/{os.path.relpath(path, root)}"] = path
    return _shuffled(found)


def _shuffled(found: dict[str, str]) -> tuple[list[str], list[str]]:
    """Returns paths and names in an order that depends on the names alone."""
    names = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [found[name] for name in names], names


def _pieces(text: str) -> Iterator[str]:
    """Yields a text in pieces that end where a line does."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _text(path: str) -> Iterator[str]:
    """Yields the text of a file, or nothing if it is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as stream:
            yield stream.read()
    except (UnicodeDecodeError, OSError):
        return


def _parsed(path: str) -> tuple[str, list[_Definition]]:
    """Returns the text of a module and the definitions in it that have a docstring."""
    text = "".join(_text(path))
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return text, []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return text, [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]


def _reference(path: str) -> Iterator[str]:
    """Yields the topics of the language reference: the values of the one dictionary in `pydoc_data/topics.py`."""
    for node in ast.walk(ast.parse("".join(_text(path)))):
        if isinstance(node, ast.Dict):
            yield from (v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _prose(path: str) -> Iterator[str]:
    """Yields the docstrings of a module as one document, in the order of the file."""
    if os.path.basename(path) == "topics.py":
        yield from _reference(path)
        return
    _, nodes = _parsed(path)
    yield "\n\n".join(ast.get_docstring(n) or "" for n in sorted(nodes, key=lambda n: n.body[0].lineno))


def _code(path: str) -> Iterator[str]:
    """Yields a module without its docstrings."""
    if os.path.basename(path) == "topics.py":  # documentation in the form of a module
        return
    text, nodes = _parsed(path)
    lines = text.splitlines(keepends=True)
    for node in nodes:
        statement = node.body[0]
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        alone = isinstance(node, _Definition) and len(node.body) == 1 and not isinstance(node, ast.Module)
        kept = [" " * statement.col_offset + "pass\n"] if alone else []
        if lines[first][: statement.col_offset].strip() or lines[last - 1].encode()[statement.end_col_offset :].strip():
            continue  # shares a line with code
        lines[first:last] = kept + [""] * (last - first - len(kept))
    yield "".join(lines)
