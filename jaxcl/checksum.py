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

BLOCK = 2**20  # elements


def checksums(arrays: list[jax.Array]) -> jax.Array:
    """Returns one uint32 for each array, copied to every device: it depends on the values, not on how they are cut.

    Each element's bits are multiplied by an odd number made from its index and summed modulo 2^32, so the order of
    the sum does not matter and no single changed element goes unseen.
    """
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    devices = {device for x in arrays for device in x.sharding.device_set}
    whole = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return jax.jit(_checksum_all, static_argnums=0, out_shardings=out)(whole, arrays)


def table(params: Params) -> dict[str, list[Any]]:
    """Returns shape, type and checksum of every array by its name, as JSON."""
    leaves = named_leaves(params)
    sums = np.asarray(checksums([x for _, x in leaves]).addressable_data(0)).tolist()
    return {name: [list(x.shape), str(x.dtype), total] for (name, x), total in zip(leaves, sums, strict=True)}


def _checksum_all(whole: bool, arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_in_blocks(x) if whole else _checksum(x) for x in arrays])


def _in_blocks(x: jax.Array) -> jax.Array:
    """Returns `_checksum` of an array on one device, whose products XLA for CPUs would otherwise write to memory."""
    if not BLOCK < x.size < 2**31:  # the loop counts in int32
        return _checksum(x)
    flat, count = x.reshape(-1), x.size // BLOCK

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _checksum(jax.lax.dynamic_slice_in_dim(flat, i * BLOCK, BLOCK), i * BLOCK)

    total = jax.lax.fori_loop(0, count, add, jnp.uint32(0))
    rest = flat[count * BLOCK :]
    return total + _checksum(rest, count * BLOCK) if rest.size else total


def _checksum(x: jax.Array, first: Any = 0) -> jax.Array:
    """Returns the checksum of an array; of a part of a flat one, `first` is the index of its first element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _checksum(x.real, first) + _checksum(x.imag, first) * jnp.uint32(3)
    bits = x.astype(jnp.uint32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    bits = bits.astype(jnp.uint32)
    words = bits.size // max(x.size, 1)  # of an element: two where it has 8 bytes
    index = jnp.full(bits.shape, first * words, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride) if size > 1 else 0
    odd = (index * jnp.uint32(0x9E3779B1) ^ (index >> 15)) | jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def _unsigned(dtype: Any) -> Any:
    """Returns the unsigned type that holds the bits of `dtype`; 8 bytes become two of 4."""
    return {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[np.dtype(dtype).itemsize]
