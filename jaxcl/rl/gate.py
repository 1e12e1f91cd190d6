r"""The gate of HRPO: the embedding of a drawn token, and as much of the mean embedding as training finds useful.

    a = exp(-8 softplus(-Lambda) sigmoid(e W_r + b_r)),   i = sigmoid(e W_i + b_i)
    fed = a e + sqrt(1 - a^2) (i h),   h = p table / |p|_2

The token is drawn as by `thoughts.hard` and its log-probability is that of `thoughts.hard`: what is fed is a function
of it, so that any objective on tokens holds. Source: Yue et al. 2025, 2505.18454, equations 3 and 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.rl import thoughts
from jaxcl.types import Params

DECAY = 8.0  # the paper's constant c


def gate(params: Params, token_embedding: jax.Array, mixture: jax.Array) -> jax.Array:
    """Returns what is fed, [..., D], in the dtype of the token's embedding.

    Args:
      params: `recurrent` and `input`, each {kernel [D, D], bias [D]}, and `decay` [D], the Lambda: at
        -log(r^(-1/8) - 1), a is at least r.
      token_embedding: e, [..., D].
      mixture: h, [..., D], from `mixture`.
    """
    e = token_embedding.astype(thoughts.wide(token_embedding))
    r, i = (jax.nn.sigmoid(_affine(params[name], e)) for name in ("recurrent", "input"))
    log_a = -DECAY * _along(jax.nn.softplus(-params["decay"]), e) * r
    # 1 - a^2, exact near a = 1, where training starts; the root has no slope at 0
    rest = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(e.dtype).tiny))
    return (jnp.exp(log_a) * e + rest * i * mixture).astype(token_embedding.dtype)


def mixture(logits: jax.Array, table: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns p table / |p|_2 with p = softmax(logits / temperature), float32 [..., D]."""
    p = jax.nn.softmax(thoughts.scores(logits, temperature), axis=-1)
    return thoughts.average(p, table) / jnp.linalg.norm(p, axis=-1, keepdims=True)


def log_prob(logits: jax.Array, token: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns the log-probability of the token behind what was fed, float32 [...]."""
    return thoughts.select(logits, jax.lax.stop_gradient(token), temperature)


def _affine(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("...d,de->...e", x, layer["kernel"]) + _along(layer["bias"], x)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the vector [D] with as many axes as x [..., D]."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
