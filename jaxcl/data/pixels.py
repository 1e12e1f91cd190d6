"""What a task sees of images: pixels that are padded, rotated or permuted, of the rows that are chosen for it.

The options of every source of images, in the order in which they act. Split, permuted and rotated MNIST are made of
them (Goodfellow et al. 2014, https://arxiv.org/abs/1312.6211; Zenke et al. 2017, https://arxiv.org/abs/1703.04200;
Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data import chosen
from jaxcl.data.image_files import Images
from jaxcl.data.rows import Columns, Lazy
from jaxcl.data.sources import Table, describe
from jaxcl.schema import UserError


class View(NamedTuple):
    """What a task sees."""

    pad: int = 0  # black pixels on every side
    rotation: float = 0.0  # degrees, counterclockwise
    permutation: int | None = None  # seed of an order of the pixels
    standardise: bool = False  # whether pixels are shifted and scaled by mean and deviation of the training file

    @property
    def options(self) -> dict[str, Any]:
        """What the description of a source says of it: all that is not as in the file."""
        told = {"pad": self.pad or None, "rotation": self.rotation or None, "permutation": self.permutation}
        return told | {"standardise": self.standardise or None}


def checked(view: View) -> View:
    """Returns the view.

    Raises:
      UserError: no images can be seen so.
    """
    for name, value in (("pad", view.pad), ("permutation", view.permutation)):
        if value is not None and value < 0:
            raise UserError(f"config.sources: {name}={value!r}: must be at least 0")
    if not math.isfinite(view.rotation):
        raise UserError(f"config.sources: rotation={view.rotation!r}: must be a finite number of degrees")
    return view


def table(
    name: str,
    options: Mapping[str, Any],
    train: Images,
    held_out: Images,
    view: View,
    choice: chosen.Choice,
    *,
    every: Sequence[int] | None = None,
    licence: str | None = None,
) -> Table:
    """Returns the rows of a task: pixels as they are in the file, which are made what it sees when they are read.

    A task that has all rows shares the array; one that has some of them has a copy of these.

    Args:
      name: of the source.
      options: of the source, beside those of the view and the choice.
      train: all training rows.
      held_out: all rows that are only evaluated on.
      view: what the task sees of them.
      choice: which of them the task has.
      every: all labels that there are, if `train` has some of them.
      licence: recorded in the run.

    Raises:
      UserError: a class that is not there; images of two sizes; flat rows that should be rotated or padded.
    """
    if train.pixels.shape[1:] != held_out.pixels.shape[1:]:
        sizes = f"{train.pixels.shape[1:]} and held-out rows {held_out.pixels.shape[1:]}"
        raise UserError(f"config.sources: training rows have the shape {sizes}; give files of equal images")
    if train.pixels.ndim == 2 and (view.pad or view.rotation):
        key = "pad" if view.pad else "rotation"
        raise UserError(f"config.sources: {key}={getattr(view, key)!r}: rows of {train.pixels.shape[1:]} are no images")
    moments = _moments(train.pixels) if view.standardise else None
    count = 1 + int(train.labels.max() if every is None else max(every))
    parts = [
        (train.pixels, *chosen.train(train.labels, choice, every)),
        (held_out.pixels, *chosen.held_out(held_out.labels, choice, count)),
    ]
    told = describe(name, {**options, **view.options, **choice.options})
    see = functools.partial(seen, view=view, moments=moments)
    first, second = ({"inputs": _some(pixels, index, see), **beside(labels)} for pixels, index, labels in parts)
    return Table(told, first, second, licence)


def _some(pixels: np.ndarray, index: np.ndarray, see: Callable[[np.ndarray], np.ndarray]) -> Lazy:
    own = pixels if len(index) == len(pixels) else pixels[index]
    return Lazy(own, index if own is pixels else np.arange(len(own)), see)


def columns(inputs: np.ndarray, labels: np.ndarray) -> Columns:
    """Returns rows of a classifier: inputs float32 [N, ...] as given, and what `beside` returns."""
    return {"inputs": inputs, **beside(labels)}


def beside(labels: np.ndarray) -> Columns:
    """Returns what rows of a classifier have beside their inputs.

    Args:
      labels: whole numbers [N].

    Returns:
      targets, segments (1) and positions (0) int32 [N]; weights (1) float32 [N].
    """
    total = len(labels)
    return {
        "targets": labels.astype(np.int32),
        "weights": np.ones(total, np.float32),
        "segments": np.ones(total, np.int32),
        "positions": np.zeros(total, np.int32),
    }


def seen(pixels: np.ndarray, view: View, moments: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Returns pixels as the task sees them, float32 [N, ...]; without `moments` those of uint8 lie in [0, 1].

    Args:
      pixels: uint8 or float [N, H, W, C], or [N, D].
      view: padding, rotation and permutation.
      moments: mean and deviation that pixels are standardised by, [C].
    """
    if view.pad:
        pixels = np.pad(pixels, ((0, 0), (view.pad, view.pad), (view.pad, view.pad), (0, 0)))
    out = scaled(pixels)
    if view.rotation % 360:
        out = rotated(out, view.rotation)
    if view.permutation is not None:
        sizes = (math.prod(out.shape[1:3]), out.shape[3]) if out.ndim == 4 else out.shape[1:]
        flat = out.reshape(len(out), *sizes)
        order = np.random.default_rng(view.permutation).permutation(flat.shape[1])
        out = flat[:, order].reshape(out.shape)
    if moments is not None:
        out -= moments[0]
        out /= moments[1]
    return out


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Returns a new array, float32: bytes in [0, 1], other pixels as they are."""
    out = pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        out /= np.float32(255)
    return out


def rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    """Returns images turned counterclockwise about their centre by bilinear interpolation; what comes in is black.

    Args:
      images: float32 [N, H, W, C].
      degrees: of the turn.
    """
    height, width = images.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    row = cos * y + sin * x + (height - 1) / 2  # where each pixel comes from
    column = cos * x - sin * y + (width - 1) / 2
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    flat = images.reshape(len(images), height * width, images.shape[3])
    out = np.zeros_like(flat)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = top + down, left + right
        weight = (1 - np.abs(row - i)) * (1 - np.abs(column - j)) * (i >= 0) * (i < height) * (j >= 0) * (j < width)
        place = np.clip(i, 0, height - 1) * width + np.clip(j, 0, width - 1)
        out += flat[:, place.ravel()] * weight.ravel()[None, :, None].astype(np.float32)
    return out.reshape(images.shape)


def divided(whole: Images, held_out: float, seed: int) -> tuple[Images, Images]:
    """Returns training and held-out rows of one file, drawn by seed; equal images are on the same side.

    Args:
      whole: all rows.
      held_out: share of the rows below 1, or a number of them.
      seed: of the draw, which does not depend on what a task sees.

    Raises:
      UserError: nothing would be left on one side.
    """
    total = len(whole.labels)
    count = round(held_out * total) if held_out < 1 else int(held_out)
    flat = np.ascontiguousarray(whole.pixels).reshape(total, -1)
    _, group = np.unique(flat.view(np.dtype((np.void, flat.itemsize * flat.shape[1]))).ravel(), return_inverse=True)
    order = np.random.default_rng((seed, 0)).permutation(group.max() + 1)
    taken = order[np.cumsum(np.bincount(group)[order]) <= count]
    out = np.isin(group, taken)
    if not 0 < out.sum() < total:
        raise UserError(f"config.sources: held_out={held_out!r}: of {total:,} images; leave some on both sides")
    return whole.take(np.flatnonzero(~out)), whole.take(np.flatnonzero(out))


def _moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation of every channel of the pixels as they are fed, float32 [C]."""
    flat = pixels.reshape(-1, pixels.shape[-1] if pixels.ndim == 4 else 1)
    scale = 255 if pixels.dtype == np.uint8 else 1
    mean, deviation = flat.mean(axis=0, dtype=np.float64) / scale, flat.std(axis=0, dtype=np.float64) / scale
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)
