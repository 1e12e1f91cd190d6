"""Sums over the sequences of a batch, and the means that make a loss of the costs of its tokens.

A sequence is a row, or, where rollouts are packed, one segment of it. `size` is the number of sequences that a row has
room for: with 1 the whole row is one sequence, padding on either side included.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Mean = Literal["sequence_token_mean", "token_mean", "fixed_length", "sequence_token_sum"]


class Sequences(NamedTuple):
    """Which tokens count and where they belong; carries no gradient."""

    weights: jax.Array  # [B, L] share of each token within its sequence
    share: jax.Array  # [B, L] share of the token's sequence in the batch
    member: jax.Array | None  # bool [B, L, S]; None if a row is one sequence

    @property
    def live(self) -> jax.Array:
        """bool [B, L]: whether the token counts; what lies elsewhere may be anything, even NaN."""
        return (self.weights > 0) & (self.share > 0)

    def total(self, x: jax.Array) -> jax.Array:
        """Returns the sum of x [B, L] over each sequence, [B, S]."""
        if self.member is None:
            return jnp.sum(x, axis=1, keepdims=True)
        return jnp.sum(jnp.where(self.member, x[..., None], 0), axis=1)

    def spread(self, y: jax.Array) -> jax.Array:
        """Returns y [B, S] at every token of its sequence, [B, L]."""
        if self.member is None:
            return jnp.broadcast_to(y, self.weights.shape)
        return jnp.sum(jnp.where(self.member, y[:, None, :], 0), axis=-1)

    def count(self) -> jax.Array:
        """Returns the number of sequences that count, each by its share, []."""
        drawn = (self.weights > 0).astype(self.weights.dtype)
        number = self.total(drawn)
        return jnp.sum(self.total(drawn * self.share) / jnp.where(number > 0, number, 1))

    def length(self) -> jax.Array:
        """Returns the weight of each token's sequence, [B, L], 1 where there is none."""
        length = self.spread(self.total(self.weights))
        return jnp.where(length > 0, length, 1)


def find(weights: jax.Array, share: jax.Array, segments: jax.Array, size: int) -> Sequences:
    """Returns the sequences of a batch.

    Args:
      weights: [B, L]; 0 for prompts, forced tokens and padding.
      share: [B], or [B, L] with one value for each sequence.
      segments: int32 [B, L], 1, 2, .. for the sequences of a row.
      size: sequences that a row has room for. A row that holds more makes everything NaN rather than a wrong loss.
    """
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    weights = jax.lax.stop_gradient(weights).astype(dtype)
    share = jnp.broadcast_to(share if share.ndim == 2 else share[:, None], weights.shape)
    share = jax.lax.stop_gradient(share).astype(dtype)
    fits = jnp.all((segments <= size) | (weights == 0))
    share = jnp.where(fits, share, jnp.nan)
    member = None if size == 1 else segments[..., None] == jnp.arange(1, size + 1, dtype=segments.dtype)[None, None]
    return Sequences(weights, share, member)


def aggregate(cost: jax.Array, rows: Sequences, mean: Mean, length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns (sum, weight) of the costs of tokens; the weight depends on no parameter and adds up over microbatches.

      sequence_token_mean   mean over sequences of the mean over tokens            GRPO
      token_mean            mean over all tokens of the batch                      DAPO
      fixed_length          sum over tokens / (sequences * length)                 Dr. GRPO
      sequence_token_sum    mean over sequences of the sum over tokens             RLOO, the gradient of E[reward]

    Args:
      cost: [B, L].
      rows: of the batch.
      mean: see above.
      length: longest possible completion in tokens, for `fixed_length`.
    """
    weights = rows.weights * rows.share
    total = weights / rows.length() if mean == "sequence_token_mean" else weights
    # Dead tokens may cost anything; NaN weights must stay NaN.
    total = jnp.sum(jnp.where(weights == 0, 0, total * cost))
    if mean == "token_mean":
        return total, jnp.sum(weights)
    return total, rows.count() * (1 if length is None or mean != "fixed_length" else length)
