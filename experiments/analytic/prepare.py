r"""Makes what the streams read: images of one seed, and features of a network that stays as it is.

python experiments/analytic/prepare.py --mnist=FOLDER --omniglot=FOLDER --out=runs/analytic/data --seeds=0,1,2,3,4

--mnist (or JAXCL_MNIST): the four files of MNIST in IDX. --omniglot (or JAXCL_OMNIGLOT): archives of Omniglot as they
are published, images_background*.zip and images_evaluation*.zip, some of them or all.

A seed is the order of the classes and the draw of the rows: label 0 is the class that is learned first. OUT gets
mnist-SEED.npz (1,200 training and 400 test images of each digit, drawn from both splits) and omniglot-SEED.npz (242
characters of 15 training and 5 test images, by other hands; 105 x 105 pixels averaged to 28 x 28, ink is 1).
"""

import functools
import io
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxcl import schema
from jaxcl.data import image_files, pixels
from jaxcl.main import cli
from jaxcl.schema import UserError
from jaxcl.types import Batch

MNIST = flags.DEFINE_string("mnist", os.environ.get("JAXCL_MNIST"), "Folder of the four files of MNIST.")
OMNIGLOT = flags.DEFINE_string("omniglot", os.environ.get("JAXCL_OMNIGLOT"), "Folder of the archives of Omniglot.")
OUT = flags.DEFINE_string("out", "runs/analytic/data", "Folder to make.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Orders of the classes.")
ROWS = (1200, 400)  # of each digit
CHARACTERS, HANDS = 242, (15, 5)
SIDE = 28
BLOCK = 500  # images that features are computed of at a time


def mnist(place, out, seed):
    """Writes the images of one seed, unless they are there; returns the file."""
    path = Path(out) / f"mnist-{seed}.npz"
    if path.exists():
        return path
    whole, test = image_files.of_flag("--mnist", place)
    draw = np.random.default_rng((seed, 10))
    order = draw.permutation(10)
    parts = {}
    for name, split, count in (("train", whole, ROWS[0]), ("test", test, ROWS[1])):
        rows = [draw.permutation(np.flatnonzero(split.labels == digit))[:count] for digit in order]
        parts[f"x_{name}"] = split.pixels[np.concatenate(rows), ..., 0]
        parts[f"y_{name}"] = np.repeat(np.arange(10, dtype=np.int32), [len(row) for row in rows])
    return write(path, parts, order=order)


def omniglot(place, out, seed):
    """Writes the images of one seed, unless they are there; returns the file."""
    path = Path(out) / f"omniglot-{seed}.npz"
    if path.exists():
        return path
    if not place:
        raise UserError("--omniglot: missing; give the folder of the archives of Omniglot, or set JAXCL_OMNIGLOT")
    known = characters(place)
    draw = np.random.default_rng((seed, 242))
    order = draw.permutation(len(known))[:CHARACTERS]
    if len(order) < CHARACTERS:
        raise UserError(f"--omniglot={place}: has {len(known)} characters; give archives of at least {CHARACTERS}")
    images = np.stack([known[k][draw.permutation(sum(HANDS))] for k in order])  # [C, 20, H, W]
    parts = {}
    for name, rows in (("train", images[:, : HANDS[0]]), ("test", images[:, HANDS[0] :])):
        parts[f"x_{name}"] = rows.reshape(-1, SIDE, SIDE)
        parts[f"y_{name}"] = np.repeat(np.arange(CHARACTERS, dtype=np.int32), rows.shape[1])
    return write(path, parts, order=order)


@functools.cache
def characters(place):
    """Returns the images of every character, uint8 [20, H, W] each, in the order of their names."""
    try:
        from PIL import Image  # nothing else needs it
    except ImportError as error:
        raise UserError("--omniglot: its images need a decoder; pip install pillow") from error
    found = {}
    for archive in sorted(Path(place).glob("images_*.zip")):
        with zipfile.ZipFile(archive) as files:
            for name in sorted(files.namelist()):
                if not name.endswith(".png") or name.startswith("__"):
                    continue
                _, alphabet, character, file = name.split("/")
                with Image.open(io.BytesIO(files.read(name))) as image:
                    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
                found.setdefault((alphabet, character), {})[file] = 255 - np.asarray(small)
    if not found:
        raise UserError(f"--omniglot={place}: holds no images_*.zip with characters; give the folder of the archives")
    return [np.stack([*found[name].values()]) for name in sorted(found) if len(found[name]) == sum(HANDS)]


def features(images, out, model, params):
    """Writes the features of all images, float16, unless they are there; returns the file.

    Args:
      images: file that `mnist` or `omniglot` made.
      out: the bank, an `.npz`.
      model: `config.model` of the network.
      params: of the network; its last layer is not read.
    """
    out = Path(out)
    if out.exists():
        return out
    network = schema.make("jaxcl.models", {**model, "output": "hidden"}, field="model")

    @jax.jit
    def read(params, x):
        row = jnp.zeros(len(x), jnp.int32)
        return network.apply(params, Batch(x, row, jnp.ones(len(x)), row, row, row)).hidden

    train, test = image_files.read(str(images))
    parts = {}
    for name, split in (("train", train), ("test", test)):
        found = []
        for start in range(0, len(split.labels), BLOCK):
            x = split.pixels[start : start + BLOCK]
            padded = np.pad(x, ((0, BLOCK - len(x)), *((0, 0),) * 3))  # so that it is compiled once
            found.append(np.asarray(read(params, pixels.scaled(padded)), np.float16)[: len(x)])
        parts |= {f"{name}_features": np.concatenate(found), f"{name}_labels": split.labels}
    return write(out, parts)


def write(path, parts, **more):
    """Writes arrays so that a file that is there is whole; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(begun, **parts, **more)
    os.replace(begun, path)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in parts.items())
    print(f"{path}: {shapes}", flush=True)
    return path


def main(argv):
    flags.FLAGS(argv)
    for seed in map(int, SEEDS.value):
        if MNIST.value:
            mnist(MNIST.value, OUT.value, seed)
        if OMNIGLOT.value:
            omniglot(OMNIGLOT.value, OUT.value, seed)
    if not MNIST.value and not OMNIGLOT.value:
        raise UserError("--mnist, --omniglot: missing; give the folder of one of them, or set JAXCL_MNIST")
    return 0


if __name__ == "__main__":
    cli(main)
