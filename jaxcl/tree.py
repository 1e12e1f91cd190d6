"""Arithmetic on parameter trees: dot, norm, lerp, cast, named leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.types import PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """Returns `a/b/c` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns `(path, leaf)` pairs in flattening order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `function(path, leaf, *other_leaves)` over `tree`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Returns the inner product of two trees, float32 []."""
    terms = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def norm(a: PyTree) -> jax.Array:
    """Returns the Euclidean norm over all leaves, float32 []."""
    return jnp.sqrt(dot(a, a))


def add(a: PyTree, b: PyTree, scale: jax.Array | float = 1.0) -> PyTree:
    """Returns `a + scale * b`."""
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def residual(continued: PyTree, base: PyTree, instruct: PyTree, scale: jax.Array | float = 1.0) -> PyTree:
    """Returns `instruct + scale * (continued - base)`, summed in float32, in the types of `instruct`.

    Where `continued` equals `base` the result has the bits of `instruct`, also those of -0.0 and NaN.
    Source: arXiv 2410.10739.
    """

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    def leaf(after: jax.Array, before: jax.Array, anchor: jax.Array) -> jax.Array:
        wide = jnp.promote_types(anchor.dtype, jnp.float32)
        c, b = after.astype(wide), before.astype(wide)
        value = (anchor.astype(wide) + scale * (c - b)).astype(anchor.dtype)
        kept = (c == b) | (bits(c) == bits(b))
        return jax.lax.bitcast_convert_type(jnp.where(kept, bits(anchor), bits(value)), anchor.dtype)

    return jax.tree.map(leaf, continued, base, instruct)


def lerp(a: PyTree, b: PyTree, weight: jax.Array | float) -> PyTree:
    """Returns `a + weight * (b - a)`; exactly `b` at weight 1 and exactly `a` at weight 0."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        mixed = jnp.where(weight == 0.0, x, x + weight * (y - x))  # -0.0 + 0.0 is not -0.0
        return jnp.where(weight == 1.0, y, mixed).astype(x.dtype)  # x + (y - x) need not equal y in floating point

    return jax.tree.map(leaf, a, b)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Returns `a` if the scalar `condition` holds, else `b`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts floating-point leaves to `dtype` and leaves the rest alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def size(tree: PyTree) -> int:
    """Returns the number of elements over all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def finite(tree: PyTree) -> jax.Array:
    """Returns whether every element of every floating-point leaf is finite, bool []."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)
