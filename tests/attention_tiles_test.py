"""Tile tables of packed attention against the dense mask."""

import functools

import jax
import numpy as np
import pytest

from jaxcl.kernels.attention import reference, tiles

ROWS = 25


def packings(rng, length, rows=ROWS):
    """Random rows of documents with ids in any order, padding at the end or between them, each id in one piece."""
    made = np.zeros((rows, length), np.int32)
    for row in made:
        mean, place = rng.choice([3, 10, 40, 200]), 0
        for name in rng.permutation(np.arange(1, length + 1)) if rng.random() < 0.5 else np.arange(1, length + 1):
            size = int(rng.integers(1, 2 * mean))
            row[place : place + size] = name
            place += size + (int(rng.integers(0, mean)) if rng.random() < 0.2 else 0)
            if place >= length - (rng.integers(0, length // 2) if rng.random() < 0.3 else 0):
                break
    return made


def freeze(rng, segments):
    """Whole documents, single tokens and prefixes."""
    some = rng.random((len(segments), segments.max() + 1)) < 0.5
    frozen = np.take_along_axis(some, segments, axis=1)
    frozen[::3] &= rng.random(frozen[::3].shape) < 0.8
    frozen[1::3] |= np.arange(frozen.shape[1]) < rng.integers(0, frozen.shape[1], (len(frozen[1::3]), 1))
    return frozen


def dense(segments, window, causal):
    length = segments.shape[1]
    places = {"kv_segments": None, "positions": None, "kv_positions": None}
    return np.asarray(reference.visible(length, length, segments=segments, causal=causal, window=window, **places))


def split(mask, block_q, block_kv, value):
    rows, length, _ = mask.shape
    q, kv = -(-length // block_q), -(-length // block_kv)
    wide = np.full((rows, q * block_q, kv * block_kv), value)
    wide[:, :length, :length] = mask
    return wide.reshape(rows, q, block_q, kv, block_kv)


def check(got, visited, full):
    """Lists equal the tables, bool [B, n, m], and later slots repeat the last tile, also that of an earlier list."""
    index, kind, count = (np.asarray(x) for x in got)
    np.testing.assert_array_equal(count, visited.sum(2))
    used = np.arange(index.shape[2]) < count[:, :, None]
    order = np.argsort(~visited, axis=2, kind="stable")
    np.testing.assert_array_equal(index[used], order[used])
    kinds = np.where(full, tiles.FULL, tiles.BOUNDARY)
    np.testing.assert_array_equal(kind, np.where(used, np.take_along_axis(kinds, order, axis=2), tiles.SKIP))
    for row, mine in zip(index.reshape(len(index), -1), used.reshape(len(index), -1), strict=True):
        last = np.maximum.accumulate(np.where(mine, np.arange(len(row)), -1))
        np.testing.assert_array_equal(row, np.where(last < 0, 0, row[last]))


@functools.partial(jax.jit, static_argnames=("causal", "block_q", "block_kv"))
def everything(segments, window, frozen, **static):
    forward = tiles.forward(segments, window, **static)
    return (
        forward,
        tiles.d_queries(segments, window, frozen, **static),
        tiles.d_keys(segments, window, frozen, **static),
    )


@pytest.mark.parametrize(
    ("length", "block_q", "block_kv", "causal", "window", "gated"),
    [
        (256, 16, 16, True, None, False),
        (256, 32, 16, True, None, True),
        (250, 7, 5, True, 20, True),
        (250, 48, 16, True, 1, True),
        (256, 16, 16, False, None, True),
        (130, 16, 48, False, 20, True),
        (256, 32, 32, True, 0, True),
        (40, 64, 16, True, 100, True),
    ],
)
def test_tables_are_the_tiles_of_the_dense_mask_that_hold_something(length, block_q, block_kv, causal, window, gated):
    rng = np.random.default_rng(length + block_q)
    segments = packings(rng, length)
    frozen = freeze(rng, segments) if gated else None
    window = None if window is None else np.int32(window)
    got = everything(segments, window, frozen, causal=causal, block_q=block_q, block_kv=block_kv)
    mask = dense(segments, window, causal)
    live = np.ones_like(segments, bool) if frozen is None else ~frozen
    full = split(mask, block_q, block_kv, False).all((2, 4))
    wanted = (mask, mask & live[:, :, None], mask & live[:, :, None] & live[:, None, :])
    forward, d_queries, d_keys = (split(m, block_q, block_kv, False).any((2, 4)) for m in wanted)
    assert 0 < forward.mean() < 1 or length < block_q
    check(got[0], forward, full)
    check(got[1], d_queries, full)
    check(got[2], d_keys.swapaxes(1, 2), full.swapaxes(1, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_in_pieces_is_never_missed(causal):
    rng = np.random.default_rng(0)
    segments = np.repeat(rng.integers(0, 4, (20, 16)), 8, axis=1).astype(np.int32)
    segments[:3] = packings(rng, 128, 3)
    frozen = freeze(rng, segments)
    static = {"causal": causal, "block_q": 16, "block_kv": 16}
    mask = dense(segments, None, causal)
    exact = split(mask & ~frozen[:, :, None], 16, 16, False).any((2, 4))
    full = split(mask, 16, 16, False).all((2, 4))
    index, kind, _ = (np.asarray(x) for x in everything(segments, None, frozen, **static)[1])
    table = np.zeros(exact.shape, int)
    np.maximum.at(table, (*np.ogrid[:20, :8, :1][:2], index), kind)
    assert not (exact & (table == tiles.SKIP)).any()
    np.testing.assert_array_equal((table == tiles.FULL)[exact], full[exact])
    np.testing.assert_array_equal((table > 0)[:3], exact[:3])


@pytest.mark.parametrize("causal", [True, False])
def test_no_array_of_scores_is_made(causal):
    """One byte per token and tile, folded into the reduction, at the most."""
    length, block = 4096, 256
    segments = jax.ShapeDtypeStruct((1, length), np.int32)
    frozen = jax.ShapeDtypeStruct((1, length), bool)
    window = jax.ShapeDtypeStruct((), np.int32)
    compiled = everything.lower(segments, window, frozen, causal=causal, block_q=block, block_kv=block).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length // block * 8
