r"""Moments of rows that are not there: what Gaussian features of known mean and variance add up to, in expectation.

With f ~ N(mu, diag(v)), beta = 1 / (2 sigma^2), u_i = c_i - mu and products over the D features k:

    none        E[f f^T] = mu mu^T + diag(v),    E[f] = mu
    gaussian    E[x_i]     = prod_k (1 + 2 beta v_k)^-1/2  exp(-sum_k beta u_ik^2 / (1 + 2 beta v_k))
                E[x_i x_j] = prod_k (1 + 4 beta v_k)^-1/2
                             exp(-sum_k (beta / 2 (u_ik - u_jk)^2 + 2 beta / (1 + 4 beta v_k) ((u_ik + u_jk) / 2)^2))

The second line of "gaussian" is the integral of a Gaussian of variance 1 / (4 beta) around (c_i + c_j) / 2 against that
of f. Cost of a class: C d with "none", 4 d^2 D with "gaussian".
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.kernels.ridge import pair
from jaxcl.ridge import moments
from jaxcl.ridge.moments import Moments
from jaxcl.types import Params


def plain(m: Moments, own: Params, mean: jax.Array, variance: jax.Array, count: jax.Array, **options: Any) -> Moments:
    """Returns the moments with rows added that are features themselves.

    Args:
      m: moments so far.
      own: parameters of the expansion.
      mean, variance: float32 [C, D].
      count: float32 [C], rows of each class.
      **options: `bias`, whether a column of ones follows.
    """
    del own
    ones = jnp.ones((mean.shape[0], int(options["bias"])))
    m = moments.add(m, jnp.concatenate([mean, ones], 1), jnp.arange(mean.shape[0]), count)
    spread = jnp.concatenate([pair.contract(count, variance, 0, 0), jnp.zeros(int(options["bias"]))])
    return Moments(pair.plus(m.gram, jnp.diag(spread)), m.cross, m.counts, m.features)


def gaussian(
    m: Moments, own: Params, mean: jax.Array, variance: jax.Array, count: jax.Array, *, sigma: float, bias: bool
) -> Moments:
    """Returns the moments with rows added that are features of a Gaussian kernel; `own` has its centres [d, D]."""
    beta = 1 / (2 * sigma**2)

    def one(m: Moments, entry: tuple[jax.Array, ...]) -> tuple[Moments, None]:
        mu, v, n, label = entry
        first, second = kernel_moments(own["centres"] - mu[None], v, beta)
        if bias:
            second = jnp.block([[second, first[:, None]], [first[None], jnp.ones((1, 1))]])
            first = jnp.concatenate([first, jnp.ones(1)])
        own_class = (jnp.arange(mean.shape[0]) == label).astype(jnp.float32)
        gram = pair.plus(m.gram, n * second)
        cross = pair.plus(m.cross, n * first[:, None] * own_class[None])
        return Moments(gram, cross, pair.plus(m.counts, n * own_class), m.features), None

    return jax.lax.scan(one, m, (mean, variance, count, jnp.arange(mean.shape[0])))[0]


def kernel_moments(u: jax.Array, v: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Returns E[x], float32 [d], and E[x x^T], [d, d] symmetric to the last bit.

    Args:
      u: float32 [d, D], centres less the mean.
      v: float32 [D], variances.
      beta: 1 / (2 sigma^2).
    """
    once, twice = 1 + 2 * beta * v, 1 + 4 * beta * v
    first = jnp.exp(-jnp.sum(beta * u * u / once[None], 1) - 0.5 * jnp.sum(jnp.log(once)))

    def products(weights: jax.Array) -> jax.Array:
        half = jnp.sqrt(weights)[None] * u
        return pair.contract(half, half, 1, 1)

    apart, together = products(jnp.full_like(v, beta / 2)), products(beta / 2 / twice)
    ends = jnp.diagonal(apart) + jnp.diagonal(together)
    exponent = ends[:, None] + ends[None] - 2 * (apart - together)
    second = jnp.exp(-jnp.maximum(exponent, 0.0) - 0.5 * jnp.sum(jnp.log(twice)))
    return first, 0.5 * (second + second.T)


KNOWN = MappingProxyType({"none": plain, "gaussian": gaussian})  # expansion -> what adds its expected rows
