"""Images of TensorFlow Datasets as rows in memory, for classifiers; a task may be some of the classes.

Decoding needs Pillow or OpenCV, unless the dataset stores its images as tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from jaxcl.data.rows import Columns
from jaxcl.data.sources import Table, describe, tfds
from jaxcl.schema import UserError


def make(
    *,
    dataset: str,
    split: str = "train",
    held_out: str = "test",
    labels: Sequence[int] | None = None,
    image: str = "image",
    label: str = "label",
    data_dir: str | None = None,
    download: bool = False,
    licence: str | None = None,
) -> Table:
    """Returns the images of a dataset.

    Args:
      dataset: name, such as "mnist" or "cifar100".
      split: that is trained on; or a part of it, as in "train[:10%]".
      held_out: split that is only evaluated on.
      labels: of the examples that are kept; None = all. The targets stay what they are in the dataset.
      image, label, data_dir, download: see `load`.
      licence: recorded in the run.

    Raises:
      UserError: see `load`; or a label that no example has.
    """
    parts = []
    for name in (split, held_out):
        columns = load(dataset, name, data_dir, image=image, label=label, download=download)
        if labels is not None:
            if missing := sorted({*labels} - {*columns["targets"].tolist()}):
                raise UserError(f"config.sources: labels={list(labels)}: {dataset} {name} has none of {missing}")
            kept = np.isin(columns["targets"], list(labels))
            columns = {key: value[kept] for key, value in columns.items()}
        parts.append(columns)
    told = {"dataset": dataset, "split": split, "held_out": held_out, "labels": None if labels is None else [*labels]}
    return Table(describe("images", told), parts[0], parts[1], licence)


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
    scale = 255 if inputs.dtype == np.uint8 else 1
    total = len(found)
    return {
        "inputs": inputs.astype(np.float32) / scale,
        "targets": np.array([example[label] for example in found], np.int32),
        "weights": np.ones(total, np.float32),
        "segments": np.ones(total, np.int32),
        "positions": np.zeros(total, np.int32),
    }
