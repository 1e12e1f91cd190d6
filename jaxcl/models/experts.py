r"""A mixture of experts in place of the gated unit of a block: a router sends every token to k of E units.

    p = softmax(W x)                                     the router, float32, [E]
    y = sum over the k largest p_e of share_e unit_e(x)  share_e = p_e, divided by their sum if `norm_topk`

Sources: Shazeer et al. 2017, 1701.06538; Jiang et al. 2024, 2401.04088, section 2.1 (Mixtral: `norm_topk`). The units
themselves are `jaxcl.kernels.experts`. What training adds to its loss:

    balance    E sum_e f_e P_e              f_e = choices of e by tokens, P_e = mean of p_e
    router_z   mean of logsumexp(W x)^2

(Fedus et al. 2021, 2101.03961, eq. 4-6; Zoph et al. 2022, 2202.08906, eq. 5), each times its coefficient and averaged
over the layers. So the first is k times its coefficient where all experts are used alike, and coefficients mean what
they do in the config.json of released models, which count the choices of all layers together.

A row is a group: f, P and the capacity are those of one row, and rows are averaged by their tokens. Fedus et al. take
the tokens of a device. So a row means the same in any batch and microbatch, beside any replayed row and on any mesh, as
the terms are sums over rows like every other loss. Rows should be long beside E / k.

With a `capacity`, an expert takes the first capacity k n / E choices of a row of n tokens, rounded, at least one, and
the rest is dropped: a dropped choice adds nothing, and what is left passes by the residual connection. Capacity bounds
how long the fullest expert can keep the others waiting, and `experts/dropped` says what it costs. Without one nothing
is dropped, and nothing ever is where a cache is kept: of what is drawn token by token the length is not known.

Padding, where segments are 0, is routed nowhere and counts nowhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.kernels import experts as kernels
from jaxcl.models.config import Config
from jaxcl.models.units import weight


class Told(NamedTuple):
    """What one router says of a batch, float32 [], each a sum over tokens."""

    penalty: jax.Array  # balance and z, times their coefficients
    busiest: jax.Array  # share of the choices of a row that its busiest expert has
    dropped: jax.Array  # choices dropped


class Experts(nn.Module):
    """Router and units. Their parameters are `router` [D, E], `gate` and `up` [E, D, F], `down` [E, F, D]."""

    config: Config
    bounded: bool  # whether a capacity holds

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, Told]:
        """Maps x [B, L, D] to [B, L, D], segments int32 [B, L]."""
        c, dtype = self.config, x.dtype
        assert c.experts is not None
        hidden, std = c.expert_mlp or c.mlp, c.init_std
        # Every device decides for its own tokens, so the router is not cut by expert.
        router = weight(self, "router", (c.embed, c.experts), ("embed", None), std)
        gate = weight(self, "gate", (c.experts, c.embed, hidden), ("expert", "embed", "mlp"), std)
        up = weight(self, "up", (c.experts, c.embed, hidden), ("expert", "embed", "mlp"), std)
        back = std / math.sqrt(2 * c.layers)
        down = weight(self, "down", (c.experts, hidden, c.embed), ("expert", "mlp", "embed"), back)
        wide = jnp.promote_types(dtype, jnp.float32)
        logits = jnp.einsum("bld,de->ble", x.astype(wide), router, precision="highest")
        choice, shares, told = route(c, logits, segments > 0, bounded=self.bounded)
        return kernels.mixture(x, choice, shares, gate.astype(dtype), up.astype(dtype), down.astype(dtype)), told


def route(c: Config, logits: jax.Array, inside: jax.Array, *, bounded: bool) -> tuple[jax.Array, jax.Array, Told]:
    """Returns the experts of every token, int32 [B, L, k], E for none; their shares [B, L, k]; and the sums.

    Args:
      c: of the model.
      logits: float32 [B, L, E].
      inside: bool [B, L], false for padding.
      bounded: whether a capacity holds.
    """
    experts, taken = logits.shape[-1], c.experts_per_token
    p = jax.nn.softmax(logits)
    choice = _largest(p, taken)
    picked = jax.nn.one_hot(choice, experts, dtype=p.dtype)  # [B, L, k, E]
    shares = jnp.sum(picked * p[:, :, None], axis=3)
    if c.norm_topk:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    counts = inside[..., None].astype(p.dtype)  # [B, L, 1]
    chosen = counts * jnp.sum(picked, axis=2)  # [B, L, E] of 0 and 1
    tokens = jnp.sum(counts, axis=1)  # [B, 1]
    per_token = 1 / jnp.maximum(tokens, 1)
    used = jnp.sum(chosen, axis=1) * per_token  # f, [B, E]
    penalty = jnp.zeros((), p.dtype)
    if c.balance:
        mean = jnp.sum(counts * p, axis=1) * per_token  # P, [B, E]
        penalty += c.balance * experts * jnp.sum(tokens * used * mean)
    if c.router_z:
        penalty += c.router_z * jnp.sum(counts[..., 0] * jax.nn.logsumexp(logits, axis=-1) ** 2)
    kept = jnp.broadcast_to(inside[..., None], choice.shape)
    if bounded and c.capacity is not None:
        before = jnp.cumsum(chosen, axis=1) - chosen  # [B, L, E] choices of earlier tokens
        limit = jnp.maximum(jnp.round(c.capacity * taken / experts * tokens), 1)  # [B, 1]
        kept &= jnp.sum(picked * before[:, :, None], axis=3) < limit[..., None]
    dropped = jnp.sum(counts * taken) - jnp.sum(kept)
    busiest = jnp.sum(tokens[:, 0] * jnp.max(used, axis=1)) / taken
    told = Told(penalty, busiest, dropped)
    return jnp.where(kept, choice, experts).astype(jnp.int32), jnp.where(kept, shares, 0), told


def _largest(p: jax.Array, count: int) -> jax.Array:
    """Returns the places of the `count` largest of p [..., E], the largest first, and of equal ones the first.

    As `jax.lax.top_k`, which the partitioner does not cut: every device would see the tokens of all.
    """
    p, places = jax.lax.stop_gradient(p), []
    for _ in range(count):
        places.append(jnp.argmax(p, axis=-1))
        p = jnp.where(jax.nn.one_hot(places[-1], p.shape[-1], dtype=bool), -jnp.inf, p)
    return jnp.stack(places, axis=-1)


def terms(c: Config, told: Told, segments: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns `Output.terms`: (sum, weight) of the penalty, if there is one, and of what is only reported.

    Args:
      c: of the model.
      told: of every layer, [layers] each.
      segments: int32 [B, L].
    """
    mean = jax.tree.map(lambda x: jnp.mean(x).astype(jnp.float32), told)
    tokens = jnp.sum(segments > 0).astype(jnp.float32)
    found = {"experts/busiest": (mean.busiest, tokens)}
    if c.capacity is not None:
        found["experts/dropped"] = (mean.dropped, tokens * c.experts_per_token)
    return ({"experts/penalty": (mean.penalty, tokens)} if c.balance or c.router_z else {}) | found
