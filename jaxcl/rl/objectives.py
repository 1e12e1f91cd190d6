r"""Policy-gradient objectives as (sum, weight) losses over the log-probabilities of what was drawn.

    cost of a token = -w gain(rho, A) + kl D(pi || reference) - entropy H        rho = pi / pi_old

    name            advantage        gain                                     mean
    rloo            rloo             A log pi                                 sequence_token_sum
    remax           remax            A log pi                                 sequence_token_sum
    reinforce       batch mean       A log pi                                 sequence_token_sum
    reinforce_plus  batch mean, std  min(rho A, clip(rho, 1 - .2, 1 + .2) A)  token_mean
    grpo            group mean, std  min(rho A, clip(rho, 1 - .2, 1 + .2) A)  sequence_token_mean
    dr_grpo         group mean       as grpo                                  fixed_length
    dapo            as grpo          ... 1 + .28                              token_mean
    gspo            as grpo          ... 1 - 3e-4, 1 + 4e-4, rho of sequence  sequence_token_mean
    cispo           as grpo          sg(min(rho, 5)) A log pi                 token_mean

w is the importance weight of `mismatch.py`. Sources: Ahmadian et al., 2402.14740 (rloo); Li et al., 2310.10505 (remax);
Shao et al., 2402.03300 (grpo); Liu et al., 2503.20783 (dr_grpo); Yu et al., 2503.14476 (dapo); Zheng et al., 2507.18071
(gspo); MiniMax, 2506.13585 (cispo); Ye et al., 1912.09729 (dual clip).

Columns of a batch, position t being what was drawn from the logits at t: `weights` [B, L]; in `extra` the columns
`advantage` and `share`, [B], or [B, L] where rows are packed; `behaviour`, the sampler's log-probability, and `old`,
the trainer's at the sampler's parameters, [B, L] (absent: `behaviour`); where an option needs it also `reference`
[B, L], `dimensions` [B, L] and `truncated` [B].

With one update a batch rho is 1 and all gains have the same gradient. An objective with gain A log pi never looks at
rho: take another one for several updates a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import schema
from jaxcl.rl import advantages, divergence, mismatch
from jaxcl.rl.advantages import Advantages, Baseline, Scale
from jaxcl.rl.mismatch import Correction
from jaxcl.rl.sequences import Mean, Sequences, aggregate, find
from jaxcl.schema import UserError
from jaxcl.types import Batch, Metrics


class Objective(NamedTuple):
    """How rollouts are valued, and the loss that they make."""

    name: str
    advantages: Callable[..., Advantages]  # (rewards [P, G], greedy=None, valid=None); see `advantages.estimate`
    surrogate: Callable[..., tuple[jax.Array, jax.Array]]  # (log_prob [B, L], batch, entropy=None) -> (sum, weight)
    measures: Callable[..., dict[str, tuple[jax.Array, jax.Array]]]  # same arguments; (sum, weight) without gradient
    metrics: Callable[..., Metrics]  # same arguments: the means of the measures, and the maxima


class Options(NamedTuple):
    """Options of every objective; what a name changes stands in the table above."""

    baseline: Baseline  # of the advantage
    scale: Scale = "none"  # of the advantage
    ddof: int = 1  # of the standard deviation
    epsilon: float = 1e-6  # added to it
    skip: bool = True  # groups without a signal do not count in the mean
    gain: Literal["score", "ratio", "detached"] = "ratio"  # A log pi; clipped rho A; CISPO's sg(clipped rho) A log pi
    mean: Mean = "sequence_token_mean"
    length: int | None = None  # longest possible completion in tokens, for the mean `fixed_length`
    clip_low: float | None = 0.2  # rho above 1 - clip_low; None = no bound
    clip_high: float | None = 0.2  # rho below 1 + clip_high; None = no bound
    dual_clip: float | None = None  # gain at least dual_clip * A where A < 0
    sequence_ratio: bool = False  # rho = geometric mean over the sequence
    per_dimension: float = 0.0  # k: the log-ratio of a density in d dimensions is divided by d^k
    rescale: bool = True  # and its gain multiplied by d^k, so that the gradient at rho = 1 is the policy gradient
    proximal: Literal["old", "current"] = "old"  # current: old := the parameters now; right for one update a batch
    correction: Correction = "none"  # of the sampler's log-probabilities
    cap: float = 2.0  # of the correction
    kl: float = 0.0  # factor of the divergence from `reference`
    kl_loss: str = "rho_k3"  # see `divergence`
    entropy: float = 0.0  # factor of the entropy bonus; the caller passes the entropy [B, L]
    mask_truncated: bool = False  # rows with `truncated` do not count
    sequences: int = 1  # rollouts that a row has room for; 1: the whole row is one


def make(name: str, **options: Any) -> Objective:
    """Returns the objective `name` with `options` in place of its own.

    Raises:
      UserError: unknown name or option, or options that make no objective.
    """
    own = _own(name)
    o: Options = schema.call(Options, {**own, **options}, field="objective")
    _check(o, name)

    def value(rewards: Any, greedy: Any = None, valid: Any = None) -> Advantages:
        return advantages.estimate(
            rewards,
            baseline=o.baseline,
            scale=o.scale,
            ddof=o.ddof,
            epsilon=o.epsilon,
            greedy=greedy,
            valid=valid,
            skip=o.skip,
        )

    def surrogate(log_prob: jax.Array, batch: Batch, entropy: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        c = _columns(o, log_prob, batch)
        weight = mismatch.correct(c.old, c.behaviour, c.rows, o.correction, o.cap)
        cost = -_gain(o, c)
        if o.kl:
            cost = cost + o.kl * divergence.loss(c.log_prob, c.old, c.reference, name=o.kl_loss)
        cost = weight * cost
        if o.entropy:
            if entropy is None:
                raise UserError(f"config.objective entropy={o.entropy}: the surrogate was given no entropy [B, L]")
            cost = cost - o.entropy * entropy
        return aggregate(cost, c.rows, o.mean, o.length)

    def measures(log_prob: jax.Array, batch: Batch, entropy: jax.Array | None = None) -> dict:
        c = _columns(o, jax.lax.stop_gradient(log_prob), batch)
        means = _measure(o, c, None if entropy is None else jax.lax.stop_gradient(entropy))
        return {key: aggregate(cost, c.rows, "token_mean") for key, cost in means.items()}

    def metrics(log_prob: jax.Array, batch: Batch, entropy: jax.Array | None = None) -> Metrics:
        c = _columns(o, jax.lax.stop_gradient(log_prob), batch)
        pairs = measures(log_prob, batch, entropy)
        means = {key: total / jnp.where(weight == 0, 1, weight) for key, (total, weight) in pairs.items()}
        highest = {"ratio_max": _ratio(o, c), "mismatch_max": mismatch.raw(c.old, c.behaviour, c.rows, o.correction)}
        maxima = {key: jnp.max(jnp.where(c.rows.live, x, 0)) for key, x in highest.items()}
        return {key: x.astype(jnp.float32) for key, x in (means | maxima).items()}

    return Objective(name, value, surrogate, measures, metrics)


def _own(name: str) -> dict[str, Any]:
    """Returns what the objective `name` changes in the options."""
    score = {"gain": "score", "mean": "sequence_token_sum"}
    group = {"baseline": "group", "scale": "group"}
    choices = {
        "rloo": {"baseline": "others", **score},
        "remax": {"baseline": "greedy", **score},
        "reinforce": {"baseline": "batch", **score},
        "reinforce_plus": {"baseline": "batch", "scale": "batch", "mean": "token_mean"},
        "grpo": group,
        "dr_grpo": {"baseline": "group", "mean": "fixed_length"},
        "dapo": {**group, "clip_high": 0.28, "mean": "token_mean"},
        "gspo": {**group, "clip_low": 3e-4, "clip_high": 4e-4, "sequence_ratio": True},
        "cispo": {**group, "gain": "detached", "clip_low": None, "clip_high": 4.0, "mean": "token_mean"},
    }
    if name not in choices:
        raise UserError(f"config.objective.name={name!r}: no such objective{schema.nearest(name, list(choices))}")
    return choices[name]


def _check(o: Options, name: str) -> None:
    """Raises UserError unless the options make an objective."""
    divergence.check(o.kl_loss)
    rules = (
        ("clip_low", o.clip_low is None or 0 <= o.clip_low <= 1, "must lie in [0, 1]"),
        ("clip_high", o.clip_high is None or o.clip_high >= 0, "must not be negative"),
        ("dual_clip", o.dual_clip is None or o.dual_clip > 1, "must be above 1"),
        ("dual_clip", o.dual_clip is None or o.gain == "ratio", "needs gain='ratio'"),
        ("length", o.length is None or o.length > 0, "must be above 0"),
        ("length", o.length is not None or o.mean != "fixed_length", f"{name} needs the longest completion in tokens"),
        ("per_dimension", o.per_dimension >= 0, "must not be negative; 0.5 keeps the spread of the log-ratio"),
        ("cap", o.cap > 0, "must be above 0"),
        ("kl", o.kl >= 0, "must not be negative"),
        ("entropy", o.entropy >= 0, "must not be negative"),
        ("sequences", o.sequences >= 1, "must be 1 or more"),
        ("ddof", o.ddof >= 0, "must not be negative"),
        ("epsilon", o.epsilon >= 0, "must not be negative"),
    )
    for key, holds, remedy in rules:
        if not holds:
            raise UserError(f"config.objective {key}={getattr(o, key)!r}: {remedy}")


class _Columns(NamedTuple):
    """Columns of a batch, [B, L]; all but `log_prob` without a gradient, 0 where a token does not count."""

    rows: Sequences
    log_prob: jax.Array
    old: jax.Array
    behaviour: jax.Array
    reference: jax.Array
    advantage: jax.Array
    divisor: jax.Array  # d^k of the log-ratio


def _columns(o: Options, log_prob: jax.Array, batch: Batch) -> _Columns:
    share = _column(batch, "share")
    if o.mask_truncated:
        cut = _column(batch, "truncated", "mask_truncated")
        share = share * (1 - (cut if cut.ndim == share.ndim else cut[:, None])).astype(share.dtype)
    if log_prob.shape != batch.weights.shape:
        raise UserError(
            f"log_prob of shape {list(log_prob.shape)}: expected {list(batch.weights.shape)} as the weights"
        )
    rows = find(batch.weights, share, batch.segments, o.sequences)
    log_prob = log_prob.astype(jnp.promote_types(log_prob.dtype, jnp.float32))

    def read(name: str, option: str | None = None) -> jax.Array:
        x = jax.lax.stop_gradient(_column(batch, name, option)).astype(log_prob.dtype)
        x = jnp.broadcast_to(x if x.ndim == 2 else x[:, None], log_prob.shape)
        return jnp.where(rows.live, x, 0)

    current = jnp.where(rows.live, log_prob, 0)
    if o.proximal == "current":
        old = jax.lax.stop_gradient(current)
    elif o.correction != "none":
        old = read("old", "correction")  # with `behaviour` in its place nothing would be corrected
    else:
        old = read("old" if "old" in batch.extra else "behaviour")
    behaviour = read("behaviour") if "behaviour" in batch.extra or o.correction != "none" else old
    divisor = jnp.ones_like(current)
    if o.per_dimension:
        dimensions = read("dimensions", "per_dimension")
        divisor = jnp.where(rows.live, jnp.maximum(dimensions, 1), 1) ** o.per_dimension
    reference = read("reference", "kl") if o.kl or "reference" in batch.extra else current
    return _Columns(rows, current, old, behaviour, reference, read("advantage"), divisor)


def _column(batch: Batch, name: str, option: str | None = None) -> jax.Array:
    if name not in batch.extra:
        reason = f"config.objective {option} needs it" if option else "every objective needs it"
        raise UserError(f"column '{name}' is missing in the batch: {reason}; add it to Batch.extra")
    return batch.extra[name]


def _ratio(o: Options, c: _Columns) -> jax.Array:
    """Returns rho, [B, L]."""
    gap = (c.log_prob - c.old) / c.divisor
    if o.sequence_ratio:
        whole = c.rows.spread(c.rows.total(jnp.where(c.rows.live, c.rows.weights * gap, 0))) / c.rows.length()
        # Its value with each token's own gradient: the same in all, and right where tokens differ in their divisor.
        gap = jax.lax.stop_gradient(whole - gap) + gap
    return divergence.ratio(gap, jnp.zeros_like(gap))


def _bound(o: Options, rho: jax.Array) -> jax.Array:
    low = None if o.clip_low is None else 1 - o.clip_low
    return jnp.clip(rho, low, None if o.clip_high is None else 1 + o.clip_high)


def _gain(o: Options, c: _Columns) -> jax.Array:
    """Returns what a token adds to the objective, [B, L]."""
    if o.gain == "score":
        return c.advantage * c.log_prob
    rho = _ratio(o, c)
    if o.gain == "detached":
        return jax.lax.stop_gradient(_bound(o, rho)) * c.advantage * c.log_prob
    gain = jnp.minimum(rho * c.advantage, _bound(o, rho) * c.advantage)
    if o.dual_clip is not None:
        gain = jnp.where(c.advantage < 0, jnp.maximum(gain, o.dual_clip * c.advantage), gain)
    return gain * c.divisor if o.rescale else gain


def _measure(o: Options, c: _Columns, entropy: jax.Array | None) -> dict[str, jax.Array]:
    """Returns costs of tokens whose means are of interest, each [B, L]."""
    rho = _ratio(o, c)
    bound = _bound(o, rho)
    clipped = bound != rho if o.gain == "detached" else bound * c.advantage < rho * c.advantage
    if o.dual_clip is not None:
        clipped = clipped | ((c.advantage < 0) & (rho > o.dual_clip))
    if o.gain == "score":
        clipped = jnp.zeros_like(clipped)
    found = {
        "clip_fraction": clipped.astype(rho.dtype),
        "ratio_mean": rho,
        # -log pi of what was drawn is an unbiased estimate on samples of the policy itself.
        "entropy": -c.log_prob if entropy is None else entropy,
        **mismatch.measures(c.old, c.behaviour, o.correction, o.cap, c.rows),
    }
    return found | divergence.estimators(c.log_prob, c.reference)
