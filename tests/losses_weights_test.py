"""Weights of tokens are data: no gradient reaches them."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_test
import numpy as np
import pytest

from jaxcl import losses
from jaxcl.types import Output


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_weights_carry_no_gradient(loss, chunk):
    hidden, head, batch = losses_test.rows()
    output = Output(hidden, head)

    def total(weights):
        own = dataclasses.replace(batch, weights=weights)
        if loss == "kl":
            return sum(losses.kl(output, Output(hidden + 1, head), own, chunk=chunk))
        return sum(losses.cross_entropy(output, own, chunk=chunk))

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones_like(batch.weights)), 0.0)
