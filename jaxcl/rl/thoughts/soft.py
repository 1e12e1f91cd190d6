r"""Soft tokens: the mean embedding under the next-token distribution, with Gaussian noise to explore by.

    mean = softmax(logits / temperature) table;   thought = mean + sigma eps,  eps ~ N(0, I)
    log_prob = -|thought - mean|^2 / (2 sigma^2) - D log(sigma sqrt(2 pi));   sigma = gamma rms(table)

Source: Butt et al. 2025, "Soft Tokens, Hard Truths", 2509.19170, equations 6, 9 and 10.

Choices and deviations:
- The text says that sigma is a share of the "root-mean-square norm" of the embeddings and that the noise is a bit
  smaller than they are. Only the root mean square of a coordinate does that (|noise| = gamma |embedding|), and is the
  default; `norm="vector"` is the literal norm, sqrt(D) as large.
- The density is that of the thought as it was fed, after the cast to the table's dtype, and with the sigma it was drawn
  with, which the record keeps. No gradient reaches sigma.
- Per step the gradient is about sqrt(D) / (gamma temperature) times a hard token's: Adam does not see that, clipping by
  a global norm and mixed losses do.
- gamma 0 is a point mass: log_prob is 0 and has no gradient, as in `none`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.kernels import vocabulary
from jaxcl.rl import thoughts
from jaxcl.types import Key

Norm = Literal["coordinate", "vector"]


def make(*, temperature: float = 0.5, gamma: float = 0.33, norm: Norm = "coordinate") -> thoughts.Policy:
    """Returns the policy.

    Args:
      temperature: of the softmax, > 0. After supervision of distributions (CSFT) 1, which it was trained at.
      gamma: standard deviation of the noise as a share of the table's root mean square.
      norm: what that is of: a `coordinate` or a row (`vector`) of the table.

    Raises:
      UserError: an option out of range.
    """
    return gaussian("soft", temperature, gamma, norm)


def gaussian(name: str, temperature: float, gamma: float, norm: Norm) -> thoughts.Policy:
    """Returns the policy of `make` under another name."""
    thoughts.demand_positive(temperature=temperature)
    thoughts.demand(gamma >= 0, "gamma", gamma, "must not be negative")
    thoughts.demand(norm in ("coordinate", "vector"), "norm", repr(norm), "must be 'coordinate' or 'vector'")

    def mean(logits: jax.Array, table: jax.Array) -> jax.Array:
        return thoughts.mixture(logits, table, temperature)

    def draw(logits: jax.Array, table: jax.Array, key: Key) -> thoughts.Record:
        centre = mean(logits, table)
        sigma = scale_of(table, gamma, norm).astype(centre.dtype)
        noise = jax.random.normal(key, centre.shape, centre.dtype) if gamma else jnp.zeros_like(centre)
        return {"thought": centre + sigma * noise, "scale": jnp.broadcast_to(sigma, centre.shape[:-1])}

    def log_prob(logits: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        if not gamma:
            return jnp.zeros(logits.shape[:-1], thoughts.wide(logits))
        return log_density(record["thought"], mean(logits, table), _positive(record["scale"]))

    def fused(hidden: jax.Array, head: jax.Array, table: jax.Array, record: thoughts.Record) -> jax.Array:
        if not gamma:
            return jnp.zeros(hidden.shape[:-1], jnp.float32)
        centre, _ = vocabulary.mixture(hidden, head, table, temperature=temperature)
        density = jnp.vectorize(vocabulary.log_density, signature="(d),(d),()->()")  # a sigma for every thought
        return density(record["thought"], centre, _positive(record["scale"]))

    return thoughts.build(
        name, draw=draw, mean=mean, log_prob=log_prob, feed=lambda _, record: record["thought"], fused=fused
    )


def scale_of(table: jax.Array, gamma: float, norm: Norm) -> jax.Array:
    """Returns the standard deviation of the noise for a table [V, D], float32 [], without gradient."""
    square = jnp.mean(jnp.square(jax.lax.stop_gradient(table).astype(thoughts.wide(table))))
    return gamma * jnp.sqrt(square * (table.shape[1] if norm == "vector" else 1))


def log_density(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns log N(x; mean, scale^2 I) of [..., D], [..., D] and [...], in the dtype of the mean, [...]."""
    gap = (x.astype(mean.dtype) - mean) / scale[..., None]
    return -0.5 * jnp.sum(gap**2, axis=-1) - x.shape[-1] * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1)  # 0 in padding
