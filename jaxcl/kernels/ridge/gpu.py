"""Updates of symmetric matrices on GPUs in plain XLA, where one launch must do much: not measured on a GPU yet.

`downdate` is cuBLAS's symmetric product (ssyrk, float32 without TF32), in place, and a copy of its lower triangle to
the upper one. `gram_update` is the loop of `cpu` in float64 with blocks of 1024. `stream` is an update and then a
product: at full float32 both are bound by operations from some 64 rows on, so that to read the matrix once instead of
twice gains nothing. By rooflines of an H200 (d = 8192, b = 256): ssyrk 0.31 ms, the mirror 0.19 ms, the product 0.6 ms,
the gram 0.3 ms on its float64 tensor cores; a GPU without those is slow at it.
"""

from __future__ import annotations

import jax

from jaxcl.kernels.ridge import cpu, pair

SIDE = 1024  # of a block: 36 launches at d = 8192, each of milliseconds' parts rather than of their thousandths


def gram_update(a: pair.Pair, x: pair.Pair, sign: float = 1.0, *, side: int = SIDE) -> pair.Pair:
    """Returns a + sign * x^T x in pairs; see `jaxcl.kernels.ridge.gram_update`."""
    return cpu.gram_update(a, x, sign, side=side)


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`."""
    found = jax.lax.linalg.symmetric_product(v.T, r, alpha=sign, beta=1.0)  # only the lower triangle counts
    return cpu.mirrored(found)


def stream(r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that); see `jaxcl.kernels.ridge.stream`."""
    new = downdate(r, v, sign)
    return new, pair.contract(x, new, 1, 1)
