"""Hard tokens: the ordinary chain of thought, one token drawn from softmax(logits / temperature).

token ~ Cat(p);   fed = table[token];   log_prob = log p[token]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.kernels import vocabulary
from jaxcl.random import categorical
from jaxcl.rl import thoughts
from jaxcl.types import Key


def make(*, temperature: float = 1.0) -> thoughts.Policy:
    """Returns the policy.

    Args:
      temperature: of the softmax, > 0; `greedy` is its limit 0.

    Raises:
      UserError: a temperature that is not positive.
    """
    thoughts.demand_positive(temperature=temperature)

    def sample(logits: jax.Array, table: jax.Array, key: Key) -> tuple[jax.Array, thoughts.Record]:
        logits, table = jax.lax.stop_gradient((logits, table))
        token = categorical(key, thoughts.scores(logits, temperature))
        return table[token], {"token": token}

    def greedy(logits: jax.Array, table: jax.Array) -> tuple[jax.Array, thoughts.Record]:
        token = thoughts.shadow(logits)
        return jax.lax.stop_gradient(table)[token], {"token": token}

    def log_prob(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        del table
        return thoughts.select(logits, jax.lax.stop_gradient(record["token"]), temperature)

    def fused(hidden: jax.Array, head: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        del table
        cold = hidden if temperature == 1 else hidden.astype(jnp.float32) / temperature
        return vocabulary.cross_entropy(cold, head, record["token"])[0]

    return thoughts.Policy("hard", False, sample, greedy, log_prob, lambda table, record: table[record["token"]], fused)
