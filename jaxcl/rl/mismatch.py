r"""Importance weights for a sampler whose log-probabilities are not the trainer's: w = pi_old / pi_behaviour.

    token           min(w_t, cap)                    token_mask       w_t, or 0 above the cap
    sequence        min(prod_t w_t, cap)             sequence_mask    prod_t w_t, or 0 above the cap
    geometric       min((prod_t w_t)^(1/T), cap)     geometric_mask   the mean, or 0 above the cap

Truncation is of Ionides 2008; its use between engines of Yao et al. 2025 ("Your efficient RL framework secretly brings
you off-policy RL training"). Below the cap `token` removes the bias of one token, `sequence` and `sequence_mask` that
of whole sequences at more variance: with two tokens, `token` may leave as much bias as it finds, because it leaves out
how the other token shifts what this one is worth. Everything is detached.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.rl.divergence import LIMIT, ratio
from jaxcl.rl.sequences import Sequences

Correction = Literal["none", "token", "sequence", "geometric", "token_mask", "sequence_mask", "geometric_mask"]


def correct(old: jax.Array, behaviour: jax.Array, rows: Sequences, correction: Correction, cap: float) -> jax.Array:
    """Returns the importance weight of each token, [B, L].

    Args:
      old: log-probability by the trainer, at the parameters that the sampler had, [B, L].
      behaviour: log-probability by the sampler, of the distribution that it drew from, [B, L].
      rows: of the batch.
      correction: see above; `none` gives 1.
      cap: > 0.
    """
    if correction == "none":
        return jnp.ones_like(old)
    weight = raw(old, behaviour, rows, correction)
    bound = jnp.where(weight > cap, 0, weight) if correction.endswith("_mask") else jnp.minimum(weight, cap)
    return jax.lax.stop_gradient(bound)


def raw(old: jax.Array, behaviour: jax.Array, rows: Sequences, correction: Correction) -> jax.Array:
    """Returns the importance weight of each token before the cap, [B, L]."""
    gap = jnp.where(rows.live, old - behaviour, 0)
    if correction.startswith("sequence"):
        gap = rows.spread(rows.total(gap))
    elif correction.startswith("geometric"):
        gap = rows.spread(rows.total(rows.weights * gap)) / rows.length()
    return jnp.exp(jnp.clip(gap, -LIMIT, LIMIT))


def measures(old: jax.Array, behaviour: jax.Array, correction: Correction, cap: float, rows: Sequences) -> dict:
    """Returns the costs of tokens whose means say how far sampler and trainer are apart, each [B, L].

    `mismatch_k3` estimates KL(behaviour || old), `mismatch_gap` is the mean absolute difference of the
    log-probabilities and `mismatch_capped` the fraction of tokens above the cap.
    """
    gap = jnp.where(rows.live, old - behaviour, 0)
    above = raw(old, behaviour, rows, correction) > cap
    return {
        "mismatch_k3": ratio(gap, jnp.zeros_like(gap)) - gap - 1,
        "mismatch_gap": jnp.abs(gap),
        "mismatch_capped": above.astype(gap.dtype),
    }
