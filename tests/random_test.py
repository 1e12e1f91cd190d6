"""Draws from a softmax beside its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import random

DRAWS = 200_000


def drawn(logits, seed=0):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return np.asarray(jax.jit(jax.vmap(random.categorical, in_axes=(0, None)))(keys, logits))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 130])
def test_shares_are_those_of_the_softmax(size):
    """Every share and every running sum of shares, within five standard errors; sizes with and without a full block."""
    logits = 2 * jax.random.normal(jax.random.key(size), (size,))
    found = np.bincount(drawn(logits), minlength=size) / DRAWS
    wide = np.asarray(logits, np.float64)
    want = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
    assert found.shape == (size,)
    for a, b in ((found, want), (np.cumsum(found), np.cumsum(want))):
        assert np.all(np.abs(a - b) <= 5 * np.sqrt(np.clip(b * (1 - b), 0, None) / DRAWS) + 2e-6)


def test_what_is_impossible_is_never_drawn():
    """Tiny shares next to impossible ones, where rounded sums could tell one for the other."""
    logits = jnp.where(jnp.arange(70) % 2 == 0, -jnp.inf, -3.0 * (jnp.arange(70) % 7))
    assert set(np.unique(drawn(logits, 1) % 2)) == {1}
    assert set(np.unique(drawn(jnp.full((50,), -jnp.inf).at[49].set(-1e9)))) == {49}


def test_draws_of_a_batch_are_independent_and_belong_to_their_logits():
    logits = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]))
    keys = jax.random.split(jax.random.key(3), DRAWS)
    pairs = np.asarray(jax.jit(jax.vmap(random.categorical, in_axes=(0, None)))(keys, logits))
    found = np.zeros((3, 3))
    np.add.at(found, (pairs[:, 0], pairs[:, 1]), 1 / DRAWS)
    np.testing.assert_allclose(found, np.outer([0.5, 0.5, 0.0], [0.0, 0.25, 0.75]), atol=6e-3)
    assert pairs.dtype == np.int32


def test_narrow_logits_are_drawn_as_float32():
    logits = jax.random.normal(jax.random.key(4), (300,)).astype(jnp.bfloat16)
    assert np.array_equal(drawn(logits), drawn(logits.astype(jnp.float32)))
