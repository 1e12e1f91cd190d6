"""Parameters of a transformer's modules, and the gated unit of its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.config import Config
from jaxcl.models.layers import linear, swiglu


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None
) -> jax.Array:
    """Returns a float32 parameter: normal with standard deviation `std`, or ones for None, or zeros for 0."""
    if std is None:
        initial: Callable[..., Any] = nn.initializers.ones
    else:
        initial = nn.initializers.normal(std) if std else nn.initializers.zeros
    value: Any = module.param(name, nn.with_logical_partitioning(initial, axes), shape, jnp.float32)
    return value


class Mlp(nn.Module):
    """Gated unit: down(silu(gate(x)) * up(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, L, D] to [B, L, D]."""
        c, dtype = self.config, x.dtype

        def project(y: jax.Array, name: str, width: int, axes: tuple[str, str], std: float) -> jax.Array:
            out: Any = linear(y, weight(self, name, (y.shape[-1], width), axes, std).astype(dtype))
            if c.mlp_bias:
                out = out + weight(self, f"{name}_bias", (width,), axes[1:], 0.0).astype(dtype)[None, None]
            return out

        gate = project(x, "gate", c.mlp, ("embed", "mlp"), c.init_std)
        up = project(x, "up", c.mlp, ("embed", "mlp"), c.init_std)
        return project(swiglu(gate, up), "down", c.embed, ("mlp", "embed"), c.init_std / math.sqrt(2 * c.layers))
