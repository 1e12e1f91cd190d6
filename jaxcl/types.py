"""The whole contract: batch, state, model, method, source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Params = PyTree  # nested dict of float arrays
Memory = PyTree  # whatever a method must remember
Key = jax.Array  # typed PRNG key, shape []
Metrics = dict[str, jax.Array]  # scalars, float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global batch of rows. Every leaf has B as its first axis.

    A row of text holds one or more packed documents: positions with the same `segments` value
    attend to each other and to nothing else, and `positions` restart at 0 in each of them.
    """

    inputs: jax.Array  # int32 [B, L] tokens; or float [B, L, D] embeddings; or float [B, ...] features
    targets: jax.Array  # int32 [B, L], or int32 [B] for a classifier
    weights: jax.Array  # float32, shaped like targets: share of each target in the loss, 0 = none
    segments: jax.Array  # int32 [B, L]: 0 = padding, 1.. = document within the row
    positions: jax.Array  # int32 [B, L]: position within the document
    task: jax.Array  # int32 [B]: task the row came from
    extra: dict[str, jax.Array] = field(default_factory=dict)  # columns that a method or a source adds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes; it is created, stepped, saved and restored as one pytree."""

    step: jax.Array  # int32 []
    params: Params  # what the optimiser moves: float32 masters
    opt_state: PyTree
    memory: Memory = ()


class Output(NamedTuple):
    """What a model says of a batch. Logits are only formed by those who ask for them."""

    hidden: jax.Array  # [B, L, D] last hidden states; [B, V] logits if there is no head
    head: jax.Array | None = None  # [D, V]
    cache: PyTree = None  # key-value cache after this call, if one was given
    embedding: jax.Array | None = None  # [V, D] table that tokens are looked up in, if the model has one
    # Name -> (sum, weight), float32 []: training adds sum / weight to its loss; evaluation and distillation do not.
    # What has no gradient is only reported.
    terms: dict[str, tuple[jax.Array, jax.Array]] | None = None

    @property
    def logits(self) -> jax.Array:
        """float32 [B, L, V]."""
        if self.head is None:
            return self.hidden.astype(jnp.float32)
        return jnp.einsum("...d,dv->...v", self.hidden, self.head, preferred_element_type=jnp.float32)


class Model(NamedTuple):
    """A model is an `init`, an `apply` and the logical axes of its parameters."""

    init: Callable[[Key], Params]
    apply: Callable[..., Output]  # apply(params, batch, cache=None)
    axes: PyTree  # like Params, with a tuple of logical axis names (or None) for every dimension


class Method(NamedTuple):
    """A continual-learning algorithm: three pure functions over one state.

    What `optax.GradientTransformation` is to optimisation, `Method` is to continual learning.
    `end_task` receives K batches of the task just ended, stacked: every leaf is [K, B, ...].
    """

    init: Callable[[Params], TrainState]
    step: Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]]
    end_task: Callable[[TrainState, Batch, Key], TrainState]


Source = Callable[[TrainState], Batch]  # supervised sources ignore the state, RL sources sample from it
