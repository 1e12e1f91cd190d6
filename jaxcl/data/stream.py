"""The training stream: every batch is a function of (seed, step, stage table).

    rows = {"wiki": corpus.train, "code": other.train}                  # prepare.make(...) or rows.from_words(...)
    stages = [Stage("first", 1000, {"wiki": 1.0}), Stage("second", 1000, {"wiki": 0.1, "code": 0.9})]
    stream = make(rows, stages, batch=16, seed=0, replay=dict(fraction=0.25, mode="replace", over="earlier"))
    stream.at(1234)                   # Batch of NumPy arrays; extra["replayed"] marks the replayed rows
    stream.at(1234, slice(4, 8))      # the rows 4..7 of the same batch, and nothing else is read
    stream.index(1234)                # which rows those are; reads no data
    stream.account(1234)              # {"wiki": {"new_rows": 1, "new_tokens": 256, "replayed_rows": 4, ...}, ...}
    stream.stage_of(1234), stream.boundaries, stream.total_steps, stream.width

Nothing is stored: a resume needs the step alone, any number of hosts assembles the same batch, and the past does not
change when a later stage is edited, added or removed. New rows: slot n of a stage belongs to a source by exact
counts (`mixture.py`); each source walks through its rows in an order shuffled anew every epoch (`permutation.py`)
and goes on in later stages where it stopped. Replay is an index transform over exactly the rows seen so far:

  over="earlier"    the distinct rows that were new in earlier stages, none twice until all have come
  over="seen"       all distinct rows before this step, drawn anew each step, none twice in a step
  over="reservoir"  a uniform sample of `capacity` rows of all that have come, drawn anew each step; for data that may
                    not be kept. The index names the rows, and `recall` reads their content from the run's disk
                    (`archive.py`). A row counts as often as it was new; the newest join every COMMIT_STEPS steps
  mode="replace"    the batch stays at B rows and replayed rows take the place of new ones (compute-equivalent replay;
                    Ibrahim et al., TMLR 2024)
  mode="extend"     all B new rows stay and replayed ones are added until they are `fraction` of the rows;
                    the batch has a fixed width, filled with rows of weight 0 where the count alternates

The number of replayed rows is rounded with error diffusion: over any prefix of a stage it is within half a row of the
fraction. The stream's `replay` holds from the second stage on; a stage with its own `replay` overrides it, also in the
first stage, where it cannot be over="earlier". `fraction=0` takes the same new rows as no replay at all.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl import schema
from jaxcl.data import mixture, replays
from jaxcl.data.permutation import fold_in, key_of, permute
from jaxcl.data.reservoir import Contents
from jaxcl.data.rows import Columns, Rows, batch_of
from jaxcl.schema import UserError
from jaxcl.types import Batch

_FORMAT = 1  # enters every key and fingerprint: raise it when the order of rows changes
COMMIT_STEPS = 8  # between commits of the reservoir: each costs fsyncs and a wait for the others; fixed like _FORMAT

Recall = Callable[[np.ndarray], Columns]  # numbers of rows of the stream, int64 [n] -> columns [n, ...]


class Stage(NamedTuple):
    """A stretch of the stream with one mixture; its number is the task number of the rows that are new in it."""

    name: str
    steps: int
    mixture: Mapping[str, float]  # source -> weight, need not sum to 1
    replay: Mapping[str, Any] | None = None  # overrides the stream's: fraction, mode, over, capacity
    learn: Literal["rl", "sft", "csft", "dpo"] | None = None  # of problems: how they are learned from; see `rl.table`


class Index(NamedTuple):
    """What the rows of a batch are: new rows first, then replayed ones, then padding. Each column is [width]."""

    source: np.ndarray  # int32, position in `Stream.sources`; -1 = padding
    row: np.ndarray  # int64, row number within the source
    replayed: np.ndarray  # bool
    task: np.ndarray  # int32, stage in which the row was new: for the first time, or when the reservoir took it
    stored: np.ndarray  # int64, number among the new rows, if it is to be read from the reservoir; else -1


class Plan(NamedTuple):
    """A stage, ready for arithmetic."""

    start: int  # first step
    mixture: mixture.Mixture
    replay: replays.Replay
    rate: Fraction  # replayed rows per step
    delay: int  # steps at the beginning without replay, because nothing has been seen
    base: np.ndarray  # int64 [K] rows of each source consumed before the stage, repeats included


class Stream(NamedTuple):
    """See the module's docstring; made by `make`."""

    rows: tuple[Rows, ...]
    sources: tuple[str, ...]
    stages: tuple[Stage, ...]
    plans: tuple[Plan, ...]
    boundaries: tuple[int, ...]  # first step after each stage
    batch: int
    width: int  # rows of a batch, padding included: the leading axis of every leaf
    seed: int
    sizes: np.ndarray  # int64 [K]
    bases: np.ndarray  # int64 [T + 1, K] rows consumed before each stage and after the last
    keys: np.ndarray  # uint64 [K]
    contents: Contents | None = None  # of the reservoir, if there is one

    @property
    def total_steps(self) -> int:
        """Number of steps of all stages."""
        return self.boundaries[-1]

    def stage_of(self, step: int) -> int:
        """Returns the number of the stage that `step` belongs to.

        Raises:
          IndexError: the stream has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the stream of {self.total_steps} steps")
        return int(np.searchsorted(self.boundaries, step, side="right"))

    def index(self, step: int) -> Index:
        """Returns the rows of the batch at `step` without reading them."""
        s = self.stage_of(step)
        plan, local = self.plans[s], step - self.plans[s].start
        first, after = _new(plan, self.batch, local), _new(plan, self.batch, local + 1)
        source, before = mixture.locate(plan.mixture, np.arange(first, after))
        count = _replayed(plan, local + 1) - _replayed(plan, local)
        old_source, old_position, stored = self._replay(s, step, first, local, count)
        sources = np.concatenate([source, old_source])
        row = self._row(sources, np.concatenate([plan.base[source] + before, old_position]))
        task = np.full(self.width, s, np.int32)
        task[len(source) : len(row)] = (self.bases[1:, old_source] <= old_position).sum(axis=0)
        place, pad = np.arange(self.width), self.width - len(row)
        return Index(
            np.concatenate([sources, np.full(pad, -1)]).astype(np.int32),
            np.concatenate([row, np.zeros(pad, np.int64)]),
            (place >= len(source)) & (place < len(row)),
            task,
            np.concatenate([np.full(len(source), -1), stored, np.full(pad, -1)]),
        )

    def at(self, step: int, rows: slice | None = None, recall: Recall | None = None) -> Batch:
        """Returns the batch at `step`, or the given rows of it; every leaf is a NumPy array [width, ...].

        `extra["replayed"]` is float32 [width]: 1 for replayed rows, else 0.
        """
        return self.read(self.index(step), rows, recall)

    def read(self, index: Index, rows: slice | None = None, recall: Recall | None = None) -> Batch:
        """Reads the rows of an index, or a slice of them: the part that a process holds.

        Args:
          index: of the batch.
          rows: which rows of it; default: all.
          recall: reads rows from the reservoir; rows for which it returns no columns stay blank, with weight 0.
        """
        source, row, replayed, task, stored = (column[rows or slice(None)] for column in index)
        pieces = []
        for k in np.unique(source[(source >= 0) & (stored < 0)]):
            mine = np.flatnonzero((source == k) & (stored < 0))
            pieces.append((mine, self.rows[k].fetch(row[mine])))
        held = np.flatnonzero(stored >= 0)
        if held.size:
            if recall is None:
                raise ValueError("rows of this batch lie in the reservoir of the run: give `recall`, see archive.py")
            pieces.append((held, recall(stored[held])))
        columns: Columns = {}
        for mine, piece in pieces:
            for name, values in piece.items():
                if name not in columns:
                    columns[name] = np.zeros((len(source), *values.shape[1:]), values.dtype)
                columns[name][mine] = values
        return batch_of(columns or self.blank(), task, {"replayed": replayed.astype(np.float32)})

    def blank(self) -> Columns:
        """Returns columns of no rows, [0, ...]; any row gives the shapes."""
        k = int(self.plans[0].mixture.order[0])
        return {name: np.zeros_like(v[:0]) for name, v in self.rows[k].fetch(np.zeros(1, np.int64)).items()}

    def account(self, step: int) -> dict[str, dict[str, int]]:
        """Returns new and replayed rows and tokens (targets in the loss) of each source at `step`."""
        index, out = self.index(step), {}
        for k, name in enumerate(self.sources):
            row = {kind: index.row[(index.source == k) & (index.replayed == (kind == "replayed"))] for kind in _KINDS}
            counts = {f"{kind}_rows": len(row[kind]) for kind in _KINDS}
            out[name] = counts | {f"{kind}_tokens": int(self.rows[k].tokens[row[kind]].sum()) for kind in _KINDS}
        return out

    def named_rows(self, step: int) -> dict[str, list[int]]:
        """Returns the numbers of the rows of each source that the batch at `step` has, in their order."""
        index = self.index(step)
        rows = {name: index.row[index.source == k].tolist() for k, name in enumerate(self.sources)}
        return {name: numbers for name, numbers in rows.items() if numbers}

    def ledger(self, step: int) -> dict[str, dict[str, int]]:
        """Returns the sum of `account` over the steps before `step`; takes time in proportion to `step`."""
        total: dict[str, dict[str, int]] = {name: {} for name in self.sources}
        for s in range(step):
            for name, counts in self.account(s).items():
                total[name] = {key: total[name].get(key, 0) + value for key, value in counts.items()}
        return total

    def consumed(self, step: int) -> dict[str, int]:
        """Returns how many new rows of each source the steps before `step` took; over N it is the number of epochs."""
        s = min(int(np.searchsorted(self.boundaries, step, side="right")), len(self.stages) - 1)
        plan, local = self.plans[s], step - self.plans[s].start
        counts = plan.base + mixture.counts(plan.mixture, _new(plan, self.batch, local), len(self.rows))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def arrivals(self) -> dict[str, dict[int, int]]:
        """Returns source -> label -> the number of steps after which a new row of that label has come.

        Of sources whose rows have labels; a label that never comes is left out.
        """
        found: dict[str, dict[int, int]] = {name: {} for name in self.sources}
        for k, name in enumerate(self.sources):
            if (labels := self.rows[k].labels) is None:
                continue
            size = int(self.sizes[k])
            order = self._row(np.full(size, k), np.arange(size))
            for label, first in zip(*np.unique(labels[order], return_index=True), strict=True):
                counts = range(self.total_steps + 1)
                step = bisect.bisect_right(counts, first, key=lambda step, name=name: self.consumed(step)[name])
                if step <= self.total_steps:
                    found[name][int(label)] = step
        return found

    def stored(self, step: int) -> int:
        """Returns how many new rows the reservoir has been given when the batch at `step` is drawn from it."""
        step = min(max(step, 0), self.total_steps)
        return sum(self.consumed(step - step % COMMIT_STEPS).values())

    def find(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and row of the given new rows, numbered from the beginning of the stream; int64 [n] each."""
        source, position = self._walk(number)
        return source, self._row(source, position)

    def fingerprint(self, step: int | None = None) -> str:
        """Returns a hash of all that decides the rows before `step` (default: of the whole stream).

        Equal fingerprints mean equal batches, so a checkpoint that stores `fingerprint(step)` notices on
        resume that a corpus, the seed or a past stage is no longer what it was; later stages may change freely.
        """
        end = self.total_steps if step is None else step
        past = [i for i, plan in enumerate(self.plans) if plan.start < end]
        table = []
        for i in past:
            weights = {name: str(mixture.exact(w)) for name, w in sorted(self.stages[i].mixture.items()) if w}
            options = [str(x) for x in self.plans[i].replay if x is not None]
            replay = options if self.plans[i].replay.fraction else None
            table.append([min(self.boundaries[i], end) - self.plans[i].start, weights, replay])
        used = sorted({name for _, weights, _ in table for name in weights})
        content = {name: self.rows[self.sources.index(name)].fingerprint for name in used}
        text = json.dumps([_FORMAT, self.seed, self.batch, table, content])
        return hashlib.sha256(text.encode()).hexdigest()

    def _row(self, source: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Returns the row number at a position of a source's endless walk; epochs are shuffled one by one."""
        epoch, place = np.divmod(position, self.sizes[source])
        return permute(place, self.sizes[source], fold_in(self.keys[source], epoch))

    def _walk(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and position in its walk of the given new rows of the stream."""
        starts = self.bases.sum(axis=1)  # [T + 1] new rows before each stage
        stage = np.searchsorted(starts, number, side="right") - 1
        source, position = np.empty(number.shape, np.int64), np.empty(number.shape, np.int64)
        for s in np.unique(stage):
            mine = stage == s
            source[mine], before = mixture.locate(self.plans[s].mixture, number[mine] - starts[s])
            position[mine] = self.plans[s].base[source[mine]] + before
        return source, position

    def _replay(self, s: int, step: int, new: int, local: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns source and position of the replayed rows, and their numbers in the reservoir or -1.

        Positions are within the first epoch, which has every row once, unless they come from the reservoir.
        """
        plan, seen, none = self.plans[s], self.plans[s].base, np.full(count, -1)
        if not count:
            return none, none, none
        if plan.replay.over == "reservoir" and self.contents:
            number = self.contents.draw(step, count, self.stored(step))
            return *self._walk(number), number
        if plan.replay.over == "earlier":
            draws, key = np.arange(count) + _replayed(plan, local), key_of(_FORMAT, self.seed, "replay", s)
        else:
            seen = seen + mixture.counts(plan.mixture, new, len(self.rows))
            draws, key = np.arange(count), key_of(_FORMAT, self.seed, "replay", s, step)
        ends = np.cumsum(np.minimum(seen, self.sizes))
        rounds, place = np.divmod(draws, ends[-1])
        pick = permute(place, int(ends[-1]), fold_in(key, rounds))
        source = np.searchsorted(ends, pick, side="right")
        return source, pick - np.concatenate([[0], ends])[source], none


_KINDS = ("new", "replayed")


def _replayed(plan: Plan, steps: int) -> int:
    """Returns the number of replayed rows in the first `steps` steps of a stage."""
    return int(mixture.rounded(max(steps - plan.delay, 0), plan.rate.numerator, plan.rate.denominator))


def _new(plan: Plan, batch: int, steps: int) -> int:
    """Returns the number of new rows in the first `steps` steps of a stage."""
    return steps * batch - (_replayed(plan, steps) if plan.replay.mode == "replace" else 0)


def make(
    rows: Mapping[str, Rows],
    stages: Sequence[Stage | Mapping[str, Any]],
    *,
    batch: int,
    seed: int = 0,
    replay: Mapping[str, Any] | None = None,
    multiple: int = 1,
) -> Stream:
    """Returns the stream of the stages, one after another.

    Args:
      rows: source name -> rows; sources that no stage uses are allowed.
      stages: the stage table; a mapping stands for `Stage(**mapping)`.
      batch: B rows per step (new rows per step with mode="extend").
      seed: of every shuffle.
      replay: `fraction` in [0, 1), `mode` ("replace" or "extend"), `over` ("earlier", "seen" or "reservoir") and, with
        over="reservoir", its `capacity` in rows; or None.
      multiple: with mode="extend", the width is rounded up to a multiple of this (devices x microbatches).

    Raises:
      UserError: empty or inconsistent stage table, unknown source, bad weight, fraction or batch.
    """
    stages = [
        stage if isinstance(stage, Stage) else schema.call(Stage, stage, field=f"stream.stages[{i}]")
        for i, stage in enumerate(stages)
    ]
    _check(rows, stages, batch, multiple)
    sources = tuple(sorted(rows))  # by name: neither the order given nor a source added later may move a row
    sizes = np.array([len(rows[name]) for name in sources], np.int64)
    plans: list[Plan] = []
    start, base, bases = 0, np.zeros(len(sources), np.int64), [np.zeros(len(sources), np.int64)]
    for i, stage in enumerate(stages):
        weights = {sources.index(name): weight for name, weight in stage.mixture.items() if weight}
        chosen = replays.make(stage.replay, i, replay)
        ratio = chosen.fraction if chosen.mode == "replace" else chosen.fraction / (1 - chosen.fraction)
        delay = max((COMMIT_STEPS if chosen.over == "reservoir" else 1) - start, 0)
        plan = Plan(start, mixture.make(weights), chosen, batch * ratio, delay, base)
        start, base = (
            start + stage.steps,
            base + mixture.counts(plan.mixture, _new(plan, batch, stage.steps), len(sources)),
        )
        plans.append(plan)
        bases.append(base)
    extra = max([-(-p.rate.numerator // p.rate.denominator) for p in plans if p.replay.mode == "extend"], default=0)
    return Stream(
        tuple(rows[name] for name in sources),
        sources,
        tuple(stages),
        tuple(plans),
        tuple(np.cumsum([stage.steps for stage in stages]).tolist()),
        batch,
        -(-(batch + extra) // multiple) * multiple if extra else batch,
        seed,
        sizes,
        np.stack(bases),
        np.array([key_of(_FORMAT, seed, "rows", name) for name in sources], np.uint64),
        replays.contents([plan.replay for plan in plans], rows, seed),
    )


def _check(rows: Mapping[str, Rows], stages: Sequence[Stage], batch: int, multiple: int) -> None:
    """Raises UserError unless the stage table and the sources fit together."""
    if batch < 1:
        raise UserError(f"config.stream.batch={batch}: must be at least 1 row")
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: must be at least 1")
    if not stages:
        raise UserError("config.stream.stages: empty; give at least one stage with a name, steps and a mixture")
    for i, stage in enumerate(stages):
        field = f"config.stream.stages[{i}]"
        if stage.name in {one.name for one in stages[:i]}:
            raise UserError(f"{field}.name={stage.name!r}: an earlier stage has it; results are told apart by it")
        _check_stage(field, stage, rows, batch)


def _check_stage(field: str, stage: Stage, rows: Mapping[str, Rows], batch: int) -> None:
    """Raises UserError unless a stage and the sources fit together."""
    if stage.steps < 1:
        raise UserError(f"{field}.steps={stage.steps}: must be at least 1")
    for name, weight in stage.mixture.items():
        if name not in rows:
            raise UserError(f"{field}.mixture.{name}: no such source{schema.nearest(name, list(rows))}")
        if not (np.isfinite(weight) and weight >= 0):
            raise UserError(f"{field}.mixture.{name}={weight}: a weight is a finite number >= 0")
    used = {name: len(rows[name]) for name, weight in stage.mixture.items() if weight}
    if not used:
        raise UserError(f"{field}.mixture={dict(stage.mixture)}: no source has a weight above 0")
    if empty := [name for name, count in used.items() if not count]:
        raise UserError(f"{field}.mixture.{empty[0]}: the source has no rows; add text or shorten the rows")
    if (total := sum(used.values())) < batch:
        few = f"{', '.join(used)} hold {total} rows, less than one batch of {batch}"
        raise UserError(f"{field}: {few}; add text, shorten the rows or lower the batch")
