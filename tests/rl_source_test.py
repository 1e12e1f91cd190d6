"""From problems to rows: rewards, values, the gradient of the expected reward, and a policy that learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import grad
from jaxcl.models import transformer
from jaxcl.rl import objectives, source, tasks, thoughts
from jaxcl.rl.sample import ANSWER, THOUGHT, Limits
from jaxcl.schema import UserError


@functools.cache
def parts(name="rloo", policy="hard", group=8, **limits):
    problems = tasks.make({"name": "modular", "count": 2, "modulus": 3, "held_out": 0.2})
    model = transformer.make(
        preset="tiny", vocab=problems.vocab, layers=1, embed=24, heads=2, kv_heads=2, mlp=48, max_length=32
    )
    lengths = Limits(**({"thoughts": problems.thoughts, "answer": 1} | limits))
    chosen = {"policy": thoughts.make(policy), "objective": objectives.make(name), "limits": lengths}
    return problems, model, source.make(model, problems, group=group, **chosen)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_rewards_and_values_belong_to_their_rows(name):
    problems, model, flow = parts(name)
    params = model.init(jax.random.key(0))
    numbers = np.array([3, 0, 4, 3])
    rows, told = flow(params, numbers, jax.random.key(1))
    kind, token = (np.asarray(x) for x in (rows.extra["kind"], rows.targets))
    answers = [row[used].tolist() for row, used in zip(token, kind == ANSWER, strict=True)]
    rewards = np.array([answer == problems.gold(numbers[i // 8]) for i, answer in enumerate(answers)], float)
    rewards = rewards.reshape(4, 8)
    assert told["reward"] == pytest.approx(rewards.mean())
    assert 0 < told["signal"] <= 1
    assert told["thoughts"] == problems.thoughts
    values = np.asarray(rows.extra["advantage"]).reshape(4, 8)
    if name == "rloo":
        others = (rewards.sum(1, keepdims=True) - rewards) / 7
        np.testing.assert_allclose(values, rewards - others, atol=1e-6)
        assert np.array_equal(np.asarray(rows.extra["share"]).reshape(4, 8)[:, 0] > 0, np.ptp(rewards, axis=1) > 0)
    else:
        bases = rewards - values
        assert np.all(np.ptp(bases, axis=1) < 1e-6)
        assert set(np.round(bases[:, 0], 6).tolist()) <= {0.0, 1.0}
    again, _ = flow(params, numbers, jax.random.key(1))
    other, _ = flow(params, numbers, jax.random.key(2))
    assert np.array_equal(rows.targets, again.targets)
    assert not np.array_equal(rows.targets, other.targets)


def test_the_mean_gradient_is_that_of_the_expected_reward():
    """Hard thoughts of one problem, over all chains: sum of reward and probability, differentiated directly."""
    problems, model, flow = parts(group=64, thoughts=1)
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, model.init(jax.random.key(3)))
    gold = problems.gold(5)[0]
    vocab = problems.vocab

    def reward(params):
        """P(answer = gold), summed over the thought."""
        prompt, inside = problems.prompts[5][None], problems.segments[5][None]
        rows = jax.tree.map(lambda x: jnp.repeat(x, vocab, axis=0), (prompt, inside))
        tokens = jnp.concatenate([rows[0], jnp.arange(vocab)[:, None]], axis=1)
        used = jnp.concatenate([rows[1], jnp.ones((vocab, 1), jnp.int32)], axis=1)
        places = jnp.maximum(jnp.cumsum(used, axis=1) - 1, 0)
        batch = source.Batch(tokens, tokens, used.astype(jnp.float32), used, places, jnp.zeros(vocab, jnp.int32))
        logits = jax.nn.log_softmax(model.apply(params, batch).logits)
        chain = logits[jnp.arange(vocab), -2, jnp.arange(vocab)] + logits[:, -1, gold]
        return jnp.sum(jnp.exp(chain))

    want = jax.grad(reward)(params)
    numbers = np.full(32, 5)
    slope = jax.jit(
        lambda params, rows: grad.value_and_grad(lambda p, r: {"loss": flow.loss(model.apply(p, r), r)}, params, rows)[
            1
        ]
    )
    found = [slope(params, flow(params, numbers, jax.random.key(k))[0]) for k in range(6)]
    mean = jax.tree.map(lambda *x: -sum(x) / len(x), *found)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (mean, want))
    assert np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.95
    assert np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, abs=0.2)


def test_it_learns():
    """One answer to all problems is right in three of seven. Soft thoughts need a trained model to start from."""
    problems, model, flow = parts(group=64, thoughts=1)
    params = model.init(jax.random.key(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))

    @jax.jit
    def step(params, opt_state, rows):
        _, slopes = grad.value_and_grad(lambda p, r: {"loss": flow.loss(model.apply(p, r), r)}, params, rows)
        updates, opt_state = tx.update(slopes, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rewards = tx.init(params), []
    numbers = np.arange(len(problems.prompts))
    for k in range(100):
        rows, told = flow(params, numbers, jax.random.key(k))
        params, opt_state = step(params, opt_state, rows)
        rewards.append(told["reward"])
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-5:]) > 0.6
    assert np.any(np.asarray(rows.extra["kind"]) == THOUGHT)


COMPILED = []


def test_other_problems_and_keys_compile_nothing():
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
    _, model, flow = parts("remax", policy="soft", group=3)
    params = model.init(jax.random.key(0))
    keys = [jax.random.key(k) for k in range(3)]
    before = len(COMPILED)
    flow(params, np.array([0, 1, 2]), keys[0])
    first = len(COMPILED) - before
    for numbers, key in (([3, 0, 4], keys[1]), ([1, 1, 1], keys[2])):
        flow(jax.tree.map(lambda x: x, params), np.array(numbers), key)
    assert first >= 3  # rollouts, the greedy ones, and the rows
    assert len(COMPILED) - before == first
    flow(params, np.array([0, 1]), keys[0])
    assert len(COMPILED) - before > first  # other shapes do, so the count counts


def test_what_cannot_be_rewarded_is_refused():
    problems, model, _ = parts()
    options = {"policy": thoughts.make("hard"), "objective": objectives.make("rloo")}
    with pytest.raises(UserError, match=r"config\.rollout\.group=0"):
        source.make(model, problems, limits=Limits(1, 1), group=0, **options)
    with pytest.raises(UserError, match=r"config\.rollout\.answer=0"):
        source.make(model, problems, limits=Limits(1, 0), group=2, **options)
    untrusted = problems._replace(verifier=problems.verifier._replace(cheap=False))
    with pytest.raises(UserError, match="give it a pool of processes"):
        source.make(model, untrusted, limits=Limits(1, 1), group=2, **options)
