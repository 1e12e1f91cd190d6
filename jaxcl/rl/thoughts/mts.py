"""Multi-token sampling: the mean embedding of K tokens drawn independently.

    i_1 .. i_K ~ Cat(p),  p = softmax(logits / temperature);   thought = mean_r table[i_r]

K = 1 is `hard`; K -> infinity is `none`, with an error of K^-1/2.

Source: CoT2-MTS of Gozeten et al., 2505.23648.

Choices and deviations:
- The ratio of the paper is the geometric mean over the K draws, whose gradient is 1/K of that of the density, while
  the answer keeps its whole weight. The default is the density, prod_r p[i_r]; `ratio="geometric"` is the paper's.
- `greedy` feeds the limit of large K.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.random import categorical
from jaxcl.rl import thoughts
from jaxcl.types import Key


def make(
    *, count: int = 3, temperature: float = 1.0, ratio: Literal["product", "geometric"] = "product"
) -> thoughts.Policy:
    """Returns the policy; its records have `tokens`, int32 [..., K].

    Args:
      count: tokens per thought, K.
      temperature: of the softmax, > 0.
      ratio: what log_prob is: the log-probability of the draws, or its mean over them.

    Raises:
      UserError: an option out of range.
    """
    thoughts.demand(count >= 1, "count", count, "must be at least 1")
    thoughts.demand_positive(temperature=temperature)
    thoughts.demand(ratio in ("product", "geometric"), "ratio", repr(ratio), "must be 'product' or 'geometric'")
    gather = jnp.sum if ratio == "product" else jnp.mean

    def draw(logits: jax.Array, table: jax.Array, key: Key) -> thoughts.Record:
        del table
        scores = thoughts.scores(logits, temperature)[..., None, :]
        return {"tokens": categorical(key, jnp.broadcast_to(scores, (*logits.shape[:-1], count, logits.shape[-1])))}

    def log_prob(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        del table
        return gather(thoughts.pick(thoughts.log_softmax(logits, temperature), record["tokens"]), axis=-1)

    def mixture(record: thoughts.Record) -> thoughts.Mixture:
        return record["tokens"], jnp.full(record["tokens"].shape, 1 / count, jnp.float32)

    return thoughts.build(
        "mts",
        draw=draw,
        mean=lambda logits, table: thoughts.mixture(logits, table, temperature),
        log_prob=log_prob,
        mixture=mixture,
    )
