"""Products with the last layer of a hypernetwork on TPUs in Pallas: a tile of its rows at a time, read once.

V [N, K] is cut into tiles of rows, each with all of K, so that |V|, sign(V) and products with generators live and die
in VMEM. A TPU keeps a tall matrix whose rows are no multiple of 128 by columns, as it would pad them; so the kernels
take V^T, which is no copy, and rows of V lie in the lanes of everything. Boxes and generators lie whole in VMEM.
Gradients that are sums over rows are accumulated over the tiles in one order, so that two runs give the same bits.
Products of float32 run in full. N need not divide: what lies beyond the last row is masked where it would be summed,
and is never written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcl.kernels.boxes.reference import dot, signed

_LANES = 128
_VMEM = 2**23  # bytes of the tiles of rows, both buffers: half of the 16 MiB that every TPU has for a kernel
_ARRAYS = 14  # of a tile's size, at most: three operands and three results in two buffers, two products
WIDEST = _VMEM // (4 * _ARRAYS * _LANES)  # K of the thinnest tile that fits
MOST = 256  # boxes, or generators
_LAYER = ("lane weight", "lane first", "lane second")  # [K, N]


def fits(width: int, count: int) -> bool:
    """Returns whether kernels take K = `width` and `count` boxes or generators.

    Rows of a multiple of 128 numbers are kept as they are, and V^T would be a copy.
    """
    return width <= WIDEST and width % _LANES != 0 and count <= MOST


def default_rows(width: int) -> int:
    """Returns the rows of a tile for K = `width`: a power of two from 128 to 1024."""
    rows = 1024
    while rows > _LANES and 4 * width * _ARRAYS * rows > _VMEM:
        rows //= 2
    return rows


def _call(
    body: Callable[..., None],
    operands: Mapping[str, jax.Array],
    results: Mapping[str, tuple[int, ...]],
    *,
    products: int,
    rows: int | None,
    interpret: Any,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Runs `body(own, *refs)` for every tile of rows.

    Args:
      body: a kernel; `own` gives the rows of the tile that exist, a mask along an axis.
      operands: by name, float32. What starts with "lane" is [., N] and tiled along axis 1, "scalar" is [1, .]; other
        operands are whole for each tile. "lane weight" is V^T.
      results: shapes by name, likewise; whole results are accumulated.
      products: matrix products with a tile of V, for the cost estimate.
      rows: of a tile: a multiple of 128; None = `default_rows`.
      interpret: as for `pl.pallas_call`.
      aliases: results that overwrite operands, by position.
    """
    width, total = operands["lane weight"].shape
    size = min(rows or default_rows(width), total)

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name.startswith("lane"):
            return pl.BlockSpec((shape[0], size), lambda i: (0, i))
        if name == "scalar":
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.BlockSpec(shape, lambda i: (0, 0))

    def own(x: jax.Array, axis: int) -> jax.Array:
        """Returns x with zeros beyond the last row; what was there may be NaN."""
        if total % size == 0:
            return x
        at = pl.program_id(0) * size + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(at < total, x, 0.0)

    sums = any(not name.startswith("lane") for name in results)
    count = max(x.shape[0] for name, x in operands.items() if not name.startswith(_LAYER))
    moved = sum(x.nbytes for x in operands.values()) + sum(4 * a * b for a, b in results.values())
    return pl.pallas_call(
        functools.partial(body, own),
        grid=(pl.cdiv(total, size),),
        in_specs=[spec(name, x.shape) for name, x in operands.items()],
        out_specs=[spec(*x) for x in results.items()],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results.values()],
        input_output_aliases=dict(aliases or {}),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary" if sums else "parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * total * width * count, bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpret,
        name=f"boxes_{body.__name__.strip('_')}",
    )(*operands.values())


def _start(*totals: Any) -> None:
    """Sets accumulators to zero before the first tile."""

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)


def _pull(weight: jax.Array, centre: Any, radius: Any, d_centre: Any, d_radius: Any) -> jax.Array:
    """Returns the cotangent of a tile of V^T."""
    half = dot(radius[...], d_radius[...], 0, 0)
    return dot(centre[...], d_centre[...], 0, 0) + signed(half, weight)


def _affine(_: Any, weight: Any, bias: Any, centre: Any, radius: Any, middle: Any, half: Any) -> None:
    block = weight[...]
    middle[...] = dot(centre[...], block, 1, 0) + jnp.broadcast_to(bias[...], middle.shape)
    half[...] = dot(radius[...], jnp.abs(block), 1, 0)


def affine(
    weight: jax.Array,
    bias: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    *,
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns centre weight^T + bias and radius |weight|^T, both float32 [T, N].

    Args:
      weight: float32 [N, K].
      bias: float32 [N].
      centre: float32 [T, K].
      radius: float32 [T, K].
      rows: of a tile, a multiple of 128; None = `default_rows`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    operands = {"lane weight": weight.T, "lane": bias[None], "centre": centre, "radius": radius}
    shape = (centre.shape[0], weight.shape[0])
    results = {"lane centre": shape, "lane radius": shape}
    middle, half = _call(_affine, operands, results, products=2, rows=rows, interpret=interpret)
    return middle, half


def _affine_backward(own: Any, weight: Any, *refs: Any) -> None:
    centre, radius, d_centre, d_radius, d_weight, of_centre, of_radius = refs
    d_weight[...] = _pull(weight[...], centre, radius, d_centre, d_radius)
    _start(of_centre, of_radius)
    block = own(weight[...], 1)
    of_centre[...] += dot(own(d_centre[...], 1), block, 1, 1)
    of_radius[...] += dot(own(d_radius[...], 1), jnp.abs(block), 1, 1)


def affine_backward(
    weight: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    d_centre: jax.Array,
    d_radius: jax.Array,
    *,
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (weight, bias, centre, radius), given those of the results, [T, N] both."""
    operands = {
        "lane weight": weight.T,
        "centre": centre,
        "radius": radius,
        "lane centre": d_centre,
        "lane radius": d_radius,
    }
    results = {"lane weight": weight.shape[::-1], "centre": centre.shape, "radius": radius.shape}
    out = _call(_affine_backward, operands, results, products=4, rows=rows, interpret=interpret)
    return out[0].T, jnp.sum(d_centre, 0), out[1], out[2]


def _row_sums(_: Any, weight: Any, generators: Any, sums: Any) -> None:
    sums[...] = jnp.sum(jnp.abs(dot(generators[...], weight[...], 1, 0)), 0, keepdims=True)


def row_sums(weight: jax.Array, generators: jax.Array, *, rows: int | None = None, interpret: Any = False) -> jax.Array:
    """Returns sum_s |weight generators_s|, float32 [N], of weight [N, K] and generators [S, K]."""
    operands, results = {"lane weight": weight.T, "generators": generators}, {"lane": (1, weight.shape[0])}
    return _call(_row_sums, operands, results, products=1, rows=rows, interpret=interpret)[0][0]


def _row_sums_backward(own: Any, weight: Any, generators: Any, d_sums: Any, d_weight: Any, d_generators: Any) -> None:
    block = own(weight[...], 1)
    moved = dot(generators[...], block, 1, 0)  # [S, rows]
    d = signed(jnp.broadcast_to(own(d_sums[...], 1), moved.shape), moved)
    d_weight[...] = dot(generators[...], d, 0, 0)
    _start(d_generators)
    d_generators[...] += dot(d, block, 1, 1)


def row_sums_backward(
    weight: jax.Array, generators: jax.Array, d_sums: jax.Array, *, rows: int | None = None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of (weight, generators), given that of the sums [N]."""
    operands = {"lane weight": weight.T, "generators": generators, "lane": d_sums[None]}
    results = {"lane weight": weight.shape[::-1], "generators": generators.shape}
    d_weight, of_generators = _call(_row_sums_backward, operands, results, products=3, rows=rows, interpret=interpret)
    return d_weight.T, of_generators


def _update(_: Any, weight: Any, first: Any, second: Any, *refs: Any) -> None:
    centre, radius, d_centre, d_radius, numbers, new_weight, new_first, new_second = refs
    lr, b1, b2, eps, share_1, share_2 = (numbers[0, i] for i in range(6))
    d_weight = _pull(weight[...], centre, radius, d_centre, d_radius)
    m = b1 * first[...] + (1 - b1) * d_weight
    v = b2 * second[...] + (1 - b2) * d_weight**2
    new_first[...], new_second[...] = m, v
    new_weight[...] = weight[...] - lr * (m / share_1) / (jnp.sqrt(v / share_2) + eps)


def update(
    weight: jax.Array,
    first: jax.Array,
    second: jax.Array,
    centre: jax.Array,
    radius: jax.Array,
    d_centre: jax.Array,
    d_radius: jax.Array,
    numbers: jax.Array,
    *,
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weight and moments after a step of Adam; they overwrite those given, if these are donated.

    Args:
      weight: float32 [N, K].
      first: float32 [N, K].
      second: float32 [N, K].
      centre: float32 [T, K].
      radius: float32 [T, K].
      d_centre: float32 [T, N].
      d_radius: float32 [T, N].
      numbers: float32 [6]: lr, b1, b2, eps, 1 - b1^n, 1 - b2^n for step n = 1, 2, ...
      rows: of a tile, a multiple of 128; None = `default_rows`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    operands = dict(zip(_LAYER, (weight.T, first.T, second.T), strict=True))
    results = {name: x.shape for name, x in operands.items()}
    operands |= {"centre": centre, "radius": radius, "lane centre": d_centre, "lane radius": d_radius}
    operands |= {"scalar": numbers[None]}
    aliases = {0: 0, 1: 1, 2: 2}
    out = _call(_update, operands, results, products=2, rows=rows, interpret=interpret, aliases=aliases)
    return out[0].T, out[1].T, out[2].T
