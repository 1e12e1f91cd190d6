"""The files of a checkpoint: their names and hashes, and whether all of them are as they were written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxcl.schema import UserError

MANIFEST = "MANIFEST"
PART = "part-"  # then the number of a process: its share of the hashes


def steps(directory: epath.Path) -> list[int]:
    """Returns the steps that have a directory, whole or not, in increasing order."""
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal()) if directory.exists() else []


def completed(directory: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints that were completed."""
    return [step for step in steps(directory) if (directory / str(step) / MANIFEST).exists()]


def files(root: epath.Path, prefix: str = "") -> list[str]:
    """Returns the names of all files below `root`, sorted, without those by which processes exchange hashes."""
    names = []
    for entry in (root / prefix).iterdir():
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        names += files(root, name) if entry.is_dir() else [name]
    return sorted(name for name in names if not name.startswith((PART, f".{PART}")))


def fingerprint(path: epath.Path) -> list[Any]:
    """Returns [bytes, sha256] of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def write(path: epath.Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        if "://" not in str(path):
            os.fsync(file.fileno())
    temporary.replace(path)


def verify(path: epath.Path, *, everything: bool = False) -> tuple[str | None, dict[str, Any] | None]:
    """Returns the manifest if it and this process's share of the files are as they were written, or what is wrong."""
    try:
        line, digest = (path / MANIFEST).read_bytes().decode().removesuffix("\n").split("\n")
        if digest != hashlib.sha256(line.encode()).hexdigest():
            return f"{MANIFEST} was altered", None
        manifest = json.loads(line)
        if not _sound(manifest):
            return f"{MANIFEST} holds what no run writes", None
        names = list(manifest["files"])
        if outside := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
            return f"{MANIFEST} names {outside[0]!r}, no file of its folder", None
        for name in names if everything else names[jax.process_index() :: jax.process_count()]:
            if not (path / name).exists():
                return f"{name} is missing", None
            if fingerprint(path / name) != manifest["files"][name]:
                return f"{name} was altered", None
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}", None
    return None, manifest


def _sound(manifest: Any) -> bool:
    """Returns whether a manifest, which anyone can have written, has the form of ours."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < 2**63

    def is_leaf(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], list):
            return False
        return all(map(is_size, value[0])) and isinstance(value[1], str) and is_size(value[2])

    parts = [manifest.get(key) for key in ("files", "leaves")] if isinstance(manifest, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(map(is_leaf, manifest["leaves"].values())) and not any("\0" in name for name in manifest["files"])


def host(path: epath.Path) -> dict[str, Any]:
    """Returns what a checkpoint says besides its arrays.

    Raises:
      UserError: no JSON object.
    """
    try:
        return dict(json.loads((path / "host.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path / 'host.json'}: missing or damaged; choose another checkpoint") from error


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a whole checkpoint; the manifest comes last, so that a copy that was cut short is none.

    Raises:
      OSError: the place cannot be written, or a file differs once it is there.
    """
    manifest = json.loads((source / MANIFEST).read_bytes().split(b"\n")[0])
    if target.exists():
        (target / MANIFEST).unlink(missing_ok=True)
        target.rmtree()
    for name, wanted in manifest["files"].items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).copy(target / name)
        if fingerprint(target / name) != wanted:
            raise OSError(f"{target / name}: differs from what was written")
    write(target / MANIFEST, (source / MANIFEST).read_text())


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts for names such as a/b/c: what other tools see when they open the checkpoint."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root
