r"""CHORD: reinforcement learning and imitation of demonstrations at once, with a share of imitation that falls.

    (1 - mu_t) RL + mu_t mean_w(-phi log p)      phi = 1, p or p (1 - p), detached
    mu_t = end + (mu - end) (1 + cos(pi t / steps)) / 2, and end from t = steps on

Source: Zhang et al., 2508.11408 (mu, and phi = p (1 - p), which spares what the policy knows already and what it finds
absurd); the numbers are those of DataMind, 2509.25084.

The rows are rollouts and demonstrations. Column `demonstration` of `extra`, float32 [B], is 1 for the latter; their
`advantage` and `share` are 0, so that the objective ignores them, and their `weights` say which tokens to imitate. The
share of reinforcement multiplies `advantage`: what an objective has besides, a KL or an entropy term, keeps its factor.
Rows without an advantage, those of a supervised stage, are left alone, and mu waits.

Memory: the number of steps taken. Compute: the log-probabilities of all rows once more, from the same hidden states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.compose import Part, Setting, Taken
from jaxcl.schema import UserError
from jaxcl.types import Batch, Memory, Metrics, Output, Params


def make(
    setting: Setting,
    *,
    mu: float = 0.9,
    end: float = 0.05,
    steps: int = 350,
    phi: Literal["none", "p", "p(1-p)"] = "none",
) -> Part:
    """Returns the mixture.

    Args:
      setting: of the run.
      mu: share of imitation at the first step.
      end: share after `steps` steps.
      steps: of the way from one to the other; 0 stays at `mu`.
      phi: weight of a token, beside its own; the divisor does not have it.

    Raises:
      UserError: an option out of range; when the step is traced, a batch without the column `demonstration`.
    """
    for name, value in (("mu", mu), ("end", end)):
        if not 0 <= value <= 1:
            raise UserError(f"config.method chord.{name}={value}: must lie in [0, 1]; it is the share of imitation")
    if steps < 0:
        raise UserError(f"config.method chord.steps={steps}: must not be negative; 0 stays at mu")

    def share(memory: Memory) -> jax.Array:
        return falling(memory["step"], mu, end, steps)

    def init(params: Params) -> Memory:
        del params
        return {"step": jnp.zeros((), jnp.int32)}

    def annotate(memory: Memory, rows: Batch) -> Batch:
        if "demonstration" not in rows.extra:
            if "demonstration" in setting.example.extra and "advantage" not in rows.extra:
                return rows
            raise UserError(
                "config.method chord: no demonstration rows in the batch; set config.rollout.demonstrations"
            )
        advantage = (1 - share(memory)) * rows.extra["advantage"]
        return dataclasses.replace(rows, extra={**rows.extra, "advantage": advantage})

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del params
        if "demonstration" not in rows.extra:
            return jnp.zeros(()), jnp.zeros(())
        total, weight = imitate(output, rows, phi)
        return share(memory) * total, weight

    def settle(memory: Memory, taken: Taken) -> Memory:
        return {"step": jnp.minimum(memory["step"] + 1, steps)} if "demonstration" in taken.rows.extra else memory

    def metrics(memory: Memory, rows: Batch) -> Metrics:
        return {"mu": share(memory), "rows": jnp.sum(rows.extra.get("demonstration", jnp.zeros(1)))}

    # Imitation with a share of 0 would still change the order in which the compiler adds up the gradient.
    never = mu == 0 and (steps == 0 or end == 0)
    return Part(init, annotate=annotate, loss=None if never else loss, settle=settle, metrics=metrics)


def falling(step: jax.Array, mu: float, end: float, steps: int) -> jax.Array:
    """Returns half a cosine from `mu` at step 0 to `end` at `steps`, where `step` stops; float32 []."""
    if steps == 0 or mu == end:
        return jnp.full((), mu, jnp.float32)
    return end + (mu - end) * 0.5 * (1 + jnp.cos(math.pi * step.astype(jnp.float32) / steps))


def imitate(output: Output, rows: Batch, phi: str) -> tuple[jax.Array, jax.Array]:
    """Returns the negative log-likelihood of the demonstrations, each token by its phi, and their weight."""
    weights = rows.weights * rows.extra["demonstration"][:, None]  # [B, L]
    log_prob = losses.log_probs(output, rows.targets)[0]
    log_prob = jnp.where(weights > 0, log_prob, 0.0)  # elsewhere it may be anything
    p = jax.lax.stop_gradient(jnp.exp(log_prob))
    factor = {"none": jnp.ones_like(p), "p": p, "p(1-p)": p * (1 - p)}[phi]
    return -jnp.sum(weights * factor * log_prob), jnp.sum(weights)
