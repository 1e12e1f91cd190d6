"""Ridge sums and their inverse on a mesh: cut by rows, as on one device, and nothing of their size ever travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ridge_test import everything, off, precisions, rows, sums64, wide

from jaxcl import mesh as meshes
from jaxcl.kernels import ridge, sharded
from jaxcl.kernels.ridge import cholesky, pair
from jaxcl.ridge import moments, recursion, solve
from jaxcl.types import TrainState

D, C, B = 256, 6, 64
CUT = P(("data", "fsdp"), None)
MESHES = [  # sizes, rows of A that a device has
    ({"replica": 2, "data": 2, "fsdp": 2}, D // 8),
    ({"data": 2, "fsdp": 2, "tensor": 2}, D // 4),
    ({"data": 1, "tensor": 8}, D),
]
COLLECTIVE = r" (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"


def wires(text):
    """Returns the number of elements of every array that devices exchange in a compiled program."""
    found = []
    for line in text.splitlines():
        before = re.split(COLLECTIVE + r"(?:-start)?\(", line)
        if len(before) > 1:
            shapes = re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", before[0])
            found += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return found


def some(count, seed, width):
    """Returns rows that are small, so that the condition is, too, and programs agree to rounding."""
    x, labels, weights = rows(count, seed, width, C)
    return x / 100, labels, weights


@functools.cache
def state(width=D):
    """Returns the state of a learner after some rows, a batch, and the state after that."""
    first, batch = some(96, 1, width), some(B, 2, width)
    batch[2][:3] = 0
    m = toys.quick(moments.add)(moments.empty(width, C), *first)
    inverse = recursion.Inverse(jnp.eye(width), jnp.zeros((width, C)))
    memory = {"moments": m, "inverse": toys.quick(recursion.update)(inverse, *first)}
    after = toys.quick(learn)(memory, *batch)
    return jax.tree.map(np.asarray, (memory, batch, after))  # on no device, so that nothing is donated that is shared


def learn(memory, x, labels, weights):
    """One step of a learner that keeps both; two blocks for the recursion."""
    inverse = recursion.update(memory["inverse"], x, labels, weights, block=40)
    return {"moments": moments.add(memory["moments"], x, labels, weights), "inverse": inverse}


def on_mesh(sizes, function, memory, batch):
    """Returns the compiled program and its arguments; the batch is cut over the batch axes."""
    mesh = meshes.make(**sizes)
    train = TrainState(jnp.int32(0), {}, (), memory)
    cuts = meshes.state_shardings(mesh, {}, jax.eval_shape(lambda: train)).memory
    arrays = jax.device_put(memory, cuts), *meshes.place(mesh, batch)
    program = jax.jit(meshes.on(mesh, function), out_shardings=cuts, donate_argnums=0)
    return program.lower(*arrays).compile(compiler_options=toys.QUICK), arrays


def test_sums_and_inverse_are_cut_by_rows():
    memory = {"acil": state()[0]}
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    cuts = meshes.state_shardings(mesh, {}, TrainState(jnp.int32(0), {}, (), memory)).memory["acil"]
    matrices = cuts["moments"].gram, cuts["moments"].cross, (cuts["inverse"].r, cuts["inverse"].w)
    assert all(x.spec == CUT for part in matrices for x in part)
    assert all(x.spec == P() for x in jax.tree.leaves((cuts["moments"].counts, cuts["moments"].features)) if x.spec)
    assert meshes.device_bytes(memory["acil"]["moments"].gram, cuts["moments"].gram) == 2 * 4 * D * D / 4
    odd = recursion.Inverse(jax.ShapeDtypeStruct((6, 6), "float32"), jax.ShapeDtypeStruct((6, 3), "float32"))
    cuts = meshes.state_shardings(mesh, {}, TrainState(jnp.int32(0), {}, (), odd)).memory
    assert cuts.r.spec == cuts.w.spec == P("data", None)  # 2 divides 6, 4 does not
    assert meshes.RULES["features"] == sharded.BATCH


@pytest.mark.parametrize(("sizes", "own"), MESHES)
def test_a_step_on_a_mesh_is_that_of_one_device_and_moves_rows_only(sizes, own):
    memory, batch, want = state()
    compiled, arrays = on_mesh(sizes, learn, memory, batch)
    sent = wires(compiled.as_text())
    assert max(sent, default=0) <= B * D < D * D
    assert sum(sent) <= 5.5 * B * D  # features once; of each block what R sees of it, V, and the like
    assert compiled.memory_analysis().alias_size_in_bytes >= own * 4 * (3 * D + 3 * C)
    found = compiled(*arrays)
    assert found["inverse"].r.sharding.shard_shape((D, D)) == (own, D)
    assert found["moments"].gram.low.sharding.shard_shape((D, D)) == (own, D)
    assert off(found["inverse"].r, np.asarray(want["inverse"].r, np.float64)) < 1e-6
    assert off(found["inverse"].w, np.asarray(want["inverse"].w, np.float64)) < 1e-6
    for name in ("gram", "cross", "counts"):
        assert off(wide(getattr(found["moments"], name)), wide(getattr(want["moments"], name))) < 1e-12


def test_matrices_that_the_mesh_does_not_divide_are_shared_as_far_as_they_can_be():
    memory, batch, want = state(100)
    compiled, arrays = on_mesh({"data": 2, "fsdp": 4}, learn, memory, batch)
    found = compiled(*arrays)
    assert found["inverse"].r.sharding.shard_shape((100, 100)) == (50, 100)
    assert off(found["inverse"].r, np.asarray(want["inverse"].r, np.float64)) < 1e-6
    assert off(wide(found["moments"].gram), wide(want["moments"].gram)) < 1e-12


def test_the_sizes_of_what_travels_are_found():
    """A program that does copy the matrix is caught."""
    mesh = meshes.make(data=8)
    cut = NamedSharding(mesh, P("data"))
    r = jax.device_put(jnp.eye(D), cut)
    text = jax.jit(lambda r: r @ r.T, out_shardings=NamedSharding(mesh, P())).lower(r).compile().as_text()
    assert max(wires(text)) >= D * D


def test_batches_of_several_devices_merge_into_those_of_one():
    """Data-parallel sums: every device adds its own rows, and moments are merged once."""
    mesh = meshes.make(data=8)
    batch = rows(B, 3, classes=C)
    width = batch[0].shape[1]
    empty = jax.tree.map(lambda x: jnp.stack([x] * 8), moments.empty(width, C))

    def own(m, *part):
        return jax.tree.map(lambda x: x[None], moments.add(jax.tree.map(lambda x: x[0], m), *part))

    add = jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    parts = jax.device_get(toys.quick(add)(empty, *batch))
    found = functools.reduce(toys.quick(moments.merge), [jax.tree.map(lambda x, n=n: x[n], parts) for n in range(8)])
    gram, cross = sums64(*batch, C)
    assert off(wide(found.gram), gram) < 1e-12
    assert off(wide(found.cross), cross) < 1e-12
    with pytest.raises(ValueError, match=r"gram_update inside jax.shard_map over data: give it check_vma=False"):
        jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(empty, *batch)


def test_every_update_is_cut_alike():
    mesh = meshes.make(data=2, fsdp=4)
    rng = np.random.default_rng(0)
    size = 600  # two panels and some columns
    r, v, x = (jnp.asarray(rng.standard_normal((n, size)), jnp.float32) for n in (size, 9, 5))
    r = r + r.T
    cut = NamedSharding(mesh, CUT)
    for function in (ridge.stream, ridge.downdate):
        operands = (r, v, x) if function is ridge.stream else (r, v)
        want = jax.tree.leaves(toys.quick(function)(*operands))
        arrays = jax.device_put(r, cut), *operands[1:]
        compiled = jax.jit(meshes.on(mesh, function)).lower(*arrays).compile(compiler_options=toys.QUICK)
        assert sum(wires(compiled.as_text())) <= v.size  # once, and nothing else
        for got, one in zip(jax.tree.leaves(compiled(*arrays)), want, strict=True):
            assert off(got, np.asarray(one, np.float64)) < 1e-6
    pairs = [pair.Pair(part, 2.0**-26 * part) for part in (jax.device_put(r, cut), v)]
    found = jax.jit(meshes.on(mesh, ridge.gram_update))(*pairs)
    assert off(wide(found), wide(pairs[0]) + wide(pairs[1]).T @ wide(pairs[1])) < 1e-12
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert ridge.refused(size, 9) == "rows are cut over data, fsdp: every device updates its own in plain XLA"
        gram = pair.of(r), pair.of(v)
        assert "shard_map" not in str(jax.make_jaxpr(functools.partial(ridge.gram_update, kernel=True))(*gram))
        text = jax.jit(ridge.gram_update).trace(*gram).lower(lowering_platforms=("tpu",)).as_text()
    assert "f64" not in text  # TPUs have none
    assert "tpu_custom_call" not in text


def test_a_matrix_that_is_not_cut_is_updated_by_the_kernel_on_every_device():
    r, v = (jax.ShapeDtypeStruct((n, D), jnp.float32) for n in (D, 9))
    with jax.sharding.use_abstract_mesh(meshes.make(data=1, tensor=8).abstract_mesh):
        assert ridge.refused(D, 9) is None
        for function, operands in ((ridge.downdate, (r, v)), (ridge.gram_update, (pair.Pair(r, r), pair.Pair(v, v)))):
            assert "shard_map" in str(jax.make_jaxpr(function)(*operands))
            text = jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
            assert text.count("@tpu_custom_call") == 1


SHARES = [
    ({"data": 2, "fsdp": 4}, 96),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 512),
    ({"data": 8}, 8),
]


@pytest.mark.parametrize(("sizes", "size"), SHARES)
def test_a_factor_cut_by_rows_is_that_of_one_device(sizes, size):
    mesh, rng = meshes.make(**sizes), np.random.default_rng(size)
    x = rng.standard_normal((2 * size, size)) * np.exp(rng.standard_normal(size))
    a, b = (x.T @ x + np.eye(size)).astype(np.float32), rng.standard_normal((size, 5)).astype(np.float32)
    cut, copy = NamedSharding(mesh, CUT), NamedSharding(mesh, P())
    own = jax.device_put(np.tril(a) + np.triu(rng.standard_normal(a.shape), 1).astype("f"), cut)  # the rest is not read
    factor = jax.jit(meshes.on(mesh, cholesky.factor)).lower(own).compile(compiler_options=toys.QUICK)
    found = factor(own)
    want = np.linalg.cholesky(a.astype(np.float64))
    assert found.sharding.shard_shape(a.shape) == cut.shard_shape(a.shape)
    assert off(found, want) < 1e-6
    assert (np.triu(found, 1) == 0).all()
    solve = jax.jit(meshes.on(mesh, cholesky.solve)).lower(found, jax.device_put(b, copy)).compile()
    alone = cholesky.solve(jnp.asarray(np.asarray(found)), jnp.asarray(b))
    scaled = np.linalg.cond(a.astype(np.float64)) * 2.0**-24
    assert off(solve(found, jax.device_put(b, copy)), np.asarray(alone, np.float64)) < scaled
    np.testing.assert_allclose(np.asarray(found) @ (np.asarray(found).T @ np.asarray(alone)), b, atol=1e-3)
    parts = size // cut.shard_shape(a.shape)[0]
    assert max(wires(factor.as_text())) <= cholesky.width(size, parts) * size
    assert max(wires(solve.as_text())) <= max(5 * size, 5 * cholesky.width(size, parts))
    bad = jax.device_put(a - 2 * np.diag(np.diag(a)) * (np.arange(size) == size // 2), cut)
    assert np.isnan(factor(bad)).any()


def test_panels_divide_the_rows_of_a_device():
    assert [cholesky.width(size, 8) for size in (8, 96, 4096, 5000, 8 * 257, 8 * 509)] == [1, 12, 256, 125, 257, 509]


@pytest.mark.parametrize("function", [solve.weights, recursion.start])
def test_weights_on_a_mesh_are_those_of_one_device_and_move_panels_only(function):
    m = state()[0]["moments"]
    mesh = meshes.make(data=2, fsdp=4)
    train = TrainState(jnp.int32(0), {}, (), m)
    own = jax.device_put(m, meshes.state_shardings(mesh, {}, jax.eval_shape(lambda: train)).memory)
    program = jax.jit(meshes.on(mesh, lambda m: function(m, 0.1))).lower(own).compile(compiler_options=toys.QUICK)
    text = program.as_text()
    assert D * D // 8 in wires(text)
    assert max(wires(text)) < D * D
    gathers = [line for line in text.splitlines() if " all-gather" in line]
    assert not [line for line in gathers if "dynamic_slice" in line]  # weights travel once, not for every block of A
    found, want = program(own), toys.quick(lambda m: function(m, 0.1))(jax.tree.map(jnp.asarray, m))
    if function is recursion.start:
        exact = np.linalg.inv(wide(m.gram) + 0.1 * np.eye(D))
        assert off(found.r, exact) < 2 * off(want.r, exact) < 1e-4
        assert off(found.w, np.asarray(want.w, np.float64)) < 1e-6
        assert found.r.sharding.shard_shape((D, D)) == (D // 8, D)
    else:
        assert off(wide(pair.Pair(found.weights, found.low)), wide(pair.Pair(want.weights, want.low))) < 1e-12
        assert float(found.bound) < 1e-6


def test_no_product_on_a_mesh_depends_on_the_default_precision():
    """Factors, triangular solves, strips and panels have products that one device has not."""
    mesh = meshes.make(data=2, fsdp=4)
    width = 8 * 16
    x, labels, weights = (jnp.asarray(part) for part in some(16, 0, width))
    state = moments.empty(width, C), recursion.Inverse(jnp.eye(width), jnp.zeros((width, C)))
    found = precisions(meshes.on(mesh, everything), *state, x, labels, weights)
    alone = precisions(everything, *state, x, labels, weights)
    assert len(found) > 35
    assert found != alone
    assert all(one[0] == {jax.lax.Precision.HIGHEST} and one[1] in ("float32", "float64") for one in found)
