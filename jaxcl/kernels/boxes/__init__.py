"""Boxes and sums of generators through the last layer of a hypernetwork, which is read once and never copied.

Interval arithmetic through an affine layer (Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation",
section 3) takes a centre through V and a radius through |V|. A hypernetwork's last layer V [N, K] has a row for every
weight of its target network; at these sizes the product is bound by memory, and |V| would be a second V. Neither the
boxes nor the sums have a temporary of the size of V; their backward passes form its cotangent and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxcl.kernels import sharded
from jaxcl.kernels.boxes import blocks, reference, tpu

__all__ = ["affine", "row_sums", "update"]


class _Form(NamedTuple):
    """Which form of a function may be used.

    Attributes:
      local: whether a device has whole operands: a partitioner that cuts a loop over rows would gather them.
      kernel: whether a program for TPUs takes the kernel.
    """

    local: bool
    kernel: bool


def affine(
    weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array, *, kernel: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the centres and radii of T boxes behind an affine layer: centre V^T + bias and radius |V|^T.

    The derivative of |V| is sign(V), 0 at 0. The form is that of the platform that the program is lowered for: blocks
    of rows in XLA on CPUs and, larger, on GPUs; on TPUs a Pallas kernel, where K is at most `tpu.WIDEST` and T at most
    `tpu.MOST`. On a mesh of several devices, outside `jax.shard_map`, |V| is formed and the compiler cuts it.

    Args:
      weight: float32 [N, K], V.
      bias: float32 [N].
      centre: float32 [T, K].
      radius: float32 [T, K], >= 0, which is not checked.
      kernel: whether a program lowered for a TPU uses the kernel. None = where operands are known to be whole on a
        device: one device (`jax.set_mesh`), or all axes of the mesh in context manual (`jax.shard_map` with
        check_vma=False). True = wherever it fits.

    Returns:
      float32 [T, N], float32 [T, N].

    Raises:
      ValueError: shapes or dtypes that do not fit together; `jax.shard_map` without check_vma=False.
    """
    _check_boxes(weight, centre, radius)
    _check({"bias": bias})
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} for weight {list(weight.shape)}: expected one number for each row")
    return _affine(_form(kernel, weight, centre), weight, bias, centre, radius)


def row_sums(weight: jax.Array, generators: jax.Array, *, kernel: bool | None = None) -> jax.Array:
    """Returns the sum over s of |V g_s|: the radii of a zonotope behind an affine layer, float32 [N].

    The products [N, S] are not stored and are formed again for the gradient, in which sign(0) is 0. That costs a fourth
    matrix product where three would do: memory is saved, not time.

    Args:
      weight: float32 [N, K], V.
      generators: float32 [S, K], one g_s per row.
      kernel: see `affine`.

    Raises:
      ValueError: shapes or dtypes that do not fit together; `jax.shard_map` without check_vma=False.
    """
    _check({"weight": weight, "generators": generators})
    _check_matrix(generators, "generators", weight)
    return _row_sums(_form(kernel, weight, generators), weight, generators)


def update(
    weight: jax.Array,
    first: jax.Array,
    second: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    d_centre: jax.Array,
    d_radius: jax.Array,
    *,
    lr: jax.Array | float,
    count: jax.Array | int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    kernel: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns V and its moments after a step of Adam with the gradient that `affine` has for V, which is never stored.

    What `optax.adam` does (Kingma & Ba 2015, algorithm 1) with the cotangent of V, in place where the three arrays are
    donated. Gradients of the other operands are those of `affine` at the old V, to be taken before. Not differentiable
    on TPUs.

    Args:
      weight: float32 [N, K], V.
      first: float32 [N, K], the mean of gradients.
      second: float32 [N, K], the mean of their squares.
      centre: float32 [T, K], as given to `affine`.
      radius: float32 [T, K], likewise.
      d_centre: float32 [T, N], the gradient of what `affine` returned first.
      d_radius: float32 [T, N], of what it returned second.
      lr: a number or float [].
      count: steps taken before this one, a number or int [].
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: is added to the root of the second moment.
      kernel: see `affine`.

    Returns:
      float32 [N, K], new weight, first and second.

    Raises:
      ValueError: shapes or dtypes that do not fit together, a decay out of range; `jax.shard_map` without
        check_vma=False.
    """
    _check_boxes(weight, centre, radius)
    results = (centre.shape[0], weight.shape[0])
    _check_shapes({"first": first, "second": second}, weight.shape)
    _check_shapes({"d_centre": d_centre, "d_radius": d_radius}, results)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"b1={b1}, b2={b2}: expected numbers from 0 to less than 1")
    shares = [1 - jnp.float32(b) ** (jnp.asarray(count) + 1) for b in (b1, b2)]
    numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in (lr, b1, b2, eps, *shares)])
    form, rooms = _form(kernel, weight, centre), (blocks.PASS, blocks.LARGE)
    operands = (weight, first, second, centre, radius, d_centre, d_radius, numbers)
    return _platform(form, reference.update, blocks.update, tpu.update, *operands, rooms=rooms)


def _check(operands: Mapping[str, jax.Array]) -> None:
    for name, x in operands.items():
        sharded.check(x, name)
        if x.dtype != jnp.float32:
            raise ValueError(f"{name} {x.dtype}{list(x.shape)}: expected float32")


def _check_shapes(operands: Mapping[str, jax.Array], shape: tuple[int, ...]) -> None:
    _check(operands)
    for name, x in operands.items():
        if x.shape != shape:
            raise ValueError(f"{name} {list(x.shape)}: expected {list(shape)}")


def _check_boxes(weight: jax.Array, centre: jax.Array, radius: jax.Array) -> None:
    _check({"weight": weight, "centre": centre, "radius": radius})
    _check_matrix(centre, "centre", weight)
    if radius.shape != centre.shape:
        raise ValueError(f"radius {list(radius.shape)} for centre {list(centre.shape)}: expected the same shape")


def _check_matrix(x: jax.Array, name: str, weight: jax.Array) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not (x.size and weight.size):
        found = f"weight {list(weight.shape)} and {name} {list(x.shape)}"
        raise ValueError(f"{found}: expected [N, K] and [.., K], neither of them empty")


def _form(kernel: bool | None, weight: jax.Array, few: jax.Array) -> _Form:
    mesh = jax.sharding.get_abstract_mesh()
    sides = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    local = all(size == 1 or kind == AxisType.Manual for size, kind in sides)
    wanted = local and not mesh.empty if kernel is None else kernel
    return _Form(local, wanted and tpu.fits(weight.shape[1], few.shape[0]))


def _platform(
    form: _Form,
    whole: Any,
    blockwise: Any,
    fast: Any,
    *operands: jax.Array,
    rooms: tuple[int, int] = (blocks.CACHE, blocks.LARGE),
) -> Any:
    """Runs the form for the platform that the program is lowered for."""
    small, large = (functools.partial(blockwise, room) if form.local else whole for room in rooms)
    cases = {"cpu": small, **({"tpu": fast} if form.kernel else {})}
    return jax.lax.platform_dependent(*operands, **cases, default=large)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(form: _Form, weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array) -> Any:
    return _platform(form, reference.affine, blocks.affine, tpu.affine, weight, bias, centre, radius)


def _affine_fwd(form: _Form, weight: jax.Array, bias: jax.Array, centre: jax.Array, radius: jax.Array) -> Any:
    return _affine(form, weight, bias, centre, radius), (weight, centre, radius)


def _affine_bwd(form: _Form, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    forms = reference.affine_backward, blocks.affine_backward, tpu.affine_backward
    return _platform(form, *forms, *saved, *cotangents)


_affine.defvjp(_affine_fwd, _affine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_sums(form: _Form, weight: jax.Array, generators: jax.Array) -> jax.Array:
    return _platform(form, reference.row_sums, blocks.row_sums, tpu.row_sums, weight, generators)


def _row_sums_fwd(form: _Form, weight: jax.Array, generators: jax.Array) -> Any:
    return _row_sums(form, weight, generators), (weight, generators)


def _row_sums_bwd(form: _Form, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    forms = reference.row_sums_backward, blocks.row_sums_backward, tpu.row_sums_backward
    return _platform(form, *forms, *saved, cotangent)


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)
