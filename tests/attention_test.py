"""Attention against a float64 NumPy transcription, and its limiting cases."""

import functools
import sys

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
    with pytest.raises(ValueError, match="2 queries and 7 keys"):
        reference.attention(q, k, v, frozen=SEGMENTS[:, :2] > 1, causal=False)


def packed(length, rows=2):
    """Segments of documents that begin and end inside blocks, across them and at their edges, then padding."""
    edges = [[0, 30, 64, 70, 200, length - 9], [0, 1, 128, 129, 192, length]]
    place = np.arange(length)
    segments = np.stack([(place[:, None] >= np.array(e)[None]).sum(1) for e in edges])
    return np.where(segments == 6, 0, segments).astype(np.int32)[:rows]


def dense(q, k, v, d_mixed, d_lse, *, seen, scale, soft_cap=None, bias=None, frozen=None):
    """float64: one head at a time with the whole matrix of scores; seen is bool [B, L, S].

    Returns mixed, lse and the cotangents of q, k, v and the bias, of which the last is [B, H, L, S].
    """
    q, k, v, d_mixed, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_mixed, d_lse))
    frozen = np.zeros(q.shape[:2], bool) if frozen is None else frozen
    (rows, length, heads, _), share = q.shape, q.shape[2] // k.shape[2]
    full = (rows, heads, length, length)
    bias = np.zeros(full) if bias is None else np.broadcast_to(np.asarray(bias, np.float64), full)
    mixed, lse = np.zeros(q.shape), np.full(full[:3], -1e30)
    d_q, d_k, d_v, d_bias = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(full)
    for b, h in np.ndindex(rows, heads):
        g = h // share
        s = scale * q[b, :, h] @ k[b, :, g].T
        slope = np.ones_like(s)
        if soft_cap is not None:
            slope = 1 - np.tanh(s / soft_cap) ** 2
            s = soft_cap * np.tanh(s / soft_cap)
        e = np.where(seen[b], np.exp(s + bias[b, h]), 0.0)
        total = e.sum(1)
        some = total > 0
        p = e / np.where(some, total, 1)[:, None]
        lse[b, h, some] = np.log(total[some])
        mixed[b, :, h] = p @ v[b, :, g]
        d_o = np.where(frozen[b, :, None], 0.0, d_mixed[b, :, h])
        d_l = np.where(frozen[b] | ~some, 0.0, d_lse[b, h])
        d_p = d_o @ v[b, :, g].T
        d_s = p * (d_p - (p * d_p).sum(1, keepdims=True) + d_l[:, None])
        d_bias[b, h] = d_s
        d_q[b, :, h] = scale * (d_s * slope) @ k[b, :, g]
        d_k[b, :, g] += scale * (d_s * slope).T @ q[b, :, h]
        d_v[b, :, g] += p.T @ d_o
    for d in (d_q, d_k, d_v):
        d[frozen] = 0.0
    return mixed, lse, d_q, d_k, d_v, d_bias


def sight(length, segments=None, causal=True, window=None):
    """Which key every query may see, bool [B or 1, L, L], by the definition."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    seen = ((j <= i) | (not causal)) & (window is None or window <= 0 or i - j < window)
    own = np.ones((2, length), int) if segments is None else segments
    return seen[None] & (own[:, :, None] == own[:, None, :]) & (own[:, :, None] > 0)


MIXED = np.tile(np.array([2, 1, 3, 1, 0], np.int32).repeat([40, 60, 70, 80, 50]), (2, 1))  # a document that comes back
FROZEN = np.stack([np.arange(300) < 170, np.arange(300) % 7 == 0])  # whole tiles of queries, and none
BIASES = [(2, 4, 300, 300), (1, 4, 1, 300), (2, 1, 300, 1), (1, 1, 300, 300)]
CASES = {
    "packed": {"segments": packed(300)},
    "whole": {},
    "ragged": {"length": 129},
    "short": {"length": 17, "groups": 1},
    "long": {"length": 530, "rows": 1, "heads": 2, "groups": 1},
    "both ways": {"segments": packed(300), "causal": False, "groups": 4},
    "both ways whole": {"length": 100, "causal": False},
    "packed window": {"segments": packed(300), "window": 40},
    "window": {"window": 150},
    "no window": {"window": 0},
    "segments in any order": {"segments": MIXED},
    "capped": {"segments": packed(300), "soft_cap": 0.7},
    "frozen": {"segments": packed(300), "frozen": FROZEN},
    "frozen whole, wide": {"frozen": FROZEN, "soft_cap": 2.0, "window": 90, "width": 64},
    **{f"bias {shape}": {"segments": packed(300), "bias": shape, "soft_cap": 3.0} for shape in BIASES},
    "frozen with a bias": {"frozen": FROZEN, "bias": BIASES[1], "causal": False},
    "bfloat16": {"segments": packed(300), "dtype": jnp.bfloat16, "width": 64, "soft_cap": 5.0},
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_follow_the_definition(case):
    options = {"length": 300, "rows": 2, "heads": 4, "groups": 2, "width": 4} | CASES[case]
    length, dtype = options.pop("length"), options.pop("dtype", jnp.float32)
    q, k, v = draw(length=length, slots=length, **{n: options.pop(n) for n in ("rows", "heads", "groups", "width")})
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    rng = np.random.default_rng(1)
    d_mixed = jnp.asarray(rng.normal(size=q.shape), dtype)
    d_lse = jnp.asarray(rng.normal(size=(q.shape[0], q.shape[2], length)), jnp.float32)
    bias = None if "bias" not in options else jnp.asarray(rng.normal(size=options.pop("bias")), jnp.float32)
    # The window of a layer is traced, as the layers are one loop.
    window = options.pop("window", None)

    def both(function, window, q, k, v, bias):
        run = functools.partial(function, **options, window=window, return_lse=True, scale=0.3)
        (mixed, lse), pull = jax.vjp(lambda q, k, v, bias: run(q, k, v, bias=bias), q, k, v, bias)
        return mixed, lse, *pull((mixed * 0 + d_mixed, d_lse))

    given = None if window is None else np.int32(window)
    got, plain = (
        toys.quick(functools.partial(both, f))(given, q, k, v, bias) for f in (attention, reference.attention)
    )
    causal, segments = options.get("causal", True), options.get("segments")
    rest = {"soft_cap": options.get("soft_cap"), "frozen": options.get("frozen"), "bias": bias, "scale": 0.3}
    *want, d_bias = dense(q, k, v, d_mixed, d_lse, seen=sight(length, segments, causal, window), **rest)
    if bias is not None:
        axes = tuple(a for a in range(4) if bias.shape[a] == 1)
        want.append(d_bias.sum(axes, keepdims=True))
    limit = 1e-5 if dtype == jnp.float32 else 2e-2
    for found in (got, plain):
        names = ("mixed", "lse", "d_q", "d_k", "d_v", "d_bias")
        for name, x, y in zip(names, found, want, strict=False):
            assert x.dtype == (jnp.float32 if name in ("lse", "d_bias") else dtype)
            blind = y < -1e29
            np.testing.assert_array_equal(np.asarray(x, np.float64) < -1e29, blind)
            error = np.where(blind, 0, np.asarray(x, np.float64) - y)
            assert np.abs(error).max() <= limit * np.abs(np.where(blind, 0, y)).max(), name
    if segments is not None:
        for x in (got[0], *got[2:5]):
            assert not np.any(np.asarray(x, np.float32)[segments == 0])


def test_the_logsumexp_can_go_unused_and_stays_finite():
    q, k, v = draw()
    segments = np.zeros((2, 7), np.int32)
    mixed, lse = attention(q, k, v, segments=segments, return_lse=True)
    assert not np.any(mixed)
    np.testing.assert_array_equal(lse, np.float32(-1e30))
    assert lse.dtype == np.float32
    grads = jax.grad(lambda *x: jnp.sum(attention(*x, segments=segments)), argnums=(0, 1, 2))(q, k, v)
    assert not any(np.any(g) for g in grads)


def tiles(how):
    """The tiles that a loop visits, in its order."""
    slots = jnp.zeros((how.tiles[0] * how.tiles[1], 2), jnp.int32)

    def note(i, j, carry):
        n, slots = carry
        return n + 1, slots.at[n].set(jnp.stack([i, j]))

    count, slots = cpu._over_tiles(how, note, (0, slots))
    return [tuple(x) for x in np.asarray(slots)[:count].tolist()]


@pytest.mark.parametrize("window", [None, 0, 1, 9, 30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_tiles_of_packed_rows_that_hold_a_pair_are_visited(seed, causal, window):
    rng = np.random.default_rng(seed)
    length, block = 96, 8
    segments = np.sort(rng.integers(1, 9, (2, length))).astype(np.int32)
    segments[:, -rng.integers(1, 40) :] = 0
    frozen = rng.integers(0, 2, (2, length // block)).repeat(block, 1).astype(bool)
    for awake in (segments, np.where(frozen, 0, segments).astype(np.int32)):
        at = None if window is None else jnp.int32(window)
        whole = (length // block, length // block)
        how = cpu._Scores(block, whole, jnp.asarray(awake), jnp.asarray(segments), at, causal, None, None)
        seen = sight(length, segments, causal, window) & (awake > 0)[:, :, None]
        held = seen.any(0).reshape(length // block, block, length // block, block).any((1, 3))
        want = {(i, j) for i, j in np.ndindex(held.shape) if held[i, j]}
        got = tiles(how)
        assert got == sorted(got, key=lambda t: t[::-1])
        assert want <= set(got)
        if not window or window >= block:  # a narrow window may end between two documents of a tile
            assert len(got) <= len(want) + (0 if not window else len(want) // 2)
        if seed == 0:  # of queries that are a part of the row: those tiles
            part = how._replace(tiles=(4, length // block), queries=how.queries[:, 24:56], first=jnp.int32(24))
            assert tiles(part) == [(i - 3, j) for i, j in got if 3 <= i < 7]


def test_temporaries_grow_with_the_length_not_its_square():
    def needs(length, function, **options):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = jax.grad(lambda q, k, v: jnp.sum(function(q, k, v, **options) ** 2), argnums=(0, 1, 2))
        return jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = (needs(n, attention) for n in (1024, 4096))
    assert long < 5 * short
    assert long < needs(1024, reference.attention)
    bias = jnp.zeros((1, 1, 1, 4096))
    assert needs(4096, attention, bias=bias) < 5 * short  # nobody asks for its cotangent


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": np.zeros((1, 1, 64, 64), np.float32)},
        {"width": 32},
        {"implementation": "kernel"},
        {"implementation": "tiles"},
    ],
    ids=["auto", "bias", "width", "kernel", "tiles"],
)
def test_a_kernel_is_chosen_by_the_platform_that_is_lowered_for(monkeypatch, options):
    traces = []

    class Kernel:
        """Has the interface of a kernel; its results are sines and cosines, to be found in the program."""

        @staticmethod
        def forward(q, k, v, segments, window, *, causal, scale, soft_cap=None):
            traces.append("forward")
            return jnp.sin(q), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

        @staticmethod
        def backward(q, k, v, segments, window, frozen, mixed, lse, d_mixed, d_lse, *, causal, scale, soft_cap=None):
            traces.append("backward")
            return d_mixed * jnp.cos(q), k, v

    module = sys.modules[attention.__module__]
    kernel = module.Kernel(Kernel.forward, Kernel.backward, ("float32",), auto=True)
    monkeypatch.setattr(module, "KERNELS", {"tpu": kernel, "cuda": kernel._replace(auto=False)})
    options = dict(options)
    x = jax.ShapeDtypeStruct((2, 64, 2, options.pop("width", 64)), jnp.float32)
    how = options.get("implementation", "auto")
    fits = x.shape[-1] == 64 and "bias" not in options and how != "tiles"
    wanted = {"auto": ["tpu"], "kernel": ["tpu", "cuda"], "tiles": []}[how]
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, segments=SEGMENTS64, **options))))
    traced = step.trace(x, x, x)
    assert sorted(traces) == sorted(["forward", "backward"] * fits * len(wanted))  # once for all platforms
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        kernel = fits and platform in wanted
        assert ("stablehlo.cosine" in text) == kernel
        assert ("stablehlo.while" in text) != kernel
        assert ("dot_general" in text) != kernel


def test_the_kernel_of_tpus_is_in_the_program():
    """And not in that of another platform; forward and both kernels of the backward pass."""
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    segments = np.ones((2, 256), np.int32)
    step = jax.jit(jax.grad(lambda q: jnp.sum(attention(q, q, q, segments=segments).astype(jnp.float32))))
    traced = step.trace(x)
    calls = {
        p: traced.lower(lowering_platforms=(p,)).as_text().count("tpu_custom_call") for p in ("tpu", "cpu", "cuda")
    }
    assert calls == {"tpu": 3, "cpu": 0, "cuda": 0}
    with pytest.raises(ValueError, match="implementation='fast': choose from auto, kernel, tiles"):
        attention(jnp.zeros((1, 4, 1, 4)), jnp.zeros((1, 4, 1, 4)), jnp.zeros((1, 4, 1, 4)), implementation="fast")


SEGMENTS64 = np.ones((2, 64), np.int32)


def test_two_runs_of_the_backward_pass_have_the_same_bits():
    q, k, v = draw()
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, segments=SEGMENTS) ** 2), (0, 1, 2)))
    for one, other in zip(step(q, k, v), step(q, k, v), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
