"""Cleaning: a source without what is too short, repeated, or part of an evaluation set.

    config.sources.web = dict(name="jsonl", path="web/*.jsonl.gz",
                              clean=dict(min_chars=200, near=0.8, against=["gsm8k/*.jsonl", "mine.txt"]))

Source -> Source, in one pass and in the order of the documents, the first of equal ones being kept. Documents are
examined in this order, and counted under the first reason that applies: too_short, too_long, unmatched, dropped,
duplicate, contaminated, near_duplicate. Each source is cleaned alone: what two of them share stays in both. A source's
own `max_bytes` counts what it reads, before cleaning.

Memory per kept document: 16 bytes for `exact`; for `near` a signature of 512 bytes and 16 bytes a band, 848 in all at
a threshold of 0.8 (6 numbers in each of 21 bands).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcl.data import shingles
from jaxcl.data.sources import Source, files, jsonl, listing, text_of_document
from jaxcl.schema import UserError, nearest

_DOCUMENTS, _CHARACTERS = 1024, 1 << 19  # examined together, at the most (one document may be longer)
_SHINGLE = 5  # units of a shingle; word 5-grams are usual for web text (Lee et al. 2022, arXiv:2107.06499)

Check = Callable[[list[str]], np.ndarray]  # texts -> bool [n], True = remove; it remembers the ones it lets pass


def make(
    source: Source,
    *,
    min_chars: int | None = None,
    max_chars: int | None = None,
    match: str | None = None,
    drop: str | list[str] | None = None,
    exact: bool = True,
    near: float | None = None,
    against: str | list[str] | None = None,
    columns: list[str] | None = None,
    ngram: int = 13,
    shortest: int = 8,
) -> Source:
    """Returns the source without the documents that one of these tests removes.

    Args:
      source: documents; conversations are judged by the text of their turns.
      min_chars: fewest characters of a document.
      max_chars: most characters of a document.
      match: regular expression that must be found in a document.
      drop: regular expression, or a list of them, that must not be found.
      exact: remove repetitions; texts are equal if they are after NFKC with every stretch of white space as one space.
      near: remove what resembles an earlier document: Jaccard index of the sets of 5-grams (see
        `jaxcl.data.shingles`), in (0, 1). It is estimated from 128 MinHashes (Broder 1997), so that pairs within
        about 0.05 of this threshold may fall on either side.
      against: evaluation sets, as files or glob patterns: .txt (a text per line), .jsonl, .jsonl.gz and .parquet
        (a record's strings one by one, and joined). A document that shares an n-gram with one of the texts is removed
        (Brown et al. 2020, arXiv:2005.14165, appendix C).
      columns: of the records in `against` that count; None for all.
      ngram: words that are shared, without case and punctuation (characters in scripts without spaces); a text that
        has fewer is looked for as a whole.
      shortest: texts of fewer words than this are not looked for: "yes" is in every corpus.

    Raises:
      UserError: an option out of its range, a bad regular expression, a file that is missing or cannot be read.
    """
    options = {k: v for k, v in locals().items() if k != "source" and v is not None}
    filters = _filters(min_chars, max_chars, match, [drop] if isinstance(drop, str) else drop or [])
    _check(near, against, columns, ngram, shortest)
    paths = files(against, field="clean.against") if against is not None else []
    targets = _targets(paths, columns, ngram, min(shortest, ngram))
    counts: dict[str, int] = {}

    def documents() -> Iterator[Any]:
        checks = {**filters, "duplicate": _exact()} if exact else dict(filters)
        checks |= {"contaminated": lambda texts: _contaminated(texts, targets)} if targets else {}
        checks |= {"near_duplicate": _near(near)} if near is not None else {}
        counts.clear()
        return _passing(source.documents(), checks, counts)

    return source._replace(
        description={**source.description, "clean": options},
        listing=[*source.listing, *listing(paths)],
        documents=documents,
        removed=lambda: {**source.removed(), **counts},
    )


def _check(
    near: float | None, against: str | list[str] | None, columns: list[str] | None, ngram: int, shortest: int
) -> None:
    """Raises UserError for an option out of its range."""
    if near is not None and not 0 < near < 1:
        raise UserError(f"config.sources: clean.near={near}: a Jaccard index between 0 and 1, such as 0.8")
    for key, value in (("ngram", ngram), ("shortest", shortest)):
        if value < 1:
            raise UserError(f"config.sources: clean.{key}={value}: must be at least 1")
    if columns is not None and not (against and columns):
        raise UserError(f"config.sources: clean.columns={columns}: names columns of clean.against; set both or neither")


def _passing(documents: Iterator[Any], checks: dict[str, Check], counts: dict[str, int]) -> Iterator[Any]:
    """Yields the documents that pass all checks and counts the others by reason."""
    for read in _chunks(documents):
        chunk = read
        for reason, check in checks.items():
            bad = check([text_of_document(document) for document in chunk]) if chunk else np.zeros(0, bool)
            if bad.any():
                counts[reason] = counts.get(reason, 0) + int(bad.sum())
                chunk = [document for document, removed in zip(chunk, bad, strict=True) if not removed]
        yield from chunk


def _chunks(documents: Iterator[Any]) -> Iterator[list[Any]]:
    """Yields documents in lists that are large enough for NumPy."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(text_of_document(document))
        if len(chunk) >= _DOCUMENTS or size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _filters(low: int | None, high: int | None, match: str | None, drop: Sequence[str]) -> dict[str, Check]:
    """Returns the checks that see one text at a time."""
    for key, value in (("min_chars", low), ("max_chars", high)):
        if value is not None and value < max(1, low or 1):
            raise UserError(f"config.sources: clean.{key}={value}: must be at least {max(1, low or 1)}")
    wanted = [] if match is None else [_pattern("match", match)]
    unwanted = [_pattern("drop", pattern) for pattern in drop]

    def each(bad: Callable[[str], bool]) -> Check:
        return lambda texts: np.array([bad(text) for text in texts], bool)

    checks = {}
    if low is not None:
        checks["too_short"] = each(lambda text: len(text) < low)
    if high is not None:
        checks["too_long"] = each(lambda text: len(text) > high)
    if wanted:
        checks["unmatched"] = each(lambda text: not wanted[0].search(text))
    if unwanted:
        checks["dropped"] = each(lambda text: any(pattern.search(text) for pattern in unwanted))
    return checks


def _pattern(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.sources: clean.{key}={pattern!r}: not a regular expression ({error})") from error


def _exact() -> Check:
    """Returns the check for texts that came before."""
    table = shingles.Table()

    def check(texts: list[str]) -> np.ndarray:
        plain = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts)
        digests = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest() for t in plain]
        keys = np.frombuffer(b"".join(digests), "<u8")
        bad = np.ones(len(keys), bool)
        bad[np.unique(keys, return_index=True)[1]] = False
        bad[table.find(keys)[0]] = True
        table.add(keys[~bad], np.zeros(int((~bad).sum()), np.int64))
        return bad

    return check


def _near(threshold: float) -> Check:
    """Returns the check for texts that resemble one that came before and was kept."""
    table, size = shingles.Table(), shingles.band_size(threshold)
    kept = np.zeros((1024, shingles.PERMUTATIONS), np.uint32)  # signatures; it grows
    used = 0

    def check(texts: list[str]) -> np.ndarray:
        nonlocal kept, used
        found = shingles.units(texts)
        signature = shingles.signatures(found, len(texts), _SHINGLE)
        keys = shingles.bands(signature, size)
        count = keys.shape[1]
        places, numbers = table.find(keys.ravel())
        old = np.unique(np.stack([places // count, numbers]), axis=1)
        bad = np.zeros(len(texts), bool)
        bad[old[0][_agreement(signature[old[0]], kept[old[1]]) >= threshold]] = True
        here = shingles.Table()
        here.add(keys.ravel(), np.repeat(np.arange(len(texts)), count))
        places, numbers = here.find(keys.ravel())
        new = np.unique(np.stack([places // count, numbers])[:, numbers < places // count], axis=1)
        empty = np.bincount(found.owner, minlength=len(texts)) == 0  # no words: nothing to compare
        bad &= ~empty
        like = new[:, _agreement(signature[new[0]], signature[new[1]]) >= threshold]
        for later, earlier in like.T:  # in the order of `later`
            bad[later] |= not bad[earlier] and not empty[later]
        good = np.flatnonzero(~bad & ~empty)
        while used + len(good) > len(kept):
            kept = np.concatenate([kept, np.zeros_like(kept)])
        kept[used : used + len(good)] = signature[good]
        table.add(keys[good].ravel(), np.repeat(np.arange(used, used + len(good)), count))
        used += len(good)
        return bad

    return check


def _agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the estimated Jaccard index of pairs of signatures, float64 [n]."""
    return (a == b).mean(axis=1)


def _contaminated(texts: list[str], targets: dict[int, np.ndarray]) -> np.ndarray:
    """Returns which texts hold an n-gram of `targets`: its length -> hashes, uint64 [n] ascending."""
    found, bad = shingles.units(texts), np.zeros(len(texts), bool)
    for n, known in targets.items():
        hashes, whole = shingles.grams(found, n)
        low = np.searchsorted(known, hashes)
        bad[found.owner[whole & (known[np.minimum(low, len(known) - 1)] == hashes)]] = True
    return bad


def _targets(paths: Sequence[str], columns: list[str] | None, ngram: int, shortest: int) -> dict[int, np.ndarray]:
    """Returns what `_contaminated` looks for: the n-grams of long texts, and short texts as a whole."""
    parts: dict[int, list[np.ndarray]] = {}
    for path in paths:
        before = sum(map(len, parts.values()))
        texts = [text for record in _records(path, columns) for text in {"\n".join(record), *record}]
        for start in range(0, len(texts), _DOCUMENTS):
            chunk = texts[start : start + _DOCUMENTS]
            found = shingles.units(chunk)
            lengths = np.minimum(np.bincount(found.owner, minlength=len(chunk)), ngram)
            for n in np.unique(lengths[lengths >= shortest]).tolist():
                hashes, whole = shingles.grams(found, n)
                parts.setdefault(n, []).append(hashes[whole & (lengths[found.owner] == n)])
        if sum(map(len, parts.values())) == before:
            raise UserError(
                f"config.sources: clean.against={path!r}: no text of {shortest} words in it; "
                "check the file and clean.columns, or lower clean.shortest"
            )
    return {n: np.unique(np.concatenate(arrays)) for n, arrays in sorted(parts.items())}


def _records(path: str, columns: list[str] | None) -> Iterator[list[str]]:
    """Yields the strings of each record of an evaluation file."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet  # noqa: PLC0415  (only those who use it pay for the import)

            rows: Iterator[Any] = (
                row for b in pyarrow.parquet.ParquetFile(path).iter_batches() for row in b.to_pylist()
            )
            yield from (_strings(_chosen(row, columns, path)) for row in rows)
        elif path.endswith((".txt", ".jsonl", ".jsonl.gz")):
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as stream:
                for number, line in enumerate(jsonl.lines(stream, path), 1):
                    if line.strip():
                        place = f"{path}:{number}"
                        yield (
                            [line] if path.endswith(".txt") else _strings(_chosen(_parsed(line, place), columns, place))
                        )
        else:
            raise UserError(f"config.sources: clean.against={path!r}: expected .txt, .jsonl, .jsonl.gz or .parquet")
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need pyarrow: pip install 'jaxcl[hf]'") from error
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); replace the file or leave it out of clean.against"
        ) from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); repair the line") from error


def _chosen(record: Any, columns: list[str] | None, place: str) -> Any:
    """Returns the chosen columns of a record, or all of it."""
    if columns is None:
        return record
    for column in columns:
        if not isinstance(record, dict) or column not in record:
            known = nearest(column, list(record)) if isinstance(record, dict) else "; the record is no object"
            raise UserError(f"{place}: clean.columns: no column {column!r}{known}")
    return [record[column] for column in columns]


def _strings(value: Any) -> list[str]:
    """Returns all strings in a nested value, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
