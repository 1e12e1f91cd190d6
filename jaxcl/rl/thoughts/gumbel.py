r"""Gumbel thoughts: the likeliest tokens, mixed by a softmax of log-probabilities with Gumbel noise.

    g_i = log p_i + eps_i,  eps_i ~ Gumbel(0, 1), over the support;   thought = softmax(g / tau_g) table
    log_prob = sum_i l_i,  l_i = -(g_i - log p_i) - exp(-(g_i - log p_i))

The support is the `top_k` likeliest tokens that reach `top_p` together, p is renormalised over it. It is stored, and
later parameters are renormalised over the same tokens: the density is that of g given the support.

Source: SofT-GRPO, 2511.06411.

Choices and deviations:
- The paper averages l_i over tokens with log p_i > -3, which is no density: its gradient is a fraction of the true one
  that varies with p. The sum is the default, `reduction="mean"` is the paper's.
- The paper clamps the noise to [-1.5, 3]. The ends then have mass of their own and move with the logits, where no score
  exists; l_i is what it is without the clamp, and the gradient is biased. Off by default.
- `greedy` leaves the noise out and keeps tau_g, since the model is trained on inputs as sharp as that.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.rl import thoughts
from jaxcl.types import Key

NEVER = -1e30  # finite, so that a record of zeros, which keeps nothing, has no NaN


def make(
    *,
    top_k: int = 5,
    top_p: float = 0.95,
    tau_g: float = 0.1,
    temperature: float = 1.0,
    clamp: tuple[float, ...] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> thoughts.Policy:
    """Returns the policy; its records have `support` int32, `kept` bool and `perturbed` (g), all [..., K].

    Args:
      top_k: tokens of the support at the most, K.
      top_p: share of probability after which less likely tokens are left out, in (0, 1].
      tau_g: temperature of the mixture of perturbed log-probabilities, > 0.
      temperature: of the softmax that p comes from, > 0.
      clamp: (low, high) of the noise, low < high; the paper's are (-1.5, 3).
      reduction: log_prob is the sum of l_i, or their mean over tokens with log p_i > -3.

    Raises:
      UserError: an option out of range.
    """
    thoughts.demand(top_k >= 1, "top_k", top_k, "must be at least 1")
    thoughts.demand(0 < top_p <= 1, "top_p", top_p, "must lie in (0, 1]; 1 keeps all of top_k")
    thoughts.demand_positive(tau_g=tau_g, temperature=temperature)
    ordered = clamp is None or (len(clamp) == 2 and clamp[0] < clamp[1])
    thoughts.demand(ordered, "clamp", clamp, "must be (low, high) with low < high, or None")
    thoughts.demand(reduction in ("sum", "mean"), "reduction", repr(reduction), "must be 'sum' or 'mean'")

    def locate(logits: jax.Array, record: thoughts.Record) -> jax.Array:
        return _locate(thoughts.scores(logits, temperature), record)

    def choose(logits: jax.Array) -> thoughts.Record:
        return _choose(thoughts.log_softmax(logits, temperature), top_k, top_p)

    def draw(logits: jax.Array, table: jax.Array, key: Key) -> thoughts.Record:
        del table
        record = choose(logits)
        log_p = locate(logits, record)
        noise = jax.random.gumbel(key, log_p.shape, log_p.dtype)
        return {**record, "perturbed": log_p + (noise if clamp is None else jnp.clip(noise, *clamp))}

    def mixture(record: thoughts.Record) -> thoughts.Mixture:
        g = jnp.where(record["kept"], record["perturbed"] / tau_g, NEVER)  # divided later it would be -inf
        return record["support"], jax.nn.softmax(g, axis=-1)

    def mean(logits: jax.Array, table: jax.Array) -> jax.Array:
        record = choose(logits)
        support, shares = mixture({**record, "perturbed": locate(logits, record)})
        return thoughts.average(shares, table, support)

    def log_prob(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        del table
        log_p = locate(logits, record)
        noise = record["perturbed"] - log_p
        counted = record["kept"] if reduction == "sum" else record["kept"] & (log_p > -3)
        total = jnp.sum(jnp.where(counted, -noise - jnp.exp(-noise), 0.0), axis=-1)
        return total if reduction == "sum" else total / jnp.maximum(jnp.sum(counted, axis=-1), 1)

    return thoughts.build("gumbel", draw=draw, mean=mean, log_prob=log_prob, mixture=mixture)


def _choose(log_p: jax.Array, top_k: int, top_p: float) -> thoughts.Record:
    """Returns the support of log_p [..., V]: those of the likeliest K that more likely ones leave short of top_p."""
    log_p, support = jax.lax.top_k(log_p, min(top_k, log_p.shape[-1]))
    p = jnp.exp(log_p)
    kept = (p > 0) if top_p == 1 else (p > 0) & (jnp.cumsum(p, axis=-1) - p < top_p)
    return {"support": support.astype(jnp.int32), "kept": kept}


def _locate(scores: jax.Array, record: thoughts.Record) -> jax.Array:
    """Returns log p [..., K], renormalised over the support of the record; 0 where a token is left out."""
    z = thoughts.pick(scores, record["support"])
    log_p = jax.nn.log_softmax(jnp.where(record["kept"], z, NEVER), axis=-1)
    return jnp.where(record["kept"], log_p, 0.0)
