"""The update that also sees the next rows: every form against float64, in place, on platforms, and in the recursion."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import AbstractMesh, AxisType
from ridge_kernels_test import draw, symmetric
from ridge_test import C, D, joint64, off, rows, sums64

from jaxcl.kernels import ridge
from jaxcl.kernels.ridge import cpu, gpu, reference, tpu
from jaxcl.ridge import recursion

FORMS = {
    "reference": reference.stream,
    "cpu": functools.partial(cpu.stream, side=128),
    "gpu": gpu.stream,  # plain XLA, which runs everywhere
    "tpu": functools.partial(tpu.stream, side=128, interpret=True),
    "ragged": functools.partial(tpu.stream, side=256, interpret=True),
}
SIZES = [(256, 32, 32), (384, 32, 100), (512, 100, 32), (300, 100, 1)]  # d, rows, rows ahead


def exact(r, v, x, sign=-1.0):
    r, v, x = (np.asarray(part, np.float64) for part in (r, v, x))
    new = r + sign * v.T @ v
    return new, x @ new


def apart(got, want):
    """Returns the largest error relative to the largest number."""
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(("size", "taken", "ahead"), SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_a_stream_agrees_with_float64_and_is_symmetric(name, size, taken, ahead):
    r, v, x = symmetric(size), draw(taken, size), draw(ahead, size, seed=1)
    sign = 1.0 if size == 384 else -1.0
    new, seen = toys.quick(functools.partial(FORMS[name], sign=sign))(r, v, x)
    for got, want in zip((new, seen), exact(r, v, x, sign), strict=True):
        assert got.shape == want.shape
        assert apart(got, want) < 1e-6
    assert name == "reference" or (np.asarray(new) == np.asarray(new).T).all()


def test_streams_are_mapped_over():
    r = jnp.stack([symmetric(150), 2 * symmetric(150)])
    v, x = draw(2 * 9, 150).reshape(2, 9, 150), draw(2 * 5, 150, seed=1).reshape(2, 5, 150)
    for form in (ridge.stream, FORMS["tpu"]):
        found = toys.quick(jax.vmap(functools.partial(form, sign=-1.0)))(r, v, x)
        for n in range(2):
            for got, want in zip(found, exact(r[n], v[n], x[n]), strict=True):
                assert apart(got[n], want) < 1e-6


def test_a_stream_is_in_place():
    r, v = jnp.eye(640), jnp.ones((4, 640))
    assert "f32[640,640]{1,0} copy(" not in jax.jit(ridge.stream, donate_argnums=0).lower(r, v, v).compile().as_text()


def test_a_stream_takes_the_memory_of_the_inverse():
    r, v = jnp.eye(640), jnp.ones((4, 640))
    compiled = jax.jit(ridge.stream, donate_argnums=0).lower(r, v, v).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == r.nbytes
    new, _ = compiled(r, v, v)
    assert r.is_deleted()
    np.testing.assert_array_equal(new, np.eye(640) - 4)


def shapes(size, taken, ahead):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size, size), (taken, size), (ahead, size))]


def lowered(function, operands, platform="tpu"):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("size", [1000, 8192])
def test_the_tpu_form_is_one_kernel_in_place(size):
    text = lowered(ridge.stream, shapes(size, 128, 128))
    assert text.count("@tpu_custom_call") == 1
    assert "output_operand_aliases" in text
    assert f"tensor<{size}x{size}xf32>, tensor<{size}" not in "".join(re.findall(r".*dot_general.*", text))
    assert "tpu_custom_call" not in lowered(functools.partial(ridge.stream, kernel=False), shapes(size, 128, 128))


def test_on_a_gpu_the_library_updates_one_triangle():
    operands = shapes(1000, 64, 64)
    for function, inputs, products in ((ridge.stream, operands, 1), (ridge.downdate, operands[:2], 0)):
        text = lowered(function, inputs, "cuda")
        assert len(re.findall(r"custom_call @cusolver_syrk_ffi", text)) == 1
        assert "output_operand_alias" in text
        assert text.count("dot_general") == products


def test_only_the_triangle_that_the_library_promises_counts(monkeypatch):
    real = jax.lax.linalg.symmetric_product
    monkeypatch.setattr(jax.lax.linalg, "symmetric_product", lambda *x, **y: jnp.tril(real(*x, **y), 0))
    r, v = symmetric(30), draw(4, 30)
    found = gpu.downdate(r, v)
    assert apart(found, exact(r, v, v)[0]) < 1e-6
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("size", [8192, 16384])
def test_what_does_not_fit_the_memory_of_a_tpu_is_taken_in_turn(size):
    assert ridge.refused(size, 128, ahead=128) is None
    assert "1024 rows ahead" in ridge.refused(size, 128, ahead=1024)
    text = lowered(ridge.stream, shapes(size, 128, 1024))
    assert text.count("@tpu_custom_call") == text.count("dot_general") == 1
    side = tpu.default_side(128, size, 1, 1, 128)
    assert side % 128 == 0
    assert tpu.used(128, size, 1, 1, 128, side) <= tpu._VMEM
    # What the pipeline holds: two buffers of every block, the block that is kept, and the rows that are summed.
    assert 4 * (2 * side * (2 * side + 2 * 128 + 2 * 128) + side * side + 2 * 128 * size) <= 56 * 2**20


def test_a_kernel_that_is_not_taken_says_why():
    assert ridge.refused(512, 32) is None
    assert "none for cpu" in ridge.refused(512, 32, platform="cpu")
    assert "never run" in ridge.refused(512, 32, platform="cuda")
    assert ridge.refused(512, 32, platform="cuda", kernel=True) is None
    assert "multiples of 128" in ridge.refused(500, 32, platform="cuda", kernel=True)
    assert "rows ahead" in ridge.refused(512, 32, ahead=32, platform="cuda", kernel=True)
    assert "kernel=False takes none" in ridge.refused(512, 32, kernel=False)
    mesh = AbstractMesh((2, 2, 2), ("replica", "data", "fsdp"), axis_types=(AxisType.Auto,) * 3)
    other = AbstractMesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "not one of jaxcl.mesh" in ridge.refused(512, 32)  # it has no axis of heads
    with jax.sharding.use_abstract_mesh(other):
        assert "not one of jaxcl.mesh" in ridge.refused(512, 32)
        assert ridge.refused(512, 32, kernel=True) is None
        assert "tpu_custom_call" not in lowered(ridge.stream, shapes(512, 8, 8))
        assert "cusolver" not in lowered(ridge.stream, shapes(512, 8, 8), "cuda")


def test_batches_in_a_stream_are_batches_one_after_the_other():
    batches = [rows(32, seed) for seed in range(4)]
    batches[2][2][:5] = 0
    x, labels, weights = (np.stack(part) for part in zip(*batches, strict=True))
    begin = recursion.Inverse(jnp.eye(D) / 100, jnp.zeros((D, C)))
    found = toys.quick(recursion.stream)(begin, x, labels, weights)
    update = toys.quick(recursion.update)
    want = functools.reduce(lambda inverse, batch: update(inverse, *batch), batches, begin)
    whole = [np.concatenate(part) for part in zip(*batches, strict=True)]
    limit = 2.0**-24 * (1 + np.linalg.norm(sums64(*whole)[0], 2) / 100)  # the condition of S at most
    assert off(found.w, joint64(*whole, 100.0)) < limit < 1e-4
    assert off(found.w, np.asarray(want.w, np.float64)) < limit
    assert off(found.r, np.asarray(want.r, np.float64)) < limit
    np.testing.assert_array_equal(found.r, found.r.T)


@pytest.mark.parametrize(("count", "block"), [(0, 16), (7, 16), (16, 16), (20, 16), (32, 16), (50, 16), (3, 1)])
def test_rows_in_blocks_are_rows_in_one(count, block):
    x, labels, weights = rows(count, 3)
    weights = np.random.default_rng(4).uniform(0.2, 2.0, count).astype(np.float32)
    batch = x / 50, labels, weights  # so that the condition is about 20
    begin = recursion.Inverse(jnp.eye(D), jnp.zeros((D, C)))
    found = toys.quick(functools.partial(recursion.update, block=block))(begin, *batch)
    assert off(found.r, np.linalg.inv(sums64(*batch)[0] + np.eye(D))) < 1e-5
    np.testing.assert_allclose(found.w, joint64(*batch, 1.0), atol=1e-5)
    back = toys.quick(functools.partial(recursion.downdate, block=block))(found, *batch)
    np.testing.assert_allclose(back.r, np.eye(D), atol=1e-4)
    np.testing.assert_allclose(back.w, np.zeros((D, C)), atol=1e-4)


def test_a_stream_reads_the_inverse_once_per_batch():
    """For a TPU: one kernel in the loop and no other product of the whole matrix there, one before, one after."""
    size, rows_ = 1024, 64
    state = recursion.Inverse(*(jax.ShapeDtypeStruct((size, n), jnp.float32) for n in (size, 10)))
    batch = [jax.ShapeDtypeStruct((5, rows_, *more), kind) for more, kind in (((size,), "float32"), ((), "int32"))]
    text = lowered(recursion.stream, (state, *batch, jax.ShapeDtypeStruct((5, rows_), jnp.float32)))
    assert sorted(re.findall(r'kernel_name = "(\w+)"', text)) == ["ridge_downdate", "ridge_stream"]
    whole = [line for line in text.splitlines() if "dot_general" in line and f"tensor<{size}x{size}xf32>" in line]
    assert len(whole) == 1
