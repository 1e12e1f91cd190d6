"""Updates of symmetric matrices by a product, as one writes them first: the whole product, then the sum."""

from __future__ import annotations

import jax

from jaxcl.kernels.ridge import pair


def gram_update(a: pair.Pair, x: pair.Pair, sign: float = 1.0) -> pair.Pair:
    """Returns a + sign * x^T x in pairs; see `jaxcl.kernels.ridge.gram_update`."""
    cut = pair.pieces(x, 0)
    return pair.absorb(a, pair.parts(cut, cut, 0, 0), sign)


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`."""
    return r + sign * pair.contract(v, v, 0, 0)


def stream(r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that); see `jaxcl.kernels.ridge.stream`."""
    new = downdate(r, v, sign)
    return new, pair.contract(x, new, 1, 0)
