r"""The gate of HRPO: the embedding of a drawn token, and as much of the mean embedding as training finds useful.

    a = exp(-8 softplus(-Lambda) sigmoid(e W_r + b_r)),   i = sigmoid(e W_i + b_i)
    fed = a e + sqrt(1 - a^2) (i h),   h = p table / |p|_2

The token is drawn as by `thoughts.hard` and its log-probability is that of `thoughts.hard`: what is fed is a function
of it, so that any objective on tokens holds. Source: Yue et al. 2025, 2505.18454, equations 3 and 4.

`gated` gives a model a gate, which lies beside its other parameters as "gate". The paper trains the model at a rate of
5e-6, the kernels of the gate at 1e-4 and Lambda at 1e-3; with a schedule for the model that is

  config.optim.multipliers = {"^gate/(recurrent|input)/": 20.0, "^gate/decay$": 200.0}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.models.layers import lookup
from jaxcl.random import named
from jaxcl.rl import thoughts
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params

DECAY = 8.0  # the paper's constant c
MOST = 0.999  # largest a^2 that a gate starts at
NAME = "gate"  # of the gate among the parameters of a model


def gated(model: Model, *, least: float = 0.98) -> Model:
    """Returns `model` with a gate: what it is given of a token where `batch.extra` says so.

    Where `soft` holds, bool [B, L], the input is gate(E[token], mixture), of the columns `inputs` and `mixture`
    [B, L, D]: differentiable in the gate and in the table E, while the mixture is data. All else is as without a gate,
    also the columns `thought`, `shares` and `support`.

    Kernels and biases start at 0 and Lambda so that a^2 is uniform between `least` and 0.999, drawn for every
    coordinate (the reference code: with kernels that are not 0, so that a varies about that).

    Args:
      model: one whose parameters have the table as "embedding", [V, D], such as the transformer.
      least: a is at least this at the start, in (0, 0.999).

    Raises:
      UserError: `least` out of range, or a model without a table.
    """
    if not 0 < least < MOST:
        raise UserError(f"least={least}: the gate starts between it and {MOST}; choose one in (0, {MOST})")
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    if not isinstance(shapes, Mapping) or "embedding" not in shapes:
        raise UserError("config.model: has no table of embeddings, which the gate of hrpo needs; choose a transformer")
    width = shapes["embedding"].shape[1]

    def init(key: Key) -> Params:
        square = jax.random.uniform(named(key, NAME), (width,), jnp.float32, least, MOST)
        fresh: Params = {
            name: {"kernel": jnp.zeros((width, width), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}
            for name in ("recurrent", "input")
        }
        return {**model.init(key), NAME: {**fresh, "decay": -jnp.log(jnp.expm1(-jnp.log(square) / DECAY))}}

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        extra = dict(batch.extra)
        if (mixed := extra.pop("mixture", None)) is not None:
            where = extra["soft"][..., None]
            # Elsewhere a token may be none and the mixture anything: 0 * NaN would reach the gradients.
            e = jnp.where(where, lookup(params["embedding"], batch.inputs), 0)
            extra["thought"] = gate(params[NAME], e, jax.lax.stop_gradient(jnp.where(where, mixed, 0)))
        return model.apply(without(params), dataclasses.replace(batch, extra=extra), cache)

    # One of the two axes of a kernel may be cut; the name can stand there once.
    affine = {"kernel": ("embed", None), "bias": ("embed",)}
    return Model(init, apply, {**model.axes, NAME: {"recurrent": affine, "input": affine, "decay": ("embed",)}})


def without(params: Params) -> Params:
    """Returns the parameters less those of the gate."""
    return {name: leaf for name, leaf in params.items() if name != NAME}


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
