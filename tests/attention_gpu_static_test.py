"""The Hopper kernels: the same bits twice, and machine code of the narrow and the wide heads."""

import functools
import os
import re
import subprocess
import sys

import attention_gpu_test as base
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcl.kernels.attention import gpu, gpu_backward


@base.interpreted
def test_two_runs_of_the_backward_pass_give_the_same_bits():
    q, k, v, d_mixed, d_lse = base.draw(64, 128, 2, 1, jnp.bfloat16)
    run = {"causal": True, "scale": 0.125, "interpret": plgpu.InterpretGPUParams()}
    segments = jnp.asarray(np.repeat([[1, 2]], [50, 78], axis=1), jnp.int32)
    mixed, lse = jax.jit(functools.partial(gpu.forward, **run))(q, k, v, segments, None)
    backward = jax.jit(functools.partial(gpu_backward.backward, **run))
    first, second = (backward(q, k, v, segments, None, None, mixed, lse, d_mixed, d_lse) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.any(np.asarray(a, np.float32))
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@base.compiled
@pytest.mark.parametrize("width", [64, 256])
def test_machine_code_of_the_other_widths_has_no_spills_and_no_atomics(width, tmp_path):
    """As the neighbour in attention_gpu_test, which compiles heads of 128."""
    worker = base.ROOT / "tests" / "workers" / "gpu_machine_code.py"
    path = {"PYTHONPATH": f"{base.ROOT}:{base.ROOT / 'tests'}"}
    argv = [sys.executable, worker, tmp_path, str(width)]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=base.ROOT, env=os.environ | path, check=False)
    assert not run.returncode, run.stderr[-2000:]
    reports = [p.read_text() for p in tmp_path.glob("*.ptxas")]
    listings = [p.read_text() for p in tmp_path.glob("*.sass*")]
    assert len(reports) == len(listings) == 3
    assert all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)
    for listing in listings:
        assert "HGMMA" in listing
        assert not re.search(r"\b(RED|ATOM|ATOMG)\.|\bHMMA\b", listing)


def test_keys_without_gradient_are_visited_by_nobody():
    """512 tokens, of which the first 256 and the last 128 are frozen: neither their tiles nor their queries count."""
    place = np.arange(512)[None]
    live = jnp.asarray((place >= 256) & (place < 384))
    first, last = gpu.reachable(1, 512, None, None, True)
    last = jnp.where(live, last, 0)
    begin, end = np.asarray(gpu_backward._visitors(first, last, live, 128))[0]
    assert (end - begin).tolist() == [0, 0, 2, 0]
    assert (begin[2], end[2]) == (4, 6)
