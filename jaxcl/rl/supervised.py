r"""Supervised losses beside the policy gradient: preferences, distributions of thoughts.

    dpo       -log sigmoid(beta ((log pi / ref)(chosen) / n_c - (log pi / ref)(rejected) / n_r)), n = tokens or 1
    csft      sum_t KL(alpha*_t || softmax(logits_t)) over thoughts + cross-entropy of the other tokens

Sources: Rafailov et al., 2305.18290, and, length-normalised, Lambert et al., 2411.15124 (dpo); Gozeten et al.,
2505.23648 (csft). All return (sum, weight); no weight depends on a parameter. `preference` is dpo on rows that hold
both sides, see `jaxcl.rl.table`. For demonstrations beside rollouts see `jaxcl.methods.chord`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    _check(beta)
    weight = jax.lax.stop_gradient((chosen[1] > 0) & (rejected[1] > 0)).astype(chosen[0].dtype)
    gap = _margin(chosen, reference[0], normalise) - _margin(rejected, reference[1], normalise)
    return jnp.sum(jnp.where(weight > 0, -jax.nn.log_sigmoid(beta * gap), 0)), jnp.sum(weight)


def _check(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise UserError(f"config.objective dpo beta={beta}: must be above 0, and finite")


def _margin(side: Pair, anchor: jax.Array, normalise: bool) -> jax.Array:
    gap = side[0] - jax.lax.stop_gradient(anchor)
    return gap / jnp.maximum(side[1], 1) if normalise else gap


def preference(*, beta: float = 5.0, normalise: bool = True) -> Callable[..., tuple[Pair, dict[str, Pair]]]:
    """Returns dpo of rows that hold both sides of a pair, (log_prob [B, L], batch) -> (loss, measures).

    The batch has two columns of `extra`: `rejected`, bool [B, L], the tokens of that side, and `reference`, float32
    [B, L], the log-probabilities by the reference. Loss and measures are (sum, weight), the weight the number of pairs:
    `dpo/accuracy`, the share of pairs whose chosen side gained more than the other (an equal gain counts half),
    `dpo/margin`, beta times the difference of the gains, and `dpo/chosen`, beta times that of the chosen side, which
    falls if both sides become less likely.

    Args:
      beta, normalise: see `dpo`.

    Raises:
      UserError: beta out of range; from the function, a batch without reference.
    """
    _check(beta)

    def run(log_prob: jax.Array, batch: Batch) -> tuple[Pair, dict[str, Pair]]:
        if "reference" not in batch.extra:
            raise UserError("config.objective dpo: no column 'reference' in the batch; add reference to config.method")
        # The difference first: it is small where the sums of long completions are not.
        gain = log_prob - jax.lax.stop_gradient(batch.extra["reference"])
        sides = [jnp.where(batch.extra["rejected"] == side, batch.weights, 0) for side in (False, True)]
        chosen, rejected = (totals(gain, weights) for weights in sides)
        zero = jnp.zeros_like(chosen[0])
        total, count = dpo(chosen, rejected, (zero, zero), beta=beta, normalise=normalise)
        one, other = (beta * _margin(side, zero, normalise) for side in (chosen, rejected))
        found = {"accuracy": 0.5 + 0.5 * jnp.sign(one - other), "margin": one - other, "chosen": one}
        whole = (chosen[1] > 0) & (rejected[1] > 0)
        measures = {f"dpo/{name}": (jnp.sum(jnp.where(whole, x, 0)), count) for name, x in found.items()}
        return (total, count), measures

    return run


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
