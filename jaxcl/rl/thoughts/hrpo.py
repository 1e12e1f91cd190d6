"""HRPO: the token of `hard`, and beside it the mean embedding, of which the model takes in what its gate lets pass.

token ~ Cat(p);   thought = p table / |p|_2;   log_prob = log p[token]

`sample`, `greedy` and `feed` give the thought before the gate, which belongs to the parameters of the model
(`jaxcl.rl.gate.gated`): the model is given the token and, in the column `mixture` of the batch, the thought. That is
data: no gradient flows back through time, but one reaches the gate, and the table through the token.
A model without a gate is given the token alone, as by `hard`.

Source: Yue et al. 2025, 2505.18454, equations 3 and 4; p is cooled to a temperature of 0.5 there.
"""

from __future__ import annotations

import jax

from jaxcl.rl import gate, thoughts
from jaxcl.rl.thoughts import hard


def make(*, temperature: float = 1.0) -> thoughts.Policy:
    """Returns the policy; `token` and `thought` are all its records have.

    Args:
      temperature: of the softmax that the token is drawn from and the thought is made of, > 0. With `greedy` the token
        is the likeliest one and the thought is the same.

    Raises:
      UserError: a temperature that is not positive.
    """
    base = hard.make(temperature=temperature)

    def beside(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> tuple[jax.Array, thoughts.Record]:
        logits, table = jax.lax.stop_gradient((logits, table))
        thought = gate.mixture(logits, table, temperature).astype(table.dtype)
        return thought, {**record, "thought": thought}

    return base._replace(
        name="hrpo",
        soft=True,
        gated=True,
        sample=lambda logits, table, key: beside(logits, table, base.sample(logits, table, key)[1]),
        greedy=lambda logits, table: beside(logits, table, base.greedy(logits, table)[1]),
        feed=lambda table, record: jax.lax.stop_gradient(record["thought"]).astype(table.dtype),
    )
