"""TensorFlow Datasets by name, without TensorFlow: datasets that are prepared on this machine as ArrayRecord."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxcl.data.sources import Source, listing, records
from jaxcl.schema import UserError

_CHUNK = 256  # examples read at a time


def make(
    *,
    dataset: str,
    split: str = "train",
    column: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    where: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    download: bool = False,
    max_bytes: int | None = None,
    licence: str | None = None,
) -> Source:
    """Returns a source of one split of a TFDS dataset.

    Args:
      dataset: name, as in "wiki40b/en" or "c4/en:3.0.1".
      split: name of the split, or a part of it, as in "train[:10%]".
      column: feature of the text; "text" unless the next ones are given.
      messages: feature of lists of messages instead.
      prompt: feature of a user's turn instead, with `response`.
      response: feature of the answer.
      where: feature -> value, or list of values, of the examples that are kept.
      data_dir: where datasets are prepared; $TFDS_DATA_DIR or ~/tensorflow_datasets unless given.
      download: download and prepare the dataset if it is not there; many need packages of their own for that.
      max_bytes: stop after this many bytes of text.
      licence: recorded in the manifest.

    Raises:
      UserError: the dataset is not prepared, or not as ArrayRecord; no such split or feature.
    """
    chosen = records.fields(column, messages, prompt, response, where)
    examples, folder = open_split(dataset, split, data_dir, chosen.columns, download=download)
    paths = sorted(str(path) for path in folder.iterdir() if path.is_file())

    def read(name: str, columns: Sequence[str]) -> Iterator[tuple[str, records.Record]]:
        return rows(examples, f"{dataset} {split}")

    made = records.source(
        "tfds", {"dataset": dataset, "split": split}, [str(folder)], read, chosen, max_bytes=max_bytes, licence=licence
    )
    return made._replace(listing=listing(paths))


def open_split(
    dataset: str, split: str, data_dir: str | None, columns: Sequence[str], *, download: bool = False
) -> tuple[Sequence[Any], Path]:
    """Returns the examples of a split, of which images are decoded only if in `columns`, and the folder of the dataset.

    Raises:
      UserError: the dataset is not prepared, or not as ArrayRecord; no such split or feature.
    """
    import tensorflow_datasets as tfds  # noqa: PLC0415  (only those who use it pay for the import)
    from tensorflow_datasets.core import read_only_builder  # noqa: PLC0415

    place = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    name = f"config.sources: dataset={dataset!r}"
    remedy = f"tfds.builder({dataset!r}, data_dir={place!r}, file_format='array_record').download_and_prepare()"
    with _quiet():
        try:
            builder: Any = read_only_builder.builder_from_files(dataset, data_dir=place)
        except Exception as error:  # whatever it is, nothing there can be read
            if not download:
                raise UserError(
                    f"{name}: not prepared in data_dir={place!r}; set download=True, or run {remedy} where there is a "
                    "network and copy the folder"
                ) from error
            builder = _prepared(tfds, dataset, place, name)
        splits = list(builder.info.splits)
        if not set(re.sub(r"\[.*?\]", "", split).split("+")) <= {*splits, "all"}:
            raise UserError(f"config.sources: split={split!r}: not in {dataset!r}; choose from {', '.join(splits)}")
        features: Any = builder.info.features
        known = list(features.keys()) if hasattr(features, "keys") else []
        for column in columns:
            if column not in known:
                raise records.absent(column, known, f"{name} in data_dir={place!r}")
        skipped = [key for key in known if key not in columns and isinstance(features[key], tfds.features.Image)]
        decoders = dict.fromkeys(skipped, tfds.decode.SkipDecoding())  # needs no package that decodes images
        try:
            examples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise UserError(f"{name}: not prepared as ArrayRecord in data_dir={place!r}; run {remedy}") from error
        except Exception as error:
            raise UserError(f"{name}: split={split!r} cannot be read ({_line(error)}); mend it, or {remedy}") from error
    return examples, Path(os.fspath(builder.data_dir))


def rows(examples: Sequence[Any], name: str) -> Iterator[tuple[str, records.Record]]:
    """Yields place and example of an opened split.

    Raises:
      UserError: a file is damaged.
    """
    for start in range(0, len(examples), _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, len(examples))))
        try:
            found = examples.__getitems__(numbers)  # type: ignore[attr-defined]
        except Exception as error:
            raise UserError(f"{name}: examples from {start} on cannot be read ({_line(error)})") from error
        for number, example in zip(numbers, found, strict=True):
            yield f"{name}[{number}]", example


def _prepared(tfds: Any, dataset: str, place: str, name: str) -> Any:
    """Returns the builder of a dataset after downloading it."""
    try:
        builder = tfds.builder(dataset, data_dir=place, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # no network, no such dataset, a package that its preparation needs ...
        raise UserError(
            f"{name}: cannot be downloaded to data_dir={place!r} ({_line(error)}); check the name, or prepare it on "
            "another machine and copy the folder"
        ) from error
    return builder


def _line(error: Exception) -> str:
    """Returns the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what TFDS logs and prints, other than its errors."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
