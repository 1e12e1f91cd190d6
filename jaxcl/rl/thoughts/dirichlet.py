r"""Dirichlet thoughts: mixture weights drawn about the next-token distribution.

    x ~ Dir(a),  a = concentration p + floor,  p = softmax(logits / temperature);   thought = x table
    log_prob = log Gamma(sum a) - sum log Gamma(a) + sum (a - 1) log x

Source: CoT2 of Gozeten et al., 2505.23648, where the concentration is 1 and tokens with p < 1e-3 are left out.

Choices and deviations:
- Without `top_k` all V tokens have weights and the floor keeps a token with p = 0 in the support; the record has
  V numbers a thought, so that this is for small vocabularies. The floors add up: V floor should be well below the
  concentration, or thoughts are drawn to the mean of the table.
- With `top_k`, the support is stored and p is renormalised over it, also under later parameters: the density is that of
  the weights given the support.
- Weights are kept as logarithms: those of a small a underflow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from jaxcl.rl import thoughts
from jaxcl.types import Key


def make(
    *, concentration: float = 1.0, floor: float = 1e-4, top_k: int | None = None, temperature: float = 1.0
) -> thoughts.Policy:
    """Returns the policy; its records have `log_shares` [..., K], and `support` int32 [..., K] with `top_k`.

    Args:
      concentration: sum of a, less the floors; the larger, the closer to the mean, > 0.
      floor: least a, > 0.
      top_k: number of the likeliest tokens that are mixed; None = all, K = V.
      temperature: of the softmax, > 0.

    Raises:
      UserError: an option out of range.
    """
    thoughts.demand_positive(concentration=concentration, floor=floor, temperature=temperature)
    thoughts.demand(top_k is None or top_k >= 2, "top_k", top_k, "must be at least 2, or None for all tokens")

    def alpha(logits: jax.Array, support: jax.Array | None) -> jax.Array:
        kept = logits if support is None else thoughts.pick(logits, support)
        return concentration * jax.nn.softmax(thoughts.scores(kept, temperature), axis=-1) + floor

    def choose(logits: jax.Array) -> jax.Array | None:
        return None if top_k is None else jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[1].astype(jnp.int32)

    def draw(logits: jax.Array, table: jax.Array, key: Key) -> thoughts.Record:
        del table
        support = choose(logits)
        shares = jax.nn.log_softmax(jax.random.loggamma(key, alpha(logits, support)), axis=-1)
        return {"log_shares": shares} | ({} if support is None else {"support": support})

    def mean(logits: jax.Array, table: jax.Array) -> jax.Array:
        support = choose(logits)
        a = alpha(logits, support)
        return thoughts.average(a / jnp.sum(a, axis=-1, keepdims=True), table, support)

    def log_prob(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        del table
        a = alpha(logits, record.get("support"))
        inner = (a - 1) * record["log_shares"] - gammaln(a)
        return gammaln(jnp.sum(a, axis=-1)) + jnp.sum(inner, axis=-1)

    def mixture(record: thoughts.Record) -> thoughts.Mixture:
        return record.get("support"), jnp.exp(record["log_shares"])

    return thoughts.build("dirichlet", draw=draw, mean=mean, log_prob=log_prob, mixture=mixture)
