"""Images as rows, for classifiers: of files (`.npz`, IDX), or of TensorFlow Datasets; a task sees a part.

    dict(name="images", path="mnist", classes=[0, 1])                 # a folder of the four files of MNIST
    dict(name="images", path="mnist", permutation=7)                  # a task of permuted MNIST
    dict(name="images", dataset="cifar100", classes=[3, 5], relabel=False)

Those of TFDS need Pillow or OpenCV, unless the dataset stores its images as tensors. `jaxcl.data.scenarios` writes the
tasks of a protocol.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data import chosen, image_files, pixels
from jaxcl.data.image_files import Images
from jaxcl.data.rows import Columns
from jaxcl.data.sources import Table, tfds
from jaxcl.schema import UserError

_SHARE = 0.1  # held out of a file that has no held-out rows beside it


def make(
    *,
    path: str | None = None,
    held_out_path: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    held_out: str | float | None = None,
    classes: Sequence[int] | None = None,
    relabel: bool = True,
    pad: int = 0,
    rotation: float = 0.0,
    permutation: int | None = None,
    standardise: bool = False,
    imbalance: float = 1.0,
    si_blurry: Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    image: str | None = None,
    label: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    licence: str | None = None,
) -> Table:
    """Returns the images of files or of a dataset, float32 [N, H, W, C] in [0, 1] (flat rows of an `.npz`: [N, D]).

    Args:
      path: an `.npz`, an IDX file of images that has its labels beside it, or a folder with the four files of MNIST.
      held_out_path: the same, of the rows that are only evaluated on.
      dataset: name of a TFDS dataset instead of a path, such as "mnist" or "cifar100".
      split: of the dataset that is trained on, or a part of it, as in "train[:10%]"; "train" unless given.
      held_out: of a dataset, the split that is only evaluated on, "test" unless given. Of files, share (below 1) or
        number of training rows that are taken, 0.1 where no test rows lie beside them; equal images stay together.
      classes: labels of the rows that are kept; None = all.
      relabel: whether these become 0, 1, ... in the order given. `pad` adds black pixels on every side.
      rotation: degrees counterclockwise, by bilinear interpolation.
      permutation: seed of an order of the pixels, NumPy's `default_rng(seed).permutation(H * W)`; None = as they are.
      standardise: subtract the mean and divide by the deviation of each channel in all training rows of the file.
      imbalance: training rows of the first class over those of the last; see `jaxcl.data.chosen.thinned`.
      si_blurry: the task of a stream without clean boundaries, options of `jaxcl.data.blurred.Part`.
      limit: at most that many training rows, drawn by `seed`.
      seed: of what is held out of a file, of `imbalance` and of `limit`; the same rows in every task.
      image, label: names of the arrays of an `.npz`, otherwise looked for; features of a dataset, see `load`.
      data_dir, download: of a dataset, see `load`. `licence` is recorded in the run.

    Raises:
      UserError: files or a dataset that cannot be read, or options that do not fit them.
    """
    _check_names(path, held_out_path, dataset)
    choice = chosen.checked(chosen.Choice(classes, relabel, imbalance, si_blurry, limit, seed))
    view = pixels.checked(pixels.View(pad, rotation, permutation, standardise))
    if path is not None:
        _refuse("of a dataset, but path is given", split=split, data_dir=data_dir, download=download or None)
        parts, told = _of_files(path, held_out_path, held_out, seed, image, label), {"path": path, "held_out": held_out}
    else:
        _refuse("of files, but dataset is given", held_out_path=held_out_path)
        told = {"dataset": dataset, "split": split or "train", "held_out": held_out or "test"}
        parts = _of_dataset(told, data_dir, image=image or "image", label=label or "label", download=download)
    told |= {"held_out_path": held_out_path, "seed": seed or None}
    return pixels.table("images", told, *parts, view, choice, licence=licence)


def _check_names(path: str | None, held_out_path: str | None, dataset: str | None) -> None:
    for key, value in (("path", path), ("held_out_path", held_out_path), ("dataset", dataset)):
        if value == "":
            raise UserError(f"config.sources: {key}='': is empty; give a file, a folder or a name, or leave it out")
    if (path is None) == (dataset is None):
        raise UserError(f"config.sources: path={path!r}, dataset={dataset!r}: images need one of them")


def _refuse(reason: str, **options: object) -> None:
    """Raises UserError for options that are given."""
    for key, value in options.items():
        if value is not None:
            raise UserError(f"config.sources: {key}={value!r}: {reason}; leave it out")


def _of_dataset(told: Mapping[str, Any], data_dir: str | None, **options: Any) -> tuple[Images, Images]:
    """Returns training and held-out rows of a dataset."""
    if not isinstance(told["held_out"], str):
        raise UserError(f"config.sources: held_out={told['held_out']!r}: of a dataset it is a split, as in 'test'")
    train, held_out = (load(told["dataset"], told[key], data_dir, **options) for key in ("split", "held_out"))
    return Images(train["inputs"], train["targets"]), Images(held_out["inputs"], held_out["targets"])


def _of_files(
    path: str, held_out_path: str | None, held_out: str | float | None, seed: int, image: str | None, label: str | None
) -> tuple[Images, Images]:
    """Returns training and held-out rows of files."""
    if isinstance(held_out, str) or (held_out is not None and not held_out > 0):
        raise UserError(f"config.sources: held_out={held_out!r}: of files a share or a number of rows, above 0")
    if held_out is not None and held_out_path is not None:
        raise UserError(f"config.sources: held_out={held_out!r}: held_out_path is given as well; leave one of them out")
    train, beside = image_files.read(path, image, label)
    if held_out_path is not None:
        if os.path.realpath(os.path.expanduser(held_out_path)) == os.path.realpath(os.path.expanduser(path)):
            raise UserError(f"config.sources: held_out_path={held_out_path!r}: is path as well; give held_out=0.1")
        try:
            return train, image_files.read(held_out_path, image, label)[0]
        except UserError as error:
            raise UserError(str(error).replace("config.sources: path=", "config.sources: held_out_path=")) from error
    if held_out is None and beside is not None:
        return train, beside
    return pixels.divided(train, _SHARE if held_out is None else held_out, seed)


def load(
    name: str,
    split: str = "train",
    data_dir: str | None = None,
    *,
    image: str = "image",
    label: str = "label",
    download: bool = False,
) -> Columns:
    """Returns a split of a dataset such as "mnist" or "cifar100" that is prepared on this machine.

    Args:
      name: of the dataset.
      split: of the dataset, or a part of it, as in "train[:10%]".
      data_dir: where datasets are prepared; $TFDS_DATA_DIR or ~/tensorflow_datasets unless given.
      image: feature of the inputs, [H, W, C] with the same sizes in every example.
      label: feature of the targets.
      download: download and prepare the dataset if it is not there.

    Returns:
      inputs float32 [N, H, W, C], of uint8 in [0, 1]; targets, segments (1) and positions (0) int32 [N];
      weights (1) float32 [N].

    Raises:
      UserError: the dataset is not prepared, or no package decodes its images.
    """
    examples, folder = tfds.open_split(name, split, data_dir, [image, label], download=download)
    encoded = "image_feature.Image" in (folder / "features.json").read_text(encoding="utf-8")
    if encoded and not any(map(importlib.util.find_spec, ("PIL", "cv2"))):
        raise UserError(f"{folder}: its images need a decoder; pip install pillow")
    found = [example for _, example in tfds.rows(examples, f"{name} {split}")]
    if not found:
        raise UserError(f"{folder}: split {split!r} holds no examples; choose another")
    inputs = np.stack([example[image] for example in found])
    return pixels.columns(pixels.scaled(inputs), np.array([example[label] for example in found]))
