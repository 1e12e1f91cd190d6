r"""The divergence from a reference policy: three estimators of its value, and losses with its gradient.

With k = log pi(x) - log q(x), x drawn from pi (Schulman, "Approximating KL divergence", 2020):

    k1 = k           k2 = k^2 / 2         k3 = e^-k + k - 1

all estimate KL(pi || q). As losses they are not the same thing. The expectation over x of the gradient of k1 is 0 and
that of k3 is the gradient of the forward KL(q || pi); the reverse KL's is that of k2 on samples of pi itself, and that
of rho k1 and rho k3, rho = pi / pi_old, on samples of pi_old.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.schema import UserError, nearest

LIMIT = 20.0  # of a log-ratio before exp: 4.9e8, far beyond any clip and far from overflow
LOSSES = ("rho_k3", "rho_k1", "k2", "k3_forward")


def ratio(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns exp(new - old) with the difference kept within +-20."""
    return jnp.exp(jnp.clip(new - old, -LIMIT, LIMIT))


def estimators(log_prob: jax.Array, reference: jax.Array) -> dict[str, jax.Array]:
    """Returns k1, k2 and k3, shaped like `log_prob`. No gradient reaches the reference."""
    reference = jax.lax.stop_gradient(reference)
    k1 = log_prob - reference
    return {"k1": k1, "k2": 0.5 * k1**2, "k3": ratio(reference, log_prob) + k1 - 1}


def loss(log_prob: jax.Array, old: jax.Array, reference: jax.Array, *, name: str) -> jax.Array:
    """Returns the cost of each token, shaped like `log_prob`; the reverse KL's gradient unless `name` says otherwise.

    Args:
      log_prob: of the policy.
      old: log-probability of the policy that drew the tokens, or its stand-in; carries no gradient.
      reference: log-probability of the reference.
      name: one of `LOSSES`; see `check`.
    """
    values = estimators(log_prob, reference)
    if name in ("rho_k1", "rho_k3"):
        return ratio(log_prob, jax.lax.stop_gradient(old)) * values[name[-2:]]
    return values[name[:2]]


def check(name: str) -> None:
    """Raises UserError unless `name` is a loss that has a gradient, and the one that its name promises."""
    if name == "k1":
        raise UserError("config.objective kl_loss='k1': its expected gradient is 0; use 'rho_k1', 'rho_k3' or 'k2'")
    if name == "k3":
        raise UserError(
            "config.objective kl_loss='k3': its gradient is the forward KL's; use 'rho_k3' for the reverse KL, "
            "or 'k3_forward' if that is meant"
        )
    if name not in LOSSES:
        raise UserError(f"config.objective kl_loss={name!r}: no such loss{nearest(name, LOSSES)}")
