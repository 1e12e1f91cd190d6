"""The folder of a run: which config it belongs to, and whether it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcl.schema import UserError

# What may differ between two starts of one run. The rows of past stages are checked against the checkpoint itself; the
# implementations of attention compute the same, as meshes do but for rounding, and the machines that a run goes on with
# may need others.
FREE = (
    *("label", "checkpoint", "rollback", "tensorboard", "wandb", "watch", "mesh", "microbatches"),
    *("stream.stages", "stream.steps", "packing.directory", "model.attention"),
)
LOCK = "lock"  # held by the process that trains in the folder; the operating system frees it when that ends
BRANCH = "branch.json"  # in the folder of a run that goes on from another: where it came from
PACKAGES = ("jaxcl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def about(place: Path) -> dict[str, Any]:
    """Returns run.json: config, id, facts, versions, finished.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        found = _read(place / "run.json")
    except FileNotFoundError:
        fault = "not the folder of a run, it has no run.json; name that of a run, or an empty one to train in"
        raise UserError(f"{place}: {fault}") from None
    if {"id", "config", "finished"} - set(found) or not isinstance(found["config"], dict):
        raise UserError(f"{place / 'run.json'}: damaged; remove the folder to start anew")
    return found


def finished(place: Path, config: Mapping[str, Any]) -> bool:
    """Returns whether the run of `config` has finished here.

    Raises:
      UserError: `place` holds the run of another config, or something that is no run.
    """
    if place.exists() and not place.is_dir():
        raise UserError(f"--workdir={place}: is a file; name a folder")
    if not place.exists() or all(path.name == LOCK for path in place.iterdir()):
        return False
    if (whole := branched(place)) is not None:
        if not whole:
            raise UserError(f"{place}: a branch that was cut short; make it again with python -m jaxcl.branch")
        return False
    known = about(place)
    plain = json.loads(json.dumps(config))
    old, new = dict(flat(known["config"])), dict(flat(plain))
    for key in sorted({**old, **new}):
        both = key in old and key in new
        same = both and old[key] == new[key]
        if not same and not any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in FREE):
            now = f"not {new[key]!r}" if both else f"and this config has {_said(new, key)}"
            raise UserError(
                f"--workdir={place}: belongs to a run with {_said(old, key)}, {now}; "
                "choose another --workdir, or set it back"
            )
    return known["finished"] and known["config"] == plain


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keeps other processes from training in `place`, which it creates; removes it again if nothing was written.

    Process 0 only: the others of a cluster belong to it.

    Raises:
      UserError: another process trains there.
    """
    if jax.process_index():
        yield
        return
    new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            new = False
            raise UserError(f"--workdir={place}: another process trains there; wait for it or choose another") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        if new and all(path.name == LOCK for path in place.iterdir()):
            (place / LOCK).unlink()
            place.rmdir()
        os.close(handle)


def moved(place: Path, config: Mapping[str, Any], message: str | None) -> str | None:
    """Returns what there is to say of a run that goes on, and that its mesh or its microbatches are others now."""
    if message is None or not (place / "run.json").exists():
        return message
    then, now = about(place)["config"], json.loads(json.dumps(config))
    parts = [
        f"config.{key} is {now.get(key)}, was {then.get(key)}: the same up to rounding"
        for key in ("mesh", "microbatches")
        if now.get(key) != then.get(key)
    ]
    return "; ".join([message, *parts])


def branched(place: Path) -> bool | None:
    """Returns whether `place` is a whole branch of another run; None if it is no branch, or has begun to train."""
    path = place / BRANCH
    return bool(_read(path).get("whole")) if path.exists() and not (place / "run.json").exists() else None


def claim(place: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes run.json and config.json for a run that starts or continues. Process 0 only."""
    if jax.process_index():
        return
    place.mkdir(parents=True, exist_ok=True)
    identity = about(place)["id"] if (place / "run.json").exists() else uuid.uuid4().hex[:12]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    record = {"id": identity, "finished": False, "facts": facts, "versions": versions, "config": config}
    if (place / BRANCH).exists():
        record["branch"] = _read(place / BRANCH)
    write(place / "config.json", config)
    write(place / "run.json", record)


def check_data(place: Path, step: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares the fingerprints `stream` and `held_out` with those of a checkpoint; None there = no longer known.

    Raises:
      UserError: the run would go on with other data.
    """
    if then["stream"] not in (None, now["stream"]):
        raise UserError(
            f"config.sources: the rows before step {step} are not those that {place} was trained "
            "on (another corpus, seed or past stage); restore them, or start a new --workdir"
        )
    if then["held_out"] not in (None, now["held_out"]):
        raise UserError(
            f"config.sources: the held-out rows are not those that {place} was evaluated on; restore "
            "the corpus, or start a new --workdir"
        )


def finish(place: Path) -> None:
    """Marks the run as finished. Process 0 only."""
    if jax.process_index() == 0:
        write(place / "run.json", about(place) | {"finished": True})


def write(path: Path, value: Any) -> None:
    """Writes JSON so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every leaf of nested dicts and lists."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for i, item in enumerate(value):
            yield from flat(item, f"{name}[{i}]")
    else:
        yield name, value


def _said(values: Mapping[str, Any], key: str) -> str:
    """Returns what a flat config has at a key, in words where it is no value."""
    if key in values:
        return f"config.{key}={values[key]!r}"
    inside = any(name.startswith((f"{key}.", f"{key}[")) for name in values)
    return f"more than one value in config.{key}" if inside else f"no config.{key}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        beside = "move the checkpoints beside it, which it says nothing of, elsewhere"
        raise UserError(f"{path}: damaged; put a copy of it back, or {beside} and remove the folder") from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
