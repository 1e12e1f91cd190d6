"""Softmax over the vocabulary by blocks of columns: an online logsumexp forward, logits formed again backward.

Milakov & Gimelshein 2018 (online normaliser). One block of logits [..., width] is held at a time; the price is one more
matrix product in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

NEVER = -1e30  # less than any logit, and finite, so that a difference of two is not NaN
_Carry = TypeVar("_Carry")
Pair = tuple[jax.Array, jax.Array]  # hidden [..., D], head [D, V]


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Returns the logits, float32 [..., V], of hidden [..., D] and head [D, V]."""
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def hits(targets: jax.Array, start: jax.Array | int, width: int) -> jax.Array:
    """Returns whether column start + j is the target, bool [..., width]."""
    targets = targets.astype(jnp.promote_types(targets.dtype, jnp.int32))  # a narrow type would count the columns twice
    columns = jax.lax.broadcasted_iota(targets.dtype, (*targets.shape, width), targets.ndim)
    return columns == (targets - start)[..., None]


def pull_logits(logits: jax.Array, lse: jax.Array, hits: jax.Array, d_logp: jax.Array, d_lse: jax.Array) -> jax.Array:
    """Returns the cotangent of logits, given those of the log-probability of the target and of the logsumexp."""
    p = jnp.exp(logits - lse[..., None])
    return p * (d_lse - d_logp)[..., None] + jnp.where(hits, d_logp[..., None], 0.0)


def pull_product(hidden: jax.Array, head: jax.Array, d_logits: jax.Array) -> Pair:
    """Returns float32 cotangents of (hidden, head) in `project`; the products run in the type of its operands."""
    d_logits = d_logits.astype(jnp.result_type(hidden, head))
    d_hidden = jnp.einsum("...v,dv->...d", d_logits, head, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("...d,...v->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


def _fold(
    width: int, heads: tuple[jax.Array, ...], visit: Callable[[_Carry, Any, tuple[jax.Array, ...]], _Carry], carry: Any
) -> Any:
    """Folds `visit(carry, start, blocks)` over blocks of columns of `heads`; the last one may be narrower."""
    size = heads[0].shape[1]

    def body(state: Any, start: jax.Array) -> tuple[Any, None]:
        return visit(state, start, tuple(jax.lax.dynamic_slice_in_dim(h, start, width, 1) for h in heads)), None

    carry, _ = jax.lax.scan(body, carry, width * jnp.arange(size // width))
    rest = size - size % width
    return carry if rest == size else visit(carry, rest, tuple(h[:, rest:] for h in heads))


def _absorb(
    top: jax.Array, total: jax.Array, logits: jax.Array, scale: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the new running maximum, the new sum, what old sums shrink by, and exp(scale * (logits - maximum)).

    The difference is taken before it is scaled: that of two large numbers, of which one is rounded, would be off.
    """
    new = jnp.maximum(top, jnp.max(logits, axis=-1))
    shrink, e = jnp.exp(scale * (top - new)), jnp.exp(scale * (logits - new[..., None]))
    return new, total * shrink + jnp.sum(e, axis=-1), shrink, e


def cross_entropy(width: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of the targets and the logsumexp of the logits, float32 [...].

    Args:
      width: columns per block.
      hidden: [..., D].
      head: [D, V].
      targets: int32 [...].
    """

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        top, total, target = carry
        logits = project(hidden, blocks[0])  # [..., width]
        top, total, _, _ = _absorb(top, total, logits)
        return top, total, target + jnp.sum(jnp.where(hits(targets, start, logits.shape[-1]), logits, 0.0), axis=-1)

    zero = jnp.zeros(targets.shape, jnp.float32)
    top, total, target = _fold(width, (head,), visit, (zero + NEVER, zero, zero))
    lse = top + jnp.log(total)
    return target - lse, lse


def cross_entropy_backward(
    width: int,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    d_logp: jax.Array,
    d_lse: jax.Array,
) -> Pair:
    """Returns the cotangents of (hidden, head) in their dtypes, given what `cross_entropy` returned."""

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        logits = project(hidden, blocks[0])
        d_logits = pull_logits(logits, lse, hits(targets, start, logits.shape[-1]), d_logp, d_lse)
        return _accumulate(carry, start, hidden, blocks[0], d_logits)

    d_hidden, d_head = _fold(width, (head,), visit, _empty(hidden, head))
    return d_hidden.astype(hidden.dtype), d_head


def _empty(hidden: jax.Array, head: jax.Array) -> Pair:
    return jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype)


def _accumulate(carry: Any, start: Any, hidden: jax.Array, block: jax.Array, d_logits: jax.Array) -> Any:
    """Adds the cotangents of one block of logits to those of (hidden, head)."""
    d_hidden, d_block = pull_product(hidden, block, d_logits)
    d_head = jax.lax.dynamic_update_slice_in_dim(carry[1], d_block.astype(carry[1].dtype), start, 1)
    return carry[0] + d_hidden, d_head


def kl(width: int, scale: float, student: Pair, teacher: Pair) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns KL(teacher || student) of softmax(scale * logits), and the logsumexp of student and teacher, [...]."""

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        top_q, sum_q, top_p, sum_p, gap = carry
        q, p = project(student[0], blocks[0]), project(teacher[0], blocks[1])
        top_q, sum_q, _, _ = _absorb(top_q, sum_q, q, scale)
        top_p, sum_p, shrink, e = _absorb(top_p, sum_p, p, scale)
        return top_q, sum_q, top_p, sum_p, gap * shrink + jnp.sum(e * (scale * (p - q)), axis=-1)

    zero = jnp.zeros(student[0].shape[:-1], jnp.float32)
    start = (zero + NEVER, zero, zero + NEVER, zero, zero)
    top_q, sum_q, top_p, sum_p, gap = _fold(width, (student[1], teacher[1]), visit, start)
    lse_q, lse_p = scale * top_q + jnp.log(sum_q), scale * top_p + jnp.log(sum_p)
    return gap / sum_p + (lse_q - lse_p), lse_q, lse_p  # sum_v p (log p - log q)


def kl_backward(
    width: int,
    scale: float,
    student: Pair,
    teacher: Pair,
    lse_q: jax.Array,
    lse_p: jax.Array,
    cotangent: jax.Array,
) -> Pair:
    """Returns the cotangents of the student's (hidden, head)."""
    hidden, head = student

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        q = jnp.exp(jnp.minimum(scale * project(hidden, blocks[0]) - lse_q[..., None], 0.0))
        p = jnp.exp(jnp.minimum(scale * project(teacher[0], blocks[1]) - lse_p[..., None], 0.0))
        return _accumulate(carry, start, hidden, blocks[0], (q - p) * (scale * cotangent)[..., None])

    d_hidden, d_head = _fold(width, (head, teacher[1]), visit, _empty(hidden, head))
    return d_hidden.astype(hidden.dtype), d_head


def mixture(
    width: int, hidden: jax.Array, head: jax.Array, embedding: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(inverse * hidden head) embedding, float32 [..., E], and the logsumexp, float32 [...].

    Args:
      width: columns of the vocabulary per block.
      hidden: [..., D].
      head: [D, V].
      embedding: [V, E].
      inverse: float32 [], 1 / temperature.
    """

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        top, total, mean = carry
        top, total, shrink, e = _absorb(top, total, exact(hidden, blocks[0]), inverse)
        rows = _rows(embedding, start, blocks[0].shape[1])
        return top, total, mean * shrink[..., None] + exact(e.astype(rows.dtype), rows)

    zero = jnp.zeros(hidden.shape[:-1], jnp.float32)
    mean = jnp.zeros((*zero.shape, embedding.shape[1]), jnp.float32)
    top, total, mean = _fold(width, (head,), visit, (zero + NEVER, zero, mean))
    return mean / total[..., None], inverse * top + jnp.log(total)


def mixture_backward(
    width: int,
    hidden: jax.Array,
    head: jax.Array,
    embedding: jax.Array,
    inverse: jax.Array,
    mean: jax.Array,
    lse: jax.Array,
    d_mean: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of (hidden, head, embedding, inverse), given what `mixture` returned.

    With the scores z = inverse * hidden head and p = exp(z - lse), dz_v = p_v (<d_mean, embedding_v - mean> + d_lse).
    """
    shift = d_lse - jnp.sum(d_mean * mean, axis=-1)  # [...]
    narrow = d_mean.astype(embedding.dtype)
    kind = jnp.result_type(hidden, head)

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        d_hidden, d_head, d_embedding, slope = carry
        size = blocks[0].shape[1]
        rows = _rows(embedding, start, size)
        gap = jnp.minimum(inverse * exact(hidden, blocks[0]) - lse[..., None], 0.0)  # log p
        p = jnp.exp(gap)
        d_scores = p * (exact(narrow, rows.T) + shift[..., None])
        # sum_v dz_v z_v about the logsumexp: z itself is large at low temperatures, and sum_v dz_v is d_lse.
        slope = slope + jnp.sum(d_scores * gap)
        d_scores = d_scores.astype(kind)
        d_hidden = d_hidden + exact(d_scores, blocks[0].T)
        d_block = inverse * _outer(hidden, d_scores)
        d_rows = _outer(p.astype(embedding.dtype), narrow)
        put = jax.lax.dynamic_update_slice_in_dim
        d_head = put(d_head, d_block.astype(head.dtype), start, 1)
        return d_hidden, d_head, put(d_embedding, d_rows.astype(embedding.dtype), start, 0), slope

    start = (*_empty(hidden, head), jnp.zeros(embedding.shape, embedding.dtype), jnp.zeros((), jnp.float32))
    d_hidden, d_head, d_embedding, slope = _fold(width, (head,), visit, start)
    d_inverse = (slope + jnp.sum(d_lse * lse)) / inverse
    return (inverse * d_hidden).astype(hidden.dtype), d_head, d_embedding, d_inverse


def _rows(embedding: jax.Array, start: Any, size: int) -> jax.Array:
    """Returns the rows of the embedding that belong to a block of columns."""
    return jax.lax.dynamic_slice_in_dim(embedding, start, size, 0)


def exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a [..., m] times b [m, n] in float32: a low temperature enlarges every rounding of a score."""
    return jnp.einsum("...m,mn->...n", a, b, precision="highest", preferred_element_type=jnp.float32)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum over tokens of a [..., m] times b [..., n], float32 [m, n]."""
    return jnp.einsum("...m,...n->mn", a, b, precision="highest", preferred_element_type=jnp.float32)
