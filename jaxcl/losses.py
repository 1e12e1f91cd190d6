"""Cross-entropy and distillation from hidden states, without ever holding all logits of a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxcl.types import Batch, Output

# Widest logits that are formed whole: below it one matrix product is faster, above it memory decides.
WIDEST = 8192
_NEVER = -1e30  # less than any logit, and finite, so that a difference of two is not NaN
_Carry = TypeVar("_Carry")


def cross_entropy(
    output: Output, batch: Batch, *, z_loss: float = 0.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the negative log-likelihoods of the targets in nats, and the sum of the weights.

    Args:
      output: hidden [B, L, D] with a head [D, V], or logits [B, V] or [B, L, V] without one; any float type.
      batch: `targets` and `weights` of shape [B, L] or [B]. A target of weight 0 may be any number.
      z_loss: coefficient of the square of the logsumexp of the logits (Chowdhery et al. 2022, PaLM, section 5).
      chunk: columns of the vocabulary held at a time; None = all of them up to 8192, else 8192.

    Returns:
      float32 [], float32 []. The weight is that of the targets alone and carries no gradient.
    """
    logp, lse = log_probs(output, batch.targets, chunk=chunk)
    cost = -logp if z_loss == 0.0 else z_loss * lse**2 - logp
    return _weigh(cost, batch.weights)


def log_probs(output: Output, targets: jax.Array, *, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target and the logsumexp of its logits, float32, shaped like `targets`.

    With a chunk the forward pass is an online logsumexp over blocks of head columns (Milakov & Gimelshein 2018)
    and the backward pass forms each block of logits again: one more matrix product, no [B, L, V].

    Args:
      output: see `cross_entropy`.
      targets: int32 [B, L] or [B]; numbers outside [0, V) give the log-probability of no class, 0 - logsumexp.
      chunk: see `cross_entropy`.
    """
    targets = jax.lax.stop_gradient(targets)
    if output.head is None:
        return _select(output.hidden.astype(jnp.float32), targets)
    width = _width(output.head, chunk)
    if width is None:
        return _whole(output.hidden, output.head, targets)
    return _chunked(width, output.hidden, output.head, targets)


def kl(
    student: Output, teacher: Output, batch: Batch, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of KL(teacher || student) in nats, and the sum of the weights.

    Both distributions are softmax(logits / temperature). Distillation multiplies the result by temperature^2 to
    keep the size of its gradient (Hinton et al. 2015, section 2); this function does not. No gradient reaches
    the teacher.

    Args:
      student, teacher: outputs of the same rows and vocabulary; their D may differ.
      batch: `weights` [B, L] or [B] are used.
      temperature: > 0.
      chunk: see `cross_entropy`.

    Returns:
      float32 [], float32 [].
    """
    teacher = jax.lax.stop_gradient(teacher)
    scale = 1.0 / temperature
    width = None if student.head is None else _width(student.head, chunk)
    if student.head is None or teacher.head is None or width is None:
        log_p = jax.nn.log_softmax(teacher.logits * scale)
        log_q = jax.nn.log_softmax(student.logits * scale)
        cost = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    else:
        cost = _chunked_kl(width, scale, (student.hidden, student.head), (teacher.hidden, teacher.head))
    return _weigh(cost, batch.weights)  # pyright: ignore[reportArgumentType]


def _weigh(cost: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    # A cost behind a weight of 0 may be anything, even infinite.
    return jnp.sum(jnp.where(weights == 0.0, 0.0, weights * cost)), jnp.sum(weights)


def _width(head: jax.Array, chunk: int | None) -> int | None:
    """Returns the columns per chunk, or None to form the logits whole."""
    if chunk is None:
        return WIDEST if head.shape[1] > WIDEST else None
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least one column of the vocabulary")
    return chunk if chunk < head.shape[1] else None


def _project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _hits(targets: jax.Array, start: jax.Array | int, width: int) -> jax.Array:
    """Returns whether column start + j is the target, bool [..., width]."""
    columns = jax.lax.broadcasted_iota(targets.dtype, (*targets.shape, width), targets.ndim)
    return columns == (targets - start)[..., None]


def _select(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.sum(jnp.where(_hits(targets, 0, logits.shape[-1]), logits, 0.0), axis=-1)
    return target - lse, lse


def _pull_logits(logits: jax.Array, lse: jax.Array, hits: jax.Array, d_logp: jax.Array, d_lse: jax.Array) -> jax.Array:
    """Returns the cotangent of logits whose `_select` has the cotangents (d_logp, d_lse)."""
    p = jnp.exp(logits - lse[..., None])
    return p * (d_lse - d_logp)[..., None] + jnp.where(hits, d_logp[..., None], 0.0)


def _pull_product(hidden: jax.Array, head: jax.Array, d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 cotangents of (hidden, head) in `_project`; the products run in the type of its operands."""
    d_logits = d_logits.astype(jnp.result_type(hidden, head))
    d_hidden = jnp.einsum("...v,dv->...d", d_logits, head, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("...d,...v->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


@jax.custom_vjp
def _whole(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _select(_project(hidden, head), targets)


def _whole_fwd(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    logits = _project(hidden, head)
    logp, lse = _select(logits, targets)
    # The logits are kept: forming them again costs a matrix product, an exponential costs next to nothing.
    return (logp, lse), (hidden, head, targets, logits, lse)


def _whole_bwd(saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    hidden, head, targets, logits, lse = saved
    d_logits = _pull_logits(logits, lse, _hits(targets, 0, logits.shape[-1]), *cotangents)
    d_hidden, d_head = _pull_product(hidden, head, d_logits)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None


_whole.defvjp(_whole_fwd, _whole_bwd)


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


def _absorb(top: jax.Array, total: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the new running maximum, the new sum, what old sums shrink by, and exp(logits - maximum)."""
    new = jnp.maximum(top, jnp.max(logits, axis=-1))
    shrink, e = jnp.exp(top - new), jnp.exp(logits - new[..., None])
    return new, total * shrink + jnp.sum(e, axis=-1), shrink, e


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(width: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        top, total, target = carry
        logits = _project(hidden, blocks[0])  # [..., width]
        top, total, _, _ = _absorb(top, total, logits)
        return top, total, target + jnp.sum(jnp.where(_hits(targets, start, logits.shape[-1]), logits, 0.0), axis=-1)

    zero = jnp.zeros(targets.shape, jnp.float32)
    top, total, target = _fold(width, (head,), visit, (zero + _NEVER, zero, zero))
    lse = top + jnp.log(total)
    return target - lse, lse


def _chunked_fwd(width: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    logp, lse = _chunked(width, hidden, head, targets)  # pyright: ignore[reportGeneralTypeIssues]
    return (logp, lse), (hidden, head, targets, lse)


def _chunked_bwd(width: int, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    hidden, head, targets, lse = saved

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        logits = _project(hidden, blocks[0])
        d_logits = _pull_logits(logits, lse, _hits(targets, start, logits.shape[-1]), *cotangents)
        return _accumulate(carry, start, hidden, blocks[0], d_logits)

    d_hidden, d_head = _fold(width, (head,), visit, _empty(hidden, head))
    return d_hidden.astype(hidden.dtype), d_head, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _empty(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype)


def _accumulate(carry: Any, start: Any, hidden: jax.Array, block: jax.Array, d_logits: jax.Array) -> Any:
    """Adds the cotangents of one block of logits to those of (hidden, head)."""
    d_hidden, d_block = _pull_product(hidden, block, d_logits)
    d_head = jax.lax.dynamic_update_slice_in_dim(carry[1], d_block.astype(carry[1].dtype), start, 1)
    return carry[0] + d_hidden, d_head


_Pair = tuple[jax.Array, jax.Array]  # hidden [..., D], head [D, V]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_kl(width: int, scale: float, student: _Pair, teacher: _Pair) -> jax.Array:
    return _chunked_kl_fwd(width, scale, student, teacher)[0]


def _chunked_kl_fwd(width: int, scale: float, student: _Pair, teacher: _Pair) -> tuple[Any, Any]:
    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        top_q, sum_q, top_p, sum_p, gap = carry
        q, p = scale * _project(student[0], blocks[0]), scale * _project(teacher[0], blocks[1])
        top_q, sum_q, _, _ = _absorb(top_q, sum_q, q)
        top_p, sum_p, shrink, e = _absorb(top_p, sum_p, p)
        return top_q, sum_q, top_p, sum_p, gap * shrink + jnp.sum(e * (p - q), axis=-1)

    zero = jnp.zeros(student[0].shape[:-1], jnp.float32)
    start = (zero + _NEVER, zero, zero + _NEVER, zero, zero)
    top_q, sum_q, top_p, sum_p, gap = _fold(width, (student[1], teacher[1]), visit, start)
    lse_q, lse_p = top_q + jnp.log(sum_q), top_p + jnp.log(sum_p)
    cost = gap / sum_p + (lse_q - lse_p)  # sum_v p (log p - log q)
    return cost, (student, teacher, lse_q, lse_p)


def _chunked_kl_bwd(width: int, scale: float, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    (hidden, head), teacher, lse_q, lse_p = saved

    def visit(carry: Any, start: Any, blocks: tuple[jax.Array, ...]) -> Any:
        q = jnp.exp(scale * _project(hidden, blocks[0]) - lse_q[..., None])
        p = jnp.exp(scale * _project(teacher[0], blocks[1]) - lse_p[..., None])
        return _accumulate(carry, start, hidden, blocks[0], (q - p) * (scale * cotangent)[..., None])

    d_hidden, d_head = _fold(width, (head, teacher[1]), visit, _empty(hidden, head))
    return (d_hidden.astype(hidden.dtype), d_head), None


_chunked_kl.defvjp(_chunked_kl_fwd, _chunked_kl_bwd)
