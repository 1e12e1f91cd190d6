"""The batches of a run in order: read ahead from the stream, and where a stage learns from rollouts, made of them."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import frozen
from jaxcl.data import stream as streams
from jaxcl.data.permutation import fold_in, key_of
from jaxcl.practice import Practice
from jaxcl.rl.explore import Explorer, Rewarded, Rolled, Told
from jaxcl.types import Batch, TrainState

AHEAD = 2  # batches that are read and placed while the device works
Kept = dict[str, list[list[int]]]  # stage -> rows that are learned from, of every source


class Held(NamedTuple):
    """What a feed remembers from step to step: part of every checkpoint."""

    kept: Kept = {}  # noqa: RUF012  never changed in place
    rows: Batch | None = None  # of the next step, drawn one step before
    told: Told | None = None  # of these rows


class Feeder:
    """Reads and places the next batches in a thread while the device works."""

    def __init__(self, place: Callable[[int], Batch], start: int, end: int):
        self._place, self._next, self._end = place, start, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._queue: deque[Future[Batch]] = deque()

    def get(self) -> Batch:
        """Returns the batch of the next step."""
        while len(self._queue) <= AHEAD and self._next < self._end:
            self._queue.append(self._pool.submit(self._place, self._next))
            self._next += 1
        return self._queue.popleft().result()

    def close(self) -> None:
        """Drops what was read ahead, but reads it: another process may wait for rows that are committed on the way."""
        self._pool.shutdown(wait=True)


class Rollouts(NamedTuple):
    """What makes batches of prompts, for the stages that learn from rollouts."""

    explorer: Explorer
    practice: Practice
    flow: streams.Stream
    place: Callable[[streams.Index, int], Batch]
    seed: int
    example: Batch  # shapes, dtypes and shardings of the rows that are made

    def learns(self, step: int) -> bool:
        """Returns whether a step learns from rollouts."""
        return self.practice.learns[self.flow.stage_of(step)] == "rl"

    def index(self, step: int, kept: Kept, draw: int = 0) -> streams.Index:
        """Returns the rows whose prompts are shown at a step; after the first draw, other ones of the same sources."""
        index, stage = self.flow.index(step), str(self.flow.stage_of(step))
        if draw == 0 and stage not in kept:
            return index
        row = index.row.copy()
        hashes = fold_in(key_of("refill", self.seed, step, draw), np.arange(len(row)))
        for source, size in enumerate(self.flow.sizes):
            rows = np.array(kept[stage][source] if stage in kept else np.arange(size), np.int64)
            mine = np.flatnonzero(index.source == source)
            if draw == 0:
                mine = mine[~np.isin(row[mine], rows)]
            row[mine] = rows[(hashes[mine] % np.uint64(len(rows))).astype(np.int64)]
        return index._replace(row=row)

    def prompts(self, step: int, kept: Kept, draw: int = 0) -> tuple[Batch, np.ndarray]:
        """Returns the prompts of a step on the devices, and the numbers of their problems."""
        index = self.index(step, kept, draw)
        return self.place(index, self.flow.stage_of(step)), self.practice.numbers(self.flow, index)

    def now(self, state: TrainState, prompts: Batch, step: int, kept: Kept) -> tuple[Batch, Told]:
        """Returns the rows to train on at a step, drawn from the present parameters."""
        params, began = frozen.whole(state), time.perf_counter()
        rolled = self.explorer.roll(params, prompts, step)
        if self.explorer.rollout.refill:
            return self.refilled(params, rolled, prompts, step, kept)
        return self.judged(rolled, prompts, step, kept, began)

    def judged(self, rolled: Rolled, prompts: Batch, step: int, kept: Kept, began: float) -> tuple[Batch, Told]:
        """Returns the rows to train on, given what was drawn; times are under `time/`."""
        numbers = self.practice.numbers(self.flow, self.index(step, kept))
        rolled.kind.block_until_ready()
        drawn = time.perf_counter()
        rows, told = self.explorer.judge(rolled, prompts, numbers, self.local(step))
        return rows, told | {"time/sample_s": drawn - began, "time/verify_s": time.perf_counter() - drawn}

    def refilled(self, params: Any, rolled: Rolled, prompts: Batch, step: int, kept: Kept) -> tuple[Batch, Told]:
        """Returns the rows to train on, with groups without a signal drawn anew for other problems (DAPO).

        After `refill` rounds those that are left take part without weight. `reward` and all else that is told is of
        the groups trained on; `refills` counts the rounds.
        """
        explorer, began = self.explorer, time.perf_counter()
        numbers = self.practice.numbers(self.flow, self.index(step, kept))
        got, base = self.rewarded(rolled, numbers, step)
        rounds, events = 0, dict(got.events)
        while rounds < explorer.rollout.refill and (blank := _blank_groups(explorer, numbers, got, base)).size:
            rounds += 1
            shown, others = self.prompts(step, kept, rounds)
            more = explorer.roll(params, shown, step, rounds)
            found, other_base = self.rewarded(more, others, step)
            events = {name: count + found.events[name] for name, count in events.items()}
            empty = _blank_groups(explorer, others, found, other_base)
            good = np.setdiff1d(np.flatnonzero(others >= 0), empty)[: len(blank)]  # padding is neither
            source = np.full(len(numbers), -1, np.int32)
            source[blank[: len(good)]] = good
            where = source >= 0
            for old, new in ((got.values, found.values), (got.right, found.right), (got.failed, found.failed)):
                old[where] = new[good]
            numbers[where] = others[good]
            if base is not None and other_base is not None:
                base[where] = other_base[good]
            got = got._replace(message=got.message or found.message)
            rolled, prompts = explorer.merge((rolled, prompts), (more, shown), explorer.whole(source))
        spent = time.perf_counter() - began
        rows, told = explorer.valued(rolled, prompts, numbers, got._replace(events=events), base)
        del told["busy"]  # of several draws there is no one number
        return rows, told | {"refills": float(rounds), "time/sample_s": spent}

    def rewarded(self, rolled: Rolled, numbers: np.ndarray, step: int) -> tuple[Rewarded, np.ndarray | None]:
        """Returns the rewards, and those of the greedy baseline [N] if there is one."""
        explorer, local = self.explorer, self.local(step)
        return explorer.rewards(rolled.kind, rolled.token, numbers, local), explorer.baseline(rolled, numbers, local)

    def local(self, step: int) -> int:
        """Returns the step within its stage."""
        stage = self.flow.stage_of(step)
        return step - self.flow.boundaries[stage] + self.flow.stages[stage].steps

    def solved(self, state: TrainState, stage: int) -> list[list[int]]:
        """Returns the rows of every source that any of `filter` rollouts solves; all of a source if there is none.

        This is the rollout instance filter of Lai et al. (2507.05386): problems that the present parameters cannot
        solve give no signal but noise.
        """
        params, first = frozen.whole(state), self.flow.boundaries[stage] - self.flow.stages[stage].steps
        kept = []
        for source, size in enumerate(self.flow.sizes):
            rows = np.arange(size)
            if self.flow.stages[stage].mixture.get(self.flow.sources[source]):
                rows = rows[self.successes(params, source, stage, first) > 0]
            kept.append((rows if len(rows) else np.arange(size)).tolist())
        return kept

    def successes(self, params: Any, source: int, stage: int, step: int) -> np.ndarray:
        """Returns how many of `filter` rollouts of each row of a source are right, int [rows]."""
        size, width = int(self.flow.sizes[source]), self.flow.width
        count, rounds = np.zeros(size, int), self.explorer.rollout.filter // self.explorer.rollout.group
        blank, zero = np.full(width, -1, np.int32), np.zeros(width, bool)
        for start in range(0, size, width):
            row = start + np.arange(width)
            inside = row < size
            index = streams.Index(
                np.where(inside, source, -1).astype(np.int32), np.where(inside, row, 0), zero, blank * 0 + stage, blank
            )
            prompts, numbers = self.place(index, stage), self.practice.numbers(self.flow, index)
            for draw in range(rounds):
                rolled = self.explorer.roll(params, prompts, step, -1 - draw - rounds * start)
                right = self.explorer.rewards(rolled.kind, rolled.token, numbers).right
                count[row[inside]] += right[inside].sum(axis=1)
        return count


def _blank_groups(explorer: Explorer, numbers: np.ndarray, got: Rewarded, base: np.ndarray | None) -> np.ndarray:
    """Returns the groups that teach nothing, int."""
    return np.flatnonzero(np.all(explorer.value(numbers, got, base).values == 0, axis=1) & (numbers >= 0))


class Feed:
    """Gives the loop its batches; to be closed."""

    def __init__(
        self, read: Callable[[int], Batch], rollouts: Rollouts | None, start: int, flow: streams.Stream, held: Held
    ) -> None:
        """Begins to read at step `start`; `held` is what an earlier feed remembered there."""
        self.rollouts, self.flow, self.step, self.held = rollouts, flow, start, held
        self._feeder = Feeder(read, start, flow.total_steps)
        self._next: Batch | None = None
        self._rolled: tuple[Rolled, float] | None = None

    def get(self, state: TrainState) -> tuple[Batch, Told]:
        """Returns the batch of the next step and what there is to tell of it."""
        step, self.step = self.step, self.step + 1
        given, self._next = self._next or self._feeder.get(), None
        rollouts = self.rollouts
        if rollouts is None or not rollouts.learns(step):
            return given, {}
        if self.held.rows is None or self.held.told is None:
            rows, told = self._drawn(rollouts, state, given, step)
        else:
            rows, told = self.held.rows, self.held.told
        self.held = Held(self.held.kept)
        if rollouts.explorer.rollout.ahead and step + 1 not in self.flow.boundaries:
            self._next = self._shown(rollouts, self._feeder.get(), step + 1)
            # Dispatched before the step that donates the parameters: the devices draw first, then train.
            self._rolled = rollouts.explorer.roll(frozen.whole(state), self._next, step + 1), time.perf_counter()
        return rows, told

    def settle(self) -> None:
        """Verifies what is drawn for the next step; to be called when the present one has been dispatched."""
        if self._rolled is not None and self.rollouts is not None and self._next is not None:
            rolled, began = self._rolled
            self.held = Held(
                self.held.kept, *self.rollouts.judged(rolled, self._next, self.step, self.held.kept, began)
            )
        self._rolled = None

    def task(self, state: TrainState, steps: range) -> list[Batch]:
        """Returns rollouts of the present parameters for the prompts of past steps, for the end of a task."""
        assert self.rollouts is not None
        rows = []
        for step in steps:
            prompts, numbers = self.rollouts.prompts(step, self.held.kept)
            rolled = self.rollouts.explorer.roll(frozen.whole(state), prompts, step, self.flow.total_steps)
            rows.append(self.rollouts.explorer.judge(rolled, prompts, numbers, self.rollouts.local(step))[0])
        return rows

    def close(self) -> None:
        """Stops reading."""
        self._feeder.close()

    def _drawn(self, rollouts: Rollouts, state: TrainState, given: Batch, step: int) -> tuple[Batch, Told]:
        stage = self.flow.stage_of(step)
        told: Told = {}
        if rollouts.explorer.rollout.filter and str(stage) not in self.held.kept:
            kept = rollouts.solved(state, stage)
            self.held = self.held._replace(kept={**self.held.kept, str(stage): kept})
            used = [bool(self.flow.stages[stage].mixture.get(name)) for name in self.flow.sources]
            told["kept"] = float(
                sum(len(rows) for rows, use in zip(kept, used, strict=True) if use) / self.flow.sizes[used].sum()
            )
        rows, more = rollouts.now(state, self._shown(rollouts, given, step), step, self.held.kept)
        return rows, told | more

    def _shown(self, rollouts: Rollouts, given: Batch, step: int) -> Batch:
        """Returns the prompts of a step; those read ahead do not know which problems are kept."""
        known = str(self.flow.stage_of(step)) in self.held.kept
        return rollouts.prompts(step, self.held.kept)[0] if known else given


def with_ahead(abstract: TrainState, rollouts: Rollouts | None) -> TrainState:
    """Returns the shapes of what a checkpoint has: with `rollout.ahead`, also the rows of the next step."""
    if rollouts is None or not rollouts.explorer.rollout.ahead:
        return abstract
    return dataclasses.replace(abstract, memory={**abstract.memory, "ahead": rollouts.example})


def packed(state: TrainState, rollouts: Rollouts | None, held: Held) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the host part that a checkpoint has of a run and its feed."""
    if rollouts is None:
        return state, {}
    host = {"feed": {"kept": held.kept, "told": held.told}}
    if not rollouts.explorer.rollout.ahead:
        return state, host
    rows = held.rows if held.rows is not None else _blank(rollouts.example)
    return dataclasses.replace(state, memory={**state.memory, "ahead": rows}), host


def unpacked(state: TrainState, host: Mapping[str, Any] | None) -> tuple[TrainState, Held]:
    """Returns the state of the method, and what the feed remembers."""
    if host is None:
        return state, Held()
    if "ahead" not in state.memory:
        return state, Held(dict(host["kept"]))
    rest = {name: value for name, value in state.memory.items() if name != "ahead"}
    rows = state.memory["ahead"] if host["told"] is not None else None
    return dataclasses.replace(state, memory=rest), Held(dict(host["kept"]), rows, host["told"])


def _blank(example: Batch) -> Batch:
    """Returns rows of zeros, for a checkpoint at which no rows wait."""
    shardings = jax.tree.map(lambda x: x.sharding, example)
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example), out_shardings=shardings)
    return make()
