"""Thought policies: what a chain of thought feeds back to the model, drawn from its logits, and how likely that was.

One module a policy, `make(name, **options)` builds it. Drawing gives data: neither what is fed nor the record of it
carries a gradient, and `log_prob` is differentiated at the record as it is stored. Were a thought the mean plus noise
in the eyes of the derivative, the score of a Gaussian policy would be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import schema
from jaxcl.kernels import vocabulary
from jaxcl.types import Key

Mixture = tuple[jax.Array | None, jax.Array]  # tokens int32 [..., S] or None = all V, and their shares float32 [..., S]
Record = dict[str, jax.Array]  # what was drawn and fed; every array starts with the leading axes [...] of the logits


class Policy(NamedTuple):
    """A distribution over the next input of the model, given logits [..., V] and the embedding table [V, D].

    Every record has `token`, int32 [...]: the token drawn if the policy is hard or gated, else the argmax of the
    logits (the shadow that stop phrases are looked for in). Soft ones have `thought`
    [..., D]: what was fed, in the table's dtype.

    `log_prob` and `feed` stop the gradient of the record. Both are differentiable in the table, where the density or
    the input depends on it. Policies with a `mixture` compose their input of rows of the table. A training pass that
    feeds `record["thought"]` instead has the same values, and lacks the gradient through the table.
    What a gated policy calls fed is the `thought` that a gate of the model mixes with the token (`jaxcl.rl.gate`).
    A record of zeros, as in padding, has a finite density with a finite gradient.
    """

    name: str
    soft: bool  # whether what is fed is an embedding of its own, and not that of a token
    sample: Callable[[jax.Array, jax.Array, Key], tuple[jax.Array, Record]]  # (logits, table, key) -> fed, record
    greedy: Callable[[jax.Array, jax.Array], tuple[jax.Array, Record]]  # without noise; record: token, thought
    log_prob: Callable[[jax.Array, jax.Array, Record], jax.Array]  # (logits, table, record) -> [...], nats
    feed: Callable[[jax.Array, Record], jax.Array]  # (table, record) -> fed [..., D], of a sampled record
    fused: Callable[[jax.Array, jax.Array, jax.Array, Record], jax.Array] | None = None
    # (hidden [..., D], head [D, V], table, record) -> float32 [...]: log_prob without logits [..., V]
    mixture: Callable[[Record], Mixture] | None = None  # of a sampled record: what `feed` sums; None: it sums no rows
    gated: bool = False  # whether the model is given the token and the thought, and not one of them

    @property
    def column(self) -> str:
        """Returns the column of a batch that thoughts are fed in."""
        return "mixture" if self.gated else "thought"


def make(name: str, **options: Any) -> Policy:
    """Returns the policy `name` of this package: hard, soft, fuzzy, none, mts, dirichlet, gumbel or hrpo.

    Raises:
      UserError: no such policy, unknown option, wrong type or value out of range.
    """
    return schema.make(__name__, {**options, "name": name}, field="policy")


def build(
    name: str,
    *,
    draw: Callable[[jax.Array, jax.Array, Key], Record],
    mean: Callable[[jax.Array, jax.Array], jax.Array],
    log_prob: Callable[[jax.Array, jax.Array, Record], jax.Array],
    feed: Callable[[jax.Array, Record], jax.Array] | None = None,
    mixture: Callable[[Record], Mixture] | None = None,
    fused: Callable[[jax.Array, jax.Array, jax.Array, Record], jax.Array] | None = None,
) -> Policy:
    """Returns a soft policy.

    Args:
      name: of the policy.
      draw: (logits, table, key) -> the record less token and thought.
      mean: (logits, table) -> [..., D], what is fed without noise.
      log_prob: as in `Policy`, of a record without gradient.
      feed: as in `Policy`, of a record without gradient and in any dtype; or give a `mixture`, which it follows from.
      mixture: as in `Policy`, of a record without gradient.
      fused: as in `Policy`, of a record without gradient.
    """
    stop = jax.lax.stop_gradient

    def fed_by(table: jax.Array, record: Record) -> jax.Array:
        if mixture is None:
            assert feed is not None
            return feed(table, stop(record)).astype(table.dtype)
        tokens, shares = mixture(stop(record))
        return average(shares, table, tokens).astype(table.dtype)

    def sample(logits: jax.Array, table: jax.Array, key: Key) -> tuple[jax.Array, Record]:
        logits, table = stop((logits, table))
        record = draw(logits, table, key)
        thought = fed_by(table, record)
        return thought, {**record, "token": shadow(logits), "thought": thought}

    def greedy(logits: jax.Array, table: jax.Array) -> tuple[jax.Array, Record]:
        logits, table = stop((logits, table))
        thought = mean(logits, table).astype(table.dtype)
        return thought, {"token": shadow(logits), "thought": thought}

    return Policy(
        name=name,
        soft=True,
        sample=sample,
        greedy=greedy,
        log_prob=lambda logits, table, record: log_prob(logits, table, stop(record)),
        feed=fed_by,
        fused=fused and (lambda hidden, head, table, record: fused(hidden, head, table, stop(record))),
        mixture=mixture and (lambda record: mixture(stop(record))),
    )


def wide(x: jax.Array) -> Any:
    """Returns the dtype that densities of `x` are computed in: float32, or float64 if that is what `x` has."""
    return jnp.promote_types(x.dtype, jnp.float32)


def shadow(logits: jax.Array) -> jax.Array:
    """Returns the likeliest token, int32 [...]."""
    # Two plain reductions: XLA reduces a value with its place one by one on a CPU, which takes eight times as long.
    numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, numbers, logits.shape[-1] - 1), axis=-1)


def scores(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns logits / temperature less their largest, which is taken off first: near ties stay exact when cold."""
    logits = logits.astype(wide(logits))
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return (logits - top) / temperature


def log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns log softmax(logits / temperature), float32 [..., V]."""
    return jax.nn.log_softmax(scores(logits, temperature), axis=-1)


def mixture(logits: jax.Array, table: jax.Array, temperature: float) -> jax.Array:
    """Returns softmax(logits / temperature) table, float32 [..., D]."""
    return average(jax.nn.softmax(scores(logits, temperature), axis=-1), table)


def average(shares: jax.Array, table: jax.Array, support: jax.Array | None = None) -> jax.Array:
    """Returns the sum of rows of the table [V, D], float32 [..., D].

    Args:
      shares: [..., K], weight of each row.
      table: [V, D].
      support: int32 [..., K], which rows; None = all.
    """
    rows = "vd" if support is None else "...vd"
    operand = table if support is None else table[support]
    precise = {"precision": "highest", "preferred_element_type": jnp.promote_types(wide(shares), table.dtype)}
    return jnp.einsum(f"...v,{rows}->...d", shares, operand, **precise)


def select(logits: jax.Array, token: jax.Array, temperature: float) -> jax.Array:
    """Returns log softmax(logits / temperature) at a token [...], float32 [...]."""
    return vocabulary.select(scores(logits, temperature), token)[0]


def pick(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns x [..., V] at tokens [..., K], [..., K]; a number that is no token stands for the nearest one."""
    return jnp.take_along_axis(x, tokens, axis=-1, mode="clip")


def demand(holds: bool, option: str, value: object, rule: str) -> None:
    """Raises UserError about an option of the policy unless `holds`."""
    if not holds:
        raise schema.UserError(f"config.policy {option}={value}: {rule}")


def demand_positive(**options: float) -> None:
    """Raises UserError unless all options are positive."""
    for option, value in options.items():
        demand(value > 0, option, value, "must be positive")
