"""Symmetric updates: every form against float64, ragged sizes, in place, and on the TPU where there is one."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import AbstractMesh, AxisType
from ridge_test import precisions

from jaxcl.kernels import ridge
from jaxcl.kernels.ridge import cpu, gpu, pair, reference, tpu

FORMS = {
    "reference": reference,
    "cpu": cpu,
    "sliced": types.SimpleNamespace(gram_update=cpu.gram_update_sliced, downdate=cpu.downdate),
    "tpu": tpu,
    "gpu": types.SimpleNamespace(gram_update=gpu.gram_update, downdate=cpu.downdate),  # that one of Triton needs a GPU
}
SIZES = [(100, 32), (128, 5), (300, 100), (257, 1), (256, 32), (384, 100), (512, 100)]


def form(name, function):
    """Returns a form with small blocks."""
    options = {} if name == "reference" else {"side": 128}
    options |= {"interpret": True} if name == "tpu" else {}
    return toys.quick(functools.partial(getattr(FORMS[name], function), **options), static_argnums=2)


def wide(x):
    return np.asarray(x.high, np.float64) + np.asarray(x.low, np.float64)


def draw(*shape, seed=0):
    """Returns float32 numbers of many magnitudes."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1])), jnp.float32)


def symmetric(size):
    x = np.asarray(draw(size, size, seed=3))
    return jnp.asarray(x + x.T)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "rows"), SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_an_update_agrees_with_float64_and_is_symmetric(name, size, rows, sign):
    r, v = symmetric(size), draw(rows, size)
    found = form(name, "downdate")(r, v, sign)
    want = np.asarray(r, np.float64) + sign * np.asarray(v, np.float64).T @ np.asarray(v, np.float64)
    sizes = np.abs(r) + np.abs(v).T @ np.abs(v)  # whatever the order of a sum of n + 1 terms, n roundings of these
    assert (np.abs(found - want) <= (rows + 1) * 2.0**-24 * sizes).all()
    assert np.abs(found - want).max() / np.abs(want).max() < 3e-6
    if name != "reference":  # whether a plain product is symmetric depends on the processor
        np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "rows"), SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_a_sum_of_pairs_has_the_quality_of_float64(name, size, rows, sign):
    a, x = pair.Pair(symmetric(size), 2.0**-26 * symmetric(size)), pair.Pair(draw(rows, size), 0 * draw(rows, size))
    x = pair.Pair(x.high, x.high * 2.0**-25)
    found = form(name, "gram_update")(a, x, sign)
    want = wide(a) + sign * wide(x).T @ wide(x)
    # What is not exact are sums of 3 b float32 products that have 2^-18 of the largest ones; a pair rounds to 2^-46.
    largest = np.abs(wide(x)).max(0)
    last = rows * 2.0**-18 * largest[:, None] * largest[None]
    limit = 3 * rows * 2.0**-24 * last + 2.0**-46 * np.abs(want) + 1e-13 * np.abs(wide(a))
    assert (np.abs(wide(found) - want) / limit).max() < 1
    assert name == "reference" or all((np.asarray(part) == np.asarray(part).T).all() for part in found)
    assert (np.abs(found.low) <= 2.0**-24 * np.abs(found.high)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("whole", [True, False])
def test_what_a_tpu_does_without_the_kernel_is_what_all_others_do(sign, whole, monkeypatch):
    """Also of more rows than one product of slices takes, and of the rows of a matrix that a device of a mesh has."""
    a, x, found = pair.of(symmetric(100)), pair.of(draw(300, 100)), {}

    def each(*operands, **forms):
        found.update({name: toys.quick(form)(*operands) for name, form in forms.items()})
        return found["default"]

    monkeypatch.setattr(jax.lax, "platform_dependent", each)
    if whole:
        ridge.gram_update(a, x, sign, kernel=False)
    else:
        ridge._gram_strip(sign, [part[:40] for part in a], [part[:, :40] for part in x], list(x))
    want = (wide(a) + sign * wide(x).T @ wide(x))[: 100 if whole else 40]
    assert {"tpu", "default"} <= set(found)
    for name, form in found.items():
        assert np.abs(wide(pair.Pair(*form)) - want).max() / np.abs(want).max() < 4e-12, name


@pytest.mark.parametrize("name", ["cpu", "gpu", "sliced", "tpu"])
def test_updates_are_mapped_over_streams(name):
    r, v = jnp.stack([symmetric(150), 2 * symmetric(150)]), draw(2 * 9, 150).reshape(2, 9, 150)
    a, x = pair.Pair(r, 0 * r), pair.Pair(v, 0 * v)
    for function, operands in (("downdate", (r, v)), ("gram_update", (a, x))):
        one = form(name, function)
        together = jax.vmap(lambda *both, one=one: one(*both, -1.0))(*operands)
        for n in range(2):
            alone = one(*jax.tree.map(lambda part, n=n: part[n], operands), -1.0)
            for many, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(many[n], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compile_", [toys.quick, jax.jit])
def test_pairs_are_not_simplified_away(compile_):
    """A compiler that reorders sums, or rounds a product once that is used twice, loses the low part."""
    a, b = draw(5, 64, seed=1), draw(5, 64, seed=2) * 1e-4
    exact = [np.asarray(x, np.float64) for x in (a, b)]
    np.testing.assert_array_equal(wide(compile_(pair.two_sum)(a, b)), sum(exact))
    np.testing.assert_allclose(wide(compile_(pair.product)(a, b)), exact[0] * exact[1], rtol=2.0**-46)
    np.testing.assert_allclose(wide(compile_(pair.root)(abs(a))), np.sqrt(abs(exact[0])), rtol=2.0**-46)
    total = compile_(pair.total)(pair.Pair(a, b))
    np.testing.assert_allclose(wide(total), (exact[0] + exact[1]).sum(), rtol=1e-13)
    assert not wide(compile_(pair.root)(jnp.zeros(3))).any()


@pytest.mark.parametrize("terms", [9, pair.ROWS, 2 * pair.ROWS + 30])
def test_a_product_of_pairs_has_the_quality_of_float64(terms):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, terms)), rng.standard_normal((terms, 4))
    for form, limit in ((pair._dot_sliced, 1e-9), (pair._dot_wide, 1e-12)):  # 2^-40 and 2^-47 of products up to 16
        assert np.abs(wide(toys.quick(form)(pair.of(a), pair.of(b))) - a @ b).max() < limit
    found = toys.quick(pair.dot)(pair.of(a), pair.of(b))
    np.testing.assert_array_equal(wide(found), wide(toys.quick(pair._dot_wide)(pair.of(a), pair.of(b))))
    np.testing.assert_allclose(wide(pair.of(0.1)), 0.1, rtol=2.0**-47)


def test_a_product_of_pairs_for_a_tpu_has_no_float64():
    x = pair.of(jnp.ones((300, 300)))
    text = {name: jax.jit(pair.dot).trace(x, x).lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    assert "f64" not in text["tpu"]
    assert "f64" in text["cpu"]


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 128])
def test_sums_of_slices_are_exact(rows):
    x = pair.pieces(pair.of(draw(rows, 6, seed=rows)), 0)
    first, middle, _ = toys.quick(pair.parts, static_argnums=(2, 3))(x, x, 0, 0)
    a, b = (np.asarray(part, np.float64) for part in x[:2])
    np.testing.assert_array_equal(first, a.T @ a)
    np.testing.assert_array_equal(middle, a.T @ b + b.T @ a)
    np.testing.assert_array_equal(np.asarray(x.first + x.second + x.rest), draw(rows, 6, seed=rows))


def updates():
    """Yields compiled updates with what is given away to them and what is not."""
    r, v = jnp.eye(640), jnp.ones((4, 640))
    for function, donated, rest in ((ridge.downdate, r, v), (ridge.gram_update, pair.of(r + 0), pair.of(v))):
        yield jax.jit(function, donate_argnums=0).lower(donated, rest).compile(), donated, rest


def test_updates_take_the_memory_of_what_they_update():
    for compiled, donated, rest in updates():
        assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(donated))
        compiled(donated, rest)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))


def test_updates_are_in_place():
    assert all("f32[640,640]{1,0} copy(" not in compiled.as_text() for compiled, _, _ in updates())


def lowered(function, *operands, mesh=None):
    traced = jax.jit(function).trace(*operands)
    if mesh is None:
        return traced.lower(lowering_platforms=("tpu",)).as_text()
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("size", [1000, 8192])
def test_the_tpu_form_lowers_and_is_used_where_arrays_are_whole(size):
    r, v = jax.ShapeDtypeStruct((size, size), jnp.float32), jax.ShapeDtypeStruct((100, size), jnp.float32)
    for function, operands in ((ridge.downdate, (r, v)), (ridge.gram_update, (pair.Pair(r, r), pair.Pair(v, v)))):
        text = lowered(function, *operands)
        assert text.count("@tpu_custom_call") == 1
        assert "output_operand_aliases" in text
        plain = lowered(functools.partial(function, kernel=False), *operands)
        assert "tpu_custom_call" not in plain
        assert "f64" not in text + plain  # TPUs have none
    many = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert "tpu_custom_call" not in lowered(ridge.downdate, r, v, mesh=many)


def test_blocks_of_the_tpu_form_fit_its_memory():
    for rows in (8, 128, 256, 1024):
        for operands, matrices in ((1, 1), (3, 2)):
            side = tpu.default_side(rows, 8192, operands, matrices)
            assert side % 128 == 0
            assert 4 * (2 * 2 * rows * side * operands + 5 * matrices * side * side) < 56 * 2**20
    assert tpu.default_side(64, 100, 1, 1) == 100


def test_every_lower_block_is_computed_once_and_mirrored_after():
    plan = tpu.steps(5).T
    assert sorted(map(tuple, plan[:, 2:])) == [(i, j) for i in range(5) for j in range(5)]
    for n, (i, j, to, at) in enumerate(plan):
        assert i >= j
        assert (to, at) == (i, j) or ((to, at) == (j, i) and tuple(plan[n - 1]) == (i, j, i, j))


def test_products_are_in_full_float32():
    r, v = jnp.eye(200), jnp.ones((4, 200))
    for form_ in FORMS.values():
        found = precisions(form_.downdate, r, v) + precisions(form_.gram_update, pair.of(r), pair.of(v))
        assert len(found) >= 2
        assert all(one[0] == {jax.lax.Precision.HIGHEST} for one in found)
        kinds = {"float32", "float64"} if form_ in (cpu, FORMS["gpu"]) else {"float32"}
        assert {one[1] for one in found} == kinds
    for stream in (reference.stream, cpu.stream, tpu.stream, gpu.stream):
        found = precisions(stream, r, v, v)
        assert len(found) >= 2 - (stream is gpu.stream)  # the library's symmetric product is none
        assert all(one == ({jax.lax.Precision.HIGHEST}, "float32") for one in found)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"downdate: matrix \[3, 3\] and rows \[2, 4\]"):
        ridge.downdate(jnp.eye(3), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="expected float32"):
        ridge.downdate(jnp.eye(4, dtype=jnp.bfloat16), jnp.ones((2, 4)))
