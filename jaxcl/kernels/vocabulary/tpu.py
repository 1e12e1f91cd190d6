"""Softmax over the vocabulary on TPUs in Pallas: tiles of tokens and columns, one tile of logits at a time in VMEM.

Forward: the columns are walked for every tile of tokens with a running maximum and sum (Milakov & Gimelshein 2018).
Backward: the logits are formed again in two kernels, one per owner of an accumulator (tokens, or columns), so that sums
are made in one order and two runs give the same bits. Products run in the type of their operands, float32 in full, and
accumulate in float32. Numbers per token are [T, 1], which take 512 bytes each on a TPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NEVER = -1e30  # less than any logit, and finite, so that a difference of two is not NaN
_VMEM = 48 * 2**20  # bytes a kernel may use: below those of every TPU since v5e; v5p has the least, 64 MiB
_SLICE = 512  # lanes of an accumulator that are updated at a time


class Tiles(NamedTuple):
    """Sizes of a tile.

    Attributes:
      tokens: a multiple of 16, or all of them.
      columns: columns of the vocabulary, a multiple of 128, or all of them.
    """

    tokens: int
    columns: int


def default_tiles(tokens: int, width: int, vocab: int, itemsize: int) -> Tiles:
    """Returns the largest tiles whose operands and accumulators fit: width is D, or D + E for a mixture."""
    rows, columns = 512, 512

    def used() -> int:
        # Both operands and one result in two buffers, the accumulator, and about four tiles of logits.
        return width * (2 * itemsize * (rows + 2 * columns) + 4 * max(rows, columns)) + 16 * rows * columns

    while used() > _VMEM and max(rows, columns) > 128:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return Tiles(min(rows, tokens), min(columns, vocab))


class _Launch(NamedTuple):
    """What all kernels of one call share: T tokens, V columns."""

    tiles: Tiles
    tokens: int
    vocab: int
    interpret: Any

    def spec(self, kind: str, width: int, columns_first: bool) -> pl.BlockSpec:
        """Returns the block of an operand; `width` is that of its dimension which is not tiled."""

        def at(find: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
            return (lambda j, i: find(i, j)) if columns_first else find

        if kind == "token":
            return pl.BlockSpec((self.tiles.tokens, width), at(lambda i, j: (i, 0)))
        if kind == "column":
            return pl.BlockSpec((width, self.tiles.columns), at(lambda i, j: (0, j)))
        if kind == "row":  # of the embedding
            return pl.BlockSpec((self.tiles.columns, width), at(lambda i, j: (j, 0)))
        return pl.BlockSpec(memory_space=pltpu.SMEM)

    def __call__(
        self,
        body: Callable[..., None],
        operands: Sequence[tuple[str, jax.Array]],
        results: Sequence[tuple[str, tuple[int, ...], Any]],
        scratch: Sequence[tuple[int, ...]],
        *,
        products: Sequence[int],
        columns_first: bool = False,
    ) -> list[jax.Array]:
        """Runs `body(place, *refs)` for every tile, the last axis of the grid innermost.

        Args:
          body: a kernel; `place` says which tile it is.
          operands: (kind, array); kinds are those of `spec`.
          results: (kind, shape, dtype).
          scratch: shapes of float32 accumulators.
          products: the widths of the matrix products, of which each costs 2 T V width operations.
          columns_first: whether the owner of the accumulators is a tile of columns.
        """
        steps = pl.cdiv(self.tokens, self.tiles.tokens), pl.cdiv(self.vocab, self.tiles.columns)
        place = functools.partial(_Place, self, columns_first)
        other = {"token": 1, "column": 0, "row": 1}
        widths = [1 if kind == "scalar" else x.shape[other[kind]] for kind, x in operands]
        moved = sum(x.nbytes * (steps[0] if kind in ("column", "row") else 1) for kind, x in operands)
        return pl.pallas_call(
            lambda *refs: body(place(), *refs),
            grid=steps[::-1] if columns_first else steps,
            in_specs=[self.spec(k, w, columns_first) for (k, _), w in zip(operands, widths, strict=True)],
            out_specs=[self.spec(k, shape[other[k]], columns_first) for k, shape, _ in results],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM + 8 * 2**20
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * self.tokens * self.vocab * sum(products),
                bytes_accessed=moved,
                transcendentals=self.tokens * self.vocab,
            ),
            interpret=self.interpret,
            name=f"vocabulary_{body.__name__.strip('_')}",
        )(*(x for _, x in operands))


class _Place:
    """Where the current tile lies; to be made inside a kernel."""

    def __init__(self, launch: _Launch, columns_first: bool):
        outer, inner = pl.program_id(0), pl.program_id(1)
        self.first, self.last = inner == 0, inner == pl.num_programs(1) - 1
        self.token, self.column = (inner, outer) if columns_first else (outer, inner)
        self.launch = launch

    def columns(self) -> jax.Array:
        """Returns the number of every column of a tile of logits, int32 [tokens, columns]."""
        tiles = self.launch.tiles
        return self.column * tiles.columns + jax.lax.broadcasted_iota(jnp.int32, tiles, 1)

    def inside(self, x: jax.Array, axis: int, kind: str, fill: float = 0.0) -> jax.Array:
        """Returns x with `fill` where `axis` lies beyond the last token or column; what was there may be NaN."""
        t = self.launch
        start, size, limit = (
            (self.token * t.tiles.tokens, t.tiles.tokens, t.tokens)
            if kind == "token"
            else (self.column * t.tiles.columns, t.tiles.columns, t.vocab)
        )
        if limit % size == 0:
            return x
        return jnp.where(start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < limit, x, fill)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a with axis j of b, in their common type; float32 [.., ..]."""
    kind = jnp.result_type(a, b)
    precision = jax.lax.Precision.HIGHEST if kind == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(kind),
        b.astype(kind),
        (((i,), (j,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _absorb(
    place: _Place, top: Any, total: Any, logits: jax.Array, scale: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Updates the running maximum and sum; returns what old sums shrink by and exp(scale * (logits - maximum))."""

    @pl.when(place.first)
    def _() -> None:
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)

    new = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    shrink, e = jnp.exp(scale * (top[...] - new)), jnp.exp(scale * (logits - new))
    top[...], total[...] = new, total[...] * shrink + jnp.sum(e, axis=1, keepdims=True)
    return shrink, e


def _cross_entropy(
    place: _Place, hidden: Any, head: Any, targets: Any, logp: Any, lse: Any, top: Any, total: Any, target: Any
) -> None:
    logits = _dot(hidden[...], head[...], 1, 0)
    _absorb(place, top, total, place.inside(logits, 1, "column", NEVER))

    @pl.when(place.first)
    def _() -> None:
        target[...] = jnp.zeros_like(target)

    found = place.inside(jnp.where(place.columns() == targets[...], logits, 0.0), 1, "column")
    target[...] += jnp.sum(found, axis=1, keepdims=True)

    @pl.when(place.last)
    def _() -> None:
        lse[...] = top[...] + jnp.log(total[...])
        logp[...] = target[...] - lse[...]


def _pull_logits(place: _Place, hidden: Any, head: Any, targets: Any, lse: Any, d_logp: Any, shift: Any) -> jax.Array:
    """Returns the cotangent of a tile of logits in the type of the operands."""
    p = jnp.exp(_dot(hidden[...], head[...], 1, 0) - lse[...])
    d_logits = p * shift[...] + jnp.where(place.columns() == targets[...], d_logp[...], 0.0)
    return d_logits.astype(jnp.result_type(hidden, head))


def _d_hidden(place: _Place, *refs: Any) -> None:
    *inputs, d_hidden, total = refs
    d_logits = place.inside(_pull_logits(place, *inputs), 1, "column")
    _gather(place, total, 1, lambda at: _dot(d_logits, place.inside(inputs[1][at, :], 1, "column"), 1, 1))
    _write(place, d_hidden, total)


def _d_head(place: _Place, *refs: Any) -> None:
    *inputs, d_head, total = refs
    d_logits = place.inside(_pull_logits(place, *inputs), 0, "token")
    _gather(place, total, 0, lambda at: _dot(place.inside(inputs[0][:, at], 0, "token"), d_logits, 0, 0))
    _write(place, d_head, total)


def _gather(place: _Place, total: Any, axis: int, part: Callable[[Any], jax.Array], shrink: Any = None) -> None:
    """Multiplies an accumulator by `shrink` and adds `part(slice)` to every slice along `axis`; it starts at zero.

    A product as large as the accumulator would be held a second time, in spilled registers.
    """

    @pl.when(place.first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    size = total.shape[axis]
    for start in range(0, size, _SLICE):
        at = pl.ds(start, min(_SLICE, size - start))
        where = (at, slice(None)) if axis == 0 else (slice(None), at)
        old = total[where] if shrink is None else total[where] * shrink
        total[where] = old + part(at)


def _write(place: _Place, out: Any, total: Any) -> None:
    @pl.when(place.last)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, tiles: Tiles | None = None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of the targets and the logsumexp of the logits, float32 [...].

    Args:
      hidden: float32 or bfloat16 [..., D].
      head: [D, V].
      targets: int32 [...].
      tiles: None = `default_tiles`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    launch, (width, _) = _launch(hidden, head, tiles, interpret), head.shape
    lane = (launch.tokens, 1)
    logp, lse = launch(
        _cross_entropy,
        [("token", hidden.reshape(-1, width)), ("column", head), ("token", targets.reshape(lane))],
        [("token", lane, jnp.float32)] * 2,
        [(launch.tiles.tokens, 1)] * 3,
        products=[width],
    )
    return logp.reshape(targets.shape), lse.reshape(targets.shape)


def cross_entropy_backward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    d_logp: jax.Array,
    d_lse: jax.Array,
    *,
    d_head: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of (hidden, head), given what `cross_entropy` returned.

    They have the dtypes of these, but for that of head if the dtype `d_head` is given.
    """
    launch, width = _launch(hidden, head, tiles, interpret), head.shape[0]
    flat = hidden.reshape(-1, width)
    operands = [("token", flat), ("column", head)]
    operands += [("token", x.reshape(-1, 1)) for x in (targets, lse, d_logp, d_lse - d_logp)]
    result = ("token", flat.shape, hidden.dtype)
    (of_hidden,) = launch(_d_hidden, operands, [result], [(launch.tiles.tokens, width)], products=[width] * 2)
    result = ("column", head.shape, head.dtype if d_head is None else d_head)
    scratch = [(width, launch.tiles.columns)]
    (of_head,) = launch(_d_head, operands, [result], scratch, products=[width] * 2, columns_first=True)
    return of_hidden.reshape(hidden.shape), of_head


def _launch(hidden: jax.Array, head: jax.Array, tiles: Tiles | None, interpret: Any, extra: int = 0) -> _Launch:
    tokens, (width, vocab) = hidden.size // head.shape[0], head.shape
    itemsize = max(hidden.dtype.itemsize, head.dtype.itemsize)
    tiles = tiles or default_tiles(tokens, width + extra, vocab, itemsize)
    return _Launch(Tiles(min(tiles.tokens, tokens), min(tiles.columns, vocab)), tokens, vocab, interpret)


def _mixture(
    place: _Place,
    inverse: Any,
    hidden: Any,
    head: Any,
    embedding: Any,
    mean: Any,
    lse: Any,
    top: Any,
    total: Any,
    mixed: Any,
) -> None:
    scores = place.inside(_dot(hidden[...], head[...], 1, 0), 1, "column", NEVER)
    shrink, e = _absorb(place, top, total, scores, inverse[0, 0])
    e = e.astype(embedding.dtype)
    _gather(place, mixed, 1, lambda at: _dot(e, place.inside(embedding[:, at], 0, "column"), 1, 0), shrink)

    @pl.when(place.last)
    def _() -> None:
        mean[...] = mixed[...] / total[...]
        lse[...] = inverse[0, 0] * top[...] + jnp.log(total[...])


def mixture(
    hidden: jax.Array,
    head: jax.Array,
    embedding: jax.Array,
    inverse: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(inverse * hidden head) embedding, float32 [..., E], and the logsumexp, float32 [...].

    Args:
      hidden: float32 or bfloat16 [..., D].
      head: [D, V].
      embedding: [V, E].
      inverse: float32 [], 1 / temperature.
      tiles: None = `default_tiles`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    (width, _), depth, batch = head.shape, embedding.shape[1], hidden.shape[:-1]
    launch = _launch(hidden, head, tiles, interpret, depth)
    rows = launch.tiles.tokens
    mean, lse = launch(
        _mixture,
        [
            ("scalar", inverse.reshape(1, 1)),
            ("token", hidden.reshape(-1, width)),
            ("column", head),
            ("row", embedding),
        ],
        [("token", (launch.tokens, depth), jnp.float32), ("token", (launch.tokens, 1), jnp.float32)],
        [(rows, 1), (rows, 1), (rows, depth)],
        products=[width, depth],
    )
    return mean.reshape(*batch, depth), lse.reshape(batch)
