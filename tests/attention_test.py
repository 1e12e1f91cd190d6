"""Attention against a float64 NumPy transcription, and its limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl.kernels.attention import attention, cpu, reference


def oracle(q, k, v, *, segments, kv_segments, allowed, scale):
    """float64: one query at a time; `allowed(b, i, j)` says what causality permits."""
    rows, length, heads, _ = q.shape
    share = heads // k.shape[2]
    out = np.zeros(q.shape, np.float64)
    for b in range(rows):
        for i in range(length):
            seen = [
                j
                for j in range(k.shape[1])
                if segments[b, i] > 0 and segments[b, i] == kv_segments[b, j] and allowed(b, i, j)
            ]
            for h in range(heads if seen else 0):
                scores = scale * (k[b, seen, h // share].astype(np.float64) @ q[b, i, h].astype(np.float64))
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, seen, h // share]
    return out


def draw(*, length=7, slots=7, heads=6, groups=2, width=4, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, width), (rows, slots, groups, width), (rows, slots, groups, width)]
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [3, 1, 1, 1, 1, 0, 0]], np.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_packed_rows_follow_the_definition(causal, groups):
    q, k, v = draw(groups=groups)
    got = reference.attention(q, k, v, segments=SEGMENTS, causal=causal)
    want = oracle(
        q, k, v, segments=SEGMENTS, kv_segments=SEGMENTS, allowed=lambda b, i, j: j <= i or not causal, scale=0.5
    )
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert not np.any(np.asarray(got)[SEGMENTS == 0])


@pytest.mark.parametrize("window", [1, 3, 7, np.int32(2), 0, -1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_follows_the_definition(window, causal):
    q, k, v = draw()

    def allowed(b, i, j):
        return (j <= i or not causal) and (i - j < window or window <= 0)

    want = oracle(q, k, v, segments=SEGMENTS, kv_segments=SEGMENTS, allowed=allowed, scale=0.5)
    for function in (reference.attention, attention):
        got = function(q, k, v, segments=SEGMENTS, causal=causal, window=window)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_without_segments_the_row_is_one_document():
    q, k, v = draw()
    one = np.ones((2, 7), np.int32)
    got = reference.attention(q, k, v, scale=0.3)
    want = oracle(q, k, v, segments=one, kv_segments=one, allowed=lambda b, i, j: j <= i, scale=0.3)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.isfinite(reference.attention(q, k, v, causal=False)).all()


@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_a_cache_is_causal_by_position(window):
    q, k, v = draw(length=2, slots=9)
    kv_segments = np.array([[1, 1, 1, 0, 0, 1, 1, 0, 0], [2, 2, 0, 0, 2, 2, 2, 2, 0]], np.int32)
    kv_positions = np.array([[0, 1, 2, 0, 0, 3, 4, 0, 0], [0, 1, 0, 0, 2, 3, 4, 5, 0]], np.int32)
    segments = np.array([[1, 1], [2, 0]], np.int32)
    positions = np.array([[3, 4], [4, 0]], np.int32)
    places = {"kv_segments": kv_segments, "positions": positions, "kv_positions": kv_positions}
    got = attention(q, k, v, segments=segments, window=window, **places)
    want = oracle(
        q,
        k,
        v,
        segments=segments,
        kv_segments=kv_segments,
        scale=0.5,
        allowed=lambda b, i, j: 0 <= positions[b, i] - kv_positions[b, j] < (window or 99),
    )
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_gradients_are_finite_and_blind_to_other_documents():
    q, k, v = draw()

    def first_document(q, k, v):
        return jnp.sum(reference.attention(q, k, v, segments=jnp.asarray(SEGMENTS))[0, :3] ** 2)

    grads = jax.grad(first_document, argnums=(0, 1, 2))(q, k, v)
    for g in grads:
        assert np.isfinite(g).all()
        assert np.any(np.asarray(g)[0, :3])
        assert not np.any(np.asarray(g)[0, 3:])
        assert not np.any(np.asarray(g)[1])


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    q, k, v = draw(length=64, slots=64)
    q = q * 8
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = reference.attention(*narrow)
    want = reference.attention(*[x.astype(jnp.float32) for x in narrow])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


def test_arguments_that_do_not_fit_are_refused():
    q, k, v = draw(length=2, slots=7)
    with pytest.raises(ValueError, match="needs kv_positions"):
        reference.attention(q, k, v)
    with pytest.raises(ValueError, match="not a multiple"):
        reference.attention(q[:, :, :5], k, v, causal=False)
    with pytest.raises(ValueError, match="without segments"):
        reference.attention(q, k, v, kv_segments=SEGMENTS, causal=False)
    with pytest.raises(ValueError, match="give kv_segments"):
        reference.attention(q, k, v, segments=SEGMENTS[:, :2], causal=False)


def packed(length, rows=2):
    """Segments of documents that begin and end inside blocks, across them and at their edges, then padding."""
    edges = [[0, 30, 64, 70, 200, length - 9], [0, 1, 128, 129, 192, length]]
    place = np.arange(length)
    segments = np.stack([(place[:, None] >= np.array(e)[None]).sum(1) for e in edges])
    return np.where(segments == 6, 0, segments).astype(np.int32)[:rows]


@pytest.mark.parametrize(
    ("groups", "segments", "causal", "window"),
    [
        (2, packed(300), True, None),
        (2, None, True, None),
        (4, packed(300), False, None),
        (2, packed(300), True, 40),
        (2, None, True, 150),
    ],
    ids=["packed", "whole", "both ways", "packed window", "window"],
)
def test_blocks_and_their_gradients_follow_the_definition(groups, segments, causal, window):
    """300 tokens are three blocks forward and five backward, the last of them shorter."""
    length = 300
    assert length > 2 * cpu.FORWARD > 2 * cpu.BACKWARD
    q, k, v = draw(length=length, slots=length, heads=4, groups=groups)
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def both(function, window):
        mixed, pull = jax.vjp(lambda *x: function(*x, segments=segments, causal=causal, window=window), q, k, v)
        return mixed, *pull(weights)

    # The window of a layer is traced, as the layers are one loop.
    window = None if window is None else np.int32(window)
    got, want = (toys.quick(functools.partial(both, f))(window) for f in (attention, reference.attention))
    for name, a, b in zip(("mixed", "d_q", "d_k", "d_v"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=name)


def test_long_rows_take_longer_blocks_instead_of_more():
    for length in (64, 1000, 5000):
        blocks = cpu._blocks(length, True, cpu.BACKWARD)
        assert len(blocks) <= cpu.MOST_BLOCKS
        assert [start for start, _, _ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
        assert blocks[-1][1] == length
        assert all(seen == stop for _, stop, seen in blocks)
        assert {seen for _, _, seen in cpu._blocks(length, False, cpu.BACKWARD)} == {length}
