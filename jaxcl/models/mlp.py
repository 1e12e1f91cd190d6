"""Multilayer perceptron: a classifier of feature vectors, for the classic continual-learning benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.bridge import from_linen
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model


def make(
    *,
    inputs: int,
    hidden: Sequence[int],
    classes: int,
    bias: bool = True,
    output: Literal["logits", "hidden"] = "logits",
) -> Model:
    """Returns a classifier whose `Output.hidden` are float32 logits [B, classes], without a head.

    Weights are He-normal (He et al. 2015, eq. 10), biases zero, activations ReLU. Parameters are `layer_0/kernel`,
    `layer_0/bias`, ...; the last layer gives the logits.

    Args:
      inputs: number of features: `batch.inputs` is float [B, ...] with that many elements per row.
      hidden: width of every hidden layer, from the input on; [] is logistic regression.
      classes: number of logits.
      bias: whether layers have a bias.
      output: "hidden" returns what the last layer would read, [B, width of the last hidden layer] or the inputs; the
        parameters are the same.

    Raises:
      UserError: a size below 1.
    """
    for name, value in [("inputs", inputs), ("classes", classes), *(("hidden", width) for width in hidden)]:
        if value < 1:
            raise UserError(f"config.model.{name}={value!r}: must be at least 1")
    example = _shapes(inputs)
    return from_linen(Mlp((*hidden, classes), bias, output), example, arguments=lambda batch: (batch.inputs,))


class Mlp(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]
    bias: bool
    output: str = "logits"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, ...] to float32 [B, classes], or to what the last layer reads."""
        x = read = x.reshape(x.shape[0], -1).astype(jnp.float32)
        last = len(self.widths) - 1
        for i, width in enumerate(self.widths):
            # Only one dimension can be split over devices: out of every other layer, into those between.
            axes = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            axes = (axes[0], None) if i == last else axes
            kernel = nn.with_logical_partitioning(nn.initializers.he_normal(), axes)
            offset = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
            x = nn.Dense(width, use_bias=self.bias, kernel_init=kernel, bias_init=offset, name=f"layer_{i}")(read := x)
            x = x if i == last else nn.relu(x)
        return x if self.output == "logits" else read


def _shapes(inputs: int) -> Batch:
    """Returns the shapes of a batch of one row."""
    row: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    features: Any = jax.ShapeDtypeStruct((1, inputs), jnp.float32)
    weights: Any = jax.ShapeDtypeStruct((1,), jnp.float32)
    return Batch(features, row, weights, row, row, row)
