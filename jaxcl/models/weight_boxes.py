"""Boxes of weights as parameters of their own: a centre and a radius for every weight, without a hypernetwork.

Source: Wolczyk et al. 2022, InterContiNet (ICML); the training in two phases is `jaxcl.methods.intercontinet`. Memory:
four numbers for every weight of the network, beside the ledger.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcl.models import boxed
from jaxcl.models.boxed import Boxed
from jaxcl.schema import UserError
from jaxcl.types import Key, Model, Params


def make(target: Model, *, tasks: int, radius: float = 0.1) -> Boxed:
    """Returns one universal network of boxed weights.

    Parameters: `generator/centre`, `generator/log_radius`, [N] each, and the ledger, see `jaxcl.models.boxed`.

    Args:
      target: a network of float32 parameters.
      tasks: T.
      radius: of every weight at first, above 0.

    Raises:
      UserError: a radius that is not above 0.
    """
    if not 0 < radius < math.inf:
        raise UserError(f"config.adapter.radius={radius}: must be above 0")

    def init(key: Key) -> Params:
        centre = boxed.ravel(target.init(key))
        return {"centre": centre, "log_radius": jnp.full_like(centre, math.log(radius))}

    def wide(generator: Params, which: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        centre = jnp.broadcast_to(generator["centre"][None], (which.size, generator["centre"].size))
        return centre, scales[:, None] * jnp.exp(generator["log_radius"])[None]

    return boxed.make(
        target,
        init,
        {"centre": ("mlp",), "log_radius": ("mlp",)},
        tasks,
        True,
        boxes=wide,
        tight=lambda generator, task: (generator["centre"], jnp.exp(generator["log_radius"])),
        begin=lambda generator, task, before: generator,
        keep=lambda generator, old, task: generator,
    )
