"""Small convolutional network: a classifier of images, for the vision benchmarks of continual learning."""

from __future__ import annotations

import math
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
    inputs: Sequence[int] = (28, 28, 1),
    channels: Sequence[int] = (16, 32),
    hidden: Sequence[int] = (128,),
    classes: int = 10,
    pool: Literal["max", "mean"] = "max",
    residual: bool = False,
    output: Literal["logits", "hidden"] = "logits",
) -> Model:
    """Returns a classifier whose `Output.hidden` are float32 logits [B, classes], without a head.

    Every stage is a 3x3 convolution, ReLU and 2x2 pooling; then come dense layers with ReLU between them. Weights are
    He-normal (He et al. 2015, eq. 10), biases zero. Parameters are `conv_0/kernel`, `conv_0/bias`, ...,
    `layer_0/kernel`, ...; the last layer gives the logits. There is no normalisation, so that rows do not mix and
    `jaxcl.models.interval` bounds the logits under intervals of weights and of pixels.

    Args:
      inputs: height, width and channels: `batch.inputs` is float [B, ...] with that many elements per row.
      channels: number of channels of every stage; each halves height and width, rounding down.
      hidden: width of every dense layer before the last.
      classes: number of logits.
      pool: largest or mean value of every 2x2 window.
      residual: whether every stage adds relu(convolution) to its first activations, by a second convolution
        `residual_0`, ... (He et al. 2016, eq. 1).
      output: "hidden" returns what the last layer would read; the parameters are the same.

    Raises:
      UserError: a size below 1, inputs that are not three sizes, an image smaller than the pooling needs.
    """
    sizes = [("classes", classes), *(("channels", n) for n in channels), *(("hidden", n) for n in hidden)]
    for name, value in [*sizes, *(("inputs", n) for n in inputs)]:
        if value < 1:
            raise UserError(f"config.model.{name}={value!r}: must be at least 1")
    if len(inputs) != 3:
        raise UserError(f"config.model.inputs={tuple(inputs)!r}: must be height, width and channels")
    if min(inputs[:2]) < 2 ** len(channels):
        raise UserError(
            f"config.model.inputs={tuple(inputs)!r}: {len(channels)} stages need height and width of at least "
            f"{2 ** len(channels)}; use fewer channels"
        )
    module = Cnn(tuple(inputs), tuple(channels), (*hidden, classes), pool, residual, output)
    return from_linen(module, _shapes(math.prod(inputs)), arguments=lambda batch: (batch.inputs,))


class Cnn(nn.Module):
    """Stages of convolution, ReLU and pooling, then dense layers."""

    inputs: tuple[int, ...]
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    pool: str
    residual: bool
    output: str = "logits"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, ...] to float32 [B, classes], or to what the last layer reads."""
        x = x.reshape(x.shape[0], *self.inputs).astype(jnp.float32)  # [B, height, width, channels]
        pooling = nn.max_pool if self.pool == "max" else nn.avg_pool
        for i, channels in enumerate(self.channels):
            x = nn.relu(self._convolution(channels, f"conv_{i}")(x))
            if self.residual:
                x = x + nn.relu(self._convolution(channels, f"residual_{i}")(x))
            x = pooling(x, (2, 2), strides=(2, 2))
        x = read = x.reshape(x.shape[0], -1)
        last = len(self.widths) - 1
        for i, width in enumerate(self.widths):
            # As in `mlp`: one dimension is split over devices, out of every other layer, into those between.
            axes = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            axes = (axes[0], None) if i == last else axes
            kernel = nn.with_logical_partitioning(nn.initializers.he_normal(), axes)
            offset = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
            x = nn.Dense(width, kernel_init=kernel, bias_init=offset, name=f"layer_{i}")(read := x)
            x = x if i == last else nn.relu(x)
        return x if self.output == "logits" else read

    def _convolution(self, channels: int, name: str) -> nn.Conv:
        return nn.Conv(channels, (3, 3), kernel_init=nn.initializers.he_normal(), name=name)


def _shapes(inputs: int) -> Batch:
    """Returns the shapes of a batch of one row."""
    row: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    features: Any = jax.ShapeDtypeStruct((1, inputs), jnp.float32)
    weights: Any = jax.ShapeDtypeStruct((1,), jnp.float32)
    return Batch(features, row, weights, row, row, row)
