"""DPO and CSFT: against loops in float64, reductions at the ends, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import losses
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


S = 4


S = 4


def thoughts(seed=0):
    """Logits, targets, goals with a repeated token, their probabilities, where thoughts are, and weights."""
    r = np.random.default_rng(seed)
    logits, targets = r.standard_normal((B, L, V)), r.integers(0, V, (B, L)).astype(np.int32)
    goal = np.argsort(r.uniform(size=(B, L, V)), axis=-1)[..., :S].astype(np.int32)
    goal[1:3, :, 3] = goal[1:3, :, 1]
    shares = r.dirichlet(np.ones(S), (B, L))
    shares[:, 1::2, 0] = 0
    shares[0, 0] = [0, 0, 1, 0]
    shares /= shares.sum(-1, keepdims=True)
    return logits, targets, goal, shares, r.uniform(size=(B, L)) < 0.6, (r.uniform(size=(B, L)) < 0.8).astype(float)


def supervise(batch, goal, shares):
    return dataclasses.replace(batch, extra={"goal": jnp.asarray(goal), "goal_shares": jnp.asarray(shares)})


def dense(logits, targets, goal, shares, thought, weights):
    """The loss and its gradient of the logits, in loops."""
    log_p, total, slope = log_softmax(logits), 0.0, np.zeros_like(logits)
    for b, t in np.ndindex(*targets.shape):
        wanted = np.zeros(logits.shape[-1])
        if thought[b, t]:
            for token, share in zip(goal[b, t], shares[b, t], strict=True):
                wanted[token] += share
        else:
            wanted[targets[b, t]] = 1
        seen = wanted > 0
        total += weights[b, t] * (wanted[seen] * (np.log(wanted[seen]) - log_p[b, t][seen])).sum()
        slope[b, t] = weights[b, t] * (np.exp(log_p[b, t]) - wanted)
    return total, slope


def dirty(goal, shares, thought, weights):
    """What lies at tokens that do not count may be anything, as may a token without a share."""
    goal, shares = goal.copy(), np.where(thought[..., None], shares, 0)
    goal[shares == 0] = 1_000
    shares[weights == 0] = np.nan
    return goal, shares


def test_csft_agrees_with_loops_and_has_the_gradient_of_the_distance():
    for seed in range(3):
        logits, targets, goal, shares, thought, weights = thoughts(seed)
        total, slope = dense(logits, targets, goal, shares, thought, weights)
        with jax.enable_x64(True):
            batch = supervise(batch_of(weights, targets), *dirty(goal, shares, thought, weights))

            def loss(x, batch=batch):
                return supervised.csft(Output(x), batch)

            close(loss(jnp.asarray(logits)), (total, (weights.sum(1) > 0).sum()))
            close(jax.grad(lambda x, loss=loss: loss(x)[0])(jnp.asarray(logits)), slope)


@pytest.mark.parametrize("size", [V, 8200])  # above 8192 the logits are never formed whole
def test_csft_of_hidden_states(size):
    _, targets, goal, shares, thought, weights = thoughts(2)
    r, spread = np.random.default_rng(3), size // V
    targets, goal = targets * spread, goal * spread
    hidden, head = r.standard_normal((B, L, 6)), r.standard_normal((6, size))
    total, slope = dense(hidden @ head, targets, goal, shares, thought, weights)
    batch = supervise(batch_of(weights.astype(np.float32), targets), *dirty(goal, shares, thought, weights))

    def loss(hidden, head):
        return supervised.csft(Output(hidden, head), batch)[0]

    narrow = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(*narrow)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    for found, wanted in zip(slopes, (slope @ head.T, np.einsum("bld,blv->dv", hidden, slope)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    if size > V:
        shapes = {x.shape for x in values(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*narrow).jaxpr)}
        assert (B, L, 8192) in shapes
        assert (B, L, size) not in shapes
        assert not any(len(shape) > 3 and max(shape) >= 8192 for shape in shapes)


def values(jaxpr):
    """Yields every value of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (x.aval for x in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from values(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("place", [0, 2])
def test_one_hot_csft_is_cross_entropy(place):
    logits, targets, goal, _, _, weights = thoughts(1)
    batch = batch_of(weights.astype(np.float32), targets)
    x = jnp.asarray(logits, jnp.float32)
    goal[..., place] = targets
    one_hot = np.broadcast_to(np.eye(S, dtype=np.float32)[place], goal.shape)
    for output in (Output(x), Output(x[..., :4], x[0, :4])):
        got = supervised.csft(output, supervise(batch, goal, one_hot), mean="token_mean")
        np.testing.assert_allclose(got, losses.cross_entropy(output, batch), rtol=1e-6)
        answers = supervised.csft(output, supervise(batch, goal, np.zeros_like(one_hot)), mean="token_mean")
        assert answers[0] == got[0]


def test_a_goal_outside_the_vocabulary_is_not_silent():
    logits, targets, goal, shares, _, weights = thoughts(1)
    x, batch = jnp.asarray(logits, jnp.float32), batch_of(weights.astype(np.float32), targets)
    goal[0, np.flatnonzero(weights[0])[0], 2] = V
    for output in (Output(x), Output(x[..., :4], x[0, :4])):
        assert np.isnan(supervised.csft(output, supervise(batch, goal, shares.astype(np.float32)))[0])


def test_csft_names_columns_that_are_missing_or_do_not_fit():
    logits, targets, goal, shares, _, weights = thoughts()
    batch, output = batch_of(weights, targets), Output(jnp.asarray(logits))
    with pytest.raises(UserError, match="has no goal, which csft needs"):
        supervised.csft(output, batch)
    with pytest.raises(UserError, match=r"goal \[4, 5, 3\], goal_shares \[4, 5, 4\]; expected \[4, 5\]"):
        supervised.csft(output, supervise(batch, goal[..., 1:], shares))
