"""Protocols of continual learning: from one source of a classifier to the sources and stages of a sequence of tasks.

    sources, stages = split({"name": "digits"}, classes=10, groups=5, steps=100)
    config.sources, config.stream.stages = ConfigDict(sources), stages

Tasks are named task_00, task_01, ..., so that their names sort in the order in which they are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.data import blurred
from jaxcl.schema import UserError

Options = dict[str, Any]
Scenario = tuple[dict[str, Options], tuple[Options, ...]]  # `config.sources`, `config.stream.stages`


def split(
    source: Mapping[str, Any],
    classes: int | Sequence[int],
    groups: int,
    *,
    steps: int | None = None,
    relabel: bool = True,
) -> Scenario:
    """Returns tasks that have some of the classes each: split MNIST (Zenke et al. 2017, section 4.1).

    Args:
      source: options of the source that every task reads a part of.
      classes: labels in the order in which they are learned, or how many there are.
      groups: number of tasks; each has as many classes.
      steps: of each task; None = `config.stream.steps`.
      relabel: whether every task has labels from 0 on, on shared outputs (domain-incremental learning); otherwise they
        stay, and outputs are as many as classes (class-incremental; van de Ven & Tolias 2019).

    Raises:
      UserError: the classes cannot be dealt out evenly.
    """
    labels = tuple(range(classes)) if isinstance(classes, int) else tuple(classes)
    if groups < 1 or not labels or len(labels) % groups:
        raise UserError(f"config.sources: {len(labels)} classes in groups={groups}: choose a divisor")
    share = len(labels) // groups
    parts = [labels[start : start + share] for start in range(0, len(labels), share)]
    return _scenario(source, [{"classes": part, "relabel": relabel} for part in parts], steps)


def class_incremental(
    source: Mapping[str, Any],
    classes: int | Sequence[int],
    groups: int,
    *,
    base: int = 0,
    steps: int | None = None,
) -> Scenario:
    """Returns tasks that bring new classes each, which keep their labels (van de Ven & Tolias 2019).

    Args:
      source: options of the source that every task reads a part of.
      classes: labels in the order in which they are learned, or how many there are.
      groups: number of tasks of equally many classes.
      base: classes of one more task before these, such as half of all (Hou et al. 2019); 0 = no such task.
      steps: of each task; None = `config.stream.steps`.

    Raises:
      UserError: the classes behind the first `base` cannot be dealt out evenly.
    """
    labels = tuple(range(classes)) if isinstance(classes, int) else tuple(classes)
    if not 0 <= base < len(labels):
        raise UserError(f"config.sources: base={base}: of {len(labels)} classes; leave some to the other tasks")
    parts = [labels[:base]] if base else []
    left = labels[base:]
    if groups < 1 or len(left) % groups:
        raise UserError(f"config.sources: {len(left)} classes in groups={groups}: choose a divisor")
    share = len(left) // groups
    parts += [left[start : start + share] for start in range(0, len(left), share)]
    return _scenario(source, [{"classes": part, "relabel": False} for part in parts], steps)


def si_blurry(
    source: Mapping[str, Any],
    counts: Sequence[int],
    tasks: int = 5,
    *,
    batch: int,
    disjoint: int = 50,
    blurry: int = 10,
    seed: int = 1,
) -> Scenario:
    """Returns tasks without clean boundaries, each as long as one pass over its rows (Si-Blurry, Moon et al. 2023).

    A task is as many steps as its rows fill batches; the rest of its rows, fewer than a batch, do not come. It is
    evaluated on the held-out rows of the classes that are its own; see `jaxcl.data.blurred`.

    Args:
      source: options of the source that every task reads a part of; without `classes`.
      counts: training rows of each class of the source.
      tasks: number of tasks.
      batch: `config.stream.batch`.
      disjoint: percent of the classes that come in one task alone.
      blurry: percent of the rows of the other classes that may come in any task.
      seed: of the whole stream.

    Raises:
      UserError: a task that would have no class of its own or fewer rows than a batch.
    """
    part = blurred.Part(0, tasks, disjoint, blurry, seed)
    blurred.check(part)
    sizes = blurred.sizes(counts, part)
    for t, rows in enumerate(sizes):
        blurred.own_classes(len(counts), part._replace(task=t))
        if rows < batch:
            raise UserError(
                f"config.sources: si_blurry.seed={seed}: task {t} has {rows} rows, less than a batch of {batch}; "
                "choose another seed or a smaller batch"
            )
    changes = [{"si_blurry": part._replace(task=t, rows=rows)._asdict()} for t, rows in enumerate(sizes)]
    sources, stages = _scenario(source, changes, None)
    lengths = (rows // batch for rows in sizes)
    return sources, tuple({**stage, "steps": n} for stage, n in zip(stages, lengths, strict=True))


def permuted(source: Mapping[str, Any], tasks: int, seed: int = 0, *, steps: int | None = None) -> Scenario:
    """Returns tasks that see the pixels in another order each, the first as they are (Goodfellow et al. 2014).

    Args:
      source: options of the source that every task reads.
      tasks: number of tasks.
      seed: the order of task t > 0 has the seed `seed + t`.
      steps: of each task; None = `config.stream.steps`.
    """
    return _scenario(source, [{"permutation": seed + t if t else None} for t in range(tasks)], steps)


def rotated(source: Mapping[str, Any], tasks: int, degrees: float, *, steps: int | None = None) -> Scenario:
    """Returns tasks that see the images turned, each `degrees` more than the one before (Lopez-Paz & Ranzato 2017).

    Args:
      source: options of the source that every task reads.
      tasks: number of tasks; the first is upright.
      degrees: counterclockwise, of one task to the next.
      steps: of each task; None = `config.stream.steps`.
    """
    return _scenario(source, [{"rotation": float(t * degrees)} for t in range(tasks)], steps)


def _scenario(source: Mapping[str, Any], changes: Sequence[Options], steps: int | None) -> Scenario:
    """Returns a task for each change to the options of the source.

    Raises:
      UserError: there is no task.
    """
    if not changes:
        raise UserError("config.sources: tasks=0: a sequence has at least one")
    length = {} if steps is None else {"steps": steps}
    names = [f"task_{t:0{max(2, len(str(len(changes) - 1)))}d}" for t in range(len(changes))]
    sources = {name: {**source, **change} for name, change in zip(names, changes, strict=True)}
    return sources, tuple({"name": name, **length, "mixture": {name: 1.0}} for name in names)
