"""Advantages: against loops over the rewards, identities, groups without a signal, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.rl import advantages, objectives
from jaxcl.schema import UserError

P, G = 5, 4
NAMES = ("rloo", "grpo", "dr_grpo", "remax", "reinforce", "reinforce_plus")


def deviation(values, ddof):
    middle = sum(values) / len(values)
    return (sum((v - middle) ** 2 for v in values) / max(len(values) - ddof, 1)) ** 0.5


def oracle(name, rewards, greedy, valid, ddof, epsilon):
    """Returns (values, share) one rollout at a time; None marks a failed one."""
    values, share = np.zeros(rewards.shape), np.zeros(rewards.shape)
    everything = [rewards[i] for i in np.ndindex(rewards.shape) if valid[i]]
    for p, g in np.ndindex(rewards.shape):
        if not valid[p, g]:
            continue
        r = rewards[p, g]
        group = [rewards[p, j] for j in range(G) if valid[p, j]]
        others = [rewards[p, j] for j in range(G) if valid[p, j] and j != g]
        signal = len(set(group)) > 1
        if name == "rloo":
            value = r - sum(others) / len(others) if others else 0
        elif name == "grpo":
            value = (r - sum(group) / len(group)) / (deviation(group, ddof) + epsilon)
        elif name == "dr_grpo":
            value = r - sum(group) / len(group)
        elif name == "remax":
            value, signal = r - greedy[p], any(x != greedy[p] for x in group)
        else:
            value, signal = r - sum(everything) / len(everything), len(set(everything)) > 1
            value /= (deviation(everything, ddof) + epsilon) if name == "reinforce_plus" else 1
        values[p, g], share[p, g] = (value, 1) if signal else (0, 0)
    return values, share


def case(seed):
    r = np.random.default_rng(seed)
    rewards = r.choice([0.0, 0.1, 1.0], (P, G)) if r.uniform() < 0.5 else r.standard_normal((P, G))
    rewards[r.integers(P)] = 0.1
    valid = r.uniform(size=(P, G)) < (0.8 if r.uniform() < 0.5 else 2.0)
    return rewards, r.choice([0.0, 0.1, 1.0], P), valid, int(r.integers(2)), r.choice([1e-6, 1e-2])


@pytest.mark.parametrize("name", NAMES)
def test_advantages_agree_with_loops(name):
    for seed in range(200):
        rewards, greedy, valid, ddof, epsilon = case(seed)
        wanted = oracle(name, rewards, greedy, valid, ddof, epsilon)
        objective = objectives.make(name, ddof=ddof, epsilon=epsilon, length=9)
        failed = np.where(valid, rewards, np.nan)
        got = objective.advantages(failed, greedy if name == "remax" else None, valid)
        np.testing.assert_allclose(got.values, wanted[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(got.share, wanted[1])
        assert got.values.dtype == np.float64


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce"])
def test_named_functions_are_those_of_the_objectives(name):
    rewards = case(1)[0]
    got, wanted = getattr(advantages, name)(rewards), objectives.make(name, length=4).advantages(rewards)
    np.testing.assert_array_equal(got.values, wanted.values)
    np.testing.assert_array_equal(got.share, wanted.share)


def test_rloo_is_the_scaled_distance_from_the_mean():
    rewards = np.random.default_rng(0).standard_normal((P, G))
    mean = rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(advantages.rloo(rewards).values, G / (G - 1) * (rewards - mean), rtol=1e-12)
    np.testing.assert_allclose(advantages.dr_grpo(rewards).values, rewards - mean, rtol=1e-12)


def test_grpo_with_a_deviation_of_one_is_dr_grpo():
    rewards = np.tile([0.0, 0.0, 2.0, 2.0], (P, 1))  # population std 1
    scaled, plain = advantages.grpo(rewards, ddof=0, epsilon=0.0), advantages.dr_grpo(rewards)
    np.testing.assert_allclose(scaled.values, plain.values, rtol=1e-12)
    assert abs(advantages.grpo(rewards).values[0, 0]) < 0.9  # ddof 1 is the default and another number


def test_groups_without_a_signal_have_advantage_and_share_zero_but_may_count():
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]])
    for function in (advantages.rloo, advantages.grpo, advantages.dr_grpo):
        got = function(rewards)
        assert (got.values[0] == 0).all()
        assert got.share.tolist() == [[0, 0, 0], [1, 1, 1]]
        assert function(rewards, skip=False).share.all()
        assert (function(rewards, skip=False).values[0] == 0).all()
    assert advantages.remax(rewards, np.array([0.0, 0.0])).share.all()
    assert advantages.remax(rewards, np.array([0.1, 0.0])).share.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_failed_rollout_costs_itself_alone():
    rewards, valid = np.array([[1.0, np.nan, 0.0, 0.0]]), np.array([[True, False, True, True]])
    for name in ("rloo", "grpo", "dr_grpo"):
        got = getattr(advantages, name)(rewards, valid=valid)
        rest = getattr(advantages, name)(rewards[:, [0, 2, 3]])
        np.testing.assert_allclose(got.values[:, [0, 2, 3]], rest.values, rtol=1e-12)
        assert got.share.tolist() == [[1, 0, 1, 1]]
        assert got.values[0, 1] == 0


def test_jax_arrays_stay_jax_arrays_and_compile():
    rewards = case(3)[0]
    got = jax.jit(advantages.grpo)(jnp.asarray(rewards, jnp.float32))
    assert isinstance(got.values, jax.Array)
    assert got.values.dtype == jnp.float32
    np.testing.assert_allclose(got.values, advantages.grpo(rewards).values, atol=1e-5)
    assert advantages.rloo(np.array([[1, 0]], np.int32)).values.tolist() == [[1, -1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.rloo(np.zeros((3, 1))), "group size 1"),
        (lambda: advantages.grpo(np.zeros((3, 1))), "group size 1"),
        (lambda: advantages.rloo(np.zeros(3)), "expected \\[prompts, rollouts"),
        (lambda: advantages.rloo(np.zeros((0, 3))), "expected \\[prompts, rollouts"),
        (lambda: advantages.remax(np.zeros((3, 2)), np.zeros(2)), "expected \\[3\\]"),
        (lambda: advantages.remax(np.zeros((3, 2)), None), "greedy rewards: needed"),
        (lambda: advantages.estimate(np.zeros((3, 2)), baseline="group", greedy=np.zeros(3)), "by no other"),
        (lambda: advantages.grpo(np.zeros((3, 2)), ddof=2), "ddof=2"),
        (lambda: advantages.grpo(np.zeros((3, 2)), epsilon=-1.0), "epsilon=-1.0"),
        (lambda: advantages.rloo(np.zeros((3, 2)), valid=np.ones(3)), "valid of shape"),
        (lambda: advantages.estimate(np.zeros((3, 2)), baseline="groop"), "did you mean 'group'"),
    ],
)
def test_bad_rewards_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
    assert advantages.remax(np.zeros((3, 1)), np.ones(3)).values.tolist() == [[-1]] * 3  # a group of 1 will do
