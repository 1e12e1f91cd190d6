"""Si-Blurry: tasks without clean boundaries, as a function of labels and a seed.

Some classes are disjoint: all their rows come in one task. The others are blurry: most rows come in the task of their
class, and a pool of the rest is dealt out over all tasks. How many classes and how many rows of the pool a task gets is
random (Moon et al. 2023, https://arxiv.org/abs/2308.09303, section 3).

    D, E  = classes x disjoint / 100 and the rest, each cut to a multiple of the tasks: what is over comes in no task
    order = random order of the classes; the first D are disjoint, the next E blurry; random cuts give each task a slice
    pool  = the first k_t blurry rows of every task t, shuffled; sum k_t = blurry rows x blurry / 100, cut at random
    task  = its disjoint rows, its blurry rows without the first k_t, and the next k_t of the pool

The lists of rows are, to the last index, those of the authors' sampler in its stochastic mode, which is the one that
their code runs whatever its option says. It draws from 32-bit words of a Mersenne twister (Matsumoto & Nishimura 1998)
by remainders, as torch does on a CPU; NumPy's generator gives the same words. Classes should have about as many rows
each: the pool is cut without regard to how many blurry rows a task has, and one that has fewer than k_t gives them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.schema import UserError


class Part(NamedTuple):
    """One task of a blurred stream, as a source is told of it."""

    task: int  # number of the task
    tasks: int = 5
    disjoint: int = 50  # percent of the classes that come in one task alone
    blurry: int = 10  # percent of the rows of the other classes that may come in any task
    seed: int = 1
    rows: int | None = None  # that the task must have, if that is known; steps were planned for as many


def check(part: Part) -> None:
    """Raises UserError for a stream that cannot be."""
    for name, value, least, most in (
        ("tasks", part.tasks, 1, 10_000),
        ("task", part.task, 0, part.tasks - 1),
        ("disjoint", part.disjoint, 0, 100),
        ("blurry", part.blurry, 0, 100),
        ("seed", part.seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"config.sources: si_blurry.{name}={value}: must be from {least} to {most}")


def classes_of(count: int, part: Part) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the disjoint and the blurry classes of every task, int64 [n] each, out of `count` classes."""
    disjoint, blurry, _ = _dealt(count, part)
    return disjoint, blurry


def rows_of(labels: np.ndarray, part: Part) -> list[np.ndarray]:
    """Returns the rows of every task in the order of the authors' sampler, int64 [n] each; no row comes twice.

    Args:
      labels: whole numbers [N]; there are as many classes as the largest says.
      part: `task` and `rows` do not count.
    """
    labels = np.asarray(labels, np.int64)
    disjoint, blurry, draw = _dealt(int(labels.max()) + 1, part)
    alone, mixed = ([np.flatnonzero(np.isin(labels, own)) for own in kind] for kind in (disjoint, blurry))
    total = sum(map(len, mixed)) * part.blurry // 100
    if total > 0:
        share = np.diff(draw.cuts(total, part.tasks))
        pool = np.concatenate([rows[:k] for rows, k in zip(mixed, share, strict=True)])
        pool = np.split(pool[draw.order(len(pool))], np.cumsum(share)[:-1])
        mixed = [np.concatenate([rows[k:], got]) for rows, k, got in zip(mixed, share, pool, strict=True)]
    tasks = [np.concatenate(rows) for rows in zip(alone, mixed, strict=True)]
    return [rows[draw.order(len(rows))] for rows in tasks]


class _Draws:
    """Orders and cuts from the words of a Mersenne twister."""

    def __init__(self, seed: int):
        self.source = np.random.RandomState(seed)  # its first word is that of `init_genrand(seed)`

    def words(self, count: int) -> np.ndarray:
        return self.source.randint(0, 2**32, max(count, 0), np.uint32).astype(np.int64)

    def order(self, size: int) -> np.ndarray:
        """Returns a random order: from the front, each place is swapped with one that is not before it."""
        out = list(range(size))
        left = size - np.arange(max(size - 1, 0))
        for i, ahead in enumerate((self.words(size - 1) % left).tolist()):
            out[i], out[i + ahead] = out[i + ahead], out[i]
        return np.array(out, np.int64)

    def cuts(self, size: int, pieces: int) -> np.ndarray:
        """Returns where a sequence is cut into pieces, both ends included, int64 [pieces + 1]; some may be empty."""
        return np.concatenate([[0], np.sort(self.words(pieces - 1) % size), [size]])


def _dealt(count: int, part: Part) -> tuple[list[np.ndarray], list[np.ndarray], _Draws]:
    """Returns the classes of every task and the draws that follow."""
    alone = count * part.disjoint // 100 // part.tasks * part.tasks
    mixed = (count - alone) // part.tasks * part.tasks
    draw = _Draws(part.seed)
    order = draw.order(count)

    def slices(classes: np.ndarray) -> list[np.ndarray]:
        if not len(classes):
            return [classes] * part.tasks
        ends = draw.cuts(len(classes), part.tasks)
        return [classes[begin:end] for begin, end in itertools.pairwise(ends)]

    return slices(order[:alone]), slices(order[alone : alone + mixed]), draw


def own_classes(count: int, part: Part) -> np.ndarray:
    """Returns the classes that a task is evaluated on, sorted: those of its two slices.

    Raises:
      UserError: it has none.
    """
    disjoint, blurry = classes_of(count, part)
    own = np.sort(np.concatenate([disjoint[part.task], blurry[part.task]]))
    if not len(own):
        raise UserError(
            f"config.sources: si_blurry.seed={part.seed}: leaves task {part.task} without a class of its own; choose "
            "another seed, fewer tasks or more classes"
        )
    return own


def sizes(counts: Sequence[int], part: Part) -> list[int]:
    """Returns the number of rows of every task, given that of every class."""
    return [len(rows) for rows in rows_of(np.repeat(np.arange(len(counts)), counts), part)]
