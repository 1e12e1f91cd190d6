"""From problems to rows: rewards, values, the gradient of the expected reward, and a policy that learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rl_small

from jaxcl.rl import explore
from jaxcl.rl.sample import ANSWER, THOUGHT
from jaxcl.types import Batch

QUICK = True  # compiling is most of the time

parts = functools.cache(rl_small.Parts)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_rewards_and_values_belong_to_their_rows(name):
    made = parts(name)
    params = made.model.init(jax.random.key(0))
    numbers = np.array([3, 0, 4, 3])
    rows, told = made.draw(params, numbers, 1)
    kind, token = (np.asarray(x) for x in (rows.extra["kind"], rows.targets))
    answers = [row[used].tolist() for row, used in zip(token, kind == ANSWER, strict=True)]
    rewards = np.array([answer == made.problems.gold(numbers[i // 8]) for i, answer in enumerate(answers)], float)
    rewards = rewards.reshape(4, 8)
    assert told["reward"] == pytest.approx(rewards.mean())
    assert told["solved"] == pytest.approx((rewards.max(axis=1) > 0).mean())
    assert told["signal"] == pytest.approx(
        (np.abs(np.asarray(rows.extra["advantage"])).reshape(4, 8) > 0).any(1).mean()
    )
    assert told["thoughts"] == made.problems.thoughts
    assert np.array_equal(np.asarray(rows.inputs)[::8, :3], made.problems.prompts[numbers])
    values = np.asarray(rows.extra["advantage"]).reshape(4, 8)
    if name == "rloo":
        others = (rewards.sum(1, keepdims=True) - rewards) / 7
        np.testing.assert_allclose(values, rewards - others, atol=1e-6)
        assert np.array_equal(np.asarray(rows.extra["share"]).reshape(4, 8)[:, 0] > 0, np.ptp(rewards, axis=1) > 0)
    else:
        bases = rewards - values
        assert np.all(np.ptp(bases, axis=1) < 1e-6)
        assert set(np.round(bases[:, 0], 6).tolist()) <= {0.0, 1.0}
    again, _ = made.draw(params, numbers, 1)
    other, _ = made.draw(params, numbers, 2)
    assert np.array_equal(rows.targets, again.targets)
    assert not np.array_equal(rows.targets, other.targets)


def test_the_baseline_of_remax_is_the_greedy_answer():
    made = parts("remax")
    params = made.model.init(jax.random.key(0))
    numbers = np.arange(4)
    prompts = made.prompts(numbers)
    rolled = made.explorer.roll(params, prompts, 0)
    base = made.explorer.rewards(*rolled.greedy, numbers).values[:, 0]
    rows, _ = made.explorer.judge(rolled, prompts, numbers)
    rewards = made.explorer.rewards(rolled.kind, rolled.token, numbers).values
    np.testing.assert_allclose(np.asarray(rows.extra["advantage"]).reshape(4, 8), rewards - base[:, None], atol=1e-6)


def test_padding_is_neither_rewarded_nor_trained_on():
    made = parts()
    params = made.model.init(jax.random.key(0))
    prompts = made.prompts(np.array([3, 0, 4, 3]))
    rolled = made.explorer.roll(params, prompts, 1)
    numbers = np.array([3, 0, -1, -1])
    rows, told = made.explorer.judge(rolled, prompts, numbers)
    assert np.all(np.asarray(rows.extra["share"]).reshape(4, 8)[2:] == 0)
    alone = made.explorer.rewards(rolled.kind, rolled.token, numbers).values
    assert told["reward"] == pytest.approx(alone[:2].mean())
    assert np.all(alone[2:] == 0)


def test_the_mean_gradient_is_that_of_the_expected_reward():
    """Hard thoughts of one problem, over all chains: sum of reward and probability, differentiated directly."""
    made = parts(group=64, thoughts=1)
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, made.model.init(jax.random.key(3)))
    gold = made.problems.gold(5)[0]
    vocab = made.problems.vocab

    def reward(params):
        """P(answer = gold), summed over the thought."""
        prompt, inside = made.problems.prompts[5][None], made.problems.segments[5][None]
        rows = jax.tree.map(lambda x: jnp.repeat(x, vocab, axis=0), (prompt, inside))
        tokens = jnp.concatenate([rows[0], jnp.arange(vocab)[:, None]], axis=1)
        used = jnp.concatenate([rows[1], jnp.ones((vocab, 1), jnp.int32)], axis=1)
        places = jnp.maximum(jnp.cumsum(used, axis=1) - 1, 0)
        batch = Batch(tokens, tokens, used.astype(jnp.float32), used, places, jnp.zeros(vocab, jnp.int32))
        logits = jax.nn.log_softmax(made.model.apply(params, batch).logits)
        chain = logits[jnp.arange(vocab), -2, jnp.arange(vocab)] + logits[:, -1, gold]
        return jnp.sum(jnp.exp(chain))

    want = jax.grad(reward)(params)
    slope = made.gradient()
    found = [slope(params, made.draw(params, np.full(32, 5), k)[0]) for k in range(6)]
    mean = jax.tree.map(lambda *x: -sum(x) / len(x), *found)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (mean, want))
    assert np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.95
    assert np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, abs=0.2)


def test_it_learns():
    """One answer to all problems is right in three of seven. Soft thoughts need a trained model to start from."""
    made = parts(group=64, thoughts=1)
    params = made.model.init(jax.random.key(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
    slope = made.gradient()

    @jax.jit
    def move(params, opt_state, slopes):
        updates, opt_state = tx.update(slopes, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rewards = tx.init(params), []
    numbers = np.arange(len(made.problems.prompts))
    for k in range(150):
        rows, told = made.draw(params, numbers, k)
        params, opt_state = move(params, opt_state, slope(params, rows))
        rewards.append(told["reward"])
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-5:]) > made.problems.baselines["majority"] + 0.1  # a constant answer is found first
    assert np.any(np.asarray(rows.extra["kind"]) == THOUGHT)


def test_demonstrations_are_the_worked_rows_of_the_same_problems():
    made = parts(demonstrations=True)
    params = made.model.init(jax.random.key(0))
    numbers = np.array([3, 0, 4, 3])
    rows, _ = made.draw(params, numbers, 1)
    marks = np.asarray(rows.extra[explore.DEMONSTRATION])
    assert marks.tolist() == [0.0] * 32 + [1.0] * 4
    for row, number in zip(np.flatnonzero(marks), numbers, strict=True):
        used = np.asarray(rows.weights)[row] > 0
        tail = [*made.problems.traces[number].tolist(), *made.problems.gold(number)]
        assert np.asarray(rows.targets)[row, used].tolist() == tail
        for name in ("kind", "advantage", "share", "behaviour"):
            assert not np.any(np.asarray(rows.extra[name])[row])
    # The objective does not see them: its loss is that of the rollouts alone.
    cut = dataclasses.replace(
        jax.tree.map(lambda x: x[:32], rows), extra={k: v[:32] for k, v in rows.extra.items() if k != "demonstration"}
    )
    whole, part = (made.loss(made.model.apply(params, batch), batch) for batch in (rows, cut))
    np.testing.assert_allclose(whole, part, rtol=1e-5)


def test_long_answers_are_penalised():
    made = parts(overlong=2)
    params = made.model.init(jax.random.key(0))
    numbers = np.array([3, 0])
    rolled = made.explorer.roll(params, made.prompts(numbers), 1)
    plain = made.explorer.rewards(rolled.kind, rolled.token, numbers).values
    rewards = made.explorer.rewards(rolled.kind, rolled.token, numbers, 0).values
    assert set(plain.ravel().tolist()) <= {0.0, 1.0}
    np.testing.assert_allclose(rewards, plain - 1.0)  # all are of two tokens, the limit


COMPILED = []


def test_other_problems_and_steps_compile_nothing():
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
    made = parts("remax", policy="soft", group=3)
    params = made.model.init(jax.random.key(0))
    first, _ = made.draw(params, np.array([3, 0]), 1)
    COMPILED.clear()
    second, _ = made.draw(jax.tree.map(lambda x: x, params), np.array([1, 4]), 2)
    assert not COMPILED
    assert not np.array_equal(first.inputs, second.inputs)
    jax.jit(lambda x: x * 2 + 1)(np.ones(17))  # the listener hears
    assert COMPILED
