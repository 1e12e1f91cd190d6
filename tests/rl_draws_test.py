"""What the options of rollouts and the numbers of a draw do to what is drawn, beside loops that know no sampler."""

import functools

import jax
import numpy as np
import pytest
import rl_small

from jaxcl.rl.sample import ANSWER, NOTHING
from jaxcl.types import Batch

QUICK = True  # compiling is most of the time

NUMBERS = np.array([3, 0, 4, 1])


@pytest.fixture(autouse=True)
def quick():
    """The compiler need not try: nothing here is about speed, and both sides of a comparison are its work."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def made(**options):
    """Returns the parts and parameters whose logits differ by more than at the start of training."""
    parts = rl_small.Parts(**options)
    params = parts.model.init(jax.random.key(5))
    return parts, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)


def likeliest(parts, params, numbers):
    """Returns the tokens that argmax alone picks for each problem, up to an end token: a forward pass for each step."""
    shown, limits = parts.problems.prompts[numbers], parts.own.limits
    first = shown.shape[1]
    tokens = np.pad(shown, ((0, 0), (0, limits.total)))
    apply = jax.jit(lambda batch: parts.model.apply(params, batch).logits)
    for end in range(first, tokens.shape[1]):
        used = np.zeros_like(tokens)
        used[:, :end] = 1
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batch = Batch(tokens, tokens, used.astype(np.float32), used, places, np.zeros(len(tokens), np.int32))
        tokens[:, end] = np.argmax(np.asarray(apply(batch))[:, end - 1], axis=-1)
    rows = [row[first:].tolist() for row in tokens]
    ends = [[t for t in range(limits.thoughts, limits.total) if row[t] in limits.end] for row in rows]
    return [row[: at[0] + 1] if at else row for row, at in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("policy", ["hard", "soft"])
def test_step_and_draw_are_both_in_the_key(policy):
    parts, params = made(policy=policy, group=4)
    prompts = parts.prompts(NUMBERS)

    def drawn(step, draw):
        rolled = parts.explorer.roll(params, prompts, step, draw)
        return [np.asarray(x) for x in jax.tree.leaves(rolled.rollouts)]

    pairs = [(1, 0), (1, 1), (2, 0), (2, 1), (0, 1), (1, 2), (0, 2), (1, -1)]
    found = {pair: drawn(*pair) for pair in pairs}
    assert len({b"".join(x.tobytes() for x in one) for one in found.values()}) == len(pairs)
    for pair in pairs[:3]:
        assert all(np.array_equal(a, b) for a, b in zip(found[pair], drawn(*pair), strict=True))


def test_the_temperature_of_answers_reaches_sampler_and_score():
    """No thoughts, so that an answer of three tokens is all there is to be drawn."""
    options = {"policy": "hard", "objective": "rloo", "group": 8, "thoughts": 0, "answer": 3}
    drawn = {}
    for temperature in (1e-4, 1.0, 0.5):
        parts, params = made(temperature=temperature, **options)
        prompts = parts.prompts(NUMBERS)
        rolled = parts.explorer.roll(params, prompts, 1)
        drawn[temperature] = np.asarray(rolled.token)
        rows, _ = parts.explorer.judge(rolled, prompts, NUMBERS)
        _, score = parts.own.loss({})
        value = jax.jit(lambda params, rows, m=parts.model, s=score: s(m.apply(params, rows), rows))(params, rows)
        np.testing.assert_allclose(value, rows.extra["behaviour"], rtol=1e-4, atol=1e-4)
        assert temperature < 0.01 or np.any(np.asarray(value) < -0.1)
    cold = drawn[1e-4].reshape(len(NUMBERS), 8, 3)
    for best, some in zip(likeliest(parts, params, NUMBERS), cold, strict=True):
        assert np.array_equal(some, np.tile([*best, *[0] * (3 - len(best))], (8, 1)))
    assert not np.array_equal(drawn[1.0], drawn[1e-4])
    assert not np.array_equal(drawn[1.0], drawn[0.5])


def test_slots_reach_the_sampler_and_change_no_completion():
    few, params = made(policy="hard", group=4, answer=3, slots=3)
    all_, _ = made(policy="hard", group=4, answer=3)
    prompts = few.prompts(NUMBERS)
    some, whole = (parts.explorer.roll(params, prompts, 1) for parts in (few, all_))
    for name in ("kind", "token", "stopped", "ended"):
        assert np.array_equal(getattr(some.rollouts, name), getattr(whole.rollouts, name)), name
    np.testing.assert_allclose(some.rollouts.log_prob, whole.rollouts.log_prob, atol=1e-5)
    live = np.sum(np.asarray(some.kind) != NOTHING)
    assert int(whole.rollouts.steps) == few.own.limits.total
    assert int(some.rollouts.steps) >= live / 3
    told = few.explorer.measures(some)
    assert told["busy"] == pytest.approx(live / (3 * int(some.rollouts.steps)))
    assert told["busy"] > 0.8


def test_the_baseline_of_remax_is_the_reward_of_the_completion_that_argmax_finds():
    parts, params = made(objective="remax", policy="hard", group=4)
    numbers = np.arange(len(parts.problems.prompts))
    prompts = parts.prompts(numbers)
    rolled = parts.explorer.roll(params, prompts, 1)
    rows, _ = parts.explorer.judge(rolled, prompts, numbers)
    thoughts = parts.own.limits.thoughts
    chains = likeliest(parts, params, numbers)
    base = np.array([float(chain[thoughts:] == parts.problems.gold(i)) for i, chain in enumerate(chains)])
    assert 0 < base.sum() < len(base)  # else any baseline of one value would do
    kind, token = np.asarray(rolled.kind), np.asarray(rolled.token)
    answers = [row[used].tolist() for row, used in zip(token, kind == ANSWER, strict=True)]
    rewards = np.array([float(answer == parts.problems.gold(i // 4)) for i, answer in enumerate(answers)])
    values = np.asarray(rows.extra["advantage"]).reshape(-1, 4)
    np.testing.assert_allclose(values, rewards.reshape(-1, 4) - base[:, None], atol=1e-6)
    assert np.any(base[:, None] != rewards.reshape(-1, 4))


class Failing:
    """A judge to whom some rows, and a call on fewer rows, are as if the verifier had thrown."""

    def __init__(self, judge, rows, greedy=()):
        self.judge, self.rows, self.greedy = judge, list(rows), list(greedy)
        self.right = judge.right

    def __call__(self, numbers, kind, token):
        found = self.judge(numbers, kind, token)
        rewards, failed = found.rewards.copy(), found.failed.copy()
        mine = self.rows if len(numbers) > len(NUMBERS) else self.greedy
        rewards[mine], failed[mine] = 0, True
        return found._replace(rewards=rewards, failed=failed, events=found.events | {"error": len(mine)})


def valued(objective, rows, greedy=()):
    """Returns rewards, advantages and shares [N, G] where some rows fail, and what is told."""
    parts, params = made(objective=objective, policy="hard", group=4)
    prompts = parts.prompts(NUMBERS)
    explorer = parts.explorer._replace(judge_rows=Failing(parts.explorer.judge_rows, rows, greedy))
    rolled = explorer.roll(params, prompts, 1)
    rewards = parts.explorer.rewards(rolled.kind, rolled.token, NUMBERS).values
    batch, told = explorer.judge(rolled, prompts, NUMBERS)
    values, share = (np.asarray(batch.extra[name]).reshape(-1, 4) for name in ("advantage", "share"))
    return rewards, values, share, told


def test_an_answer_that_cannot_be_judged_is_in_no_baseline_and_has_no_weight():
    rewards, *_ = valued("rloo", ())
    mixed = int(np.flatnonzero(np.ptp(rewards, axis=1) > 0)[0])
    lost = int(np.flatnonzero(rewards[mixed] == rewards[mixed].max())[0])
    rewards, values, share, told = valued("rloo", [4 * mixed + lost])
    left = np.ones(rewards.shape, bool)
    left[mixed, lost] = False
    for row, (r, some) in enumerate(zip(rewards, left, strict=True)):
        for i in range(4):
            others = [r[j] for j in range(4) if some[j] and j != i]
            signal = some[i] and np.ptp(r[some]) > 0
            assert values[row, i] == pytest.approx(r[i] - np.mean(others) if signal else 0, abs=1e-6)
            assert share[row, i] == signal
    assert told["failed"] == 1


def test_a_greedy_answer_that_cannot_be_judged_is_no_baseline():
    _, whole, shares, _ = valued("remax", ())
    assert np.any(whole[1:3] != 0)
    row = 1 if np.any(whole[1] != 0) else 2
    _, values, share, _ = valued("remax", (), [row])
    assert not np.any(values[row])
    assert not np.any(share[row])
    rest = np.arange(len(whole)) != row
    np.testing.assert_array_equal(values[rest], whole[rest])
    np.testing.assert_array_equal(share[rest], shares[rest])
