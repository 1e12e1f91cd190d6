"""Word n-grams of many documents at once, as 64-bit hashes; MinHash signatures; a table of hashes.

A *unit* is a run of letters, digits and marks after NFKC and case folding; everything else separates units. Scripts
that put no spaces between words (Chinese, Japanese kana, Thai, Lao, Khmer, Burmese) have one unit per character, so
that a 5-gram is five words of French and five characters of Japanese, also within one text.

Hashes are polynomials modulo 2^64 over mixed code points, finished by the mixer of SplitMix64 (Steele et al. 2014):
NumPy throughout, the same in every process.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BASE, _STEP = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, of characters in a unit and of units in an n-gram
_SPACELESS = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF))
_SPACELESS += ((0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
PERMUTATIONS = 128  # of a signature: the estimated Jaccard index has a standard deviation of at most 0.044
_RECALL = 0.99  # of pairs at the threshold that must become candidates


class Units(NamedTuple):
    """The units of D documents in a row."""

    hashes: np.ndarray  # uint64 [N]
    owner: np.ndarray  # int64 [N], ascending: document of each unit


def mix(x: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's finaliser of uint64 numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _alphabet() -> tuple[np.ndarray, np.ndarray]:
    """Returns for every code point its kind (0 separator, 1 part of a unit, 2 a unit alone) and its hash."""
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(0x20000):
        letter = chr(code)
        kinds[code] = letter.isalnum() or unicodedata.category(letter)[0] == "M"
    for first, last in _SPACELESS:
        kinds[first : last + 1] *= 2
    kinds[0x20000:0x40000] = 2
    return kinds, mix(np.arange(1, 0x110001, dtype=np.uint64) * np.uint64(_BASE))


def units(texts: Sequence[str]) -> Units:
    """Returns the units of documents."""
    kinds, values = _alphabet()
    folded = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
    ends = np.cumsum([len(text) + 1 for text in folded])
    codes = np.frombuffer("".join(f"{t}\n" for t in folded).encode("utf-32-le", "surrogatepass"), "<u4")
    kind = kinds[codes]
    part = kind == 1
    first = np.flatnonzero((kind == 2) | (part & ~np.r_[False, part[:-1]]))
    after = np.flatnonzero((kind == 2) | (part & ~np.r_[part[1:], False])) + 1
    power = np.multiply.accumulate(np.full(len(codes), _BASE, np.uint64))
    inverse = np.multiply.accumulate(np.full(len(codes), pow(_BASE, -1, 2**64), np.uint64))
    total = np.r_[np.zeros(1, np.uint64), np.cumsum(values[codes] * power)]
    return Units(mix((total[after] - total[first]) * inverse[first]), np.searchsorted(ends, first, side="right"))


def grams(found: Units, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the n-gram that begins at each unit, uint64 [N], and whether its document has that many left, bool [N].

    Where the document ends earlier, the n-gram is the shorter one of what is left.
    """
    total, size = np.zeros(len(found.hashes), np.uint64), len(found.hashes)
    whole = np.zeros(size, bool)
    for k in range(min(n, size)):
        same = found.owner[k:] == found.owner[: size - k]
        total[: size - k] += found.hashes[k:] * np.uint64(pow(_STEP, k, 2**64)) * same
        if k == n - 1:
            whole[: size - k] = same
    return mix(total), whole


def signatures(found: Units, documents: int, n: int) -> np.ndarray:
    """Returns the MinHash signatures of the sets of n-grams, uint32 [D, PERMUTATIONS].

    A document shorter than n has one n-gram, itself; one without units has a signature of 2^32 - 1.
    """
    result = np.full((documents, PERMUTATIONS), 2**32 - 1, np.uint32)
    if not len(found.hashes):
        return result
    hashes, whole = grams(found, n)
    kept = whole | np.r_[True, found.owner[1:] != found.owner[:-1]]
    hashes, owner = (hashes[kept] >> np.uint64(32)).astype(np.uint32), found.owner[kept]
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    salts = mix(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64)).astype(np.uint32)
    work = np.empty_like(hashes)
    for p in range(PERMUTATIONS):  # h -> (h xor a) * b with b odd is a permutation of the 32-bit numbers
        np.bitwise_xor(hashes, salts[2 * p], out=work)
        np.multiply(work, salts[2 * p + 1] | np.uint32(1), out=work)
        result[owner[starts], p] = np.minimum.reduceat(work, starts)
    return result


def band_size(threshold: float) -> int:
    """Returns the numbers in a band: the most with which a pair at the threshold becomes a candidate nearly always.

    A pair of Jaccard index s agrees in one of b bands of r with probability 1 - (1 - s^r)^b (Leskovec et al., Mining
    of Massive Datasets, section 3.4). The larger r is, the fewer other pairs must be compared.
    """
    sizes = range(1, PERMUTATIONS + 1)
    good = [r for r in sizes if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _RECALL]
    return max(good, default=1)


def bands(signature: np.ndarray, size: int) -> np.ndarray:
    """Returns the hashes of the bands of signatures, uint64 [D, PERMUTATIONS // size]; different bands never agree."""
    count = PERMUTATIONS // size
    parts = signature[:, : count * size].reshape(len(signature), count, size).astype(np.uint64)
    total = np.arange(count, dtype=np.uint64) * np.uint64(_BASE) + np.zeros((len(signature), 1), np.uint64)
    for k in range(size):
        total = mix(total + parts[:, :, k])
    return total


class Table:
    """A growing map from 64-bit hashes to numbers, 16 bytes an entry; one hash may have several numbers.

    Sorted runs, of which each is at least twice as long as the next: they are merged as they grow.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []  # hashes uint64 [n] ascending, numbers int64 [n]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns all (place in keys, number) of the entries that equal one of the keys, int64 [n] each."""
        places, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for known, values in self.runs:
            low = np.searchsorted(known, keys)
            hit = np.flatnonzero(known[np.minimum(low, len(known) - 1)] == keys)
            low, count = low[hit], np.searchsorted(known, keys[hit], side="right") - low[hit]
            places.append(np.repeat(hit, count))
            inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            numbers.append(values[np.repeat(low, count) + inside])
        return np.concatenate(places), np.concatenate(numbers)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Adds entries."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        self.runs.append((keys[order], numbers[order]))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            (a, x), (b, y) = self.runs.pop(-2), self.runs.pop()
            joined = np.concatenate([a, b])
            order = np.argsort(joined, kind="stable")
            self.runs.append((joined[order], np.concatenate([x, y])[order]))
