"""Updates of symmetric matrices by a product: the Gram matrix of features and the inverse that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxcl.kernels.ridge import cpu, tpu
from jaxcl.kernels.ridge.pair import ROWS, Pair

PyTree = Any

__all__ = ["Pair", "downdate", "gram_update"]


def gram_update(a: Pair, x: Pair, sign: float = 1.0, *, kernel: bool | None = None) -> Pair:
    """Returns a + sign * x^T x, symmetric to the last bit, with an error of about 2^-40 of the largest products.

    Costs d^2 b operations in float64, on TPUs 6 d^2 b in float32, and writes in place where `a` is donated.

    Args:
      a: float32 pair [d, d], symmetric.
      x: float32 pair [b, d].
      sign: 1, or -1 to take rows out.
      kernel: whether to use the TPU kernel where there is a TPU; None = unless the arrays may be sharded.

    Raises:
      ValueError: shapes that do not fit together.
    """
    _check(a.high, x.high, "gram_update")

    def fast(a: Pair, x: Pair) -> Pair:
        return in_blocks(lambda a, x: tpu.gram_update(a, x, sign), a, x)

    def sliced(a: Pair, x: Pair) -> Pair:
        return in_blocks(lambda a, x: cpu.gram_update_sliced(a, x, sign), a, x)

    return _platform(fast, sliced, lambda a, x: cpu.gram_update(a, x, sign), kernel, a, x)


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0, *, kernel: bool | None = None) -> jax.Array:
    """Returns r + sign * v^T v, symmetric to the last bit.

    Costs d^2 b operations in full float32 and writes in place where `r` is donated.

    Args:
      r: float32 [d, d], symmetric.
      v: float32 [b, d].
      sign: -1, or 1.
      kernel: see `gram_update`.

    Raises:
      ValueError: shapes that do not fit together.
    """
    _check(r, v, "downdate")

    def plain(r: jax.Array, v: jax.Array) -> jax.Array:
        return cpu.downdate(r, v, sign)

    return _platform(lambda r, v: tpu.downdate(r, v, sign), plain, plain, kernel, r, v)


def in_blocks(add: Callable[[PyTree, PyTree], PyTree], into: PyTree, rows: PyTree, most: int = ROWS) -> PyTree:
    """Returns `into` with blocks of at most `most` rows added one after the other; every leaf of `rows` is [b, ...]."""
    whole, last = divmod(jax.tree.leaves(rows)[0].shape[0], most)
    if whole > 1:
        cut = jax.tree.map(lambda x: x[: whole * most].reshape(whole, most, *x.shape[1:]), rows)
        into, _ = jax.lax.scan(lambda one, part: (add(one, part), None), into, cut)
    elif whole:
        into = add(into, jax.tree.map(lambda x: x[:most], rows))
    return add(into, jax.tree.map(lambda x: x[-last:], rows)) if last else into


def _check(matrix: jax.Array, rows: jax.Array, name: str) -> None:
    if rows.ndim != 2 or matrix.shape != (rows.shape[1],) * 2 or not rows.size:
        raise ValueError(f"{name}: matrix {list(matrix.shape)} and rows {list(rows.shape)}: expected [d, d] and [b, d]")
    if matrix.dtype != jnp.float32 or rows.dtype != jnp.float32:
        raise ValueError(f"{name}: {matrix.dtype} and {rows.dtype}: expected float32")


def _platform(fast: Any, slow: Any, plain: Any, kernel: bool | None, *operands: Any) -> Any:
    """Applies `fast` on TPUs, or `slow` there if the kernel is not wanted, and `plain` elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    sides = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    alone = all(size == 1 or kind == AxisType.Manual for size, kind in sides)
    chosen = slow if kernel is False or (kernel is None and not alone) else fast
    return jax.lax.platform_dependent(*operands, tpu=chosen, default=plain)
