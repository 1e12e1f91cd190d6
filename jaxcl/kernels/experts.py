r"""A mixture of gated units: every token goes through the few that were chosen for it, and through no other.

    y_t = sum_j share_tj down_e(silu(gate_e x_t) * up_e x_t),   e = choice_tj

Shazeer et al. 2017, 1701.06538, eq. 1, with the unit of Shazeer 2020, eq. 6. Nothing is dropped here and there is no
buffer for every expert: the choices are sorted by expert and cut into blocks of one expert each (the idea of Gale et
al. 2022, 2211.15841), and a loop goes through as many blocks as there are, so that the work is that of the choices
plus at most one incomplete block for each expert. Blocks are gathered from x and added to y one at a time; besides
x, y and the sorted choices, nothing grows with the number of tokens. `jax.lax.ragged_dot` has the same products, but
on CPUs and GPUs JAX 0.10 multiplies every token by every expert for it.

Backward, a block forms its hidden units again: nothing but the arguments is kept, whatever the policy of
rematerialisation, at the price of two products more than the six of a gradient. Reverse mode only. Plain XLA on every
platform, the same blocks in the same order: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.kernels import sharded

LEAST, MOST = 8, 256  # tokens of a block


def mixture(
    x: jax.Array, choice: jax.Array, shares: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Returns the mixture for every token, [B, L, D] in the dtype of `x`.

    On a mesh (see `sharded.experts`) every device has its own experts, and sees the tokens of its group.

    Args:
      x: float [B, L, D].
      choice: int32 [B, L, k], distinct experts of each token; a number outside [0, E) stands for none.
      shares: float32 [B, L, k] of each expert in the sum.
      gate, up: [E, D, F] in the dtype of `x`.
      down: [E, F, D], likewise.

    Raises:
      ValueError: shapes that do not fit together.
    """
    experts, width, hidden = gate.shape
    fits = choice.shape == shares.shape and choice.shape[:2] == x.shape[:2] and x.shape[2] == width
    if not fits or up.shape != gate.shape or down.shape != (experts, hidden, width):
        shown = [list(a.shape) for a in (x, choice, shares, gate, up, down)]
        raise ValueError(f"mixture: x, choice, shares, gate, up, down of shapes {shown} do not fit together")
    return sharded.experts(_own)(x, choice, shares, gate, up, down)


class Blocks(NamedTuple):
    """How choices are cut into blocks of one expert.

    Attributes:
      count: int32 [], blocks.
      of: the block i -> its expert [], the tokens [tile] and the choices [tile] in it, beyond the last where it has
        fewer; no two are equal.
    """

    count: jax.Array
    of: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def blocks(choice: jax.Array, experts: int, tile: int) -> Blocks:
    """Returns the blocks of `choice` [T, k]."""
    tokens, most = choice.shape[0], choice.size
    flat = choice.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(flat, stable=True)
    edges = jnp.sum(flat[:, None] < jnp.arange(experts + 1)[None], axis=0)  # [E + 1] where the experts begin
    needed = -(-(edges[1:] - edges[:-1]) // tile)  # [E]
    upto = jnp.cumsum(needed)

    def of(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        expert = jnp.minimum(jnp.sum(upto <= i), experts - 1)
        within = jnp.arange(tile)
        place = edges[expert] + (i - upto[expert] + needed[expert]) * tile + within
        used = place < edges[expert + 1]
        found = order[jnp.minimum(place, most - 1)]
        return expert, jnp.where(used, found // choice.shape[1], tokens + within), jnp.where(used, found, most + within)

    return Blocks(upto[-1], of)


def _own(
    x: jax.Array, choice: jax.Array, shares: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, total: int
) -> jax.Array:
    """Returns what the experts of one device add to its tokens; `total` counts those of all devices."""
    load = choice.size // total  # choices of an expert, on average
    tile = min(max(LEAST, 1 << max(load // 4, 1).bit_length() - 1), MOST)
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, choice, shares))
    y: Any = _mixture(tile, *flat, gate, up, down)
    return y.reshape(x.shape)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _add(x: jax.Array, index: jax.Array, y: jax.Array) -> jax.Array:
    return x.at[index].add(y.astype(x.dtype), mode="drop", unique_indices=True)


def _unit(g: jax.Array, u: jax.Array) -> jax.Array:
    return jax.nn.silu(g) * u


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(tile: int, x: Any, choice: Any, shares: Any, gate: Any, up: Any, down: Any) -> jax.Array:
    """Returns the mixture of x [T, D] by choice and shares [T, k]."""
    cut = blocks(choice, gate.shape[0], tile)
    share = shares.reshape(-1)

    def block(i: jax.Array, y: jax.Array) -> jax.Array:
        e, token, place = cut.of(i)
        own = _rows(x, token)  # [tile, D]
        out = _unit(own @ gate[e], own @ up[e]) @ down[e]
        return _add(y, token, _rows(share, place)[:, None] * out.astype(y.dtype))

    return jax.lax.fori_loop(0, cut.count, block, jnp.zeros(x.shape, _wide(x))).astype(x.dtype)


def _forward(tile: int, *arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _mixture(tile, *arguments), arguments


def _backward(tile: int, saved: tuple[Any, ...], d_y: jax.Array) -> tuple[Any, ...]:
    x, choice, shares, gate, up, down = saved
    cut = blocks(choice, gate.shape[0], tile)
    share = shares.reshape(-1)

    def block(i: jax.Array, sums: Any) -> Any:
        d_x, d_share, d_gate, d_up, d_down = sums
        e, token, place = cut.of(i)
        own, d_out = _rows(x, token), _rows(d_y, token)
        h, unit = jax.vjp(_unit, own @ gate[e], own @ up[e])
        s = _rows(share, place)[:, None]
        d_h = d_out @ down[e].T  # for a share of 1
        d_g, d_u = unit((s * d_h).astype(h.dtype))
        return (
            _add(d_x, token, d_g @ gate[e].T + d_u @ up[e].T),
            _add(d_share, place, jnp.sum(h.astype(s.dtype) * d_h.astype(s.dtype), axis=1)),
            d_gate.at[e].add((own.T @ d_g).astype(d_gate.dtype)),
            d_up.at[e].add((own.T @ d_u).astype(d_up.dtype)),
            d_down.at[e].add((h.T @ (s * d_out).astype(h.dtype)).astype(d_down.dtype)),
        )

    zeros = tuple(jnp.zeros(a.shape, _wide(a)) for a in (x, share, gate, up, down))
    d_x, d_share, *d_weights = jax.lax.fori_loop(0, cut.count, block, zeros)
    d_weights = (d.astype(w.dtype) for d, w in zip(d_weights, (gate, up, down), strict=True))
    return d_x.astype(x.dtype), None, d_share.reshape(shares.shape).astype(shares.dtype), *d_weights


_mixture.defvjp(_forward, _backward)
