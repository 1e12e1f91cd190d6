"""Attention whose rows are cut along their length: equal to the uncut one, with the collectives that it needs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl import mesh as meshes
from jaxcl.kernels import sharded
from jaxcl.kernels.attention import attention, cpu, reference, tpu

B, L, H, G, K = 4, 24, 4, 2, 8


def inputs(length=L, rows=B):
    """Returns q, k, v, packed documents that cross every cut, frozen tokens, and the weights of the two results."""
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (rows, length, H, K))
    k, v = (jax.random.normal(key, (rows, length, G, K)) for key in keys[1:3])
    ends = np.sort(np.random.default_rng(0).integers(1, length, (rows, 3)))
    segments = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(2)
    segments[0, -5:] = 0  # padding behind, and one row without a cut
    segments[1] = 1
    frozen = jax.random.bernoulli(keys[3], 0.3, (rows, length))
    seeds = jax.random.normal(keys[4], (rows, length, H, K)), jax.random.normal(keys[5], (rows, H, length))
    return (q, k, v), jnp.asarray(segments, jnp.int32), frozen, seeds


CASES = {
    "packed": {},
    "all": {"window": 5, "soft_cap": 2.0, "scale": 0.7, "frozen": True},
    "both ways": {"causal": False, "window": 7},
}


def outcome(f, operands, segments, frozen, seeds, options):
    """Returns results and gradients of f."""
    options = {**options, **({"frozen": frozen} if options.get("frozen") else {})}

    def loss(q, k, v):
        mixed, lse = f(q, k, v, segments=segments, return_lse=True, **options)
        lse = jnp.where(segments[:, None] > 0, lse, 0)
        return jnp.sum(mixed * seeds[0]) + jnp.sum(lse * seeds[1]), (mixed, lse)

    (_, found), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*operands)
    return *found, *grads


MESHES = [
    {"context": 2, "data": 2, "tensor": 2},
    {"context": 4, "fsdp": 2, "data": 1},
    {"context": 2, "tensor": 4, "data": 1},  # two key heads for four devices: each twice
    {"context": 8, "data": 1},  # three queries each: an odd number, that cannot be traded
]


@functools.cache
def expected(case, length=L):
    """Returns the outcome of the definition, on one device."""
    return jax.jit(lambda *x: outcome(reference.attention, *x, CASES[case]))(*inputs(length))


@pytest.mark.parametrize(
    ("sizes", "case"), [*((sizes, "packed") for sizes in MESHES), (MESHES[0], "all"), (MESHES[0], "both ways")], ids=str
)
def test_the_cut_changes_nothing(sizes, case):
    mesh = meshes.make(**sizes)
    cut = jax.jit(meshes.on(mesh, lambda *x: outcome(attention, *x, CASES[case])))
    got, want = cut(*jax.device_put(inputs(), meshes.replicated(mesh))), expected(case)
    for name, a, b in zip(("mixed", "lse", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("module", "case"), [*((cpu, case) for case in CASES), (tpu, "all")])
def test_a_part_of_the_queries(module, case):
    """What a kernel gives for some of the queries is that part of what it gives for all; gradients of keys add up."""
    length, size = (192, 64) if module is cpu else (384, 128)
    options = {"causal": True, "soft_cap": None, "scale": K**-0.5} | CASES[case]
    (q, k, v), segments, frozen, (d_mixed, d_lse) = inputs(length, rows=2)
    frozen, window = frozen if options.pop("frozen", None) else None, options.pop("window", None)
    window = None if window is None else jnp.int32(window)
    options |= {"interpret": True} if module is tpu else {}

    def both(q, d_mixed, d_lse, first):
        mixed, lse = module.forward(q, k, v, segments, window, first, **options)
        grads = module.backward(q, k, v, segments, window, frozen, mixed, lse, d_mixed, d_lse, first, **options)
        return mixed, lse, *grads

    whole = jax.jit(both)(q, d_mixed, d_lse, None)
    of_part = jax.jit(both)
    parts = []
    for first in range(0, length, size):
        own = slice(first, first + size)
        parts.append(of_part(q[:, own], d_mixed[:, own], d_lse[:, :, own], jnp.int32(first)))
    mixed, lse, d_q, d_k, d_v = zip(*parts, strict=True)
    joined = [jnp.concatenate(mixed, 1), jnp.concatenate(lse, 2), jnp.concatenate(d_q, 1), sum(d_k), sum(d_v)]
    for name, a, b in zip(("mixed", "lse", "dq", "dk", "dv"), joined, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


def compiled(mesh, length=64):
    """Returns the compiled gradient of attention whose operands lie cut along rows, length and heads."""
    wide = NamedSharding(mesh, P(meshes.BATCH, "context", "tensor"))
    operands, segments, _, seeds = inputs(length)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wide) for x in (*operands, seeds[0])]
    ids = jax.ShapeDtypeStruct(segments.shape, jnp.int32, sharding=NamedSharding(mesh, P(meshes.BATCH)))

    def grads(q, k, v, seed, segments):
        return jax.grad(lambda *x: jnp.sum(attention(*x, segments=segments) * seed), (0, 1, 2))(q, k, v)

    return jax.jit(meshes.on(mesh, grads), out_shardings=(wide,) * 3).trace(*shapes, ids).lower().compile()


def test_keys_are_gathered_and_their_gradients_scattered():
    """No queries are gathered: each device trades half of them with its mirror image, and gives them back."""
    text = compiled(meshes.make(context=4, data=1, tensor=2)).as_text()
    found = re.findall(r"= (\S+?)\S* (all-gather|reduce-scatter|collective-permute|all-reduce|all-to-all)\(", text)
    kinds = [kind for _, kind in found]
    assert kinds.count("all-gather") == 2, found
    assert kinds.count("reduce-scatter") == 2, found
    assert kinds.count("collective-permute") == 3, found  # queries and cotangents there, their gradients back
    assert set(kinds) == {"all-gather", "reduce-scatter", "collective-permute"}, found


def test_every_device_does_the_same_work(monkeypatch):
    """Of one long document, the tiles that are visited are as many on every device."""
    seen = []

    def spy(q, k, v, segments, window, first):
        jax.debug.callback(lambda at, n=q.shape[1]: seen.append((int(at), n)), first)
        return reference.attention(q, k, v, segments=None, causal=False)

    mesh = meshes.make(context=4, data=1, devices=jax.devices()[:4])
    (q, k, v), segments, _, _ = inputs(64)
    jax.block_until_ready(
        jax.jit(meshes.on(mesh, lambda *x: sharded.attention(spy, causal=True)(*x, None, None)))(
            *jax.device_put((q, k, v, segments), meshes.replicated(mesh))
        )
    )
    jax.effects_barrier()
    assert sorted(seen) == [(8 * i, 8) for i in range(8)]  # each eighth once


def test_rows_that_do_not_divide_are_not_cut():
    mesh = meshes.make(context=8, data=1)
    (q, k, v), segments, _, _ = inputs(20)
    whole = jax.jit(meshes.on(mesh, lambda *x: attention(*x[:3], segments=x[3])))
    placed = jax.device_put((q, k, v, segments), meshes.replicated(mesh))
    step = whole.lower(*placed).compile()
    np.testing.assert_allclose(step(*placed), expected("packed", 20)[0], rtol=1e-5, atol=1e-5)
    assert "all-gather(" not in step.as_text()


def test_activations_keep_their_length():
    mesh = meshes.make(data=2, context=2, tensor=2)
    out = jax.jit(meshes.on(mesh, lambda x: sharded.rows(x * 2)))(
        jax.device_put(np.ones((8, 6, 5)), meshes.replicated(mesh))
    )
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "context")), 3)
