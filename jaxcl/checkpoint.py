"""Checkpoints: asynchronous, whole or absent, verified when read, readable on any mesh and number of processes.

  with Checkpoints(workdir / "checkpoints", every_minutes=10, keep=3) as checkpoints:
      restored = checkpoints.restore(abstract_state)        None, or (step, state, host, message)
      ...
      if checkpoints.due(step):
          checkpoints.save(step, state, {"ledger": ...})    returns once the state may be donated

`jaxcl.saved` reads and copies checkpoints without a run.

On disk, WORKDIR/checkpoints/STEP holds `state` (written by Orbax), `host.json` and, written last, `MANIFEST`: a line of
JSON with size and sha256 of every file and shape, type and checksum of every leaf, and a line with its own sha256.
A directory without a manifest is a save that was cut short and is never read. Three checks stand between the disk and
a restored run: the files are those that were written; the leaves are those the run asks for; and the arrays, once back
on the devices, have the checksums they had before they were donated to the next step. If the newest checkpoint fails,
the one before is used and the message says so. `save` moves away what another attempt left at its step or later.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxcl import allocator, manifests, saved
from jaxcl.checksum import checksums
from jaxcl.manifests import MANIFEST, PART
from jaxcl.saved import BASE, Base
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import PyTree, TrainState

OWNER = "OWNER"  # in the second place: whose copies these are
CLOCK_STEPS = 20  # several processes ask process 0 for the time only this often: each answer is a collective


class NotSaved(RuntimeError):
    """A checkpoint could not be written."""

    cause = "not saved"


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    state: Any
    host: dict[str, Any]
    message: str | None  # why a newer checkpoint was passed over


class Checkpoints:
    """The checkpoints of one run. Every process makes the same calls, in the main thread."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        base: Base | None = None,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep: int = 2,
        keep_every: int | None = None,
        second: str | None = None,
        background: bool = True,
    ):
        """Prepares a directory; nothing is created before the first save.

        Args:
          directory: local, or gs:// and others that etils.epath knows; shared by all processes.
          base: reads the leaves below `saved.BASE` from where they came; then checkpoints hold their checksums alone.
          every_steps: `due` at every multiple; None = never.
          every_minutes: `due` when this much time has passed since the last save; None = never.
          keep: how many of the latest checkpoints stay.
          keep_every: those at multiples of it stay as well; None = none.
          second: another place, best on another file system: every checkpoint is copied there once it is whole, and
            read there if it is damaged or gone in the first. None = none. A copy that fails is told by `warnings`.
          background: whether training goes on while a checkpoint is written, from memory that holds the state once more
            until it is; False waits, and takes none.
        """
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes), ("keep_every", keep_every)):
            if value is not None and value <= 0:
                raise UserError(f"config.checkpoint.{name}={value!r}: must be above 0, or None for never")
        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep!r}: must be at least 1, to have one to resume from")
        logging.getLogger("absl").addFilter(_not_orbax)
        self._directory = _place(directory)
        self._second = None if second is None else self._own_second(second)
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._keep, self._keep_every, self._base, self._background = keep, keep_every, base, background
        self._last = time.monotonic()
        self._pending: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saves = 0
        self._warnings: list[str] = []

    def _own_second(self, second: str) -> epath.Path:
        """Returns the second place.

        Raises:
          UserError: it is no folder, or not of this run.
        """
        field = f"config.checkpoint.second={second!r}"
        if not isinstance(second, str) or not second or "://" in second:
            raise UserError(f"{field}: name a folder; mount storage that is none")
        place = _place(second)
        if place in (self._directory, *self._directory.parents):
            raise UserError(f"{field}: holds the first place; name a folder of its own")
        if place.exists() and not place.is_dir():
            raise UserError(f"{field}: is a file; name a folder")
        owner = (place / OWNER).read_text().strip() if (place / OWNER).exists() else None
        if owner not in (None, str(self._directory)):
            raise UserError(
                f"{field}: belongs to {owner}; name another folder, or remove {OWNER} there if that has moved"
            )
        if owner is None and place.exists() and any(place.iterdir()):
            raise UserError(f"{field}: has files that are no copies of this run; name a folder of its own")
        return place

    def __enter__(self) -> Checkpoints:
        """Returns itself; leaving the block waits for the save under way."""
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    @jax.transfer_guard("allow")
    def due(self, step: int) -> bool:
        """Returns whether to save now; the same answer on every process."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        if self._every_minutes is None:
            return False
        passed = time.monotonic() - self._last > 60 * self._every_minutes
        if jax.process_count() == 1:
            return passed
        return step % CLOCK_STEPS == 0 and bool(multihost_utils.broadcast_one_to_all(np.int32(passed)))

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints that were completed, in increasing order."""
        return manifests.completed(self._directory)

    def warnings(self) -> list[str]:
        """Returns what went wrong since the last call without harm to the checkpoints in the first place."""
        found, self._warnings = self._warnings, []
        return found

    @jax.transfer_guard("allow")
    def save(self, step: int, state: TrainState, host: Mapping[str, Any]) -> float:
        """Starts to write a checkpoint and returns the seconds it held up the caller.

        It waits for the save before it and until the state may be donated: threads write what it was. Without
        `background` it waits for them too.

        Args:
          step: number of finished updates.
          state: jax.Array leaves, global ones if there are several processes.
          host: what else a resumed run must know, as JSON.

        Raises:
          NotSaved: the save before this one failed; without `background`, this one.
        """
        begin = time.monotonic()
        self.wait()
        leaves = {name: leaf for name, leaf in named_leaves(state) if leaf.size}  # Orbax takes no empty arrays
        if foreign := [name for name, leaf in leaves.items() if not isinstance(leaf, jax.Array)]:
            raise TypeError(f"state leaf {foreign[0]!r} is no jax.Array: several processes could not save it as one")
        text = json.dumps(host, allow_nan=False)
        target = self._directory / str(step)
        self._saves += 1
        if jax.process_index() == 0:
            self._discard(step)
            target.mkdir(parents=True)
            manifests.write(target / "host.json", text)
        self._barrier(step, "start")
        sums = checksums(list(leaves.values()))
        table = {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
        inside = {name: leaf for name, leaf in leaves.items() if not (self._base and name.startswith(BASE))}
        with saved.memory(leaves.values()):
            under_way = [ocp.save_async(target / "state", manifests.nest(inside))]

        # The thread must not touch the leaves: the next step may take their memory.
        def finish() -> None:
            try:
                under_way.pop().result()  # and with it go its buffers
                self._commit(step, target, table, np.asarray(sums.addressable_data(0)).tolist())
            except BaseException as error:  # raised again by wait()
                self._error = NotSaved(f"checkpoint {step} in {self._directory} was not written: {error}")
                self._error.__cause__ = error
            allocator.give_back()

        self._pending = threading.Thread(target=finish, name=f"checkpoint-{step}")
        self._pending.start()
        if not self._background:
            self.wait()
            allocator.give_back()  # what other threads have let go of since
        self._last = time.monotonic()
        return self._last - begin

    def wait(self) -> None:
        """Blocks until the save under way is complete on all processes; raises NotSaved if it failed."""
        if self._pending:
            self._pending.join()
            self._pending = None
        if self._error:
            error, self._error = self._error, None
            raise error

    @jax.transfer_guard("allow")
    def restore(self, abstract_state: PyTree, *, step: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is whole, or the one at `step`. Nothing on disk changes.

        Args:
          abstract_state: jax.ShapeDtypeStruct leaves; with a sharding each, or all go to the first device.
          step: no other will do.

        Returns:
          None if there is no checkpoint.

        Raises:
          UserError: the checkpoint holds another structure; or the one asked for is damaged; or all are.
        """
        self.wait()
        reasons: list[str] = []
        whole = False
        for number, second in self._candidates(step):
            path = (self._second if second and self._second is not None else self._directory) / str(number)
            exists = _all_agree((path / MANIFEST).exists())
            whole |= exists
            cut_short = f"{MANIFEST} is missing: its save was cut short"
            reason, manifest = manifests.verify(path) if exists else (cut_short, None)
            if _all_agree(manifest is not None) and manifest is not None:
                state = _load(path, manifest, abstract_state, self._base)
                if state is not None:
                    host = manifests.host(path)
                    place = f" in {self._second}" if second else ""
                    message = (
                        "; ".join([*reasons, f"resuming from step {number}{place}"]) if reasons or second else None
                    )
                    allocator.give_back()
                    return Restored(number, state, host, message)
                reason = "an array differs from the one that was saved"
            where = f" in {self._second}" if second else ""
            reason = reason or "another process found a damaged file"
            reasons.append(f"checkpoint {number}{where} is unusable ({reason})")
        if step is not None:
            raise UserError(f"{self._directory}: {'; '.join(reasons)}; the whole ones are {self.steps()}")
        if whole:
            raise UserError(
                f"{self._directory}: no checkpoint can be read: {'; '.join(reasons)}; "
                "restore it from a copy, or remove it to start from the beginning"
            )
        return None

    def _candidates(self, step: int | None) -> list[tuple[int, bool]]:
        """Returns (step, whether in the second place) of what may be a checkpoint, the best first."""
        if step is not None:
            return [(step, False)] + ([(step, True)] if self._second is not None else [])
        first = manifests.steps(self._directory)
        try:
            second = [] if self._second is None else manifests.completed(self._second)
        except OSError:  # it may be away
            second = []
        ranks = sorted([2 * n + 1 for n in first] + [2 * n for n in second], reverse=True)
        return [(rank // 2, rank % 2 == 0) for rank in _from_first(ranks)]

    def _discard(self, since: int) -> None:
        """Moves checkpoints at `since` and later out of the way: they belong to an attempt that was given up."""
        self._discard_in(self._directory, since)
        if self._second is not None:
            try:
                self._discard_in(self._second, since)
            except OSError as error:
                self._warnings.append(f"{self._second}: {' '.join(str(error).split())}")

    def _discard_in(self, directory: epath.Path, since: int) -> None:
        for step in manifests.steps(directory):
            if step >= since:
                path = directory / str(step)
                aside = directory / f"{step}.discarded"
                if (path / MANIFEST).exists():
                    if aside.exists():
                        aside.rmtree()
                    path.rename(aside)
                else:
                    path.rmtree()

    def _commit(self, step: int, target: epath.Path, table: dict[str, Any], sums: list[int]) -> None:
        """Hashes the files, each process its share, and lets process 0 write the manifest."""
        self._barrier(step, "written")
        index, count = jax.process_index(), jax.process_count()
        mine = {name: manifests.fingerprint(target / name) for name in manifests.files(target)[index::count]}
        if index > 0:
            manifests.write(target / f"{PART}{index}", json.dumps(mine))
        self._barrier(step, "hashed")
        if index == 0:
            for other in range(1, count):
                mine |= json.loads((target / f"{PART}{other}").read_text())
                (target / f"{PART}{other}").unlink()
            leaves = {name: [*shape_type, total] for (name, shape_type), total in zip(table.items(), sums, strict=True)}
            line = json.dumps({"step": step, "files": mine, "leaves": leaves, "base": self._base is None})
            manifests.write(target / MANIFEST, f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
            if self._second is not None:
                try:
                    self._second.mkdir(parents=True, exist_ok=True)
                    manifests.write(self._second / OWNER, f"{self._directory}\n")
                    manifests.copy(target, self._second / str(step))
                    self._prune(self._second)
                except OSError as error:
                    text = " ".join(str(error).split())
                    self._warnings.append(f"checkpoint {step} was not copied to {self._second}: {text}")
            self._prune(self._directory)
        self._barrier(step, "committed")

    def _prune(self, directory: epath.Path) -> None:
        """Removes what the keep options do not name, and what was cut short before the newest."""
        steps = manifests.completed(directory)
        kept = {*steps[-self._keep :], *(step for step in steps if self._keep_every and step % self._keep_every == 0)}
        for step in manifests.steps(directory):
            if step not in kept and step < steps[-1]:
                path = directory / str(step)
                (path / MANIFEST).unlink(missing_ok=True)  # first, so that no half of one is taken for whole
                path.rmtree()

    def _barrier(self, step: int, phase: str) -> None:
        """Waits for all processes, through the coordination service: no device takes part."""
        if jax.process_count() > 1:
            asyncio.run(ocp.multihost.sync_global_processes(phase, operation_id=f"jaxcl-{step}-{self._saves}"))


def _place(directory: str | os.PathLike[str]) -> epath.Path:
    return epath.Path(os.path.abspath(directory) if "://" not in str(directory) else directory)


def _load(path: epath.Path, manifest: dict[str, Any], abstract_state: PyTree, base: Base | None) -> PyTree | None:
    """Returns the state on the devices, or None if a checksum differs.

    Raises:
      UserError: `abstract_state` has other leaves than the checkpoint, or the base has changed.
    """
    kept, wanted = manifest["leaves"], dict(named_leaves(abstract_state))
    for name, leaf in wanted.items():
        if leaf.size and name not in kept:
            raise UserError(f"{path}: has no leaf {name!r}, which this run needs; was it made by another config?")
        if leaf.size and kept[name][:2] != [list(leaf.shape), str(leaf.dtype)]:
            found, asked = (f"{kind}{shape}" for shape, kind in (kept[name][:2], (list(leaf.shape), leaf.dtype)))
            raise UserError(f"{path}: leaf {name!r} is {found}, this run needs {asked}; was it made by another config?")
    extra = [name for name in kept if name not in wanted]
    if extra:
        raise UserError(f"{path}: holds the leaf {extra[0]!r}, which this run lacks; was it made by another config?")
    here = SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in wanted.items()
    }
    full = {name: target for name, target in targets.items() if target.size}
    loaded, differ = saved.arrays(path, manifest, full, base)
    if not _all_agree(not differ):
        return None
    empty = {name: jnp.zeros(t.shape, t.dtype, device=t.sharding) for name, t in targets.items() if not t.size}
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [(loaded | empty)[name] for name in wanted])


def _from_first(steps: list[int], most: int = 64) -> list[int]:
    """Returns the first `most` steps as process 0 sees them: directory listings may be out of date elsewhere."""
    if jax.process_count() == 1:
        return steps
    padded = np.full(most, -1, np.int32)
    padded[: len(steps[:most])] = steps[:most]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _all_agree(holds: bool) -> bool:
    """Returns whether `holds` on every process."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.int32(holds))))


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keeps the progress messages of Orbax off the terminal; what it cannot do it raises."""
    return "orbax" not in record.pathname or record.levelno >= logging.ERROR
