"""The arithmetic of a transformer block as pure functions: norm, rotary embedding, gated unit, lookup of tokens."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.config import LinearScaling, RopeScaling, Scaling, YarnScaling


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019, eq. 4).

    Statistics are float32; the result has the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["w", "a", "b", "key"], meta_fields=["scale", "rate"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel w + scale * a b that is never formed; it takes the place of w [in, out] among the parameters."""

    w: jax.Array  # first, because Flax compares the shape of the first leaf with the one it expects
    a: jax.Array  # [in, r]
    b: jax.Array  # [r, out]
    key: jax.Array | None  # of the dropout; None = no dropout
    scale: float
    rate: float  # share of the inputs of `a` that is dropped

    def astype(self, dtype: Any) -> LowRank:
        """Casts the matrices."""
        return dataclasses.replace(self, w=self.w.astype(dtype), a=self.a.astype(dtype), b=self.b.astype(dtype))


def linear(x: jax.Array, kernel: jax.Array | LowRank, axes: int = 1) -> jax.Array:
    """Contracts the last `axes` dimensions of x [B, L, ...] with the first of `kernel`; both have the same dtype.

    It differs from `jnp.tensordot` in the gradient of the kernel, one product in the layout of the kernel, where
    automatic differentiation transposes the product and XLA then a whole activation; for a kernel that is not
    differentiated, nothing is kept for it. Reverse mode only.
    """
    if not isinstance(kernel, LowRank):
        return _product(x, kernel, axes)
    inputs = x
    if kernel.key is not None:
        kept = jax.random.bernoulli(kernel.key, 1 - kernel.rate, x.shape)
        inputs = jnp.where(kept, x / (1 - kernel.rate), 0).astype(x.dtype)
    low: Any = _product(_product(inputs, kernel.a, axes), kernel.b, 1)
    return _product(x, kernel.w, axes) + kernel.scale * low


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    return jnp.tensordot(x, kernel, axes)


def _product_fwd(x: Any, kernel: Any, axes: int) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    # Not `_product` itself: a policy of rematerialisation would not see the product inside.
    kept = x.value if kernel.perturbed else None
    return jnp.tensordot(x.value, kernel.value, axes), (kept, kernel.value)


def _product_bwd(
    axes: int, saved: tuple[jax.Array | None, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, kernel = saved
    outputs = kernel.ndim - axes
    last = tuple(range(d_y.ndim - outputs, d_y.ndim))
    d_x = jax.lax.dot_general(d_y, kernel, ((last, tuple(range(axes, kernel.ndim))), ((), ())))
    if x is None:
        return d_x, None
    rows = tuple(range(x.ndim - axes))
    return d_x, jax.lax.dot_general(x, d_y, ((rows, rows), ((), ())))


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up (Shazeer 2020, eq. 6), any shape."""
    return jax.nn.silu(gate) * up


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the rows of `table` [V, D] for int tokens [...]; a token outside the vocabulary becomes NaN."""
    return jnp.take(table, tokens, axis=0, mode="fill")


def mix(table: jax.Array, tokens: jax.Array | None, shares: jax.Array, dtype: Any) -> jax.Array:
    """Returns sums of rows of `table` [V, D], float32 [..., D]; a token outside the vocabulary makes them NaN.

    Args:
      table: differentiable, unlike the shares.
      tokens: int32 [..., S]; one may stand there twice. None = all of them in order, S = V.
      shares: float32 [..., S], weight of each row.
      dtype: that the rows are rounded to before they are summed, as if they had been looked up one by one.
    """
    shares = jax.lax.stop_gradient(shares).astype(jnp.promote_types(shares.dtype, jnp.float32))
    if tokens is None:
        precise = {"precision": "highest", "preferred_element_type": shares.dtype}
        return jnp.einsum("...v,vd->...d", shares, table.astype(dtype), **precise)
    # Not a product of matrices: so the compiler may sum while it gathers.
    return jnp.sum(shares[..., None] * lookup(table, tokens).astype(dtype).astype(shares.dtype), axis=-2)


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Returns the angular frequency of every rotated pair, float32 [K / 2] (Su et al. 2021, section 3.2.2)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, RopeScaling):
        turns = scaling.original_max_position * frequencies / (2 * math.pi)  # over the original context
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    elif isinstance(scaling, YarnScaling):
        keep = 1 - _ramp(head_dim, theta, scaling)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def _ramp(head_dim: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Returns by how much every pair is interpolated, 0 to 1, float64 [K / 2] (Peng et al. 2023, eq. 18 and 23)."""

    def pair(turns: float) -> float:  # the pair that makes so many turns over the original context
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)


def rope_tables(positions: jax.Array, frequencies: np.ndarray, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every angle times `factor`, float32 [B, L, 1, K / 2], for int positions [B, L]."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies.reshape(1, 1, 1, -1)
    # A loop, because its results are stored: XLA would compute the cosines again in every layer that rotates by them.
    tables = jax.lax.map(lambda i: jnp.where(i == 0, jnp.cos(angles), jnp.sin(angles)), jnp.arange(2))
    return (tables[0], tables[1]) if factor == 1.0 else (tables[0] * factor, tables[1] * factor)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + K / 2]) of x [B, L, H, K] in float32; the half-rotation layout of Llama."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
