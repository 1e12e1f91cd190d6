"""Arithmetic on checkpoint folders, tensor by tensor: residual, add, subtract, lerp; nothing is held but one tensor.

An instruct model forgets its manners when it is trained further. Train its base instead, then add what that learned:

    python -m jaxcl.hf residual CONTINUED OUT --base=BASE --instruct=INSTRUCT

Every verb has a leading folder (INSTRUCT, or A) that gives OUT its tensors, their types, the config and the tokenizer.
Sums are taken in float32 (float64 if a tensor is); what does not change keeps its bits. Rows of the vocabulary belong
together if their tokens are the same text; rows that another folder lacks stay as in the leading one.

Source: Jindal et al., "Balancing continuous pre-training and instruction fine-tuning" (arXiv 2410.10739).
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.hf import families, files, read, write
from jaxcl.schema import UserError

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
HEAD = "lm_head.weight"
CHUNK = 2**20  # elements in float32 at a time
Operation = Callable[..., np.ndarray]  # of the leading piece and one piece of every other folder


def residual(instruct: np.ndarray, continued: np.ndarray, base: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Returns `instruct + scale * (continued - base)`; where the two are equal, the bits of `instruct`."""
    anchor, after, before = _wide(instruct, continued, base)
    bits = f"u{after.itemsize}"
    kept = (after == before) | (after.view(bits) == before.view(bits)) | (scale == 0)
    return _choose(instruct, kept, lambda: anchor + scale * (after - before))


def add(a: np.ndarray, b: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Returns `a + scale * b`; where `b` is zero, the bits of `a`."""
    x, y = _wide(a, b)
    return _choose(a, (y == 0) | (scale == 0), lambda: x + scale * y)


def lerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """Returns `a + weight * (b - a)`; the bits of `a` at weight 0 and, if the types agree, those of `b` at weight 1."""
    if weight == 1:
        return b if a.dtype == b.dtype else _choose(a, np.zeros(a.shape, bool), lambda: _wide(b)[0])
    return residual(a, b, a, weight)


def _wide(*arrays: np.ndarray) -> list[np.ndarray]:
    kind = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    return [np.ascontiguousarray(array, kind).reshape(array.shape) for array in arrays]


def _choose(lead: np.ndarray, kept: np.ndarray, value: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns `lead` where `kept`, else `value` in its type.

    Raises:
      FloatingPointError: a value that is not finite in that type.
    """
    with np.errstate(all="ignore"):
        out = value().astype(lead.dtype)
    if not np.isfinite(out[~kept]).all():
        raise FloatingPointError
    out[kept] = lead[kept]
    return out


class Side(NamedTuple):
    """A folder that takes part."""

    folder: Path
    tensors: files.Tensors
    config: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", HEAD not in self.tensors.file_of))

    def names(self) -> list[str]:
        """Returns the tensors that are weights; a tied head is none, nor are constants that old versions stored."""
        held = (name for name in self.tensors.file_of if not name.endswith("rotary_emb.inv_freq"))
        return [name for name in held if not (self.tied and name == HEAD)]


class Outcome(NamedTuple):
    """What was written."""

    tensors: int
    kept: int  # rows of the vocabulary that another folder lacks


def combine(lead: Path, others: Sequence[Path], out: Path, operation: Operation, about: Mapping[str, Any]) -> Outcome:
    """Writes `operation(lead, *others)` as a checkpoint folder.

    Args:
      lead: folder that gives names, types, config and tokenizer.
      others: folders of the same model.
      out: folder to make.
      operation: elementwise, on pieces of the same shape; its result has the type of the first.
      about: what it is, for jaxcl.json.

    Raises:
      UserError: `out` exists or lies in an input; folders that are no checkpoints or not of one model; a result that
        is not finite. Nothing is written.
      OSError: not enough space, found before anything is written.
    """
    _check_out(out, [lead, *others])
    first, *rest = sides = [_side(folder) for folder in (lead, *others)]
    for side in rest:
        _check_pair(first, side)
    rows = [_rows(first, side) for side in rest]
    names = first.names()
    _check_space(out, sum(_bytes(first, name) for name in names))
    with write.Writer(out) as writer:
        for name in names:
            try:
                writer.add(name, _tensor(first, rest, rows, name, operation))
            except FloatingPointError:
                kind = first.tensors.dtype(name)
                folders = ", ".join(str(side.folder) for side in sides)
                raise UserError(f"{name!r} of {folders}: the result is not finite in {kind}; look for NaN") from None
        for file in ("config.json", "generation_config.json", *write.TOKENIZER_FILES):
            if (first.folder / file).exists():
                writer.copy(first.folder / file)
        known = [side.folder / "jaxcl.json" for side in sides]
        made = [files.config(path.parent, path.name) if path.exists() else None for path in known]
        inputs = [{"folder": str(s.folder), "made": m} for s, m in zip(sides, made, strict=True)]
        writer.json("jaxcl.json", {**about, "inputs": inputs})
    return Outcome(len(names), max((int((row < 0).sum()) for row in rows if row is not None), default=0))


def _side(folder: Path) -> Side:
    """Opens a folder."""
    place = folder.expanduser()
    if (place / "run.json").exists():
        raise UserError(f"{place}: is a run; write it as a checkpoint first: python -m jaxcl.hf export {folder} OUT")
    config = files.config(place)
    if config.get("quantization_config"):
        raise UserError(
            f"{place / 'config.json'}: quantization_config: quantised weights do not add; take the originals"
        )
    side = Side(place, files.open_folder(place), config)
    for name in side.names():
        if (kind := side.tensors.dtype(name)) not in read.DTYPES:
            file = place / side.tensors.file_of[name]
            raise UserError(f"{file}: {name!r} is {kind}; jaxcl reads {', '.join(read.DTYPES)}")
    return side


def _check_pair(first: Side, side: Side) -> None:
    """Raises UserError unless the two are the same model, up to the rows of its vocabulary."""
    ours, theirs = first.config.get("model_type"), side.config.get("model_type")
    if ours != theirs:
        raise UserError(
            f"{side.folder / 'config.json'}: model_type={theirs!r}, but {first.folder} is {ours!r}; "
            "only models of one family can be combined"
        )
    for here, there in ((first, side), (side, first)):
        lacking = [name for name in here.names() if name not in there.tensors.file_of]
        if lacking:
            raise UserError(f"{there.folder}: has no tensor {lacking[0]!r}, which {here.folder} has; not one model")
    for name in first.names():
        mine, other = first.tensors.shape(name), side.tensors.shape(name)
        if mine[1:] != other[1:] or (mine != other and name not in VOCABULARY):
            raise UserError(
                f"{side.folder / side.tensors.file_of[name]}: {name!r} is {list(other)}, but {list(mine)} in "
                f"{first.folder}; only models of one size can be combined"
            )
    mine, other = (families.unseen(s.config, str(s.folder / "config.json")) for s in (first, side))
    for key, value in other.items():
        if value != mine[key]:
            raise UserError(
                f"{side.folder / 'config.json'}: {key}={value!r}, but {mine[key]!r} in {first.folder}; "
                "only models that compute alike can be combined"
            )


def _check_out(out: Path, folders: Sequence[Path]) -> None:
    """Raises UserError if `out` exists or lies in one of the folders."""
    place = out.expanduser().resolve()
    if place.exists():
        raise UserError(f"{out}: exists; choose another folder, or remove it")
    for folder in folders:
        if place.is_relative_to(folder.expanduser().resolve()):
            raise UserError(f"{out}: lies in the input {folder}; choose a folder outside it")


def _check_space(out: Path, size: int) -> None:
    """Raises OSError unless `size` bytes fit."""
    place = next(parent for parent in out.expanduser().resolve().parents if parent.exists())
    if shutil.disk_usage(place).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))


def _bytes(side: Side, name: str) -> int:
    return math.prod(side.tensors.shape(name)) * np.dtype(read.DTYPES[side.tensors.dtype(name)]).itemsize


def _rows(first: Side, side: Side) -> np.ndarray | None:
    """Returns for every row of the vocabulary the row of `side` with the same token, -1 if none; None = all equal."""
    sizes = [[s.tensors.shape(n)[0] for n in VOCABULARY if n in s.names()] for s in (first, side)]
    for s, held in zip((first, side), sizes, strict=True):
        if len(set(held)) > 1:
            raise UserError(f"{s.folder}: embedding and head have {held[0]} and {held[1]} rows; fetch it again")
    if not sizes[0]:
        return None
    (mine, *_), (theirs, *_) = sizes
    paths = [s.folder / "tokenizer.json" for s in (first, side)]
    present = all(path.exists() for path in paths)
    if not present and mine != theirs:
        absent = next(path for path in paths if not path.exists())
        raise UserError(f"{absent}: no such file, and {theirs} rows cannot be matched to {mine} without the tokenizers")
    if not present or paths[0].read_bytes() == paths[1].read_bytes():
        row = np.arange(mine)
        return None if mine == theirs else np.where(row < theirs, row, -1)
    words = [_vocabulary(path, size) for path, size in zip(paths, (mine, theirs), strict=True)]
    named = set(words[1].values())
    # Rows without a token are padding: the same number on both sides is the same row.
    row = np.array([i if i < theirs and i not in named else -1 for i in range(mine)])
    for token, i in words[0].items():
        row[i] = words[1].get(token, -1)
    return None if mine == theirs and (row == np.arange(mine)).all() else row


def _vocabulary(path: Path, rows: int) -> dict[str, int]:
    """Returns token -> number."""
    import tokenizers  # noqa: PLC0415  (only those who use it pay for the import)

    try:
        words = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{path}: not a tokenizer.json ({error}); fetch it again") from error
    if (top := max(words.values(), default=-1)) >= rows:
        raise UserError(f"{path}: has a token number {top}, but the embedding {rows} rows; they do not belong together")
    return words


def _tensor(first: Side, rest: Sequence[Side], rows: Sequence[Any], name: str, operation: Operation) -> np.ndarray:
    """Returns one tensor of the result."""
    shape = first.tensors.shape(name)
    if not shape or not math.prod(shape):
        return operation(*(side.tensors.read(name) for side in (first, *rest)))
    out = np.empty(shape, read.DTYPES[first.tensors.dtype(name)])
    step = max(1, CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        lead = first.tensors.read(name, (part,))
        wanted = [row[part] if row is not None and name in VOCABULARY else None for row in rows]
        there = np.ones(len(lead), bool)
        for row in wanted:
            there &= True if row is None else row >= 0
        out[part] = lead
        if there.any():
            index = np.arange(part.start, part.stop)
            pieces = [
                _gather(side, name, (index if row is None else row)[there])
                for side, row in zip(rest, wanted, strict=True)
            ]
            out[part][there] = operation(lead[there], *pieces)
    return out


def _gather(side: Side, name: str, rows: np.ndarray) -> np.ndarray:
    """Returns rows of a tensor, read in runs of neighbours."""
    pieces = [side.tensors.read(name, (slice(start, stop),)) for start, stop in _runs(rows)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (first, last + 1) of every run of consecutive numbers."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(run[0]), int(run[-1]) + 1


def add_commands(commands: Any) -> None:
    """Adds the verbs to a command line; see `jaxcl.hf.__main__`."""
    made = commands.add_parser("residual", help="INSTRUCT + scale * (CONTINUED - BASE)")
    made.add_argument("continued", metavar="CONTINUED", type=Path, help="the base after more training")
    made.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    made.add_argument("--base", type=Path, required=True, help="what both others started from")
    made.add_argument("--instruct", type=Path, required=True, help="the model that follows instructions")
    made.add_argument("--scale", type=number, default=1.0, help="of what was learned; 1 by default")
    made.set_defaults(act=_residual)
    for verb, means, option in (
        ("add", "A + scale * B", "scale"),
        ("subtract", "A - B", None),
        ("lerp", "A + weight * (B - A)", "weight"),
    ):
        made = commands.add_parser(verb, help=means)
        for name in ("a", "b"):
            made.add_argument(name, metavar=name.upper(), type=Path, help="folder of a checkpoint")
        made.add_argument("out", metavar="OUT", type=Path, help="folder to make")
        if option:
            made.add_argument(f"--{option}", type=number, required=option == "weight", default=1.0, help="a number")
        made.set_defaults(act=_pair)


def number(text: str) -> float:
    """Reads a finite number."""
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _residual(options: argparse.Namespace) -> None:
    about = {"operation": "instruct + scale * (continued - base)", "scale": options.scale}
    folders = [options.continued, options.base]
    done = combine(options.instruct, folders, options.out, lambda i, c, b: residual(i, c, b, options.scale), about)
    _tell(options.out, done)


def _pair(options: argparse.Namespace) -> None:
    if options.command == "lerp":
        about, operation = {"weight": options.weight}, lambda a, b: lerp(a, b, options.weight)
    else:
        scale = -1.0 if options.command == "subtract" else options.scale
        about, operation = {"scale": scale}, lambda a, b: add(a, b, scale)
    _tell(options.out, combine(options.a, [options.b], options.out, operation, {"operation": options.command, **about}))


def _tell(out: Path, done: Outcome) -> None:
    print(f"{out}: {done.tensors} tensors; {done.kept} rows of tokens that another folder lacks stayed as they were")
