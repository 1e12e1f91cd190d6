r"""Boxes of weights as parameters of their own: a centre and a radius for every weight, without a hypernetwork.

    centre_t = centre + tanh(shift) radius,     radius_t = sigmoid(scale) (1 - |tanh(shift)|) radius

The new box lies inside the old one whatever shift and scale are. Source: Wolczyk et al. 2022, InterContiNet (ICML); its
training in two phases is `jaxcl.methods.intercontinet`. Memory: four numbers for every weight, beside the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.models import boxed
from jaxcl.models.boxed import Boxed
from jaxcl.schema import UserError
from jaxcl.types import Key, Model, Params

FULL = 5.0  # scale at the start of a task: sigmoid(5) = 0.993 of the radius that is left


def make(target: Model, *, tasks: int, radius: float = 1.0, fixed: Sequence[str] = ()) -> Boxed:
    """Returns one universal network of boxed weights.

    Parameters: `generator/{centre, radius, shift, scale}`, float32 [N] each, and the ledger, see `jaxcl.models.boxed`.

    Args:
      target: a network of float32 parameters, see `jaxcl.models.hypernetwork.make`.
      tasks: T.
      radius: of every weight before the first task, above 0.
      fixed: patterns of parameters of the target that are drawn once and have no boxes.

    Raises:
      UserError: a radius that is not above 0, or not finite.
    """
    if not 0 < radius < math.inf:
        raise UserError(f"config.adapter.radius={radius}: must be above 0, and finite")

    part = boxed.free(target, fixed)

    def init(key: Key) -> Params:
        centre = boxed.ravel(part(key))
        full = {"radius": jnp.full_like(centre, radius), "scale": jnp.full_like(centre, FULL)}
        return {"centre": centre, "shift": jnp.zeros_like(centre), **full}

    def wide(generator: Params, which: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        centre, spread = present(generator)
        return jnp.broadcast_to(centre[None], (which.size, centre.size)), scales[:, None] * spread[None]

    return boxed.make(
        target,
        init,
        dict.fromkeys(("centre", "radius", "shift", "scale"), ("mlp",)),
        tasks,
        True,
        fixed,
        boxes=wide,
        tight=lambda generator, task: present(generator),
        begin=lambda generator, task, before: generator,
        keep=lambda generator, old, task: generator,
    )


def present(generator: Params) -> tuple[jax.Array, jax.Array]:
    """Returns centre and radius of the box, [N] each."""
    shift = jnp.tanh(generator["shift"])
    spread = jax.nn.sigmoid(generator["scale"]) * (1 - jnp.abs(shift)) * generator["radius"]
    return generator["centre"] + shift * generator["radius"], spread


def settled(generator: Params) -> Params:
    """Returns the generator of the same box with nothing shifted, for the next task to move in."""
    centre, radius = present(generator)
    return {
        "centre": centre,
        "radius": radius,
        "shift": jnp.zeros_like(centre),
        "scale": jnp.full_like(centre, FULL),
    }
