"""Fixed random detectors of local patterns under a small perceptron: a classifier of images whose features never move.

    feature f = relu(<image, filter_f> - threshold)      filter_f: random on a window x window patch, mean 0, norm 1

A filter answers to few images, so that tasks share few features, which is what a box of weights around the layers above
leaves room for (`config.adapter` with `fixed=["^filters$"]`); nothing of it is learned or fitted to data. The filters
are parameters, so that a checkpoint holds them; whoever trains this model without boxes may let them move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.models import mlp
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params


def make(
    *,
    side: int,
    filters: int,
    classes: int,
    channels: int = 1,
    window: int = 10,
    threshold: float = 0.8,
    hidden: Sequence[int] = (),
    output: Literal["logits", "hidden"] = "logits",
) -> Model:
    """Returns a classifier of square images; its logits are `Output.hidden`, float32 [B, classes].

    Parameters: `filters`, float32 [side^2 channels, filters], and those of `jaxcl.models.mlp` under `head`.

    Args:
      side: of the image; `batch.inputs` is float [B, ...] with side^2 channels elements per row, in [0, 1].
      filters: number of features.
      classes: number of logits.
      channels: of the image, the fastest dimension.
      window: side of the patch that a filter sees.
      threshold: of a feature.
      hidden: widths of the layers between features and logits.
      output: as for `jaxcl.models.mlp`.

    Raises:
      UserError: a size out of range.
    """
    for name, value in (("side", side), ("filters", filters), ("channels", channels)):
        if value < 1:
            raise UserError(f"config.model.{name}={value}: must be at least 1")
    if not 2 <= window <= side:
        raise UserError(f"config.model.window={window}: must lie in 2 .. side={side}")
    head = mlp.make(inputs=filters, hidden=hidden, classes=classes, output=output)

    def init(key: Key) -> Params:
        return {"filters": drawn(named(key, "filters"), side, channels, window, filters), "head": head.init(key)}

    def apply(params: Params, batch: Batch, cache: object = None) -> Output:
        rows = batch.inputs.reshape(batch.inputs.shape[0], -1).astype(jnp.float32)
        found = jnp.dot(rows, params["filters"], precision=jax.lax.Precision.HIGHEST)
        features = dataclasses.replace(batch, inputs=jax.nn.relu(found - threshold))
        return head.apply(params["head"], features, cache)

    return Model(init, apply, {"filters": (None, "mlp"), "head": head.axes})


def drawn(key: Key, side: int, channels: int, window: int, filters: int) -> jax.Array:
    """Returns the filters, float32 [side^2 channels, filters]."""
    places, values = jax.random.split(key)
    corner = jax.random.randint(places, (2, filters), 0, side - window + 1)  # [2, F]
    along = jnp.arange(side)[:, None]
    rows, columns = ((along >= one[None]) & (along < one[None] + window) for one in corner)  # [side, F]
    seen = (rows[:, None] & columns[None])[:, :, None]  # [side, side, 1, F]
    mask = jnp.broadcast_to(seen, (side, side, channels, filters)).reshape(-1, filters).astype(jnp.float32)
    drawn = jax.random.normal(values, mask.shape) * mask
    drawn = drawn - mask * jnp.sum(drawn, axis=0, keepdims=True) / (window * window * channels)
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)
