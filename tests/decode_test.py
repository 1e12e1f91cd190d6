"""Attention to a key-value cache beside its definition in the layout of training, and the program of a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.kernels import decode
from jaxcl.kernels.attention import reference
from jaxcl.models import transformer
from jaxcl.types import Batch

OPTIONS = [{}, {"window": 3}, {"soft_cap": 0.7}, {"scale": 0.2}, {"window": 4, "soft_cap": 2.0}]


def case(length=2, heads=6, groups=3, slots=11, width=8, dtype=jnp.float32):
    """Two rows whose slots are filled in another order than their positions; the second has padding in between."""
    r = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(r.standard_normal((2, n, h, width)), dtype)
        for n, h in ((length, heads), (slots, groups), (slots, groups))
    )
    places = np.stack([r.permutation(slots), r.permutation(slots)]).astype(np.int32)
    kept = np.stack([places[0] < 8, (places[1] < 9) & (places[1] != 4)]).astype(np.int32)
    positions = np.array([[7 - length + 1 + i for i in range(length)], [8 - length + 1 + i for i in range(length)]])
    where = {
        "segments": np.ones((2, length), np.int32),
        "kv_segments": kept,
        "positions": positions.astype(np.int32),
        "kv_positions": places,
    }
    return q, k, v, where


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("length", "groups"), [(1, 6), (1, 3), (2, 1), (3, 2)])
def test_it_is_attention_in_another_layout(options, length, groups):
    q, k, v, where = case(length, groups=groups)
    found = decode.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **where, **options)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v))
        want = reference.attention(*wide, **where, **options)
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_a_query_of_padding_gets_zeros_and_bfloat16_is_summed_in_float32():
    q, k, v, where = case(dtype=jnp.bfloat16)
    where["segments"][0] = 0
    found = decode.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **where)
    assert found.dtype == jnp.bfloat16
    assert not np.any(found[0])
    want = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), **where)
    np.testing.assert_allclose(found[1].astype(jnp.float32), want[1], atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, where: (q[:, :, :5], k, where), "5 query heads"),
        (lambda q, k, where: (q, k[:1], where), "k of shape"),
        (lambda q, k, where: (q, k, where | {"kv_segments": where["segments"]}), "kv_segments of shape"),
        (lambda q, k, where: (q, k, where | {"positions": where["kv_positions"]}), "positions of shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    q, k, _, where = case()
    q, k, where = change(q, k.swapaxes(1, 2), where)
    with pytest.raises(ValueError, match=message):
        decode.attention(q, k, k, **where)


def test_a_step_writes_to_its_cache_in_place():
    """Every key and value of the cache is given back as it was, but for one slot: no copy of it is made."""
    model = transformer.make(preset="tiny", vocab=64, max_length=512)
    params = model.init(jax.random.key(0))
    cache = transformer.init_cache(model, 2, 512)
    row = jnp.ones((2, 1), jnp.int32)
    batch = Batch(row, row, row.astype(jnp.float32), row, row, row[:, 0])

    def step(params, cache):
        return model.apply(params, batch, cache=cache).cache

    done = jax.jit(step, donate_argnums=1).lower(params, cache).compile()
    size = sum(x.nbytes for x in (*cache.keys, *cache.values))
    memory = done.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / len(cache.keys)  # less than the cache of one layer
    new = done(params, dataclasses.replace(cache, index=jnp.int32(7)))
    assert all(not np.any(np.delete(np.asarray(x), 7, axis=2)) and np.any(x[:, :, 7]) for x in new.keys)
