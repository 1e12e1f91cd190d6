"""Where records go: a JSON-lines file that survives interruptions, TensorBoard, Weights & Biases; and back again."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from jaxcl.schema import UserError

Record = Mapping[str, Any]  # has "kind" and "step"; everything that depends on the clock is under "time"


class Writer(Protocol):
    """Takes records as they come. `sync` makes them durable: call it before a checkpoint is committed."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def sync(self) -> None:
        """Returns when everything written so far is on disk."""

    def close(self) -> None:
        """Syncs and releases what is held."""


class Jsonl:
    """Appends records to a file, one JSON object per line; every line is handed to the system at once.

    `truncate` may replace the file at any time, as a rollback does: the next record goes into the new one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._file = self._open()

    def write(self, record: Record) -> None:
        """Appends one line. Arrays become numbers or lists, numbers that are not finite become null."""
        if not self._path.exists() or not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            self._file.close()
            self._file = self._open()
        self._file.write(json.dumps(plain(record), separators=(",", ":"), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flushes to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes; closing twice is harmless."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _open(self) -> TextIO:
        if self._path.exists() and (data := self._path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(self._path, data.rfind(b"\n") + 1)  # a line torn by a crash must not swallow the next one
        return open(self._path, "a", encoding="utf-8", buffering=1)


class TensorBoard:
    """Writes the numbers of each record as scalars `kind/name` to TensorBoard event files."""

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
        """Opens a new event file; events after `resume_step` of earlier files are hidden by TensorBoard."""
        from tensorboardX import SummaryWriter  # noqa: PLC0415  heavy, and only needed with this writer

        self._writer = SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, record: Record) -> None:
        """Adds every number of the record; text is left to the JSON-lines file."""
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Flushes to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def wandb_client() -> Any:
    """Returns the module `wandb`, an extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        import wandb  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("config.wandb: wandb is not installed; run pip install 'jaxcl[wandb]'") from error
    return wandb


class Wandb:
    """Sends the numbers of each record to Weights & Biases; a resumed run continues under the same id.

    Curves are drawn over `step`, the step of the run. The client's own counter of calls only grows, so what a resumed
    or rolled-back run writes again would be ignored if steps were given to it. Here it is appended: such steps are
    there twice, with equal values after a resume, while metrics.jsonl has the last of them alone.
    """

    def __init__(self, directory: str | os.PathLike[str], *, project: str, run_id: str, config: Record):
        """Starts or continues a run.

        Raises:
          UserError: the client is not installed, not logged in, or cannot reach its server.
        """
        wandb = wandb_client()
        try:
            self._run = wandb.init(
                dir=str(directory), project=project, id=run_id, resume="allow", config=dict(plain(config))
            )
        except wandb.Error as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"config.wandb={project!r}: {text}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Logs every number of the record, and its step."""
        if numbers := dict(scalars(record)):
            self._run.log({**numbers, "step": plain(record["step"])})

    def sync(self) -> None:
        """Does nothing: the client uploads in the background."""

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class Several:
    """Hands every record to all of its writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = list(writers)

    def write(self, record: Record) -> None:
        """Writes to all."""
        for writer in self._writers:
            writer.write(record)

    def sync(self) -> None:
        """Syncs all."""
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """Closes all."""
        for writer in self._writers:
            writer.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file; a last line that was torn by a crash is left out.

    Raises:
      UserError: there is no such file, or a line other than the last is not a record.
    """
    return [record for record, _ in _parse(Path(path))]


def count(path: str | os.PathLike[str], step: int) -> tuple[int, int | None]:
    """Returns the number of records up to `step` and the last of their steps; a missing file counts as empty.

    Events are not counted: an interruption adds some, and the other records are those of a run without one.
    """
    path = Path(path)
    if not path.exists():
        return 0, None
    steps = [r["step"] for r, _ in _parse(path) if r["kind"] != "event" and r["step"] <= step]
    return len(steps), max(steps, default=None)


def history(path: Path, step: int, wanted: int | None) -> int:
    """Returns the number of records up to `step`; `wanted` is their number when the checkpoint there was saved.

    Raises:
      UserError: some of them are gone.
    """
    records, last = count(path, step) if step >= 0 else (0, None)
    if wanted is not None and records < wanted:
        ends = "has no records" if last is None else f"ends at step {last}"
        if last == step:
            ends = f"lacks {wanted - records} of the first {wanted} records"
        raise UserError(
            f"{path}: {ends}, but the checkpoint is at step {step}; restore the file from a copy, or start a "
            "new --workdir"
        )
    return records


def truncate(path: str | os.PathLike[str], step: int) -> int:
    """Removes the records after `step` and a torn last line; returns how many lines went.

    What a resumed run is about to write again must not be there twice. The file is replaced atomically, and kept
    as it is if there is nothing to remove; a missing file counts as empty.
    """
    path = Path(path)
    if not path.exists():
        return 0
    data = path.read_bytes()
    kept = b"".join(line for record, line in _parse(path) if record["step"] <= step)
    if kept == data:
        return 0
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself is only durable once its directory is
    finally:
        os.close(directory)
    return len(data.splitlines()) - len(kept.splitlines())


def plain(value: Any) -> Any:
    """Returns `value` as JSON types: arrays as numbers or lists, mappings as dicts, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and its kind
        array = array.astype(np.float64)
    if array.dtype.kind not in "biufU":
        raise TypeError(f"a record holds numbers, text, lists and mappings, not {type(value).__name__}")
    return plain(array.tolist())


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yields ("kind/name", number) for every number of a record, nested names joined by slashes."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{prefix}/{key}", item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix, float(value)

    yield from walk(record["kind"], plain({k: v for k, v in record.items() if k not in ("kind", "step")}))


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _parse(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (record, its line), without a last line that is incomplete."""
    if not path.exists():
        raise UserError(f"{path}: no such file; metrics.jsonl is written by a training run")
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # includes bytes that are not UTF-8
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line to go on") from error
        if not isinstance(record, dict) or "kind" not in record or not _is_step(record.get("step")):
            raise UserError(f"{path}, line {number}: a record needs a 'kind' and an integer 'step'; remove the line")
        if line.endswith(b"\n"):
            yield record, line
