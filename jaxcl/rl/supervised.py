r"""Supervised losses beside the policy gradient: preferences, distributions of thoughts.

    dpo       -log sigmoid(beta ((log pi / ref)(chosen) / n_c - (log pi / ref)(rejected) / n_r)), n = tokens or 1
    csft      sum_t KL(alpha*_t || softmax(logits_t)) over thoughts + cross-entropy of the other tokens

Sources: Rafailov et al., 2305.18290, and, length-normalised, Lambert et al., 2411.15124 (dpo); Gozeten et al.,
2505.23648 (csft). All return (sum, weight); no weight depends on a parameter. For demonstrations beside rollouts see
`jaxcl.methods.chord`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.kernels import vocabulary
from jaxcl.models.layers import mix
from jaxcl.rl.sequences import Mean, aggregate, find
from jaxcl.schema import UserError
from jaxcl.types import Batch, Output

Pair = tuple[jax.Array, jax.Array]


def totals(log_prob: jax.Array, weights: jax.Array) -> Pair:
    """Returns the log-probability of each row and its number of tokens, both [B]; tokens of weight 0 may be NaN."""
    weights = jax.lax.stop_gradient(weights)
    return jnp.sum(jnp.where(weights == 0, 0, weights * log_prob), axis=1), jnp.sum(weights, axis=1)


def dpo(
    chosen: Pair, rejected: Pair, reference: Pair, *, beta: float = 5.0, normalise: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the pairs' losses and their number; a pair with an empty side does not count.

    Args:
      chosen, rejected: `totals` of the policy, ([N], [N]).
      reference: log-probabilities of (chosen, rejected) by the reference, ([N], [N]).
      beta: 5 with mean log-probabilities, 0.1 is usual with sums.
      normalise: takes the mean over the tokens of a row instead of the sum.
    """
    if beta <= 0:
        raise UserError(f"config.objective dpo beta={beta}: must be above 0")

    def margin(side: Pair, anchor: jax.Array) -> jax.Array:
        gap = side[0] - jax.lax.stop_gradient(anchor)
        return gap / jnp.maximum(side[1], 1) if normalise else gap

    weight = jax.lax.stop_gradient((chosen[1] > 0) & (rejected[1] > 0)).astype(chosen[0].dtype)
    gap = margin(chosen, reference[0]) - margin(rejected, reference[1])
    return jnp.sum(jnp.where(weight > 0, -jax.nn.log_sigmoid(beta * gap), 0)), jnp.sum(weight)


def csft(
    output: Output, batch: Batch, *, mean: Mean = "sequence_token_sum", sequences: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Returns the supervision of continuous thoughts by distributions; a one-hot one is cross-entropy exactly.

    The vocabulary is gone through once, as for cross-entropy: with z = hidden head the distance is
    sum_s a_s log a_s - sum_s a_s (z_s - logsumexp z), and sum_s a_s z_s = hidden (sum_s a_s head_s).

    Args:
      output: of the model.
      batch: `weights`, `targets` of the tokens that are no thoughts, and two columns of `extra`: `goal`, int32
        [B, L, S], the tokens of alpha*, and `goal_shares`, float32 [B, L, S], their probabilities, which sum to 1 at a
        thought and to 0 elsewhere. A token may stand in a goal twice. S is small: S^2 comparisons at every position.
      mean: see `sequences.aggregate`; the paper's is the sum over steps, averaged over rows.
      sequences: that a row has room for.
    """
    rows = find(batch.weights, jnp.ones(batch.weights.shape[:1]), batch.segments, sequences)
    goal, shares = _goals(batch, rows.live)
    first = jnp.argmax(shares, axis=-1, keepdims=True)  # what the cross-entropy is taken at, exactly if it is alone
    top = jnp.max(shares, axis=-1)
    thought = top > 0
    target = jnp.where(thought, jnp.take_along_axis(goal, first, axis=-1)[..., 0], batch.targets)
    others = jnp.where(jnp.arange(goal.shape[-1])[None, None] == first, 0, shares)
    if output.head is None:
        logits = output.hidden.astype(jnp.promote_types(output.hidden.dtype, jnp.float32))
        log_p, lse = vocabulary.select(logits, target)
        score = jnp.sum(others * jnp.take_along_axis(logits, goal, axis=-1, mode="fill"), axis=-1)
    else:
        log_p, lse = losses.log_probs(output, target)
        score = jnp.sum(output.hidden * mix(output.head.T, goal, others, output.head.dtype), axis=-1)
    same = goal[..., None] == goal[..., None, :]
    joint = jnp.sum(jnp.where(same, shares[..., None, :], 0), axis=-1)  # a token that stands twice counts as one
    entropy = jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, joint, 1)), 0), axis=-1)
    soft = entropy - top * log_p - (score - jnp.sum(others, axis=-1) * lse)
    return aggregate(jnp.where(thought, soft, -log_p), rows, mean)


def _goals(batch: Batch, live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the columns of `csft` without gradient, zero where there is no thought or the token does not count."""
    for name in ("goal", "goal_shares"):
        if name not in batch.extra:
            raise UserError(f"batch.extra: has no {name}, which csft needs; add it, int32 goal and float32 goal_shares")
    goal, shares = batch.extra["goal"], batch.extra["goal_shares"]
    if goal.ndim != 3 or goal.shape != shares.shape or goal.shape[:2] != batch.targets.shape:
        found = f"goal {list(goal.shape)}, goal_shares {list(shares.shape)}"
        raise UserError(f"batch.extra: {found}; expected {list(batch.targets.shape)} and one more dimension of both")
    shares = jax.lax.stop_gradient(shares).astype(jnp.promote_types(shares.dtype, jnp.float32))
    shares = jnp.where((live & (jnp.sum(shares, axis=-1) > 0))[..., None], shares, 0)
    return jnp.where(shares > 0, goal, 0), shares
