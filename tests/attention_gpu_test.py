"""The Hopper kernels: tables against brute force, lowering, and numerics and machine code where the tools exist."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxcl.kernels.attention import gpu, gpu_backward, reference

ROOT = Path(__file__).parent.parent
interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="no Mosaic GPU interpreter in this JAX: numerics not checked"
)
compiled = pytest.mark.skipif(
    not all(importlib.util.find_spec(x) for x in ("jax_cuda13_plugin", "nvidia")),
    reason="no CUDA plugin and compiler: machine code not checked",
)


def packings(rows, length, seed=0):
    """Random documents one after the other, some rows with padding at the end, and random frozen documents."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        edges = np.sort(rng.choice(length, size=rng.integers(1, 9), replace=False))
        row[:] = 1 + np.searchsorted(edges, np.arange(length), side="right")
        if rng.random() < 0.5:
            row[rng.integers(1, length) :] = 0
    frozen = rng.random((rows, 10))[np.arange(rows)[:, None], segments] < 0.4
    return segments, frozen | (rng.random((rows, length)) < 0.01)


def seen(segments, causal, window):
    length = segments.shape[1]
    place = {"positions": None, "kv_positions": None, "kv_segments": None}
    return np.asarray(reference.visible(length, length, segments=segments, causal=causal, window=window, **place))


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 40), (False, 100), (True, 0)])
def test_tables_follow_brute_force(causal, window):
    """200 packings: the tiles visited are those from the first to the last that hold a pair; inner tiles hold all."""
    segments, frozen = packings(200, 512)
    mask = seen(jnp.asarray(segments), causal, window)
    window = None if window is None else jnp.int32(window)
    first, last = map(np.asarray, gpu.reachable(200, 512, jnp.asarray(segments), window, causal))
    key = np.arange(512)
    np.testing.assert_array_equal((key >= first[..., None]) & (key < last[..., None]), mask)

    def tiles(pairs, queries, keys):
        return pairs.reshape(200, 512 // queries, queries, 512 // keys, keys)

    for queries, keys in ((128, 128), (64, 64)):
        visited, inner = map(np.asarray, gpu.spans(jnp.asarray(first), jnp.asarray(last), queries, keys))
        check(visited, tiles(mask, queries, keys).any((2, 4)))
        missing = tiles(~mask & mask.any(2, keepdims=True), queries, keys).any((2, 4))  # blind queries do not count
        assert not (inside(inner, missing) & inside(visited, missing) & missing).any()
    last = np.where(frozen, 0, last)
    pairs = mask & ~frozen[:, :, None]
    bounds = jnp.asarray(first), jnp.asarray(last)
    for keys in (64, 128):
        visited = np.asarray(gpu_backward._visitors(*bounds, jnp.asarray(~frozen), keys))
        needed = tiles(pairs & ~frozen[:, None, :], 64, keys).any((2, 4)).swapaxes(1, 2)
        member = inside(visited, needed)
        assert not (needed & ~member).any()
        assert member.sum() <= needed.sum() * 1.3  # frozen documents between unfrozen ones are passed over, not more
    inner = np.asarray(gpu_backward._all_seeing(*bounds))
    missing = tiles(~mask & pairs.any(2, keepdims=True), 64, 64).any((2, 4)).swapaxes(1, 2)
    assert not (inside(inner, missing) & missing).any()
    assert inside(inner, missing).any() or window is not None


def inside(intervals, like):
    """Intervals [B, 2, n] of m tiles as bool [B, n, m]."""
    place = np.arange(like.shape[2])
    return (place >= intervals[:, 0, :, None]) & (place < intervals[:, 1, :, None])


def check(intervals, member):
    some = member.any(2)
    np.testing.assert_array_equal(intervals[:, 0][some], member.argmax(2)[some])
    np.testing.assert_array_equal(intervals[:, 1][some], member.shape[2] - member[..., ::-1].argmax(2)[some])
    assert (intervals[:, 0] == intervals[:, 1])[~some].all()


def draw(width, length, heads, groups, dtype):
    rng = np.random.default_rng(0)
    shapes = [(1, length, n, width) for n in (heads, groups, groups, heads)] + [(1, heads, length)]
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    return *arrays[:4], arrays[4].astype(jnp.float32)


def oracle(q, k, v, mask, frozen, scale, soft_cap):
    """Float32, with the whole score matrix."""
    if frozen is not None:
        q, k, v = (jnp.where(frozen[:, :, None, None], jax.lax.stop_gradient(x), x) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("blhk,bshk->bhls", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    mask = mask[:, None]
    scores = jnp.where(mask, scores, -1e30)
    mixed = jnp.einsum("bhls,bshk->blhk", jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0), v)
    lse = jax.nn.logsumexp(scores, axis=-1)
    lse = jnp.where(mask.any(-1), lse, -1e30)
    if frozen is not None:
        mixed = jnp.where(frozen[:, :, None, None], jax.lax.stop_gradient(mixed), mixed)
        lse = jnp.where(frozen[:, None, :], jax.lax.stop_gradient(lse), lse)
    return mixed, lse


CASES = {
    "packed": {"width": 64, "length": 200, "packed": True},
    "both ways, window, cap": {"width": 128, "length": 128, "causal": False, "window": 50, "soft_cap": 2.0},
    "frozen": {"width": 256, "length": 128, "packed": True, "frozen": True, "heads": 1},
    "float16": {"width": 64, "length": 256, "dtype": jnp.float16, "heads": 1},
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_definition(case):
    values, gradients = agree(**CASES[case])
    for name, (got, want) in values.items():
        np.testing.assert_allclose(got, want, atol=2e-2, err_msg=name)
    for name, (got, want) in gradients.items():
        assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max(), name
        assert want.any()


def agree(
    width, length, packed=False, causal=True, window=None, soft_cap=None, frozen=False, heads=2, dtype=jnp.bfloat16
):
    q, k, v, d_mixed, d_lse = draw(width, length, heads, 1, dtype)
    segments = stopped = None
    if packed:
        place = np.arange(length)[None]
        segments = jnp.asarray(np.where(place < length - 9, 1 + (place >= 30) + (place >= 70), 0), jnp.int32)
    if frozen:
        stopped = jnp.zeros((1, length), bool).at[:, 30:70].set(True).at[:, 3].set(True)
    window = None if window is None else jnp.int32(window)
    options = {"causal": causal, "scale": 1 / math.sqrt(width), "soft_cap": soft_cap}
    run = options | {"interpret": plgpu.InterpretGPUParams()}
    mixed, lse = jax.jit(functools.partial(gpu.forward, **run))(q, k, v, segments, window)
    mask = jnp.asarray(seen(jnp.ones((1, length), jnp.int32) if segments is None else segments, causal, window))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want, pull = jax.vjp(lambda *x: oracle(*x, mask, stopped, options["scale"], soft_cap), *wide)
    backward = jax.jit(functools.partial(gpu_backward.backward, **run))
    got = backward(q, k, v, segments, window, stopped, mixed, lse, d_mixed, d_lse)
    silent = want[1] < -1e29  # the constant that stands for no logsumexp has no derivative
    gradients = pull((d_mixed.astype(jnp.float32), jnp.where(silent, 0.0, d_lse)))

    def pairs(names, got, want):
        narrow = [np.asarray(x, np.float32) for x in (*got, *want)]
        return {n: (narrow[i], narrow[i + len(names)]) for i, n in enumerate(names)}

    return pairs(("mixed", "lse"), (mixed, lse), want), pairs(("d_q", "d_k", "d_v"), got, gradients)


def programs(width, length, segments, heads=4, groups=2):
    """Both passes as one function of shapes, for lowering and compiling."""
    options = {"causal": True, "scale": 1 / math.sqrt(width)}

    def both(q, k, v, d_mixed, segments):
        mixed, lse = gpu.forward(q, k, v, segments, None, **options)
        return gpu_backward.backward(q, k, v, segments, None, None, mixed, lse, d_mixed, None, **options)

    shapes = [jax.ShapeDtypeStruct((2, length, n, width), jnp.bfloat16) for n in (heads, groups, groups, heads)]
    return both, (*shapes, jax.ShapeDtypeStruct((2, length), jnp.int32) if segments else None)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("segments", [True, False], ids=["packed", "whole"])
def test_kernels_lower_for_cuda_without_a_device(width, segments):
    both, shapes = programs(width, 8192, segments)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(\w+)", text)
    assert sum(x.startswith("mosaic_gpu") for x in calls) == 3
    assert "8192x8192" not in text  # neither a mask nor scores


@compiled
def test_machine_code_uses_tensor_cores_without_spills_or_atomics(tmp_path):
    """Compiles both passes for sm_90a in a process of its own, without a GPU."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "workers" / "gpu_machine_code.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=False,
    )
    assert not run.returncode, run.stderr[-2000:]
    reports = [p.read_text() for p in tmp_path.glob("*.ptxas")]
    listings = [p.read_text() for p in tmp_path.glob("*.sass*")]
    assert len(reports) == len(listings) == 3
    for report in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in report
    for listing in listings:
        assert "HGMMA" in listing
        assert "UTMALDG" in listing
        assert not re.search(r"\b(RED|ATOM|ATOMG)\.|\bHMMA\b", listing)


def test_what_the_kernels_do_not_take_is_refused():
    q, k, v, *_ = draw(64, 8, 4, 2, jnp.bfloat16)
    options = {"segments": None, "window": None, "causal": True, "scale": 1.0}
    with pytest.raises(ValueError, match=r"bfloat16 or float16 in all of q, k, v, not float32"):
        gpu.forward(q.astype(jnp.float32), k, v, **options)
    with pytest.raises(ValueError, match="heads of 64, 128, 256, not of 32"):
        gpu.forward(q[..., :32], k[..., :32], v[..., :32], **options)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        gpu.forward(q[:, :, :3], k, v, **options)
    with pytest.raises(ValueError, match="scale above 0, not -1"):
        gpu.forward(q, k, v, **options | {"scale": -1.0})
