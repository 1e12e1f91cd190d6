"""Which labelled rows a task has: some of the classes, a long tail of them, a part of a blurred stream, a few of them.

The options of every source of labelled rows, in the order in which they act on training rows. Held-out rows are all
those of the classes that the task is judged by; they are neither thinned nor limited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl import schema
from jaxcl.data import blurred
from jaxcl.schema import UserError


class Choice(NamedTuple):
    """What is chosen."""

    classes: Sequence[int] | None = None  # labels of the rows that are kept
    relabel: bool = True  # whether these become 0, 1, ... in the order given
    imbalance: float = 1.0  # how many times the rows of the last class the first one has
    si_blurry: Mapping[str, Any] | None = None  # options of `blurred.Part`, in place of `classes`
    limit: int | None = None  # at most that many rows
    seed: int = 0  # of what is left out for `imbalance` and `limit`

    @property
    def part(self) -> blurred.Part | None:
        """The task of a blurred stream, if that is chosen."""
        if self.si_blurry is None:
            return None
        return schema.call(blurred.Part, self.si_blurry, field="sources: si_blurry")

    @property
    def options(self) -> dict[str, Any]:
        """What the description of a source says of it: all that is not as in the file."""
        chosen = None if self.classes is None else [*self.classes]
        told = {"classes": chosen, "relabel": None if chosen is None else self.relabel, "limit": self.limit}
        return told | {"imbalance": None if self.imbalance == 1 else self.imbalance, "si_blurry": self.si_blurry}


def checked(choice: Choice) -> Choice:
    """Returns the choice.

    Raises:
      UserError: no labels can satisfy it.
    """
    if choice.limit is not None and choice.limit < 1:
        raise UserError(f"config.sources: limit={choice.limit!r}: must be at least 1")
    if not 1 <= choice.imbalance < math.inf:
        raise UserError(f"config.sources: imbalance={choice.imbalance!r}: a ratio of at least 1, as in 100")
    if choice.classes is not None and not 0 < len(choice.classes) == len({*choice.classes}):
        raise UserError(f"config.sources: classes={[*choice.classes]}: name at least one, and each once")
    if (part := choice.part) is not None:
        if choice.classes is not None:
            raise UserError("config.sources: si_blurry: deals out the classes itself; leave classes out")
        blurred.check(part)
    return choice


def train(labels: np.ndarray, choice: Choice, every: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training rows of a task and their labels, int64 [n] each, in the order of the file.

    Args:
      labels: of all training rows, [N].
      choice: what is chosen.
      every: all labels that there are, where `labels` has some of them; `imbalance` goes by their order.

    Raises:
      UserError: a class that is not there, or another number of rows than the options say.
    """
    labels = np.asarray(labels, np.int64)
    index = thinned(labels, choice.imbalance, choice.seed, every)
    if (part := choice.part) is not None:
        index = index[np.sort(blurred.rows_of(labels[index], part)[part.task])]
        if part.rows not in (None, len(index)):
            raise UserError(
                f"config.sources: si_blurry.rows={part.rows}: task {part.task} has {len(index)}; give the counts of "
                "the classes as they are in the training rows"
            )
    index = index[_of_classes(labels[index], choice.classes, "training")]
    index = index[few(len(index), choice)]
    return index, relabelled(labels[index], choice)


def few(count: int, choice: Choice) -> np.ndarray:
    """Returns the places of at most `limit` out of `count` rows, in order, int64 [n]."""
    if choice.limit is None or choice.limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng((choice.seed, 1)).permutation(count)[: choice.limit])


def held_out(labels: np.ndarray, choice: Choice, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the held-out rows of a task and their labels, int64 [n] each.

    Args:
      labels: of all held-out rows, [N].
      choice: what is chosen.
      count: one more than the largest label of all training rows.
    """
    labels = np.asarray(labels, np.int64)
    classes = choice.classes
    if (part := choice.part) is not None:
        classes = blurred.own_classes(count, part).tolist()
    index = _of_classes(labels, classes, "held-out")
    return index, relabelled(labels[index], choice)


def thinned(labels: np.ndarray, imbalance: float, seed: int, every: Sequence[int] | None = None) -> np.ndarray:
    """Returns the rows of a long tail, int64 [n] in order: class r of C keeps imbalance^(-r / (C - 1)) of its rows.

    That is the profile of Cao et al. 2019 (https://arxiv.org/abs/1906.07413) for classes of equal size. A class keeps
    one row at least; which rows is drawn by seed, and a smaller ratio keeps those of a larger one.

    Args:
      labels: [N].
      imbalance: rows of the first class over rows of the last, at least 1.
      seed: of the draw.
      every: all labels in order of size; None = those in `labels`.
    """
    if imbalance == 1:
        return np.arange(len(labels))
    ranks = np.unique(labels) if every is None else np.asarray(every)
    kept = []
    for rank, label in enumerate(ranks.tolist()):
        rows = np.flatnonzero(labels == label)
        share = imbalance ** (-rank / max(len(ranks) - 1, 1))
        order = np.random.default_rng((seed, 2, label)).permutation(len(rows))
        kept.append(rows[order[: max(round(share * len(rows)), 1)]])
    return np.sort(np.concatenate(kept))


def relabelled(labels: np.ndarray, choice: Choice) -> np.ndarray:
    """Returns labels as the task has them."""
    if choice.classes is None or not choice.relabel:
        return labels
    classes = np.asarray(choice.classes)
    order = np.argsort(classes)
    return order[np.searchsorted(classes[order], labels)]


def _of_classes(labels: np.ndarray, classes: Sequence[int] | None, which: str) -> np.ndarray:
    """Returns the places of some classes."""
    if classes is None:
        return np.arange(len(labels))
    if missing := sorted({*classes} - {*np.unique(labels).tolist()}):
        raise UserError(f"config.sources: classes={[*classes]}: no {which} row has a label of {missing}")
    return np.flatnonzero(np.isin(labels, np.asarray(classes)))
