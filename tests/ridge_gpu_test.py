"""The update for Hopper GPUs: its arithmetic, lowering, and the kernel and its machine code where tools exist."""

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
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ridge_kernels_test import draw, symmetric
from ridge_stream_test import apart, exact, shapes

from jaxcl.kernels import ridge
from jaxcl.kernels.ridge import hopper, reference


def test_thirds_are_all_of_a_number():
    x = draw(40, 30)
    parts = jax.jit(hopper.thirds)(x)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), x)
    text = jax.jit(hopper.thirds).lower(x).as_text()
    assert text.count("reduce_precision") == 3  # where a cast there and back is dropped, two of them would be zero


def test_six_products_of_thirds_are_one_of_float32():
    v = draw(1, 500)
    thirds = [np.asarray(part, np.float64)[0] for part in hopper.thirds(v)]
    want = np.asarray(v, np.float64)[0] ** 2

    def worst(products):
        return np.max(np.abs(sum(thirds[a] * thirds[b] for a, b in products) - want) / want)

    assert worst(hopper.PRODUCTS) < 2.0**-22
    assert all(worst([x for x in hopper.PRODUCTS if x != out]) > 2.0**-18 for out in hopper.PRODUCTS)


def lowered(function, operands):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("size", "blocks"), [(500, ["500x500"]), (2500, ["1024x1024", "452x2500"])])
def test_sums_are_lowered_to_float64_products_of_large_blocks(size, blocks):
    matrix, rows = shapes(size, 300, 60)[:2]
    for kernel in (None, True, False):
        update = functools.partial(ridge.gram_update, kernel=kernel)
        text = lowered(update, (ridge.Pair(matrix, matrix), ridge.Pair(rows, rows)))
        products = re.findall(r"dot_general.*\[HIGHEST, HIGHEST\].* -> tensor<(\w+)xf64>", text)
        assert sorted(products) == blocks
        assert text.count("dot_general") == len(products)


@pytest.mark.parametrize("size", [512, 500])
def test_the_kernel_is_one_call_in_place_if_it_is_asked_for(size):
    operands = shapes(size, 100, 60)
    for function, inputs, more in ((ridge.downdate, operands[:2], 0), (ridge.stream, operands, 1)):
        asked, auto = (lowered(functools.partial(function, kernel=x), inputs) for x in (True, None))
        calls = [len(re.findall(rf"custom_call @{name}", asked)) for name in ("mosaic_gpu", "cusolver_syrk")]
        assert calls == ([1, 0] if size == 512 else [0, 1])
        assert "mosaic_gpu" not in auto
        assert "output_operand_alias" in asked
        assert asked.count("dot_general") == more
    with pytest.raises(ValueError, match="multiple of 128, not of 500"):
        hopper.downdate(jnp.eye(500), jnp.ones((4, 500)))


@base.interpreted
@pytest.mark.parametrize(("rows", "sign"), [(64, -1.0), (70, 1.0)])
def test_the_kernel_agrees_with_float64_and_is_symmetric(rows, sign):
    r, v = symmetric(256), draw(rows, 256)
    found = jax.jit(functools.partial(hopper.downdate, sign=sign, interpret=plgpu.InterpretGPUParams()))(r, v)
    assert apart(found, exact(r, v, v, sign)[0]) < 1e-6
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rows_ahead_meet_the_new_matrix(sign, monkeypatch):
    monkeypatch.setattr(hopper, "downdate", reference.downdate)  # the kernel itself needs a GPU, or a newer JAX
    r, v, x = symmetric(128), draw(20, 128), draw(7, 128, seed=1)
    for got, want in zip(hopper.stream(r, v, x, sign), exact(r, v, x, sign), strict=True):
        assert apart(got, want) < 1e-6


@base.compiled
def test_machine_code_uses_tensor_cores_without_spills_or_atomics(tmp_path):
    """Compiles for sm_90a in a process of its own, without a GPU."""
    worker = base.ROOT / "tests" / "workers" / "gpu_machine_code.py"
    path = {"PYTHONPATH": f"{base.ROOT}:{base.ROOT / 'tests'}"}
    argv = [sys.executable, worker, tmp_path, "ridge"]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=base.ROOT, env=os.environ | path, check=False)
    assert not run.returncode, run.stderr[-2000:]
    (report,) = (p.read_text() for p in tmp_path.glob("*.ptxas"))
    (listing,) = (p.read_text() for p in tmp_path.glob("*.sass*"))
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "HGMMA" in listing
    assert "UTMASTG" in listing
    assert not re.search(r"\b(RED|ATOM|ATOMG)\.|\bHMMA\b|\bFFMA\b", listing)
    assert run.stdout.split() == [str(4 * 8192 * 8192), "0"]  # bytes in place, copies of the matrix
