"""Handwritten-like digits that are drawn here, for classifiers: no download, no file, no licence question.

    dict(name="digits", classes=[0, 1])                               # a task of split digits
    dict(name="digits", permutation=7), dict(name="digits", rotation=30)

Each digit is a few pen strokes in one of four hands: round, narrow, slanted and square. A copy is drawn with waves that
bend the strokes, with its own scale, slant, turn, place and width of the pen; the grey of a pixel is one minus its
distance to the edge of the ink, cut to [0, 1], in 256 steps as in MNIST. It depends on the seed, the digit and its
number alone: other tasks of the same seed see the same copies, and a larger `count` adds to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data import chosen, pixels
from jaxcl.data.image_files import Images
from jaxcl.data.sources import Table
from jaxcl.schema import UserError

# Digits 0 to 9 in each hand; strokes are smooth curves through points x,y of a grid 6 wide and 10 high, y downwards.
_HANDS = (
    "3,0 1,1.5 0,5 1,8.5 3,10 5,8.5 6,5 5,1.5 3,0 2,.5|3,0 3,10|"
    ".3,2.5 1.2,.6 3,0 5,.8 5.6,2.8 4.5,5.2 2,7.8 0,10/0,10 6,10|"
    ".5,1 3,0 5.3,1.2 5.2,3.5 2.6,4.8/2.6,4.8 5.4,5.8 6,7.8 4.5,9.6 2.3,10 .2,8.8|4.2,0 0,6.8/0,6.8 6,6.8/4.2,0 4.2,10|"
    "5.4,0 1.2,0/1.2,0 .7,4.4/.7,4.4 3,3.7 5.4,4.9 5.8,7.3 4.3,9.5 2,10 .1,9|"
    "4.8,.2 2.2,2 .5,5 .3,7.8 1.6,9.8 3.8,9.9 5.6,8.3 5.4,6 3.4,4.9 1.2,5.7 .3,7.6|0,0 6,0/6,0 3.8,4.5 2.4,10|"
    "3,4.7 .9,3.4 .9,1.3 3,0 5.1,1.3 5.1,3.4 3,4.7 .5,6.4 .4,8.6 3,10 5.6,8.6 5.5,6.4 3,4.7|"
    "5.5,2.6 4.3,.3 1.9,.3 .4,2.2 1,4.5 3.2,5.2 5.1,4 5.5,2.6/5.5,2.6 5.4,6.5 4.4,10",
    "3.4,0 1.6,1 .8,4 1,7.6 2.6,10 4.4,9.2 5.3,6 4.9,2 3.4,0/4.8,2 1.3,8|1,2.4 3.2,0/3.2,0 3.2,10|"
    ".6,2.2 2,.2 4.6,.4 5.3,2.6 4,5.6 1.4,8.8 .3,9.6 1.6,8.6 3.4,9.4 5.8,9.6|"
    ".4,0 5.4,0/5.4,0 2.4,4/2.4,4 5,4.9 5.8,7.2 4.4,9.4 2.2,10 .2,9|.8,.4 .5,5.6/.5,5.6 5.6,5.2/4.8,0 4.5,10|"
    "5.6,.2 2,.4 1.2,2 1,4.4 3.4,4 5.4,5.6 5,8.4 2.8,10 .4,9.4|"
    "3.6,0 1.4,4.4 .4,7.4 1.4,9.6 3.6,9.9 5.3,8.2 4.8,6.2 2.8,5.7 .7,7|.3,.6 5.8,.4/5.8,.4 2,10/1.7,5 5,4.8|"
    "5,1.2 3,0 1,1.2 1.2,3.2 4.8,6.4 5.4,8.4 3.2,10 .8,8.6 1.2,6.4 4.4,3.4 5,1.2|"
    "5.2,1.2 2.6,0 .5,2 1,4.6 3.2,5 5.2,3.2/5.2,.2 5.2,10",
    "2.4,.4 .4,2.6 0,6.2 1.6,9.6 4.4,9.6 6,6.4 5.6,2.4 3.6,.2 1.8,.8|1.4,2 3,0/3,0 3,10/1,10 5,10|"
    ".2,.8 4.6,.2 5.6,2.4 .4,9.8/.4,9.8 6,9.6|.6,.8 4.2,.2 4.6,2.6 1.8,4.6/1.8,4.6 5.6,5.4 5,9 1.6,10 0,8.6|"
    "2.6,0 .2,6/.2,6 5.8,6/4.2,3.2 3.6,10|1.4,.4 1,4.8 3.8,4.4 5.4,6.6 4,9.4 .6,9.6/1.4,.4 5.6,0|"
    "2,0 .8,4 .6,8 2.4,10 5,9 5.2,6.6 3.2,5.4 .8,7.2|0,1.4 .4,.2 3.4,.8 5.8,.2/5.8,.2 3.4,5 3,10|"
    "3,0 1.2,.9 1,3 3,4.4 5,3 4.8,.9 3,0/3,4.4 .6,5.8 .6,8.6 3,10 5.4,8.6 5.4,5.8 3,4.4|"
    "5.2,1.6 3,0 .8,1.6 .9,4 3,5 5.2,3.2/5.2,1.2 5.3,6.6 4.4,9.4 2.2,10 .6,8.8",
    ".5,.2 .5,9.8/.5,9.8 5.5,9.8/5.5,9.8 5.5,.2/5.5,.2 .5,.2|1.8,1.6 3.4,.2/3.4,.2 3.2,10|"
    ".4,.2 5.6,.2/5.6,.2 5.6,4.8/5.6,4.8 .4,4.8/.4,4.8 .4,9.8/.4,9.8 5.6,9.8|"
    ".4,.2 5.6,.2/5.6,.2 5.6,9.8/5.6,9.8 .4,9.8/1,5 5.6,5|.6,.2 .6,5.4/.6,5.4 5.8,5.4/4.6,1.6 4.6,10|"
    "5.6,.2 .4,.2/.4,.2 .4,4.8/.4,4.8 5.6,4.8/5.6,4.8 5.6,9.8/5.6,9.8 .4,9.8|"
    "5.2,.2 .6,.2/.6,.2 .6,9.8/.6,9.8 5.6,9.8/5.6,9.8 5.6,5/5.6,5 .6,5|.4,2 .4,.2/.4,.2 5.6,.2/5.6,.2 4.4,10|"
    ".5,.2 .5,9.8/.5,9.8 5.5,9.8/5.5,9.8 5.5,.2/5.5,.2 .5,.2/.5,5 5.5,5|"
    "5.4,4.8 .6,4.8/.6,4.8 .6,.2/.6,.2 5.4,.2/5.4,.2 5.4,9.8/5.4,9.8 1,9.8",
)
_DRAWS = 18  # random numbers of a copy: hand, pen, scale (2), turn, slant, place (2), and five of each of two waves
_ROWS = 64  # drawn at a time, so that they stay in the cache


def make(
    *,
    count: int = 2000,
    held_out: int = 500,
    size: int = 28,
    seed: int = 0,
    jitter: float = 1.0,
    unseen: int | None = None,
    classes: Sequence[int] | None = None,
    relabel: bool = True,
    rotation: float = 0.0,
    permutation: int | None = None,
    imbalance: float = 1.0,
    si_blurry: Mapping[str, Any] | None = None,
) -> Table:
    """Returns drawn digits, float32 [N, size, size, 1] in [0, 1], the classes in turn.

    Args:
      count: training rows.
      held_out: rows that are only evaluated on, drawn from other random numbers.
      size: pixels of a side.
      seed: of the draws.
      jitter: how far copies differ from the hand, 1 = by about as much as people's; above 0.
      unseen: a hand, 0 to 3, that is not in the training rows and the only one in held-out rows; None = all in both.
      classes: digits that are drawn; None = all ten.
      relabel: whether these become 0, 1, ... in the order given, so that tasks share the outputs of a model.
      rotation: degrees counterclockwise, by bilinear interpolation.
      permutation: seed of an order of the pixels, as for `images`.
      imbalance: training rows of a 0 over those of a 9, whose numbers fall geometrically, out of `count`.
      si_blurry: the task of a stream without clean boundaries, as for `images`.

    Raises:
      UserError: a value that is out of range.
    """
    view = pixels.checked(pixels.View(rotation=rotation, permutation=permutation))
    choice = chosen.checked(chosen.Choice(classes, relabel, imbalance, si_blurry, seed=seed))
    digits = [*range(10)] if classes is None else [*classes]
    for name, value, least, most in (
        ("count", count, len(digits), math.inf),
        ("held_out", held_out, len(digits), math.inf),
        ("size", size, 8, 256),
        ("seed", seed, 0, math.inf),
        ("jitter", jitter, 1e-3, 4),
        ("unseen", unseen or 0, 0, len(_HANDS) - 1),
        ("classes", min(digits), 0, 9),
        ("classes", max(digits), 0, 9),
    ):
        if not least <= value <= most:
            raise UserError(f"config.sources: {name}={value!r}: must be from {least} to {most}")
    seen = [hand for hand in range(len(_HANDS)) if hand != unseen]
    train, rest = (
        draw(digits, total, size=size, seed=(seed, stream), jitter=jitter, hands=hands)
        for stream, total, hands in ((0, count, seen), (1, held_out, seen if unseen is None else [unseen]))
    )
    told = {"count": count, "held_out": held_out, "size": size, "seed": seed, "jitter": jitter, "unseen": unseen}
    return pixels.table("digits", told, train, rest, view, choice, every=range(10), licence="Apache-2.0")


def draw(
    digits: Sequence[int], count: int, *, size: int, seed: tuple[int, ...], jitter: float, hands: Sequence[int]
) -> Images:
    """Returns copies of digits in turn, uint8 [count, size, size, 1], with their labels.

    Args:
      digits: the digits.
      count: of all copies.
      size: pixels of a side.
      seed: of the random numbers.
      jitter: factor of all deviations.
      hands: numbers of the hands that are written in.
    """
    labels = np.resize(np.asarray(digits, np.int32), count)
    images = np.zeros((count, size, size), np.uint8)
    for digit in digits:
        places = np.flatnonzero(labels == digit)
        random = np.random.default_rng((*seed, digit)).random((len(places), _DRAWS))
        written = np.asarray(hands)[(random[:, 0] * len(hands)).astype(int)]
        for hand in hands:
            strokes, own = segments(hand, digit), np.flatnonzero(written == hand)
            for start in range(0, len(own), _ROWS):
                rows = own[start : start + _ROWS]
                ends, radius = _bent(strokes, random[rows], size, jitter)
                images[places[rows]] = _inked(ends, radius, size)
    return Images(images[..., None], labels)


def segments(hand: int, digit: int) -> np.ndarray:
    """Returns the strokes of a digit as straight pieces, float64 [M, 2 ends, (x, y)], one high about the origin."""
    pieces = [*_pieces(_HANDS[hand].split("|")[digit])]
    return (np.asarray(pieces) - (3, 5)) / 10


def _pieces(strokes: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pieces of at most one unit of the grid, of uniform Catmull-Rom splines (Catmull & Rom 1974)."""
    for stroke in strokes.split("/"):
        points = np.array([[float(v) for v in point.split(",")] for point in stroke.split()])
        points = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
        for i in range(len(points) - 3):
            a, b, c, d = points[i : i + 4]
            t = np.linspace(0, 1, math.ceil(np.hypot(*(c - b)) * 1.25) + 1)[:, None]
            curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
            curve[-1] = c  # to the bit, where the next one begins
            yield from itertools.pairwise(curve)


def _bent(strokes: np.ndarray, random: np.ndarray, size: int, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the strokes [M, 2, 2] of copies lie, float32 [R, M, 2, 2], and the pen's radius [R], in pixels.

    Two waves, each less than one period long on a digit, move every point, so that strokes that meet still do (elastic
    distortions, as in Simard et al. 2003).
    """
    u = 2 * random - 1  # [R, _DRAWS] in [-1, 1]
    points = np.broadcast_to(strokes, (len(u), *strokes.shape))
    moved = points.copy()
    for wave in (u[:, 8:13], u[:, 13:18]):
        across, down, phase, heading, amplitude = wave.T[:, :, None, None]
        height = (
            0.06 * jitter * amplitude * np.sin(5 * (across * points[..., 0] + down * points[..., 1]) + np.pi * phase)
        )
        moved += height[..., None] * np.stack([np.cos(np.pi * heading), np.sin(np.pi * heading)], -1)
    wide, high, turn, slant = (jitter * u[:, 2:6] * (0.2, 0.1, 0.2, 0.3)).T
    slope, zero = np.tan(slant), np.zeros_like(wide)
    scale = np.stack([np.exp(wide), -slope * np.exp(high), zero, np.exp(high)], -1).reshape(-1, 2, 2)
    cos, sin = np.cos(turn), np.sin(turn)
    frame = 0.7 * size * np.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2) @ scale
    place = (size - 1) / 2 + 0.06 * jitter * size * u[:, 6:8]
    ends = np.einsum("rij,rmej->rmei", frame, moved) + place[:, None, None, :]
    return ends.astype(np.float32), (size * (0.042 + 0.014 * min(jitter, 2) * u[:, 1])).astype(np.float32)


def _inked(ends: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Returns the grey of pixels under a round pen, uint8 [R, size, size]."""
    grid = np.arange(size, dtype=np.float32)
    nearest = np.full((len(ends), size, size), np.inf, np.float32)
    for start, end in ends.transpose(1, 2, 0, 3):  # of each piece, [R, (x, y)]
        x, y = grid[None, None, :] - start[:, 0, None, None], grid[None, :, None] - start[:, 1, None, None]
        dx, dy = (end - start).T[:, :, None, None]
        length = np.maximum(dx * dx + dy * dy, np.float32(1e-12))
        along = np.clip(x * (dx / length) + y * (dy / length), 0, 1)
        x, y = x - along * dx, y - along * dy
        np.minimum(nearest, x * x + y * y, out=nearest)
    ink = np.clip(radius[:, None, None] + np.float32(0.5) - np.sqrt(nearest), 0, 1)
    return np.rint(ink * 255).astype(np.uint8)
