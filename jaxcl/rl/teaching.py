"""From rollouts to a batch: one teacher-forced pass gives the log-probability of everything that was drawn.

What was drawn is data, so that all steps are computed at once and no gradient flows back through time. What is fed
follows from it: a vector of its own is data too, a mixture of tokens has a gradient through the table. Position j of a
row describes what was drawn from the logits at j: the last token of the prompt is where the first thought was drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.rl.sample import ANSWER, NOTHING, THOUGHT, Limits, Rollouts
from jaxcl.rl.thoughts import Policy, Record
from jaxcl.types import Batch, Output


def batch(policy: Policy, rollouts: Rollouts, prompts: jax.Array, segments: jax.Array) -> Batch:
    """Returns the rows to train on, all but their value.

    Args:
      policy: of the thoughts.
      rollouts: of `sample`, R rows of T steps.
      prompts: int32 [N, P], padded on the left; R is a multiple of N.
      segments: int32 [N, P].

    Returns:
      Rows of L = P + T - 1 places. `targets` are the tokens that were drawn, `weights` 1 where something was drawn and
      not forced. `extra`: `kind` int8 [R, L], `behaviour` float32 [R, L] the sampler's log-probability, `soft` bool
      [R, L] where no token was fed, `thought` [R, L, D] what was instead, and `record_*`, the policy's record. If the
      policy is gated, `mixture` [R, L, D] stands for `thought` and is fed beside the token. If the policy mixes tokens,
      `support` int32 [R, L, S] (not if S = V) and `shares` float32 [R, L, S] say what was fed, and there are neither
      `thought` nor `record_thought`; greedy thoughts are data.
    """
    group = rollouts.kind.shape[0] // prompts.shape[0]
    width = prompts.shape[1]
    shown, used = (jnp.repeat(x, group, axis=0) for x in (prompts, (segments > 0).astype(jnp.int32)))
    live = (rollouts.kind != NOTHING).astype(jnp.int32)

    def fed(x: jax.Array) -> jax.Array:  # what was drawn at t is the input at P + t
        return jnp.pad(x[:, :-1], ((0, 0), (width, 0)) + ((0, 0),) * (x.ndim - 2))

    def drawn(x: jax.Array) -> jax.Array:  # and was drawn at P - 1 + t
        return jnp.pad(x, ((0, 0), (width - 1, 0)) + ((0, 0),) * (x.ndim - 2))

    kind = drawn(rollouts.kind)
    inside = jnp.concatenate([used, live[:, :-1]], axis=1)
    extra = {"kind": kind, "behaviour": drawn(rollouts.log_prob)}
    record = dict(rollouts.record)
    if policy.soft:
        extra["soft"] = fed(rollouts.kind) == THOUGHT
    if policy.mixture and record.keys() != {"thought"}:  # a greedy record has nothing else
        del record["thought"]  # as large as the activations of a layer, and no part of the density
        support, shares = policy.mixture(record)
        extra |= {"shares": fed(shares)} | ({} if support is None else {"support": fed(support)})
    elif policy.soft:
        extra[policy.column] = fed(record["thought"])
        if policy.gated:
            del record["thought"]  # no part of the density
    extra |= {f"record_{name}": drawn(x) for name, x in record.items()}
    return Batch(
        inputs=jnp.concatenate([shown, rollouts.token[:, :-1]], axis=1),
        targets=drawn(rollouts.token),
        weights=((kind == THOUGHT) | (kind == ANSWER)).astype(jnp.float32),
        segments=inside,
        positions=jnp.maximum(jnp.cumsum(inside, axis=1) - 1, 0),
        task=jnp.zeros(inside.shape[:1], jnp.int32),
        extra=extra,
    )


def log_probs(
    policy: Policy, *, temperature: float = 1.0, limits: Limits | None = None
) -> Callable[[Output, Batch], jax.Array]:
    """Returns the function (output, batch) -> log-probability of what was drawn, float32 [R, L], 0 elsewhere.

    Args:
      policy: of the thoughts.
      temperature: of the answers.
      limits: those that the rows were drawn with, whose thoughts and answers lie together in each row: the vocabulary
        is then visited once for each of them, and not twice at every place. None = at every place.
    """
    longest = {} if limits is None else {THOUGHT: limits.thoughts, ANSWER: limits.answer}

    def thought(output: Output, record: Record) -> jax.Array:
        assert output.embedding is not None
        assert output.head is not None
        if policy.fused:
            return policy.fused(output.hidden, output.head, output.embedding, record)
        return policy.log_prob(output.logits, output.embedding, record)

    def answer(output: Output, record: Record) -> jax.Array:
        assert output.head is not None
        scaled = output if temperature == 1.0 else output._replace(head=output.head / temperature)
        return losses.log_probs(scaled, record["token"])[0]

    def run(output: Output, rows: Batch) -> jax.Array:
        record = {name[7:]: x for name, x in rows.extra.items() if name.startswith("record_")}
        record["token"] = rows.targets
        total = jnp.zeros(rows.targets.shape, jnp.float32)
        for kind, score in ((THOUGHT, thought), (ANSWER, answer)):
            found, length = rows.extra["kind"] == kind, rows.targets.shape[1]
            size = min(longest.get(kind, length), length)
            if not size:
                continue
            take, give = _window(found, size)
            part = output._replace(hidden=take(output.hidden))
            total = jnp.where(found, give(score(part, jax.tree.map(take, record))), total)
        return total

    return run


def _window(found: jax.Array, size: int) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns functions to and from `size` places of every row, among which are those where `found` [R, L] holds.

    The first maps [R, L, ...] to [R, size, ...], the second [R, size] to [R, L] with zeros elsewhere.
    """
    length = found.shape[1]
    if size == length:
        return (lambda x: x), (lambda x: x)
    start = jnp.minimum(jnp.argmax(found, axis=1), length - size)

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)

    def give(x: jax.Array) -> jax.Array:
        blank = jnp.zeros((length,), x.dtype)
        return jax.vmap(lambda row, at: jax.lax.dynamic_update_slice_in_dim(blank, row, at, 0))(x, start)

    return take, give
