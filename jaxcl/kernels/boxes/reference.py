"""The definitions, with |V| and sign(V) whole: what the other forms are tested against, and what a mesh can cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a [.., ..] with axis j of b [.., ..] in full precision: a rounded bound is none."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def signed(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns x * sign(like), 0 where `like` is 0, for arrays of one shape."""
    return jnp.where(like > 0, x, jnp.where(like < 0, -x, 0.0))


def affine(
    weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:  # [T, N] twice
    """Returns centre weight^T + bias and radius |weight|^T, both [T, N]."""
    return dot(centre, weight, 1, 1) + bias[None], dot(radius, jnp.abs(weight), 1, 1)


def affine_backward(
    weight: jax.Array, centre: jax.Array, radius: jax.Array, d_centre: jax.Array, d_radius: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (weight, bias, centre, radius), given those of the results, [T, N] both."""
    d_weight = dot(d_centre, centre, 0, 0) + jnp.sign(weight) * dot(d_radius, radius, 0, 0)
    return d_weight, jnp.sum(d_centre, 0), dot(d_centre, weight, 1, 0), dot(d_radius, jnp.abs(weight), 1, 0)


def row_sums(weight: jax.Array, generators: jax.Array) -> jax.Array:
    """Returns sum_s |weight generators_s|, [N]."""
    return jnp.sum(jnp.abs(dot(weight, generators, 1, 1)), 1)


def row_sums_backward(weight: jax.Array, generators: jax.Array, d_sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of (weight, generators), given that of the sums [N]."""
    d = jnp.sign(dot(weight, generators, 1, 1)) * d_sums[:, None]  # [N, S]
    return dot(d, generators, 1, 0), dot(d, weight, 0, 0)


def update(
    weight: jax.Array,
    first: jax.Array,
    second: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    d_centre: jax.Array,
    d_radius: jax.Array,
    numbers: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weight and moments after a step of Adam; `numbers` are those of `tpu.update`."""
    lr, b1, b2, eps, share_1, share_2 = numbers
    d_weight = affine_backward(weight, centre, radius, d_centre, d_radius)[0]
    first = b1 * first + (1 - b1) * d_weight
    second = b2 * second + (1 - b2) * d_weight**2
    return weight - lr * (first / share_1) / (jnp.sqrt(second / share_2) + eps), first, second
