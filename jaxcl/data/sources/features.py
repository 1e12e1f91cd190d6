"""Features of a frozen network as rows for classifiers, read from disk where they lie: `.npy`, or an `.npz`.

    dict(name="features", path="bank.npz", relabel=False, classes=[0, 1])       # made by np.savez, not compressed
    dict(name="features", path="bank", imbalance=100.0)                         # a folder of .npy files

An archive or a folder holds `features` [N, D], floats, and `labels` [N], whole numbers from 0 on; or `train_features`,
`train_labels`, `test_features` and `test_labels`. Of features only the rows of a batch are in memory, as float32; those
that a task has are read once before training, to see that they are finite and what they are.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data import chosen, image_files, pixels
from jaxcl.data.permutation import fold_in, key_of, mix
from jaxcl.data.rows import Lazy, Stored
from jaxcl.data.sources import Table, describe, records
from jaxcl.schema import UserError

TRAIN = (("train_features", "train_labels"), ("features", "labels"), ("x_train", "y_train"), ("x", "y"))
HELD_OUT = (("test_features", "test_labels"), ("x_test", "y_test"))
_SHARE = 0.1  # held out of a bank that has no held-out rows
_ROWS = 2**20  # numbers that are looked at at a time
_LOCAL = 30  # bytes of a member's header in a zip archive, before its name (APPNOTE 4.3.7)


class Bank(NamedTuple):
    """Features of one split."""

    path: str
    features: np.ndarray  # float [N, D], memory-mapped
    labels: np.ndarray  # int64 [N]


def make(
    *,
    path: str,
    held_out_path: str | None = None,
    held_out: float | None = None,
    classes: Sequence[int] | None = None,
    relabel: bool = True,
    imbalance: float = 1.0,
    si_blurry: Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    licence: str | None = None,
) -> Table:
    """Returns the features of a bank, float32 [N, D].

    Args:
      path: an `.npz`, a folder of `.npy`, or a file `*features*.npy` that has `*labels*.npy` beside it.
      held_out_path: the same, of the rows that are only evaluated on.
      held_out: share of the training rows that is taken instead, 0.1 where no test rows lie beside them. Whether a row
        is depends on its content and `seed` alone, so equal rows stay together.
      classes, relabel, imbalance, si_blurry, limit: as for `images`.
      seed: of what is held out, of `imbalance` and of `limit`; the same rows in every task.
      licence: recorded in the run.

    Raises:
      UserError: a bank that cannot be read, or is none, or options that do not fit it.
    """
    choice = chosen.checked(chosen.Choice(classes, relabel, imbalance, si_blurry, limit, seed))
    if held_out is not None and not 0 < held_out < 1:
        raise UserError(f"config.sources: held_out={held_out!r}: of features a share between 0 and 1")
    train, rest = _banks(path, held_out_path, held_out)
    told = {"path": path, "held_out_path": held_out_path, "held_out": held_out, "seed": seed or None}
    first = chosen.train(train.labels, choice._replace(limit=None))
    second = chosen.held_out((rest or train).labels, choice, 1 + int(train.labels.max()))
    if rest is None:
        if si_blurry is not None:
            raise UserError("config.sources: si_blurry: needs rows that are held out anyway; give held_out_path")
        first, second = _divided(train, choice, first, second, _SHARE if held_out is None else held_out)
    kept = chosen.few(len(first[0]), choice)
    parts = _columns(train, first[0][kept], first[1][kept]), _columns(rest or train, *second)
    return Table(describe("features", told | choice.options), *parts, licence)


def _banks(path: str, held_out_path: str | None, held_out: float | None) -> tuple[Bank, Bank | None]:
    """Returns the training rows, and the held-out rows unless they are to be taken out of these."""
    if held_out is not None and held_out_path is not None:
        raise UserError(f"config.sources: held_out={held_out!r}: held_out_path is given as well; leave one of them out")
    train, rest = read(path)
    if held_out_path is not None:
        if os.path.realpath(os.path.expanduser(held_out_path)) == os.path.realpath(os.path.expanduser(path)):
            raise UserError(f"config.sources: held_out_path={held_out_path!r}: is path as well; give held_out=0.1")
        rest = read(held_out_path)[0]
    if held_out is not None or rest is None:
        return train, None
    if train.features.shape[1] != rest.features.shape[1]:
        sizes = f"{train.features.shape[1]} features and held-out rows {rest.features.shape[1]}"
        raise UserError(f"config.sources: training rows have {sizes}; give banks of one network")
    return train, rest


def read(path: str) -> tuple[Bank, Bank | None]:
    """Returns the training rows of a bank, and its held-out rows if it has them.

    Raises:
      UserError: something else, or a file that is damaged or does not hold what it should.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise UserError(f"config.sources: path={path!r}: no such file or folder; check it")
    try:
        if os.path.isdir(path):
            names = [name for name in os.listdir(path) if name.endswith(".npy")]
            arrays = {name[:-4]: functools.partial(_mapped, os.path.join(path, name)) for name in names}
        elif path.endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: functools.partial(_member, path, name) for name in names}
        elif path.endswith(".npy") and "features" in os.path.basename(path):
            beside = os.path.join(os.path.dirname(path), os.path.basename(path).replace("features", "labels"))
            if not os.path.isfile(beside):
                raise UserError(f"{path}: its labels are not beside it; save them as {os.path.basename(beside)}")
            return _checked(path, _mapped(path), _mapped(beside)), None
        else:
            raise UserError(f"config.sources: path={path!r}: is no .npz, no *features*.npy, nor a folder of .npy")
        pairs = [next((pair for pair in kind if {*pair} <= {*arrays}), None) for kind in (TRAIN, HELD_OUT)]
        if pairs[0] is None:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise UserError(f"{path}: holds {found}; save features and labels, or train_features and train_labels")
        train, held_out = (pair and _checked(path, *(arrays[name]() for name in pair)) for pair in pairs)
        assert train
        return train, held_out
    except image_files.BROKEN as error:
        raise records.broken(path, error) from error


def _mapped(path: str) -> np.ndarray:
    """Returns the array of an `.npy`, which is read when it is used."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            found.close()
            raise UserError(f"{path}: is an archive, not one array; name it .npz, or save it with np.save")
        return found
    except image_files.BROKEN as error:
        raise records.broken(path, error) from error


def _member(path: str, name: str) -> np.ndarray:
    """Returns an array of an archive, which is read when it is used."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {name} is compressed, so no single row can be read; save it with np.savez")
        with archive.open(info) as stream:
            shape, fortran, dtype = image_files.declared(path, name, info, stream)
            start = stream.tell()
    with open(path, "rb") as stream:
        stream.seek(info.header_offset)
        lengths = struct.unpack("<26x2H", stream.read(_LOCAL))  # of the member's name and of extra fields
    place = info.header_offset + _LOCAL + sum(lengths) + start
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", place, shape, "F" if fortran else "C")


def _checked(path: str, features: np.ndarray, labels: np.ndarray) -> Bank:
    """Returns features and labels whose shapes and types are those of a bank."""
    if features.ndim != 2 or not features.size:
        raise UserError(f"{path}: features of shape {features.shape}; expected [N, D]")
    if features.dtype.kind != "f":
        raise UserError(f"{path}: features of {features.dtype}; store float32 or float16")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != features.shape[:1]:
        raise UserError(
            f"{path}: {len(features):,} rows of features and labels of shape {labels.shape}; expected one for each"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(f"{path}: labels of {labels.dtype}; expected whole numbers from 0 on")
    return Bank(path, features, np.array(labels, np.int64))


def _single(features: np.ndarray) -> np.ndarray:
    """Returns features in float32; what that cannot hold becomes infinite, which is refused."""
    with np.errstate(over="ignore"):
        return np.asarray(features, np.float32)


def _columns(bank: Bank, index: np.ndarray, labels: np.ndarray) -> Stored:
    """Returns the columns of some rows, all of them finite."""
    inputs = Lazy(bank.features, index, _single)
    step = max(1, _ROWS // inputs.shape[1])
    for start in range(0, len(index), step):
        bad = np.argwhere(~np.isfinite(inputs[start : start + step]))
        if bad.size:
            row, column = index[start + bad[0, 0]], bad[0, 1]
            value = bank.features[row, column]
            raise UserError(f"{bank.path}: features[{row}, {column}]={value}: no finite float32; repair the row")
    return {"inputs": inputs, **pixels.beside(labels)}


Taken = tuple[np.ndarray, np.ndarray]  # rows and their labels


def _divided(bank: Bank, choice: chosen.Choice, first: Taken, second: Taken, share: float) -> tuple[Taken, Taken]:
    """Returns the training rows that are kept and the held-out rows of a bank that has no other.

    Training rows are those of `first` that are not held out, held-out rows those of `second` that are.
    """
    out = _drawn(bank.features, second[0], choice.seed, share)
    held = second[0][out]
    kept = ~_drawn(bank.features, first[0], choice.seed, share)
    if not held.size or not kept.any():
        raise UserError(f"config.sources: held_out={share!r}: of {len(second[0]):,} rows; leave some on both sides")
    return (first[0][kept], first[1][kept]), (held, second[1][out])


def _drawn(features: np.ndarray, index: np.ndarray, seed: int, share: float) -> np.ndarray:
    """Returns which rows are held out, bool [n], by a hash of their content."""
    rows = Lazy(features, index, _single)
    factors = fold_in(key_of("held out", seed), np.arange(rows.shape[1])) | np.uint64(1)
    step = max(1, _ROWS // rows.shape[1])
    out = np.zeros(len(index), bool)
    for start in range(0, len(index), step):
        words = np.ascontiguousarray(rows[start : start + step]).view(np.uint32).astype(np.uint64)
        out[start : start + step] = mix((mix(words) * factors[None]).sum(axis=1)) < np.uint64(share * 2**64)
    return out
