"""Attention with nothing to attend to, under 64 bits, in a mesh that is cut already, and with traced options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.kernels.attention import attention, reference


@pytest.mark.parametrize("shape", [(0, 5, 4, 8), (2, 0, 4, 8)])
def test_no_rows_and_no_tokens_give_nothing(shape):
    q, k = np.zeros(shape, np.float32), np.zeros((*shape[:2], 2, 8), np.float32)
    mixed, lse = attention(q, k, k, return_lse=True)
    assert mixed.shape == shape
    assert lse.shape == (shape[0], 4, shape[1])
    assert jax.grad(lambda q: jnp.sum(attention(q, k, k)))(q).shape == shape


def test_under_64_bits_a_wide_bias_and_numbers_of_numpy_are_taken():
    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        q, k, v = (jnp.asarray(r.standard_normal((1, 9, n, 8)), jnp.float32) for n in (4, 2, 2))
        bias = jnp.asarray(r.standard_normal((1, 4, 9, 9)))
        options = {"soft_cap": np.float64(2.0), "scale": np.float64(0.3), "window": np.int64(4)}
        want, d_want = jax.value_and_grad(lambda b: jnp.sum(reference.attention(q, k, v, **options | {"bias": b})))(
            bias
        )
        found, d_found = jax.value_and_grad(lambda b: jnp.sum(attention(q, k, v, **options | {"bias": b})))(bias)
        assert d_found.dtype == jnp.float64
        np.testing.assert_allclose(found, want, rtol=1e-5)
        np.testing.assert_allclose(d_found, d_want, atol=1e-5)


def test_a_mesh_that_is_cut_already_needs_one_option_and_the_error_names_it():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    q = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9, 2, 8)), jnp.float32)
    cut = {"mesh": mesh, "in_specs": (PartitionSpec("d"),), "out_specs": PartitionSpec("d")}
    run = jax.jit(jax.shard_map(lambda q: attention(q, q, q), check_vma=False, **cut))
    np.testing.assert_allclose(run(q), attention(q, q, q), atol=1e-6)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map over d: give it check_vma=False"):
        jax.jit(jax.shard_map(lambda q: attention(q, q, q), **cut))(q)


@pytest.mark.parametrize("name", ["scale", "soft_cap"])
def test_numbers_that_make_the_program_are_not_traced(name):
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=f"{name} is traced: it is part of the program; give a number"):
        jax.jit(lambda x: attention(q, q, q, **{name: x}))(0.5)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
BAD = {
    "q of shape .*give .batch": {"q": np.zeros((7, 6, 4), np.float32)},
    "v of shape .*but k of shape .*the same": {"v": np.zeros((2, 7, 2, 5), np.float32)},
    "k of shape .*but q of shape .*the same width": {"q": np.zeros((2, 7, 6, 5), np.float32)},
    "6 query heads are not a multiple of 4": {x: np.zeros((2, 7, 4, 4), np.float32) for x in "kv"},
    r"segments of shape \(2, 6\).*give \[2, 7\]": {"segments": SEGMENTS[:, :6]},
    "segments of dtype float32: give int32": {"segments": SEGMENTS.astype(np.float32)},
    "frozen of dtype int32: give bool": {"frozen": SEGMENTS},
    r"frozen of shape \(2,\)": {"frozen": np.zeros(2, bool)},
    r"soft_cap=0\.0: give a finite number above 0, or None": {"soft_cap": 0.0},
    "soft_cap=inf: give a finite number above 0": {"soft_cap": math.inf},
    "scale=nan: give a finite number, or None": {"scale": math.nan},
    r"window=2\.5: give one integer": {"window": 2.5},
    r"window=\[7 7\]: give one integer": {"window": np.array([7, 7])},
    r"window=4294967297: .*below 2\*\*31": {"window": np.int64(2**32 + 1)},
    "q, k and v of dtype bfloat16, float32: give one": {"q": np.zeros((2, 7, 6, 4), jnp.bfloat16)},
    "q, k and v of dtype int32: give one floating": {x: np.zeros((2, 7, 2, 4), np.int32) for x in "qkv"},
    "at least one head": {x: np.zeros((2, 7, 0, 4), np.float32) for x in "qkv"},
    "segments of dtype uint32: give int32": {"segments": SEGMENTS.astype(np.uint32)},
    r"bias of shape \(7, 7\): give four axes": {"bias": np.zeros((7, 7), np.float32)},
    r"bias of shape \(2, 3, 7, 7\): .*\[2, 6, 7, 7\]": {"bias": np.zeros((2, 3, 7, 7), np.float32)},
    "bias of dtype bool: give a float": {"bias": np.zeros((1, 1, 7, 7), bool)},
    "kv_segments of shape .*give": {"segments": SEGMENTS, "kv_segments": SEGMENTS[:, :6]},
    r"positions of shape \(7,\)": {"positions": np.arange(7), "kv_positions": np.zeros((2, 7), np.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_before_lowering(message):
    q, k, v = (np.ones((2, 7, heads, 4), np.float32) for heads in (6, 2, 2))
    given = {"q": q, "k": k, "v": v} | BAD[message]
    for function in (attention, reference.attention):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(function, **given))
