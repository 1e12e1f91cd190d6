"""Self-attention for Hopper GPUs (sm_90a) in Pallas Mosaic GPU: the forward pass, and the tables both passes read.

A block of 128 queries belongs to two warpgroups, 64 each; a third one streams the keys and values that some of them see
through shared memory (TMA). Documents lie in one piece, so that the keys of query i are an interval first[i] <= j <
last[i]: segments, causality, window and padding all come down to these two numbers. Tiles outside every interval are
never read, tiles inside all of them are not masked, and no mask or score matrix exists in memory.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NEVER = -1e30  # logsumexp of a query that sees no key; finite, so that a difference of two is not NaN
LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup: one wgmma instruction
TEAMS = 2  # warpgroups that compute, beside the one that loads
WIDE, NARROW = 240, 24  # registers per thread of those and of this one: 128 * (2 * 240 + 24) <= 65,536
STAGES = 2  # tiles of keys and values in flight
LENGTH = 128  # rows are padded to a multiple of this
FORWARD_KEYS = {64: 128, 128: 128, 256: 64}  # keys per tile by head dimension: shared memory holds 227 KiB
LAUNCH = {
    "num_threads": TEAMS + 1,
    "thread_name": "team",
    # Lane: what both JAX lines compile these kernels with; the default differs.
    "compiler_params": plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
}
_FAR = 2**30
WGMMA = plgpu.Layout.WGMMA  # how a warpgroup holds a product; the next two: how it holds a vector along its axes
BY_ROW = WGMMA.reduce(1)
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
BY_COLUMN = WGMMA.reduce(0)


class Reach(NamedTuple):
    """Which keys [first, last) every query sees, int32 [B, L] each; first >= last: none."""

    first: jax.Array
    last: jax.Array


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, L, H, K] in the dtype of `q`, and the logsumexp of the scores, float32 [B, H, L].

    Args:
      q: bfloat16 or float16 [B, L, H, K], K in 64, 128, 256.
      k: as `q`, [B, L, G, K]; H is a multiple of G.
      v: as `k`.
      segments: int32 [B, L], 0 = padding, every document in one piece; None = one document.
      window: int32 []: see `jaxcl.kernels.attention.attention`; None = all.
      causal: whether a query is kept from later keys.
      scale: factor on the scores, above 0.
      soft_cap: scores s become soft_cap * tanh(s / soft_cap); None = they stay.
      interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU (JAX 0.11 and later).

    Raises:
      ValueError: a dtype, head dimension or scale that the kernel does not take.
    """
    check(q, k, v, scale)
    (rows, length, heads, width), groups = q.shape, k.shape[2]
    reach = reachable(rows, length, segments, window, causal)
    q, k, v, first, last = (pad(x) for x in (q, k, v, *reach))
    keys = FORWARD_KEYS[width]
    mixed, lse = plgpu.kernel(
        functools.partial(_forward, scale=scale, soft_cap=soft_cap, share=heads // groups, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, q.shape[1]), jnp.float32),
        ),
        scratch_types=_forward_scratch(width, keys, functools.partial(tile_of, dtype=q.dtype)),
        grid=(rows, q.shape[1] // (TEAMS * ROWS), heads),
        grid_names=("row", "block", "head"),
        interpret=interpret,
        **LAUNCH,
    )(
        *(q, k, v, jnp.stack([first, last], axis=1)),
        spans(first, last, TEAMS * ROWS, keys).visited,
        spans(first, last, ROWS, keys).inner,
    )
    return mixed[:, :length], lse[:, :, :length]


def _forward_scratch(width, keys, tiled):
    return {
        "q_tile": tiled((TEAMS, ROWS, width)),
        "k_tile": tiled((STAGES, keys, width)),
        "v_tile": tiled((STAGES, keys, width)),
        "bounds": plgpu.SMEM((TEAMS, 2, ROWS), jnp.int32),
        "lse_tile": plgpu.SMEM((TEAMS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS),
        **barriers(STAGES, "k", "v"),
    }


def barriers(stages: int, *names: str, q_parts: int = 1) -> dict[str, Any]:
    """Returns for each stream the barriers that its tiles are there, and that no team needs them any more."""
    ready = {f"{x}_ready": plgpu.Barrier(num_arrivals=q_parts if x == "q" else 1, num_barriers=stages) for x in names}
    return ready | {f"{x}_free": plgpu.Barrier(num_arrivals=TEAMS, num_barriers=stages) for x in names}


def stream(steps: jax.Array, stages: int, copies: Callable[[jax.Array], Any]) -> None:
    """Loads the tiles of every step into their slots as the slots become free: the program of the third team."""
    plgpu.set_max_registers(NARROW, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        for free, ready, parts in copies(step):
            pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for source, target in parts:
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])


def stream_keys(k: Any, v: Any, row: Any, head: Any, begin: Any, steps: Any, scratch: dict[str, Any]) -> None:
    """Loads the tiles of keys and values from `begin` on."""
    stages, keys = scratch["k_tile"].shape[:2]

    def copies(step):
        place = (row, pl.ds((begin + step) * keys, keys), head)
        for name, source in (("k", k), ("v", v)):
            yield scratch[name + "_free"], scratch[name + "_ready"], [(source.at[place], scratch[name + "_tile"])]

    stream(steps, stages, copies)


def _forward(q, k, v, reach, visited, inner, mixed, lse, *, share, **rest):
    """The kernel: team 0 and 1 compute, team 2 loads. Arrays are references into global memory."""
    row, head, team = (lax.axis_index(name) for name in ("row", "head", "team"))
    block = visited.shape[2] - 1 - lax.axis_index("block")  # of causal rows, the longest first
    begin, steps = visited[row, 0, block], visited[row, 1, block] - visited[row, 0, block]
    options = {x: rest.pop(x) for x in ("scale", "soft_cap", "interpret")}

    @pl.when(team == TEAMS)
    def _load():
        stream_keys(k, v, row, lax.div(head, jnp.int32(share)), begin, steps, rest)

    @pl.when(team < TEAMS)
    def _compute():
        plgpu.set_max_registers(WIDE, action="increase")
        part = block * TEAMS + team
        rows = pl.ds(part * ROWS, ROWS)
        q_tile, lse_tile, bounds, ready = (rest[x].at[team] for x in ("q_tile", "lse_tile", "bounds", "q_ready"))
        plgpu.copy_gmem_to_smem(q.at[row, rows, head], q_tile, ready)
        plgpu.copy_gmem_to_smem(reach.at[row, :, rows], bounds, ready)
        plgpu.barrier_wait(ready)
        full = [inner[row, i, part] for i in (0, 1)]
        top, total, acc = _online_softmax(q_tile, bounds, begin, steps, full, rest, **options)
        # A tile inside the reach of all who see something is not masked, so that its blind queries have summed too.
        sees, zero = load(bounds.at[0], BY_ROW) < load(bounds.at[1], BY_ROW), full_of(0.0, (ROWS,), BY_ROW)
        inverse = jnp.where(sees, 1.0 / total, zero)
        q_tile[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(q.dtype)
        lse_tile[...] = jnp.where(sees, (top + jnp.log2(total)) * (1 / LOG2E), zero + NEVER)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, mixed.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_tile, lse.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _online_softmax(q_tile, bounds, begin, steps, full, scratch, *, scale, soft_cap, interpret):
    """Returns maximum (times log2 e), sum and weighted values of the keys in `steps` tiles, for 64 queries."""
    factor = LOG2E * (scale if soft_cap is None else soft_cap)

    def step(i, carry):
        top, total, acc = carry
        slot, tile = lax.rem(i, jnp.int32(STAGES)), begin + i
        k_tile, v_tile = scratch["k_tile"].at[slot], scratch["v_tile"].at[slot]
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        scores = product(q_tile, k_tile.transpose((1, 0)), (ROWS, k_tile.shape[0]))
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        if soft_cap is not None:
            scores = jnp.tanh(scores * (scale / soft_cap))
        masked = functools.partial(hide, value=-jnp.inf, bounds=bounds, first_key=tile * k_tile.shape[0], axis=1)
        scores = lax.cond((tile >= full[0]) & (tile < full[1]), lambda x: x, masked, scores)
        new = jnp.maximum(top, scores.max(axis=1) * factor)
        shrink = jnp.exp2(top - new)
        p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
        total = total * shrink + p.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        acc = add_product(acc, p.astype(q_tile.dtype), v_tile, interpret)
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        return new, total, acc

    start = (full_of(NEVER, (ROWS,), BY_ROW), full_of(0.0, (ROWS,), BY_ROW), full_of(0.0, q_tile.shape, WGMMA))
    return lax.fori_loop(0, steps, step, start)


def hide(x: jax.Array, value: float, bounds: Any, first_key: jax.Array, axis: int) -> jax.Array:
    """Returns a tile of scores with `value` where a query does not see a key; the keys lie along `axis`."""
    key = plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=WGMMA) + first_key
    layout = BY_ROW if axis == 1 else BY_COLUMN
    # One bound after the other, since both do not fit the registers of the widest kernel.
    x = jnp.where(key >= lax.broadcast_in_dim(load(bounds.at[0], layout), x.shape, [1 - axis]), x, value)
    return jnp.where(key < lax.broadcast_in_dim(load(bounds.at[1], layout), x.shape, [1 - axis]), x, value)


def product(a: Any, b: Any, shape: tuple[int, int]) -> Any:
    """Returns a b in float32, of two tiles in shared memory."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, ACC(shape, jnp.float32))


def add_product(total: jax.Array, a: Any, b: Any, interpret: Any) -> Any:
    """Returns total + a b in float32: `a` in registers, `b` in shared memory."""
    if interpret is not None:  # the interpreter knows neither such an `a` nor an accumulator that begins with a value
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(ACC.init(total))


def full_of(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Returns a float32 constant in the registers of a warpgroup."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load(ref: Any, layout: Any) -> jax.Array:
    """Returns a vector in shared memory in the registers of a warpgroup."""
    whole = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # dropped in JAX 0.11
    return plgpu.load(ref, *whole, layout=layout)


def tile_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory [..., rows, K] in the order that TMA writes and wgmma reads without bank conflicts."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def check(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    """Raises ValueError for what the kernels do not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"the GPU kernel takes bfloat16 or float16 in all of q, k, v, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[-1] not in FORWARD_KEYS:
        raise ValueError(f"the GPU kernel takes heads of {', '.join(map(str, FORWARD_KEYS))}, not of {q.shape[-1]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if scale <= 0:
        raise ValueError(f"the GPU kernel takes a scale above 0, not {scale}")


def pad(x: jax.Array, axis: int = 1, value: float = 0) -> jax.Array:
    """Returns x with its axis of tokens filled up to a multiple of 128."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LENGTH)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def reachable(rows: int, length: int, segments: jax.Array | None, window: jax.Array | None, causal: bool) -> Reach:
    """Returns the keys that every query sees."""
    place = lax.broadcasted_iota(jnp.int32, (rows, length), 1)
    first, last = jnp.zeros_like(place), jnp.full_like(place, length)
    if segments is not None:
        other = segments[:, 1:] != segments[:, :-1]
        edge = jnp.ones((rows, 1), bool)
        first = lax.cummax(jnp.where(jnp.concatenate([edge, other], 1), place, 0), axis=1)
        last = lax.cummin(jnp.where(jnp.concatenate([other, edge], 1), place + 1, length), axis=1, reverse=True)
    if causal:
        last = jnp.minimum(last, place + 1)
    if window is not None:
        first = jnp.where(window > 0, jnp.maximum(first, place - window + 1), first)
    if segments is not None:
        last = jnp.where(segments > 0, last, 0)
    return Reach(first, last)


class Spans(NamedTuple):
    """Intervals of tiles, [B, 2, n] each, int32: those that somebody sees, and those that need no mask."""

    visited: jax.Array
    inner: jax.Array


def spans(first: jax.Array, last: jax.Array, queries: int, keys: int) -> Spans:
    """Returns, for every block of queries, the tiles of keys it visits; queries that see nothing do not count."""
    low, high, most, least = hull(first, last, queries)
    some = low < high
    visited = jnp.stack([jnp.where(some, low // keys, 0), jnp.where(some, -(-high // keys), 0)], axis=1)
    return Spans(visited, jnp.stack([-(-most // keys), least // keys], axis=1))


def hull(first: jax.Array, last: jax.Array, queries: int) -> tuple[jax.Array, ...]:
    """Returns per block of queries the keys [low, high) that one of them sees and [most, least) that all see."""
    first, last = (x.reshape(x.shape[0], -1, queries) for x in (first, last))
    sees = first < last
    low, least = (jnp.where(sees, x, _FAR).min(axis=2) for x in (first, last))
    high, most = (jnp.where(sees, x, 0).max(axis=2) for x in (last, first))
    return low, high, most, least
