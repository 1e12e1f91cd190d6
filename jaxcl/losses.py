"""Cross-entropy and distillation from hidden states, without ever holding all logits of a large vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.kernels import vocabulary
from jaxcl.types import Batch, Output


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
        return vocabulary.select(output.hidden.astype(jnp.float32), targets)
    return vocabulary.cross_entropy(output.hidden, output.head, targets, chunk=chunk)


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
    width = None if student.head is None else vocabulary.width_of(student.head, chunk)
    if student.head is None or teacher.head is None or width is None:
        log_p = jax.nn.log_softmax(teacher.logits * scale)
        log_q = jax.nn.log_softmax(student.logits * scale)
        cost = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    else:
        cost = vocabulary.kl(width, scale, (student.hidden, student.head), (teacher.hidden, teacher.head))
    return _weigh(cost, batch.weights)  # pyright: ignore[reportArgumentType]


def _weigh(cost: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    # A cost behind a weight of 0 may be anything, even infinite.
    return jnp.sum(jnp.where(weights == 0.0, 0.0, weights * cost)), jnp.sum(weights)
