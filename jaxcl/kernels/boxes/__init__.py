"""Boxes and sums of generators through the last layer of a hypernetwork, which is read once and never copied.

Interval arithmetic through an affine layer (Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation",
section 3) takes a centre through V and a radius through |V|. A hypernetwork's last layer V [N, K] has a row for every
weight of its target network; at these sizes the product is bound by memory, and |V| would be a second V. Box and
reduction forms alike have no temporary of the size of V; their backward passes form its cotangent and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxcl.kernels import sharded
from jaxcl.kernels.boxes import blocks, reference

__all__ = ["affine", "row_sums"]


def affine(weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the centres and radii of T boxes behind an affine layer: centre V^T + bias and radius |V|^T.

    The derivative of |V| is sign(V), 0 at 0. On a mesh of several devices, outside `jax.shard_map`, |V| is formed.

    Args:
      weight: float32 [N, K], V.
      bias: float32 [N].
      centre: float32 [T, K].
      radius: float32 [T, K], >= 0, which is not checked.

    Returns:
      float32 [T, N], float32 [T, N].

    Raises:
      ValueError: shapes or dtypes that do not fit together; `jax.shard_map` without check_vma=False.
    """
    (boxes, width), rows = _matrix(centre, "centre"), _rows(weight, bias=bias, centre=centre, radius=radius)
    if weight.shape[1] != width or radius.shape != (boxes, width) or bias.shape != (rows,):
        found = f"weight {list(weight.shape)}, bias {list(bias.shape)}, centre {list(centre.shape)}"
        raise ValueError(f"{found} and radius {list(radius.shape)}: expected [N, K], [N], [T, K] and [T, K]")
    return _affine(_local(), weight, bias, centre, radius)


def row_sums(weight: jax.Array, generators: jax.Array) -> jax.Array:
    """Returns the sum over s of |V g_s|: the radii of a zonotope behind an affine layer, float32 [N].

    The products [N, S] are not stored and are formed again for the gradient, in which sign(0) is 0.

    Args:
      weight: float32 [N, K], V.
      generators: float32 [S, K], one g_s per row.

    Raises:
      ValueError: shapes or dtypes that do not fit together; `jax.shard_map` without check_vma=False.
    """
    _rows(weight, generators=generators)
    if _matrix(generators, "generators")[1] != weight.shape[1]:
        found = f"weight {list(weight.shape)} and generators {list(generators.shape)}"
        raise ValueError(f"{found}: expected [N, K] and [S, K]")
    return _row_sums(_local(), weight, generators)


def _matrix(x: jax.Array, name: str) -> tuple[int, int]:
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} {list(x.shape)}: expected a matrix that is not empty")
    return x.shape[0], x.shape[1]


def _rows(weight: jax.Array, **others: jax.Array) -> int:
    """Returns N and raises ValueError for operands that are not float32 like the weight."""
    for name, x in {"weight": weight, **others}.items():
        sharded.check(x, name)
        if x.dtype != jnp.float32:
            raise ValueError(f"{name} {x.dtype}{list(x.shape)}: expected float32")
    return _matrix(weight, "weight")[0]


def _local() -> bool:
    """Returns whether a device has whole operands: a partitioner that cuts a loop over rows would gather them."""
    mesh = jax.sharding.get_abstract_mesh()
    sides = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return all(size == 1 or kind == AxisType.Manual for size, kind in sides)


def _platform(local: bool, whole: Any, blockwise: Any, *operands: jax.Array) -> Any:
    """Runs the form for the platform that the program is lowered for."""
    if not local:
        return whole(*operands)
    small, large = (functools.partial(blockwise, room) for room in (blocks.CACHE, blocks.LARGE))
    return jax.lax.platform_dependent(*operands, cpu=small, default=large)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(local: bool, weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array) -> Any:
    return _platform(local, reference.affine, blocks.affine, weight, bias, centre, radius)


def _affine_fwd(local: bool, weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array) -> Any:
    return _affine(local, weight, bias, centre, radius), (weight, centre, radius)


def _affine_bwd(local: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    return _platform(local, reference.affine_backward, blocks.affine_backward, *saved, *cotangents)


_affine.defvjp(_affine_fwd, _affine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_sums(local: bool, weight: jax.Array, generators: jax.Array) -> jax.Array:
    return _platform(local, reference.row_sums, blocks.row_sums, weight, generators)


def _row_sums_fwd(local: bool, weight: jax.Array, generators: jax.Array) -> Any:
    return _row_sums(local, weight, generators), (weight, generators)


def _row_sums_bwd(local: bool, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    return _platform(local, reference.row_sums_backward, blocks.row_sums_backward, *saved, cotangent)


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)
