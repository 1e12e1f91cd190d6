"""Random-access permutations and hashes: shuffling without state and without a list of indices."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8  # each half of the index is mixed into the other four times


def key_of(*parts: object) -> int:
    """Returns 64 bits that depend on the printed form of every part, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def mix(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 [n] to uint64 [n], one to one (the finaliser of SplitMix64; Steele, Lea & Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold_in(key: np.ndarray | int, value: np.ndarray | int) -> np.ndarray:
    """Returns one key, uint64 [n], for every (key, value) pair; both broadcast."""
    keys, values = np.atleast_1d(np.asarray(key, np.uint64)), np.atleast_1d(np.asarray(value, np.uint64))
    return mix(keys + mix(values + np.uint64(0x9E3779B97F4A7C15)))


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Returns where the permutation of `range(size)` that `key` names sends `index`.

    A Feistel network over a grid of a x b >= size cells (Black & Rogaway, CT-RSA 2002, generalised Feistel): each
    round adds a hash of one coordinate to the other, which can be undone, so the map is a bijection of the grid.
    Cells outside `size`, fewer than one row of the grid, are sent on until they fall inside (cycle walking).

    Args:
      index: integers in [0, size), [n].
      size: number of elements, at least 1; one for all or one per index.
      key: 64 bits; one for all or one per index.

    Returns:
      int64 [n].
    """
    index = np.asarray(index, np.uint64)
    sizes = np.broadcast_to(np.asarray(size, np.uint64), index.shape)
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    columns = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    lines = (sizes + columns - np.uint64(1)) // np.maximum(columns, np.uint64(1))
    out = _grid(index, columns, lines, keys)
    outside = np.flatnonzero(out >= sizes)
    while outside.size:
        out[outside] = _grid(out[outside], columns[outside], lines[outside], keys[outside])
        outside = outside[out[outside] >= sizes[outside]]
    return out.astype(np.int64)


def _grid(index: np.ndarray, columns: np.ndarray, lines: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over a grid of lines x columns."""
    y, x = np.divmod(index, columns)
    for i in range(0, _ROUNDS, 2):
        x = (x + mix(y + mix(keys + np.uint64(i))) % columns) % columns
        y = (y + mix(x + mix(keys + np.uint64(i + 1))) % lines) % lines
    return y * columns + x
