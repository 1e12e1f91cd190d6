"""Keys as pure functions of (seed, name, step): all randomness is derived, none is stored."""

from __future__ import annotations

import zlib

import jax

from jaxcl.types import Key


def key_for(seed: int, name: str, step: jax.Array | int = 0) -> Key:
    """Returns `fold_in(fold_in(key(seed), crc32(name)), step)`; `step` may be traced."""
    return jax.random.fold_in(named(jax.random.key(seed), name), step)


def named(key: Key, name: str) -> Key:
    """Returns the stream of `key` that belongs to `name`, so that parts of a step draw independently."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
