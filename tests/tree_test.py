"""Tree arithmetic and derived keys."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import random, tree

A = {"x": jnp.arange(6.0).reshape(2, 3), "y": {"z": jnp.array([1.0, -2.0])}}
B = jax.tree.map(lambda x: 2 * x + 1, A)


def flat(t):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]).astype(np.float64)


def test_dot_norm_add():
    np.testing.assert_allclose(tree.dot(A, B), flat(A) @ flat(B), rtol=1e-6)
    np.testing.assert_allclose(tree.norm(A), np.linalg.norm(flat(A)), rtol=1e-6)
    np.testing.assert_allclose(flat(tree.add(A, B, -0.5)), flat(A) - 0.5 * flat(B), rtol=1e-6)


def test_lerp_is_exact_at_both_ends():
    a = {"x": jnp.array([1e8, 1.0, 0.1], jnp.float32)}
    b = {"x": jnp.array([1.0, 1e-8, 0.3], jnp.float32)}
    np.testing.assert_array_equal(tree.lerp(a, b, 0.0)["x"], a["x"])
    np.testing.assert_array_equal(tree.lerp(a, b, 1.0)["x"], b["x"])
    np.testing.assert_array_equal(jax.jit(tree.lerp)(a, b, 1.0)["x"], b["x"])
    np.testing.assert_allclose(flat(tree.lerp(A, B, 0.25)), flat(A) + 0.25 * (flat(B) - flat(A)), rtol=1e-6)


def test_names_casts_and_finiteness():
    assert [name for name, _ in tree.named_leaves(A)] == ["x", "y/z"]
    assert tree.cast({"f": jnp.ones(2), "i": jnp.ones(2, jnp.int32)}, jnp.bfloat16)["i"].dtype == jnp.int32
    assert bool(tree.finite(A))
    assert not bool(tree.finite({"x": jnp.array([1.0, jnp.nan])}))
    assert tree.size(A) == 8


def test_keys_depend_on_seed_name_and_step_only():
    def bits(key):
        return jax.random.bits(key, (4,)).tolist()

    base = bits(random.key_for(0, "step", 3))
    assert base == bits(jax.jit(lambda s: random.key_for(0, "step", s))(3))
    others = [random.key_for(1, "step", 3), random.key_for(0, "eval", 3), random.key_for(0, "step", 4)]
    assert all(bits(key) != base for key in others)
