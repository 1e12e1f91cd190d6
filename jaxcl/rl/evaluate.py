"""Figures of sampled chains: unbiased pass@k, and the entropy along a chain."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.schema import UserError


def pass_at(k: int, samples: np.ndarray | int, correct: np.ndarray | int) -> np.ndarray:
    """Returns the probability that one of k samples drawn without replacement is correct: 1 - C(n-c, k) / C(n, k).

    It is the unbiased estimate of pass@k from n samples per problem (Chen et al. 2021, "Evaluating Large Language
    Models Trained on Code", equation 1), as a sum of logarithms: no large binomials, no cancellation.

    Args:
      k: samples that may be tried.
      samples: n, int, any shape.
      correct: c of them, int, the same shape.

    Returns:
      float64, the same shape.

    Raises:
      UserError: k is not from 1 to every n, or c not from 0 to n.
    """
    n, c = np.asarray(samples, np.float64), np.asarray(correct, np.float64)
    if k < 1 or (n < k).any():
        raise UserError(f"pass@k: k={k}: must be from 1 to the samples per problem, {int(n.min())}; draw more")
    if (c < 0).any() or (c > n).any():
        raise UserError("pass@k: the number of correct samples must be from 0 to the number of samples")
    kept = np.ones(np.broadcast(n, c).shape)
    logs = np.zeros(kept.shape)
    for i in range(k):  # factor i of C(n-c, k) / C(n, k) is (n-c-i) / (n-i)
        share = c / (n - i)
        kept = kept * (share < 1)
        logs = logs + np.log1p(-np.where(share < 1, share, 0.0))
    return np.where(kept > 0, -np.expm1(logs), 1.0)


def pass_figures(rewards: np.ndarray, ks: Sequence[int], *, right: float = 1.0) -> dict[str, float]:
    """Returns `pass@k` for each k, the mean over problems.

    Args:
      rewards: [N, n], of n samples for each problem.
      ks: the k.
      right: the least reward of a correct answer.
    """
    correct = (np.asarray(rewards) >= right).sum(axis=1)
    return {f"pass@{k}": float(pass_at(k, np.full_like(correct, rewards.shape[1]), correct).mean()) for k in ks}


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy in nats of softmax(logits): [..., V] -> [...], float32 or the wider type of the logits."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)


def entropy_profile(entropies: np.ndarray, weights: np.ndarray, *, bins: int | None = None) -> np.ndarray:
    """Returns the mean entropy along the chains: how much choice is left at each step.

    Args:
      entropies: float [B, T], of what each thought was drawn from.
      weights: float [B, T], 1 for the thoughts of a chain, 0 after its end.
      bins: of equal length in the relative place in the chain; None for one figure per step, counted from the start.

    Returns:
      float64 [bins] or [T]; NaN where no chain has a thought.

    Raises:
      UserError: bins is not positive.
    """
    if bins is not None and bins < 1:
        raise UserError(f"entropy_profile: bins={bins}: must be at least 1, or None for one per step")
    values, counts = np.asarray(entropies, np.float64), np.asarray(weights, np.float64)
    steps = np.broadcast_to(np.arange(counts.shape[1]), counts.shape)
    if bins is not None:
        order, length = np.cumsum(counts > 0, axis=1) - 1, (counts > 0).sum(axis=1, keepdims=True)
        steps = np.where(counts > 0, order * bins // np.maximum(length, 1), 0)
    size = counts.shape[1] if bins is None else bins
    total = np.bincount(steps.ravel(), (np.where(counts > 0, values, 0.0) * counts).ravel(), size)
    weight = np.bincount(steps.ravel(), counts.ravel(), size)
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
