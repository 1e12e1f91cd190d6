"""Attention on a mesh: cut over rows and heads inside shard_map, equal to the uncut call in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl import mesh as meshes
from jaxcl.kernels import sharded
from jaxcl.kernels.attention import attention, reference

B, L, H, G, K = 8, 8, 8, 2, 2


def inputs(rows=B, heads=H, groups=G):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, L, heads, K))
    k, v = (jax.random.normal(key, (rows, L, groups, K)) for key in keys[1:3])
    segments = np.where(np.arange(L) < 3, 1, 2)[None] * np.ones((rows, 1), np.int32)
    segments[0, 6:] = 0
    return q, k, v, jnp.asarray(segments), jnp.int32(2)


def plain(q, k, v, segments, window):
    return reference.attention(q, k, v, segments=segments, window=window)


def dispatched(q, k, v, segments, window):
    return attention(q, k, v, segments=segments, window=window)


def run(f, mesh, arrays):
    """Returns value and gradients of f, called under a mesh."""

    def loss(q, k, v, *rest):
        mixed = f(q, k, v, *rest)
        return jnp.sum(jnp.sin(mixed)), mixed

    whole = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), grads = jax.jit(meshes.on(mesh, whole))(*jax.device_put(arrays, meshes.replicated(mesh)))
    return mixed, *grads


@pytest.mark.parametrize(
    ("f", "sizes", "shape", "local"),
    [
        (dispatched, {"data": 2, "fsdp": 2, "tensor": 2}, {}, (2, 4, 1)),
        (plain, {"data": 1, "fsdp": 2, "tensor": 4}, {}, (4, 2, 1)),  # two key heads for four devices: each twice
        (plain, {"fsdp": 1, "tensor": 8, "data": 1}, {"heads": 4}, (8, 4, 2)),  # four heads for eight: not cut
        (plain, {"data": 2, "fsdp": 2, "context": 2}, {"rows": 6}, (3, 8, 2)),  # six rows: over data=2 alone
    ],
)
def test_a_mesh_changes_nothing_but_the_parts(f, sizes, shape, local):
    mesh, arrays, seen = meshes.make(**sizes), inputs(**shape), []

    def spy(q, k, v, *rest):
        seen.append((q.shape[0], q.shape[2], k.shape[2]))
        return f(q, k, v, *rest)

    cut = run(sharded.attention(spy), mesh, arrays)
    assert set(seen) == {local}
    for ours, theirs in zip(cut, run(f, meshes.make(devices=jax.devices()[:1]), arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_without_a_mesh_and_inside_another_cut_nothing_is_wrapped():
    arrays, seen = inputs(), []

    def spy(q, k, v, *rest):
        seen.append(q.shape)
        return plain(q, k, v, *rest)

    f = sharded.attention(spy)
    jax.eval_shape(f, *arrays)
    jax.eval_shape(meshes.on(meshes.make(devices=jax.devices()[:1]), f), *arrays)
    mesh = meshes.make(data=4, tensor=2)
    rows = P(sharded.BATCH)
    outer = jax.shard_map(f, mesh=mesh, in_specs=(rows,) * 4 + (P(),), out_specs=rows, check_vma=False)
    jax.eval_shape(meshes.on(mesh, outer), *arrays)
    assert seen == [(B, L, H, K), (B, L, H, K), (B // 4, L, H, K)]


def test_the_logsumexp_and_missing_arguments_are_cut_too():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)

    def f(q, k, v, segments, window, frozen):
        assert window is None
        assert segments.shape == frozen.shape == (B // 4, L)
        return plain(q, k, v, segments, None), jnp.einsum("blhk->bhl", q)

    q, k, v, segments, _ = jax.device_put(inputs(), meshes.replicated(mesh))
    mixed, lse = jax.jit(meshes.on(mesh, sharded.attention(f, lse=True)))(q, k, v, segments, None, segments > 1)
    np.testing.assert_allclose(mixed, plain(q, k, v, segments, None), atol=2e-6)
    np.testing.assert_allclose(lse, jnp.einsum("blhk->bhl", q), atol=2e-6)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 3)


def test_no_collective_and_no_copy_of_the_rows():
    """The parts are independent: what lies cut over rows and heads is not moved for the attention."""
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    wide, rows = NamedSharding(mesh, P(meshes.BATCH, None, "tensor")), NamedSharding(mesh, P(meshes.BATCH))
    places = (wide, wide, wide, rows, meshes.replicated(mesh))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(inputs(), places, strict=True)]
    text = jax.jit(meshes.on(mesh, sharded.attention(plain))).trace(*shapes).lower().compile().as_text()
    assert not any(f" {kind}(" in text for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_activations_keep_their_rows():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    out = jax.jit(meshes.on(mesh, lambda x: sharded.rows(x * 2)))(
        jax.device_put(np.ones((8, 3, 5)), meshes.replicated(mesh))
    )
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 3)
    assert sharded.rows(jnp.ones(3)).sharding.is_fully_replicated


def test_the_names_are_those_of_the_mesh():
    assert sharded.BATCH == meshes.BATCH
    assert meshes.RULES["expert"] == sharded.EXPERT
    assert meshes.RULES["heads"] == meshes.RULES["kv_heads"] == sharded.HEADS
