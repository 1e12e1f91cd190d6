"""Self-attention on TPUs over the tiles of scores that hold something: Pallas, deterministic, no scores in memory.

The grid is (heads, steps). The steps of a launch are the visits of all tiles of all rows one after the other
(`tiles.py`), as many as there are in this batch: short documents cost what they need, whatever the rest of the batch
holds. Sums are made in one order, so that two runs give the same bits. Backward is two kernels, one per owner of an
accumulator (7 products instead of 5, but neither atomics nor partial sums in memory). Dao 2023, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcl.kernels.attention import tiles
from jaxcl.kernels.attention import tpu_kernels as kernels

LANES = kernels.LANES
_EVERYTHING = 2**30  # a window that ends nowhere


class Blocks(NamedTuple):
    """Sizes of a tile, multiples of 128.

    Attributes:
      q: queries.
      kv: keys.
      compute: keys of one pass, a divisor of kv: the scores that are held are [q, compute].
    """

    q: int
    kv: int
    compute: int


def default_blocks(length: int, width: int, dtype: Any) -> Blocks:
    """Returns tiles of at most 1024 that divide the row evenly, or of at most 512 for wide heads and float32.

    Measured by the compiler's bundles for v5p and heads of 128: tiles of 512 cost 26 % more per score forward, 18 %
    and 11 % backward, besides four times the steps. They pay where documents are much shorter than 1024.
    """
    most = 1024 if width <= 128 and jnp.dtype(dtype).itemsize == 2 else 512
    pieces = -(-length // most)
    size = -(-length // (pieces * LANES)) * LANES
    return Blocks(size, size, next(c for c in (512, 384, 256, LANES) if size % c == 0))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | None,
    first: jax.Array | None = None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, L, H, K] in the dtype of `q`, and the logsumexp of the scores, float32 [B, H, L].

    A query that sees no key gets zeros and -1e30.

    Args:
      q: float32 or bfloat16 [B, L, H, K].
      k: [B, S, G, K]; H is a multiple of G.
      v: [B, S, G, K].
      segments: int32 [B, S], 0 = padding; None = one document per row.
      window: int32 [] or None; 0 or below = all.
      first: int32 [], the place of the first of the L queries in the row of S tokens; None = 0, and L = S.
      causal: whether a query is kept from later keys.
      scale: factor on the scores.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None = as they are.
      blocks: sizes of a tile; None = `default_blocks`.
      interpret: as for `pl.pallas_call`: runs without a TPU.

    Raises:
      ValueError: sizes that do not fit together.
    """
    (rows, length, heads, width), groups = q.shape, k.shape[2]
    blocks, segments, part = _filled(q, k, segments, first, blocks)
    inputs = _inputs(q, k, v, segments, part, blocks)
    column, padded = (blocks.q, LANES), inputs["q"][0].shape
    mixed, lse = _Launch(blocks, causal, scale, soft_cap, window, first, heads, groups, interpret)(
        kernels.forward,
        tiles.forward(segments, window, causal=causal, block_q=blocks.q, block_kv=blocks.kv, part=part),
        inputs,
        [(padded, q.dtype, "q"), ((rows, heads, 1, padded[2]), jnp.float32, "q_row")],
        [(column, jnp.float32), (column, jnp.float32), ((blocks.q, width), jnp.float32), (column, jnp.int32)],
        products=2,
    )
    return _tokens(mixed, length), lse[:, :, 0, :length]


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
    first: jax.Array | None = None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (q, k, v) in their dtypes, given what `forward` returned and its cotangents.

    Args as for `forward`; in addition:
      frozen: bool [B, S], tokens whose q, k, v and outputs carry no gradient; tiles without any are not visited.
      mixed, d_mixed: [B, L, H, K].
      lse: float32 [B, H, L].
      d_lse: float32 [B, H, L] or None.
    """
    (_, length, heads, width), (_, slots, groups, _) = q.shape, k.shape
    blocks, segments, part = _filled(q, k, segments, first, blocks)
    still = frozen if frozen is None or part is None else part.of(frozen)
    d_mixed, delta = _cotangents(mixed, d_mixed, d_lse, still)
    launch = _Launch(blocks, causal, scale, soft_cap, window, first, heads, groups, interpret)
    inputs = _inputs(q, k, v, segments, part, blocks) | {
        # A query without keys has a logsumexp below that of any key: lifted, its weights vanish instead of growing.
        "lse": (_row(jnp.maximum(lse, kernels.LOWEST) * kernels.LOG2E, blocks.q), "q_row"),
        "delta": (_row(delta, blocks.q), "q_row"),
        "d_mixed": (_heads(d_mixed.astype(q.dtype), blocks.q), "q"),
    }
    where = {"causal": causal, "block_q": blocks.q, "block_kv": blocks.kv, "part": part}
    column = ((blocks.q, LANES), jnp.float32)
    (d_q,) = launch(
        kernels.d_queries,
        tiles.d_queries(segments, window, frozen, **where),
        inputs,
        [(inputs["q"][0].shape, q.dtype, "q")],
        [((blocks.q, width), jnp.float32), ((blocks.q, LANES), jnp.int32), column, column],
        products=3,
    )
    d_k, d_v = launch(
        kernels.d_keys,
        tiles.d_keys(segments, window, frozen, **where),
        inputs,
        [(inputs["k"][0].shape, k.dtype, "kv"), (inputs["v"][0].shape, v.dtype, "kv")],
        [((blocks.kv, width), jnp.float32)] * 2 + [((blocks.kv, LANES), jnp.int32)],
        products=4,
    )
    d_q, d_k, d_v = _tokens(d_q, length), _tokens(d_k, slots), _tokens(d_v, slots)
    if frozen is not None:
        d_k, d_v = (jnp.where(frozen[:, :, None, None], 0, x) for x in (d_k, d_v))
    return d_q, d_k, d_v


class _Launch(NamedTuple):
    """What the launches of one call share; calling it runs a kernel over the steps of its lists."""

    blocks: Blocks
    causal: bool
    scale: float
    soft_cap: float | None
    window: jax.Array | None
    first: jax.Array | None
    heads: int
    groups: int
    interpret: Any

    def __call__(
        self,
        kernel: Callable[..., None],
        listed: tiles.Tiles,
        inputs: dict[str, tuple[jax.Array, str]],
        outputs: Sequence[tuple[tuple[int, ...], Any, str]],
        scratch: Sequence[tuple[tuple[int, ...], Any]],
        products: int,
    ) -> Sequence[jax.Array]:
        """Returns the outputs; inputs and outputs name the role that says which block a step sees: see `_specs`."""
        by_key = kernel is kernels.d_keys
        share = self.heads // self.groups
        steps, number = _steps(listed, self.window, self.first)
        options = kernels.Options(
            self.causal, self.window is not None, self.first is not None, self.scale, self.soft_cap, self.blocks.compute
        )
        width = inputs["q"][0].shape[3]
        specs = self._specs(width, by_key)
        pairs = listed.index.size // (2 if self.causal else 1) * self.heads * self.blocks.q * self.blocks.kv
        moved = sum(x.nbytes for x, _ in inputs.values())
        return pl.pallas_call(
            functools.partial(kernel, options=options),
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(inputs["q"][0]).manual_axis_type)
                for shape, dtype, _ in outputs
            ],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(steps),
                grid=(self.groups, number, share) if by_key else (self.heads, number),
                in_specs=[specs[role] for _, role in inputs.values()],
                out_specs=[specs[role] for _, _, role in outputs],
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary") if by_key else ("parallel", "arbitrary"),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * width, transcendentals=pairs, bytes_accessed=2 * moved
            ),
            interpret=self.interpret,
            name=f"attention_{kernel.__name__}",
        )(*steps, *(x for x, _ in inputs.values()))

    def _specs(self, width: int, by_key: bool) -> dict[str, pl.BlockSpec]:
        """Returns which block each role sees: per query and head, per query, per key and group, per key."""
        share, (q, kv, _) = self.heads // self.groups, self.blocks

        def place(head: Any, t: Any, *rest: Any) -> tuple[Any, ...]:
            """Returns (row, head, tile of queries, group, tile of keys)."""
            if by_key:
                turn, row, own, other, *_ = rest
                return row[t], head * share + turn, other[t], head, own[t]
            row, own, other, *_ = rest
            return row[t], head, own[t], jax.lax.div(head, jnp.int32(share)), other[t]

        def spec(shape: tuple[int | None, ...], pick: Callable[..., Any]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *at: pick(*place(*at)))

        return {
            "q": spec((None, None, q, width), lambda b, h, i, g, j: (b, h, i, 0)),
            "q_row": spec((None, None, 1, q), lambda b, h, i, g, j: (b, h, 0, i)),
            "q_ids": spec((None, 1, q), lambda b, h, i, g, j: (b, 0, i)),
            "kv": spec((None, None, kv, width), lambda b, h, i, g, j: (b, g, j, 0)),
            "kv_ids": spec((None, 1, kv), lambda b, h, i, g, j: (b, 0, j)),
        }


def _steps(listed: tiles.Tiles, window: jax.Array | None, first: jax.Array | None) -> tuple[kernels.Steps, jax.Array]:
    """Returns the visits of all tiles one after the other, and how many there are.

    A tile without visits gets a step that only writes its zeros.
    """
    _, own, slots = listed.index.shape
    count = jnp.maximum(listed.count, 1)[:, :, None]
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
    flags = listed.kind + jnp.where(slot == 0, kernels.FIRST, 0) + jnp.where(slot == count - 1, kernels.LAST, 0)
    order = jnp.argsort((slot >= count).reshape(-1), stable=True).astype(jnp.int32)
    near = jnp.asarray(_EVERYTHING, jnp.int32) if window is None else jnp.where(window > 0, window, _EVERYTHING)
    steps = kernels.Steps(
        row=order // (own * slots),
        own=order // slots % own,
        other=listed.index.reshape(-1)[order],
        flags=flags.reshape(-1)[order],
        numbers=jnp.stack([near, jnp.asarray(0 if first is None else first, jnp.int32)]),
    )
    return steps, jnp.sum(count)


def _filled(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, first: jax.Array | None, blocks: Blocks | None
) -> tuple[Blocks, jax.Array, tiles.Part | None]:
    """Returns tiles and segments, which may have been left out, and which tokens are queries, if not all."""
    (rows, length, _, width), slots = q.shape, k.shape[1]
    if blocks is None:
        own = default_blocks(length, width, q.dtype)
        blocks = default_blocks(slots, width, q.dtype)._replace(q=own.q)
    segments = jnp.ones((rows, slots), jnp.int32) if segments is None else segments
    return _checked(blocks), segments, None if first is None else tiles.Part(first, length)


def _checked(blocks: Blocks) -> Blocks:
    if any(size <= 0 or size % LANES for size in blocks) or blocks.kv % blocks.compute:
        raise ValueError(f"{blocks}: multiples of {LANES}, and compute divides kv")
    return blocks


def _pad(x: jax.Array, axis: int, block: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def _inputs(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, part: tiles.Part | None, blocks: Blocks
) -> dict[str, tuple[jax.Array, str]]:
    """Returns what every kernel reads, with its role, padded to whole tiles and in the order of their references."""
    own = segments if part is None else part.of(segments)
    keys = jnp.where(segments > 0, segments, -1)  # the padding of keys has an id that no query has
    return {
        "q": (_heads(q, blocks.q), "q"),
        "k": (_heads(k, blocks.kv), "kv"),
        "v": (_heads(v, blocks.kv), "kv"),
        "q_ids": (_pad(own, 1, blocks.q)[:, None], "q_ids"),
        "kv_ids": (_pad(keys, 1, blocks.kv, -1)[:, None], "kv_ids"),
    }


def _cotangents(
    mixed: jax.Array, d_mixed: jax.Array, d_lse: jax.Array | None, frozen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns dO [B, L, H, K] and delta [B, H, L] of dS = P (dP - delta), zero for frozen queries."""
    # sum_s P_ls dP_ls = <dO_l, O_l>; the cotangent of the logsumexp adds P_ls dlse_l to dS_ls.
    # No product of matrices: that would round float32 to bfloat16 by default.
    delta = jnp.sum(mixed.astype(jnp.float32) * d_mixed.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    delta = delta if d_lse is None else delta - d_lse
    if frozen is None:
        return d_mixed, delta
    return jnp.where(frozen[:, :, None, None], 0, d_mixed), jnp.where(frozen[:, None], 0.0, delta)


def _row(x: jax.Array, block: int) -> jax.Array:
    """Returns x [B, H, L] as [B, H, 1, padded L]."""
    return _pad(x, 2, block)[:, :, None]


def _heads(x: jax.Array, block: int) -> jax.Array:
    """Returns x [B, L, H, K] as [B, H, padded L, K]."""
    return _pad(x, 1, block).swapaxes(1, 2)


def _tokens(x: jax.Array, length: int) -> jax.Array:
    """Returns x [B, H, padded L, K] as [B, L, H, K]."""
    return x.swapaxes(1, 2)[:, :length]
