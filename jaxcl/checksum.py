"""Checksums of arrays, computed where they live: one number for the values, however they are cut over devices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.tree import named_leaves
from jaxcl.types import Params


def checksums(arrays: list[jax.Array]) -> jax.Array:
    """Returns one uint32 for each array, copied to every device: it depends on the values, not on how they are cut.

    Each element's bits are multiplied by an odd number made from its index and summed modulo 2^32, so the order of
    the sum does not matter and no single changed element goes unseen.
    """
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return jax.jit(_checksum_all, out_shardings=out)(arrays)


def table(params: Params) -> dict[str, list[Any]]:
    """Returns shape, type and checksum of every array by its name, as JSON."""
    leaves = named_leaves(params)
    sums = np.asarray(checksums([x for _, x in leaves]).addressable_data(0)).tolist()
    return {name: [list(x.shape), str(x.dtype), total] for (name, x), total in zip(leaves, sums, strict=True)}


def _checksum_all(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(x) for x in arrays])


def _checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _checksum(x.real) + _checksum(x.imag) * jnp.uint32(3)
    bits = x.astype(jnp.uint32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride) if size > 1 else 0
    odd = (index * jnp.uint32(0x9E3779B1) ^ (index >> 15)) | jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def _unsigned(dtype: Any) -> Any:
    """Returns the unsigned type that holds the bits of `dtype`; 8 bytes become two of 4."""
    return {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[np.dtype(dtype).itemsize]
