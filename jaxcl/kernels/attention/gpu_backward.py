"""The backward pass of `gpu`: one kernel for d_q and one for d_k and d_v, each sum in one place and one order.

    p = exp(s - lse)    d_s = p * (d_mixed v^T - delta)    delta = <d_mixed, mixed> - d_lse    (Dao 2023, algorithm 2)
    d_q = scale d_s k    d_k = scale d_s^T q    d_v = p^T d_mixed

The scores are computed in both kernels: seven products per tile instead of the five of a kernel that adds to d_q with
atomics, and in return two runs agree in every bit. Query heads of a group are summed inside the second kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcl.kernels.attention.gpu import (
    ACC,
    BY_COLUMN,
    BY_ROW,
    LAUNCH,
    LOG2E,
    ROWS,
    STAGES,
    TEAMS,
    WGMMA,
    WIDE,
    add_product,
    barriers,
    check,
    full_of,
    hide,
    hull,
    load,
    pad,
    product,
    reachable,
    spans,
    stream,
    stream_keys,
    tile_of,
)

D_Q_KEYS = {64: 128, 128: 128, 256: 64}  # keys per tile of the first kernel, by head dimension
D_Q_STAGES = {64: 2, 128: 2, 256: 1}  # q and d_mixed of heads of 256 leave shared memory for one tile of keys
QUERIES = 64  # per tile of the second
_SILENT = 1e30  # "logsumexp" of a query without a gradient: its p becomes 0 without a mask


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | None,
    frozen: jax.Array | None,
    mixed: jax.Array,
    lse: jax.Array,
    d_mixed: jax.Array,
    d_lse: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (q, k, v), given what `gpu.forward` returned; see there for the other arguments.

    Args:
      frozen: bool [B, L], tokens whose q, k, v and output carry no gradient; tiles without others are not visited.
      d_lse: float32 [B, H, L], cotangent of the logsumexp, or None.
    """
    check(q, k, v, scale)
    (rows, length, heads, _), groups = q.shape, k.shape[2]
    first, last = reachable(rows, length, segments, window, causal)
    if frozen is not None:
        last = jnp.where(frozen, 0, last)
    delta = jnp.einsum("blhk,blhk->bhl", mixed, d_mixed, preferred_element_type=jnp.float32)
    delta = delta if d_lse is None else delta - d_lse
    # A query without a gradient counts for nothing, whatever the tile it lies in.
    silent = (first >= last)[:, None, :]
    stats = jnp.stack([jnp.where(silent, _SILENT, lse * LOG2E), jnp.where(silent, 0.0, delta)], axis=2)
    q, k, v, d_mixed, first, last = (pad(x) for x in (q, k, v, d_mixed, first, last))
    stats = pad(stats, axis=3)
    operands = (q, k, v, d_mixed, stats, jnp.stack([first, last], axis=1))
    options = {"scale": scale, "soft_cap": soft_cap, "share": heads // groups, "interpret": interpret}
    d_q = _launch_d_q(operands, options)
    live = jnp.ones((rows, k.shape[1]), bool) if frozen is None else pad(~frozen)
    d_k, d_v = _launch_d_kv(operands, live, options)
    d_q, d_k, d_v = (x[:, :length] for x in (d_q, d_k, d_v))
    if frozen is not None:
        d_k, d_v = (jnp.where(frozen[:, :, None, None], 0, x) for x in (d_k, d_v))
    return d_q, d_k, d_v


def _launch_d_q(operands: tuple[jax.Array, ...], options: dict[str, Any]) -> jax.Array:
    q, reach = operands[0], operands[-1]
    rows, length, heads, width = q.shape
    keys, stages = D_Q_KEYS[width], D_Q_STAGES[width]
    tiled = functools.partial(tile_of, dtype=q.dtype)
    return plgpu.kernel(
        functools.partial(_d_q, **options),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={
            "own": tiled((2, TEAMS, ROWS, width)),
            "k_tile": tiled((stages, keys, width)),
            "v_tile": tiled((stages, keys, width)),
            "stats_tile": plgpu.SMEM((TEAMS, 2, ROWS), jnp.float32),
            "bounds": plgpu.SMEM((TEAMS, 2, ROWS), jnp.int32),
            "own_ready": plgpu.Barrier(num_arrivals=4, num_barriers=TEAMS),
            **barriers(stages, "k", "v"),
        },
        grid=(rows, length // (TEAMS * ROWS), heads),
        grid_names=("row", "block", "head"),
        interpret=options["interpret"],
        **LAUNCH,
    )(
        *operands,
        spans(reach[:, 0], reach[:, 1], TEAMS * ROWS, keys).visited,
        spans(reach[:, 0], reach[:, 1], ROWS, keys).inner,
    )


def _launch_d_kv(operands: tuple[jax.Array, ...], live: jax.Array, options: dict[str, Any]) -> Any:
    k, reach = operands[1], operands[-1]
    rows, length, groups, width = k.shape
    parted = width > 128  # one accumulator per team: team 0 sums d_v, team 1 d_k, for the same keys
    keys = ROWS if parted else TEAMS * ROWS
    tiled = functools.partial(tile_of, dtype=k.dtype)
    return plgpu.kernel(
        functools.partial(_d_kv, parted=parted, **options),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types={
            "own": tiled((2, keys // ROWS, ROWS, width)),
            "q_tile": tiled((STAGES, QUERIES, width)),
            "d_tile": tiled((STAGES, QUERIES, width)),
            "stats_tile": plgpu.SMEM((STAGES, 2, QUERIES), jnp.float32),
            "bounds": plgpu.SMEM((STAGES, 2, QUERIES), jnp.int32),
            "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=keys // ROWS),
            "done": plgpu.Barrier(num_arrivals=TEAMS),
            **barriers(STAGES, "d", "q", q_parts=3),
        },
        grid=(rows, length // keys, groups),
        grid_names=("row", "block", "group"),
        interpret=options["interpret"],
        **LAUNCH,
    )(*operands, _visitors(reach[:, 0], reach[:, 1], live, keys), _all_seeing(reach[:, 0], reach[:, 1]))


def _varying_zero(step: jax.Array) -> jax.Array:
    """Returns 0 in a way that the compiler takes for a function of the step.

    As an index it keeps the addresses of a tile (one per 16 columns) from being computed before the loop, where they
    would wait in registers that heads of 256 need.
    """
    return lax.shift_right_logical(step, jnp.int32(30))


def _visitors(first: jax.Array, last: jax.Array, live: jax.Array, keys: int) -> jax.Array:
    """Returns the tiles of queries [begin, end) that see a live key of each block of keys, int32 [B, 2, n]."""
    low, high, _, _ = (x[:, None, :] for x in hull(first, last, QUERIES))
    place = lax.broadcasted_iota(jnp.int32, live.shape, 1)
    begin, end, _, _ = (x[:, :, None] for x in hull(place, jnp.where(live, place + 1, 0), keys))
    return _interval((low < end) & (high > begin) & (low < high))


def _all_seeing(first: jax.Array, last: jax.Array) -> jax.Array:
    """Returns the tiles of queries of which all see all of 64 keys, int32 [B, 2, L / 64]: `first` never falls."""
    low, high, most, least = (x[:, None, :] for x in hull(first, last, QUERIES))
    begin = ROWS * lax.broadcasted_iota(jnp.int32, (1, first.shape[1] // ROWS, 1), 1)
    return _interval((low < high) & (most <= begin) & (least >= begin + ROWS))


def _interval(member: jax.Array) -> jax.Array:
    """Returns the smallest [begin, end) that holds the members, of bool [B, n, m]; int32 [B, 2, n]."""
    place = lax.broadcasted_iota(jnp.int32, member.shape, 2)
    end = jnp.where(member, place + 1, 0).max(axis=2)
    begin = jnp.where(member, place, member.shape[2]).min(axis=2)
    return jnp.stack([jnp.minimum(begin, end), end], axis=1)


def _p(scores, stats, axis, scale, soft_cap, masked):
    """Returns the weights of a tile of q k^T, its queries along `axis`, and the derivative of the cap (None: 1)."""
    factor, slope = LOG2E * (scale if soft_cap is None else soft_cap), None
    if soft_cap is not None:
        scores = jnp.tanh(scores * (scale / soft_cap))
        slope = 1 - scores * scores
    lse = lax.broadcast_in_dim(load(stats.at[0], BY_ROW if axis == 0 else BY_COLUMN), scores.shape, [axis])
    return masked(jnp.exp2(scores * factor - lse)), slope


def _d_s(p, slope, d_p, stats, axis):
    """Returns the cotangent of the scores, before `scale`."""
    delta = load(stats.at[1], BY_ROW if axis == 0 else BY_COLUMN)
    d_s = p * (d_p - lax.broadcast_in_dim(delta, p.shape, [axis]))
    return d_s if slope is None else d_s * slope


def _sum_and_product(total, a, b, c, d, shape, interpret):
    """Returns total + a b and c d, with `a` in registers: the tensor cores go from one to the other."""
    if interpret is not None:
        return add_product(total, a, b, interpret), product(c, d, shape)

    def run(refs):
        plgpu.wgmma(refs[0], a, b)
        plgpu.wgmma(refs[1], c, d)

    return pl.run_state(run)((ACC.init(total), ACC.init(full_of(0.0, shape, WGMMA))))


def _d_q(q, k, v, d_mixed, stats, reach, visited, inner, d_q, *, scale, soft_cap, share, interpret, **scratch):
    """The kernel of d_q: as the forward one, with d_mixed beside q."""
    row, head, team = (lax.axis_index(name) for name in ("row", "head", "team"))
    block = visited.shape[2] - 1 - lax.axis_index("block")
    begin, steps = visited[row, 0, block], visited[row, 1, block] - visited[row, 0, block]
    stages, keys = scratch["k_tile"].shape[:2]

    @pl.when(team == TEAMS)
    def _load():
        stream_keys(k, v, row, lax.div(head, jnp.int32(share)), begin, steps, scratch)

    @pl.when(team < TEAMS)
    def _compute():
        plgpu.set_max_registers(WIDE, action="increase")
        part = block * TEAMS + team
        rows = pl.ds(part * ROWS, ROWS)
        q_tile, d_tile = scratch["own"].at[0, team], scratch["own"].at[1, team]
        stats_tile, bounds, ready = (scratch[name].at[team] for name in ("stats_tile", "bounds", "own_ready"))
        plgpu.copy_gmem_to_smem(q.at[row, rows, head], q_tile, ready)
        plgpu.copy_gmem_to_smem(d_mixed.at[row, rows, head], d_tile, ready)
        plgpu.copy_gmem_to_smem(stats.at[row, head, :, rows], stats_tile, ready)
        plgpu.copy_gmem_to_smem(reach.at[row, :, rows], bounds, ready)
        plgpu.barrier_wait(ready)
        full = [inner[row, i, part] for i in (0, 1)]

        def step(i, total):
            slot, tile, mine = lax.rem(i, jnp.int32(stages)), begin + i, team
            if stages == 1:
                slot, mine = _varying_zero(i), team + _varying_zero(i)
            k_tile, v_tile = scratch["k_tile"].at[slot], scratch["v_tile"].at[slot]
            q_tile, d_tile = scratch["own"].at[0, mine], scratch["own"].at[1, mine]

            def masked(p):
                seen = functools.partial(hide, value=0.0, bounds=bounds, first_key=tile * keys, axis=1)
                return lax.cond((tile >= full[0]) & (tile < full[1]), lambda x: x, seen, p)

            plgpu.barrier_wait(scratch["k_ready"].at[slot])
            scores = product(q_tile, k_tile.transpose((1, 0)), (ROWS, keys))
            p, slope = _p(scores, stats_tile, 0, scale, soft_cap, masked)
            plgpu.barrier_wait(scratch["v_ready"].at[slot])
            d_p = product(d_tile, v_tile.transpose((1, 0)), (ROWS, keys))
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            d_s = _d_s(p, slope, d_p, stats_tile, 0)
            total = add_product(total, d_s.astype(q.dtype), k_tile, interpret)
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
            return total

        total = lax.fori_loop(0, steps, step, full_of(0.0, scratch["own"].shape[2:], WGMMA))
        q_tile[...] = (total * scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, d_q.at[row, rows, head])
        plgpu.wait_smem_to_gmem(0)


def _d_kv(q, k, v, d_mixed, stats, reach, visited, inner, d_k, d_v, *, share, parted, **rest):
    """The kernel of d_k and d_v: a block of keys stays, the queries of all heads of its group pass by."""
    row, block, group, team = (lax.axis_index(name) for name in ("row", "block", "group", "team"))
    begin, count = visited[row, 0, block], visited[row, 1, block] - visited[row, 0, block]
    options = {x: rest.pop(x) for x in ("scale", "soft_cap", "interpret")}
    blocks = rest["own"].shape[1]

    @pl.when(team == TEAMS)
    def _load():
        for own in range(blocks):
            rows = pl.ds((block * blocks + own) * ROWS, ROWS)
            for i, source in enumerate((k, v)):
                plgpu.copy_gmem_to_smem(source.at[row, rows, group], rest["own"].at[i, own], rest["own_ready"].at[own])

        def copies(step):
            head = group * share + lax.div(step, count)
            rows = pl.ds((begin + lax.rem(step, count)) * QUERIES, QUERIES)
            with_q = [
                (q.at[row, rows, head], rest["q_tile"]),
                (stats.at[row, head, :, rows], rest["stats_tile"]),
                (reach.at[row, :, rows], rest["bounds"]),
            ]
            yield rest["q_free"], rest["q_ready"], with_q
            yield rest["d_free"], rest["d_ready"], [(d_mixed.at[row, rows, head], rest["d_tile"])]

        stream(count * share, STAGES, copies)

    def compute(own, wanted):
        plgpu.set_max_registers(WIDE, action="increase")
        part = block * blocks + own
        plgpu.barrier_wait(rest["own_ready"].at[own])
        full = [inner[row, i, part] for i in (0, 1)]
        totals = _sum_d_kv(own, wanted, part, begin, count, count * share, full, rest, **options)
        if parted:  # the results take the place of keys and values that the other team may still read
            plgpu.barrier_arrive(rest["done"])
            plgpu.barrier_wait(rest["done"])
        factors, targets = {"k": options["scale"], "v": 1.0}, {"k": (0, d_k), "v": (1, d_v)}
        for x in wanted:
            rest["own"].at[targets[x][0], own][...] = (totals[x] * factors[x]).astype(q.dtype)
        plgpu.commit_smem()
        for x in wanted:
            i, target = targets[x]
            plgpu.copy_smem_to_gmem(rest["own"].at[i, own], target.at[row, pl.ds(part * ROWS, ROWS), group])
        plgpu.wait_smem_to_gmem(0)

    roles = [(team == 0, 0, "v"), (team == 1, 0, "k")] if parted else [(team < TEAMS, team, "kv")]
    for mine, own, wanted in roles:
        pl.when(mine)(functools.partial(compute, own, wanted))


def _sum_d_kv(own, wanted, part, begin, count, steps, full, scratch, *, scale, soft_cap, interpret):
    """Returns the `wanted` of d_k (before `scale`) and d_v of 64 keys."""
    shape, dtype = (ROWS, QUERIES), scratch["own"].dtype

    def step(i, totals):
        slot, tile = lax.rem(i, jnp.int32(STAGES)), begin + lax.rem(i, count)
        mine = own if wanted == "kv" else own + _varying_zero(i)
        k_tile, v_tile = (scratch["own"].at[j, mine] for j in (0, 1))
        q_tile, d_tile, stats, bounds = (scratch[x].at[slot] for x in ("q_tile", "d_tile", "stats_tile", "bounds"))

        def masked(p):
            seen = functools.partial(hide, value=0.0, bounds=bounds, first_key=part * ROWS, axis=0)
            return lax.cond((tile >= full[0]) & (tile < full[1]), lambda x: x, seen, p)

        plgpu.barrier_wait(scratch["q_ready"].at[slot])
        q_across, d_across = q_tile.transpose((1, 0)), d_tile.transpose((1, 0))
        # One after the other: two tiles of scores beside two sums do not fit the registers.
        p, slope = _p(product(k_tile, q_across, shape), stats, 1, scale, soft_cap, masked)
        plgpu.barrier_wait(scratch["d_ready"].at[slot])
        totals, narrow, d_p = dict(totals), p.astype(dtype), None
        if wanted == "v":
            totals["v"] = add_product(totals["v"], narrow, d_tile, interpret)
        elif wanted == "k":
            d_p = product(v_tile, d_across, shape)
        else:
            totals["v"], d_p = _sum_and_product(totals["v"], narrow, d_tile, v_tile, d_across, shape, interpret)
        plgpu.barrier_arrive(scratch["d_free"].at[slot])
        if d_p is not None:
            d_s = _d_s(p, slope, d_p, stats, 1).astype(dtype)
            totals["k"] = add_product(totals["k"], d_s, q_tile, interpret)
        plgpu.barrier_arrive(scratch["q_free"].at[slot])
        return totals

    zero = full_of(0.0, scratch["own"].shape[2:], WGMMA)
    return lax.fori_loop(0, steps, step, dict.fromkeys(wanted, zero))
