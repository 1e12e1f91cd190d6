"""DPO, CHORD and CSFT: against loops in float64, reductions at the ends, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import grad, losses
from jaxcl.rl import supervised
from jaxcl.schema import UserError
from jaxcl.types import Batch, Output

B, L, V = 4, 5, 7


def batch_of(weights, targets=None):
    zero = jnp.zeros(weights.shape, jnp.int32)
    return Batch(zero, zero if targets is None else jnp.asarray(targets), jnp.asarray(weights), zero, zero, zero[:, 0])


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("beta", "normalise"), [(5.0, True), (0.1, False)])
def test_dpo_agrees_with_loops(beta, normalise):
    for seed in range(20):
        r = np.random.default_rng(seed)
        lp, weights = r.standard_normal((2, B, L)), (r.uniform(size=(2, B, L)) < 0.6).astype(float)
        weights[0, 0] = 0  # an empty side
        ref = r.standard_normal((2, B))
        total = count = 0
        for i in range(B):
            n, m = weights[0, i].sum(), weights[1, i].sum()
            if n and m:
                x = (lp[0, i] * weights[0, i]).sum() - ref[0, i], (lp[1, i] * weights[1, i]).sum() - ref[1, i]
                gap = x[0] / n - x[1] / m if normalise else x[0] - x[1]
                total, count = total + np.log1p(np.exp(-beta * gap)), count + 1
        with jax.enable_x64(True):
            dirty = jnp.asarray(np.where(weights > 0, lp, np.nan))
            chosen, rejected = (supervised.totals(dirty[i], jnp.asarray(weights[i])) for i in (0, 1))
            pair = (jnp.asarray(ref[0]), jnp.asarray(ref[1]))
            close(supervised.dpo(chosen, rejected, pair, beta=beta, normalise=normalise), (total, count))


def test_dpo_gradient_prefers_the_chosen_and_leaves_the_reference():
    ones = jnp.ones(2)

    def loss(chosen, rejected, reference):
        return supervised.dpo((chosen, ones), (rejected, ones), (reference, reference))[0]

    up, down, still = jax.grad(loss, (0, 1, 2))(-ones, -2 * ones, -ones)
    assert (up < 0).all()
    assert (down > 0).all()
    assert (still == 0).all()


def test_chord_reduces_exactly_at_both_ends_and_mixes_between():
    rl, sft = (lambda p: (3.0 * p**2, jnp.float32(2.0))), (lambda p: (-5.0 * p, jnp.float32(4.0)))
    batch = {"row": jnp.zeros(2)}

    def gradient(mu):
        return grad.value_and_grad(lambda p, _: supervised.chord(rl(p), sft(p), mu), jnp.float32(0.7), batch)[1]

    alone = [grad.value_and_grad(lambda p, _, f=f: {"loss": f(p)}, jnp.float32(0.7), batch)[1] for f in (rl, sft)]
    assert gradient(jnp.float32(0.0)) == alone[0]
    assert gradient(jnp.float32(1.0)) == alone[1]
    np.testing.assert_allclose(gradient(0.25), 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-6)


def test_imitation_weighs_tokens_by_a_detached_phi():
    r = np.random.default_rng(0)
    lp, weights = -r.exponential(size=(B, L)), (r.uniform(size=(B, L)) < 0.6).astype(float)
    p = np.exp(lp)
    for phi, factor in (("none", np.ones_like(p)), ("p", p), ("p(1-p)", p * (1 - p))):
        with jax.enable_x64(True):
            batch = batch_of(weights)
            dirty = jnp.asarray(np.where(weights > 0, lp, -np.inf))
            total, weight = supervised.imitate(dirty, batch, phi=phi)
            slope = jax.grad(lambda x, phi=phi, batch=batch: supervised.imitate(x, batch, phi=phi)[0])(jnp.asarray(lp))
        close((total, weight), (-(weights * factor * lp).sum(), weights.sum()))
        close(slope, -weights * factor)
    with pytest.raises(UserError, match="phi='q'"):
        supervised.imitate(jnp.zeros((B, L)), batch_of(np.ones((B, L))), phi="q")


def thoughts(seed=0):
    r = np.random.default_rng(seed)
    logits, targets = r.standard_normal((B, L, V)), r.integers(0, V, (B, L)).astype(np.int32)
    wanted = r.dirichlet(np.ones(V), (B, L))
    wanted[..., 0], wanted[0, 0] = 0, np.eye(V)[1]
    wanted /= wanted.sum(-1, keepdims=True)
    return logits, targets, wanted, r.uniform(size=(B, L)) < 0.6, (r.uniform(size=(B, L)) < 0.8).astype(float)


def test_csft_agrees_with_loops_and_has_the_gradient_of_the_distance():
    logits, targets, wanted, thought, weights = thoughts()
    log_p, total, slope = log_softmax(logits), 0.0, np.zeros_like(logits)
    for b, t in np.ndindex(B, L):
        goal = wanted[b, t] if thought[b, t] else np.eye(V)[targets[b, t]]
        seen = goal > 0
        total += weights[b, t] * (goal[seen] * (np.log(goal[seen]) - log_p[b, t][seen])).sum()
        slope[b, t] = weights[b, t] * (np.exp(log_p[b, t]) - goal)
    with jax.enable_x64(True):
        batch = batch_of(weights, targets)
        dirty = jnp.asarray(np.where(thought[..., None], wanted, np.nan))

        def loss(x):
            return supervised.csft(x, batch, dirty, jnp.asarray(thought))

        close(loss(jnp.asarray(logits)), (total, (weights.sum(1) > 0).sum()))
        close(jax.grad(lambda x: loss(x)[0])(jnp.asarray(logits)), slope)


def test_one_hot_csft_is_cross_entropy():
    logits, targets, _, _, weights = thoughts(1)
    batch = batch_of(weights.astype(np.float32), targets)
    x = jnp.asarray(logits, jnp.float32)
    one_hot, thought = jax.nn.one_hot(targets, V), jnp.ones((B, L), bool)
    got = supervised.csft(x, batch, one_hot, thought, mean="token_mean")
    wanted = losses.cross_entropy(Output(x), batch)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    answers = supervised.csft(x, batch, jnp.zeros_like(x), ~thought, mean="token_mean")
    assert answers[0] == got[0]


def test_csft_names_a_vocabulary_that_does_not_fit():
    logits, targets, wanted, thought, weights = thoughts()
    with pytest.raises(UserError, match=r"distributions of shape \[4, 5, 6\]: expected \[4, 5, 7\]"):
        supervised.csft(jnp.asarray(logits), batch_of(weights, targets), jnp.asarray(wanted[..., 1:]), thought)
