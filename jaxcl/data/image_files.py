"""Images with their labels from files: `.npz` archives of NumPy and IDX pairs, the format of MNIST.

Nothing is unpickled, and nothing is allocated for a size that the file cannot have: what a header declares is compared
with the size of the file first, of a compressed one with what deflate can make of it at most.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import struct
import tokenize
import zipfile
import zlib
from typing import IO, Any, NamedTuple

import numpy as np

from jaxcl.data.sources import records
from jaxcl.schema import UserError

# Names of the two arrays in an archive that are looked for, those of training rows and those of held-out rows.
TRAIN = (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y"), ("image", "label"))
HELD_OUT = (("x_test", "y_test"), ("test_images", "test_labels"))
_RATIO = 1032  # output of deflate per byte of input, at most (zlib's technical notes)
_UBYTE = 8  # type code of IDX
_CHUNK = 2**20
# What reading a damaged file raises; RuntimeError is that of an archive that is encrypted or packed in a foreign way.
BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, struct.error, MemoryError)
BROKEN += (TypeError, SyntaxError, OverflowError, tokenize.TokenError)  # NumPy, of a header that is no header


class Images(NamedTuple):
    """Images of one split."""

    pixels: np.ndarray  # uint8 or float [N, H, W, C], or [N, D] if rows are flat
    labels: np.ndarray  # int32 [N]

    def take(self, index: np.ndarray) -> Images:
        """Returns the rows of an index."""
        return Images(self.pixels[index], self.labels[index])


def read(path: str, image: str | None = None, label: str | None = None) -> tuple[Images, Images | None]:
    """Returns training rows, and the held-out rows that lie with them (None if there are none).

    Args:
      path: an `.npz`, an IDX file of images that has its labels beside it, or a folder of both splits in IDX.
      image, label: names of the arrays in an `.npz`; looked for among usual names if not given.

    Raises:
      UserError: something else, or a file that is damaged or does not fit its header.
    """
    path = os.path.expanduser(path)
    return _read(path, image, label, tuple(_state(one) for one in _candidates(path)))


def of_flag(flag: str, folder: str | None) -> tuple[Images, Images]:
    """Returns both splits of MNIST from the folder that a flag of a launcher names.

    Args:
      flag: as it is written, `--mnist`, which is what messages name.
      folder: its value, with the four files; None = it was not given.

    Raises:
      UserError: no such folder, not all four files, or one that is damaged.
    """
    remedy = "give the folder of the four files of MNIST"
    if not folder:
        raise UserError(f"{flag}: missing; {remedy}, or set JAXCL_MNIST")
    if not os.path.isdir(os.path.expanduser(folder)):
        raise UserError(f"{flag}={folder}: is no folder; {remedy}")
    try:
        train, test = read(folder)
    except UserError as error:
        own = f"config.sources: path={os.path.expanduser(folder)!r}: "
        if not str(error).startswith(own):  # of a file, which it names
            raise
        raise UserError(f"{flag}={folder}: {str(error).removeprefix(own).rpartition(';')[0]}; {remedy}") from error
    if test is None:
        raise UserError(f"{flag}={folder}: has no test images; {remedy}")
    return train, test


def _candidates(path: str) -> list[str]:
    """Returns the files that may be read for a path."""
    if path.endswith(".npz"):
        return [path]
    place = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        return sorted(os.path.join(place, name) for name in os.listdir(place) if "ubyte" in name)
    except OSError:  # what cannot be read is said when it is read
        return [path]


def _state(path: str) -> tuple[Any, ...]:
    """Returns what changes if a file does."""
    try:
        found = os.stat(path)
    except OSError:
        return (path,)
    return path, found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=2)  # tasks that see one file in several ways share its pixels
def _read(path: str, image: str | None, label: str | None, stamp: Any) -> tuple[Images, Images | None]:
    """Reads what `read` returns; `stamp` says which state of the files this is."""
    del stamp
    if os.path.isdir(path):
        train, held_out = _in_folder(path)
        return _pair(train), _pair(held_out) if held_out else None
    if not os.path.isfile(path):
        raise UserError(f"config.sources: path={path!r}: no such file or folder; check it")
    if path.endswith(".npz"):
        return _archive(path, image, label)
    if "images" in os.path.basename(path) and "idx" in os.path.basename(path):
        return _pair(path), None
    raise UserError(f"config.sources: path={path!r}: is no .npz, *-images-idx3-ubyte[.gz], nor a folder of these")


def idx(path: str) -> np.ndarray:
    """Returns the array of an IDX file of bytes, plain or gzipped, uint8 [...].

    Raises:
      UserError: another type, or a size that is not that of the header.
    """
    try:
        with _opened(path) as stream:
            shape = _header(path, stream)
            size, most = math.prod(shape), os.path.getsize(path) * (_RATIO if path.endswith(".gz") else 1)
            if size > most:
                raise UserError(f"{path}: declares {size:,} bytes, more than it can hold; replace the file")
            array, start = np.empty(size, np.uint8), 0
            while start < size and (count := stream.readinto(memoryview(array)[start : start + _CHUNK])):  # type: ignore[attr-defined]
                start += count
            if start < size or stream.read(1):
                fault = "is longer" if start == size else f"ends after {start:,} bytes"
                raise UserError(f"{path}: declares {size:,} bytes and {fault}; replace the file")
    except BROKEN as error:
        raise records.broken(path, error) from error
    return array.reshape(shape)


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _header(path: str, stream: IO[bytes]) -> tuple[int, ...]:
    """Returns the shape of an IDX file."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UBYTE or not 1 <= magic[3] <= 4:
        raise UserError(f"{path}: is no IDX file of bytes (its first four bytes are {magic.hex()}); replace the file")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise UserError(f"{path}: ends within its header; replace the file")
    return struct.unpack(f">{magic[3]}I", sizes)


def _in_folder(folder: str) -> tuple[str, str | None]:
    """Returns the files of training images and of held-out images, None without them."""

    def find(*stems: str) -> str | None:
        names = sorted(n for n in os.listdir(folder) if "images" in n and "idx" in n and any(s in n for s in stems))
        if len({name.removesuffix(".gz") for name in names}) > 1:
            raise UserError(f"config.sources: path={folder!r}: holds {names[0]} and {names[-1]}; name one of them")
        return os.path.join(folder, names[0]) if names else None

    train = find("train-images")
    if train is None:
        raise UserError(f"config.sources: path={folder!r}: holds no train-images-idx3-ubyte or .gz of it; name a file")
    return train, find("t10k-images", "test-images")


def _pair(path: str) -> Images:
    """Returns images in IDX with the labels beside them."""
    folder, name = os.path.split(path)
    plain = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    places = [os.path.join(folder, plain + ending) for ending in ("", ".gz")]
    found = [place for place in places if os.path.isfile(place)]
    if not found:
        raise UserError(f"{path}: its labels are not beside it; copy {plain} there")
    return _checked(path, idx(path), idx(found[0]))


def _archive(path: str, image: str | None, label: str | None) -> tuple[Images, Images | None]:
    """Returns the rows of an `.npz`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            train = _names(path, names, image, label)
            held_out = next((pair for pair in HELD_OUT if {*pair} <= {*names}), None) if image is None else None
            parts = [_checked(path, *(_member(path, archive, n) for n in pair)) for pair in (train, held_out) if pair]
    except BROKEN as error:
        raise records.broken(path, error) from error
    return parts[0], parts[1] if held_out else None


def _names(path: str, names: list[str], image: str | None, label: str | None) -> tuple[str, str]:
    """Returns the names of the two arrays of training rows."""
    if (image is None) != (label is None):
        given = f"image={image!r}" if label is None else f"label={label!r}"
        raise UserError(f"config.sources: {given}: an .npz needs both, image= and label=, or none of them")
    if image is not None and label is not None:
        for name in (image, label):
            if name not in names:
                raise records.absent(name, names, path)
        return image, label
    for pair in TRAIN:
        if {*pair} <= {*names}:
            return pair
    raise UserError(f"{path}: holds {', '.join(names) or 'nothing'}; say which with image= and label=")


def _member(path: str, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Returns an array of an archive whose header says what the archive holds."""
    info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: {name} is compressed in a way that NumPy does not write; save it with np.savez")
    with archive.open(info) as stream:
        declared(path, name, info, stream)
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def declared(path: str, name: str, info: zipfile.ZipInfo, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, order (whether Fortran's) and type of an array of an archive; the stream is left behind them.

    Raises:
      UserError: they are not those of as many bytes as the archive holds.
    """
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are not loaded; save numbers")
    size = math.prod(shape) * dtype.itemsize + stream.tell()
    if size != info.file_size or size > _RATIO * os.path.getsize(path):
        raise UserError(f"{path}: {name} declares {size:,} bytes and has not that many; replace the file")
    return shape, fortran, dtype


def _checked(path: str, pixels: np.ndarray, labels: np.ndarray) -> Images:
    """Returns images and labels of the shapes and types that `Images` has."""
    if pixels.ndim not in (2, 3, 4) or not pixels.size:
        raise UserError(f"{path}: images of shape {pixels.shape}; expected [N, H, W], [N, H, W, C] or [N, D]")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != pixels.shape[:1]:
        found = f"{len(labels):,} labels" if labels.ndim == 1 else f"labels of shape {labels.shape}"
        raise UserError(f"{path}: {len(pixels):,} images, but {found}; give the labels of these images, one for each")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(f"{path}: labels of {labels.dtype}; expected whole numbers from 0 on")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":
            raise UserError(f"{path}: images of {pixels.dtype}; store uint8, or floats in [0, 1]")
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # so that NaN fails
            spread = f"{pixels.min():g} to {pixels.max():g}"
            raise UserError(f"{path}: images of {pixels.dtype} from {spread}; store uint8, or floats in [0, 1]")
    return Images(pixels[..., None] if pixels.ndim == 3 else pixels, labels.astype(np.int32))
