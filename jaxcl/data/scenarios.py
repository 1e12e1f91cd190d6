"""Protocols of continual learning: from one source of a classifier to the sources and stages of a sequence of tasks.

    sources, stages = split({"name": "digits"}, classes=10, groups=5, steps=100)
    config.sources, config.stream.stages = ConfigDict(sources), stages

Tasks are named task_00, task_01, ..., so that their names sort in the order in which they are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
