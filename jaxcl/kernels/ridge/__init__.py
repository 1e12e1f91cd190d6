"""Updates of symmetric matrices by a product: the Gram matrix of features and the inverse that follows it.

A program that is lowered for a TPU runs a Pallas kernel on lower blocks, one for a GPU the library's symmetric product
or large blocks (the Pallas kernel for Hopper has never run and must be asked for), all others small blocks. On a mesh
(see `jaxcl.kernels.sharded`) matrices are cut by rows over the batch axes, every device updates its own rows, and only
rows of features travel. `refused` says why a kernel is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxcl.kernels import sharded
from jaxcl.kernels.ridge import cpu, gpu, hopper, pair, tpu
from jaxcl.kernels.ridge.pair import Pair

__all__ = ["Pair", "downdate", "gram_update", "refused", "stream"]

Form = Callable[..., Any]
KINDS = ("float32", "float64")  # of an inverse; float64 has no kernel and is in plain XLA


def gram_update(a: Pair, x: Pair, sign: float = 1.0, *, kernel: bool | None = None) -> Pair:
    """Returns a + sign * x^T x, symmetric to the last bit, with an error of about 2^-40 of the largest products.

    Costs d^2 b operations in float64, on TPUs 6 d^2 b in float32, and writes in place where `a` is donated. On a mesh
    twice as many, shared by the devices, and symmetric up to that error.

    Args:
      a: float32 pair [d, d], symmetric.
      x: float32 pair [b, d].
      sign: 1, or -1 to take rows out.
      kernel: whether to use the kernels of all platforms that have some; None = where `refused` has nothing against it.

    Raises:
      ValueError: shapes that do not fit together.
    """
    _check(a.high, x, "gram_update")
    shared = None if kernel else sharded.strips(a.high.shape[0])
    if shared and shared.axes:
        return Pair(*shared.run(partial(_gram_strip, sign), a, x))

    def in_parts(form: Form) -> Form:  # of 128 rows, for that error
        return lambda a, x, sign: pair.in_blocks(lambda a, x: form(a, x, sign), a, x)

    forms = {
        "tpu": in_parts(tpu.gram_update),
        "slow": in_parts(cpu.gram_update_sliced),
        "cuda": gpu.gram_update,
        "default": cpu.gram_update,
    }
    return _whole(forms, refused(a.high.shape[0], x.high.shape[0], kernel=kernel), sign, kernel, shared, a, x)


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0, *, kernel: bool | None = None) -> jax.Array:
    """Returns r + sign * v^T v, symmetric to the last bit.

    Costs d^2 b operations in full float32 and writes in place where `r` is donated. On a mesh twice as many, shared by
    the devices, and symmetric up to rounding.

    Args:
      r: float32 or float64 [d, d], symmetric.
      v: of its type [b, d].
      sign: -1, or 1.
      kernel: see `gram_update`.

    Raises:
      ValueError: shapes or types that do not fit together.
    """
    _check(r, [v], "downdate", KINDS)
    shared = None if kernel else sharded.strips(r.shape[0])
    if shared and shared.axes:
        return shared.run(partial(cpu.strip, cpu.products, partial(cpu.sums, sign)), [r], [v])[0]
    hopper_or_not = hopper.downdate if _refused_by_hopper(r.shape[0], 0, kernel) is None else gpu.downdate
    forms = {"tpu": tpu.downdate, "slow": cpu.downdate, "cuda": hopper_or_not, "default": cpu.downdate}
    return _whole(forms, refused(r.shape[0], v.shape[0], kernel=kernel), sign, kernel, shared, r, v)


def stream(
    r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0, *, kernel: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that): what a batch leaves, and what the next one needs first.

    The kernel reads r once and writes it once for both. Costs d^2 (b + 2 n) operations; see `downdate`.

    Args:
      r: float32 or float64 [d, d], symmetric.
      v: of its type [b, d].
      x: of its type [n, d], the next rows.
      sign: -1, or 1.
      kernel: see `gram_update`.

    Raises:
      ValueError: shapes or types that do not fit together.
    """
    _check(r, [v, x], "stream", KINDS)
    if not kernel and sharded.strips(r.shape[0]):
        new = downdate(r, v, sign, kernel=kernel)
        return new, pair.contract(sharded.whole(x), new, 1, 1)  # along rows: every device has its own columns of it
    fused = tpu.stream if tpu.fits(v.shape[0], r.shape[0], x.shape[0]) else _in_turn
    hopper_or_not = hopper.stream if _refused_by_hopper(r.shape[0], 0, kernel) is None else gpu.stream
    forms = {"tpu": fused, "slow": cpu.stream, "cuda": hopper_or_not, "default": cpu.stream}
    return _whole(forms, refused(r.shape[0], v.shape[0], kernel=kernel), sign, kernel, None, r, v, x)


def refused(size: int, rows: int, *, ahead: int = 0, platform: str = "tpu", kernel: bool | None = None) -> str | None:
    """Returns why the Pallas kernel of a platform is not taken for an update; None if it is.

    Args:
      size: d of the matrix.
      rows: of the operand.
      ahead: rows of the next batch for `stream`, else 0.
      platform: that the program is lowered for.
      kernel: see `gram_update`; the mesh is the one that is set.
    """
    if platform not in ("tpu", "cuda"):
        return f"there is none for {platform}; the form in plain XLA is taken"
    if kernel is False:
        return "kernel=False takes none; None or True do"
    shared = sharded.strips(size)
    if kernel is None and shared and shared.axes:
        return f"rows are cut over {', '.join(shared.axes)}: every device updates its own in plain XLA"
    if kernel is None and not shared and not _alone():
        return (
            "the mesh that is set is not one of jaxcl.mesh, so that the matrix may be cut; kernel=True says it is not"
        )
    if platform == "cuda":
        return _refused_by_hopper(size, ahead, kernel)
    if ahead and not tpu.fits(rows, size, ahead):
        return f"products of {ahead} rows ahead at d={size} do not fit its memory: one update, then one product"
    return None


def _refused_by_hopper(size: int, ahead: int, kernel: bool | None) -> str | None:
    if not kernel:
        return "that for Hopper GPUs has never run; kernel=True takes it"
    if size % hopper.MULTIPLE:
        return f"d={size}; that for Hopper GPUs takes multiples of {hopper.MULTIPLE}"
    return "there is none with rows ahead for GPUs: one update, then one product" if ahead else None


def _check(matrix: jax.Array, rows: Sequence[jax.Array], name: str, kinds: tuple[str, ...] = ("float32",)) -> None:
    for x in rows:
        if x.ndim != 2 or matrix.shape != (x.shape[1],) * 2 or not x.size:
            shapes = f"matrix {list(matrix.shape)} and rows {list(x.shape)}"
            raise ValueError(f"{name}: {shapes}: expected [d, d] and [b, d]")
        if matrix.dtype != x.dtype or matrix.dtype not in kinds:
            raise ValueError(f"{name}: {matrix.dtype} and {x.dtype}: expected {' or '.join(kinds)} for both")
        sharded.check(x, name)


def _alone() -> bool:
    """Returns whether every device has all of what it is given."""
    mesh = jax.sharding.get_abstract_mesh()
    sides = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    return all(size == 1 or kind == AxisType.Manual for size, kind in sides)


def _in_turn(r: jax.Array, v: jax.Array, x: jax.Array, sign: float) -> tuple[jax.Array, jax.Array]:
    new = tpu.downdate(r, v, sign)
    return new, pair.contract(x, new, 1, 1)


def _gram_strip(
    sign: float, matrices: Sequence[jax.Array], left: Sequence[jax.Array], right: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """Returns new rows of a pair of matrices; see `sharded.Strips.run`."""

    def wide(a: Pair, left: Pair, right: Pair) -> list[jax.Array]:
        return cpu.strip(cpu.wide_products, partial(cpu.wide_sums, sign), a, left, right)

    def sliced(a: Pair, left: Pair, right: Pair) -> list[jax.Array]:
        def add(a: Sequence[jax.Array], rows: tuple[Pair, Pair]) -> list[jax.Array]:
            left, right = (pair.pieces(part, 0) for part in rows)
            return cpu.strip(cpu.gram_products, partial(cpu.gram_sums, sign), a, left, right)

        return pair.in_blocks(add, list(a), (left, right))

    return jax.lax.platform_dependent(Pair(*matrices), Pair(*left), Pair(*right), tpu=sliced, default=wide)


def _whole(
    forms: dict[str, Form],
    why_not: str | None,
    sign: float,
    kernel: bool | None,
    shared: sharded.Strips | None,
    *operands: Any,
) -> Any:
    """Returns the update of a matrix that is not cut, by the form of the platform.

    Args:
      forms: "tpu", and "slow" for a TPU if `why_not` says why; "cuda", and "default" for all others and for matrices
        that may be cut by a mesh of another kind.
      why_not: see `refused`.
      sign, kernel: see `gram_update`.
      shared: on a mesh of `jaxcl.mesh`, how.
      *operands: matrix and rows.
    """
    if jax.tree.leaves(operands)[0].dtype == jnp.float64:  # kernels are for float32
        forms = dict.fromkeys(forms, forms["default"])
    apart = kernel is None and not shared and not _alone()
    taken = {
        "tpu": forms["tpu" if why_not is None else "slow"],
        "cuda": forms["default" if apart else "cuda"],
        "default": forms["default"],
    }

    def run(*operands: Any) -> Any:
        return jax.lax.platform_dependent(*operands, **{n: partial(f, sign=sign) for n, f in taken.items()})

    return shared.alone(run, *operands) if shared else run(*operands)
