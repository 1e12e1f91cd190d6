"""The axes of a tensor in two layouts: `(heads head) embed -> embed heads head`, for whole tensors and for pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Axes(NamedTuple):
    """A parsed spec: `theirs` lists the names in every axis of the tensor, `ours` one name for each axis."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]


def parse(spec: str) -> Axes:
    """Returns the axes of a spec."""
    left, right = spec.split(" -> ")
    theirs = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", left))
    return Axes(theirs, tuple(right.split()))


def their_shape(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the tensor for the shape of our array, without its axis of layers."""
    sizes = dict(zip(axes.ours, shape, strict=True))
    return tuple(math.prod(sizes[name] for name in group) for group in axes.theirs)


def to_ours(axes: Axes, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns a tensor, or a piece of one, in our layout; `sizes` are those of the piece. A view."""
    names = [name for group in axes.theirs for name in group]
    split = tensor.reshape([sizes[name] for name in names])
    return split.transpose([names.index(name) for name in axes.ours])


def to_theirs(axes: Axes, array: np.ndarray) -> np.ndarray:
    """Returns one of our arrays, without an axis of layers, in their layout; contiguous."""
    names = [name for group in axes.theirs for name in group]
    moved = array.transpose([axes.ours.index(name) for name in names])
    return np.ascontiguousarray(moved).reshape(their_shape(axes, array.shape))


def piece(
    axes: Axes, shape: Sequence[int], index: Sequence[slice]
) -> tuple[tuple[slice, ...], dict[str, int], tuple[slice, ...]]:
    """Returns how to read the piece `index` of our array of `shape`.

    Of an axis that holds several names only the first is cut; where the others are cut too, more is read than asked.

    Returns:
      The slice of every axis of the tensor; the size of every name in what is then read; and what to keep of that,
      once it is in our layout.
    """
    full = dict(zip(axes.ours, shape, strict=True))
    asked = {name: part.indices(size)[:2] for name, part, size in zip(axes.ours, index, shape, strict=True)}
    where, sizes, kept = [], {}, {}
    for first, *rest in axes.theirs:
        start, stop = asked[first]
        inner = math.prod(full[name] for name in rest)
        where.append(slice(start * inner, stop * inner))
        sizes[first], kept[first] = stop - start, slice(None)
        for name in rest:
            sizes[name], kept[name] = full[name], slice(*asked[name])
    return tuple(where), sizes, tuple(kept[name] for name in axes.ours)
