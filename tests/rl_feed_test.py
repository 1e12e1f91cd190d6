"""What a feed shows, refills, filters and remembers, with draws that are written down instead of drawn."""

import dataclasses
import functools
import types

import numpy as np
import pytest
import rl_small

from jaxcl import feed, practice
from jaxcl.data import stream as streams
from jaxcl.feed import Held
from jaxcl.rl import advantages, explore, tasks

QUICK = True  # compiling is most of the time

GROUP = 2
STATE = types.SimpleNamespace(params="now", memory={})


def rewarded(values):
    """Returns rewards of which a positive one is right, and NaN is a failure; one answer could not be judged."""
    failed = np.isnan(values)
    return explore.Rewarded(np.where(failed, 0, values), values > 0, failed, {"error": 1}, None)


class Scripted:
    """Stands for an explorer: a draw is the number of its problem, and rewards are a function of number and draw."""

    def __init__(self, numbers, rule, greedy=False, **rollout):
        self.rollout = explore.Rollout(group=GROUP, **rollout)
        self.numbers, self.rule, self.greedy = numbers, rule, greedy
        self.rolls, self.given = [], []

    def roll(self, params, prompts, step, draw=0):
        self.rolls.append((params, step, draw))
        number = self.numbers(prompts)
        kind = np.repeat(number, GROUP)[:, None]
        greedy = (number[:, None], number[:, None] * 0 + draw) if self.greedy else None
        rollouts = types.SimpleNamespace(params=params)
        return Rolled(kind, kind * 0 + draw, greedy, rollouts)

    def rewards(self, kind, token, numbers, step=None):
        kind, token = np.asarray(kind), np.asarray(token)
        assert np.array_equal(kind[:, 0], np.repeat(numbers, len(kind) // len(numbers)))
        group = len(kind) // len(numbers)
        found = [[self.rule(int(n), i, int(token[r * group, 0])) for i in range(group)] for r, n in enumerate(numbers)]
        return rewarded(np.array(found, np.float32))

    def baseline(self, rolled, numbers, step):
        return None if rolled.greedy is None else np.array([0.01 * n + 1 for n in numbers], np.float32)

    def value(self, numbers, got, base):
        return advantages.estimate(got.values, baseline="group", valid=~got.failed)

    def valued(self, rolled, prompts, numbers, got, base):
        failed = sum(got.events.values())
        self.given.append((rolled, prompts, numbers, got.values, base, failed))
        return "rows", {"failed": float(failed), "busy": 1.0}

    def judge(self, rolled, prompts, numbers, step=0):
        assert np.array_equal(self.numbers(prompts), numbers)
        rows = {"step": step, "numbers": numbers, "params": rolled.rollouts.params}
        return rows, {"reward": float(step)}

    def merge(self, old, new, source):
        (rolled, prompts), (more, shown) = old, new

        def leaf(a, b):
            return None if a is None else np.asarray(explore.merged(a, b, source))

        greedy = None if rolled.greedy is None else tuple(map(leaf, rolled.greedy, more.greedy))
        return (
            Rolled(leaf(rolled.kind, more.kind), leaf(rolled.token, more.token), greedy, rolled.rollouts),
            type(prompts)(*map(leaf, prompts, shown)),
        )

    def whole(self, value):
        return np.asarray(value)


class Told(np.ndarray):
    """An array that is always ready."""

    def block_until_ready(self):
        return self


class Rolled:
    def __init__(self, kind, token, greedy, rollouts):
        self.kind, self.token, self.greedy, self.rollouts = np.asarray(kind).view(Told), token, greedy, rollouts


@pytest.fixture(scope="module")
def plain():
    """What a run of `rl_small` shows, without its model."""
    settings = rl_small.config()
    stages = settings["stream"]["stages"]
    problems = {name: tasks.make(one) for name, one in settings["sources"].items()}
    own = practice.make(problems, None, stages, practice.Options("hard", "rloo", {"group": GROUP}))
    flow = streams.make({name: one.train for name, one in own.corpora().items()}, stages, batch=4, seed=5)
    return feed.Rollouts(None, own, flow, lambda index, stage: index, 5, None)


@pytest.fixture
def scripted(plain, monkeypatch):
    """Returns the function (rule, **options) -> rollouts whose prompts are their index."""
    monkeypatch.setattr(feed.frozen, "whole", lambda state: state.params)

    def make(rule, **options):
        numbers = functools.partial(plain.practice.numbers, plain.flow)
        return plain._replace(explorer=Scripted(numbers, rule, **options))

    return make


def signal(number, i, draw):
    """A third of the problems have a signal."""
    return float(number % 3 == 0 and i == 0)


def refilled(rollouts, step=8):
    index, numbers = rollouts.prompts(step, {})
    rolled = rollouts.explorer.roll("now", index, step)
    _, told = rollouts.refilled("now", rolled, index, step, {})
    return numbers, told, rollouts.explorer.given[-1]


def test_a_group_drawn_anew_brings_its_prompt_number_rewards_and_baseline(scripted):
    rollouts = scripted(signal, greedy=True, refill=60)
    explorer, width = rollouts.explorer, rollouts.flow.width
    rule = explorer.rule
    before, told, (rolled, prompts, numbers, rewards, base, failed) = refilled(rollouts)
    assert told["refills"] > 0
    assert np.all(numbers % 3 == 0)
    assert np.array_equal(numbers[before % 3 == 0], before[before % 3 == 0])  # what had a signal stays where it was
    assert np.array_equal(np.asarray(rolled.kind)[:, 0], np.repeat(numbers, GROUP))
    assert np.array_equal(rollouts.practice.numbers(rollouts.flow, prompts), numbers)
    np.testing.assert_array_equal(rewards, [[rule(n, i, 0) for i in range(GROUP)] for n in numbers])
    np.testing.assert_allclose(base, 0.01 * numbers + 1, rtol=1e-6)
    assert np.array_equal(rolled.greedy[0][:, 0], numbers)
    assert failed == 1 + told["refills"]
    assert len(numbers) == width
    draws = [draw for _, _, draw in explorer.rolls]
    assert draws == list(range(len(draws)))
    assert all(step == 8 for _, step, _ in explorer.rolls)


def test_a_failed_answer_does_not_stay_with_a_group_that_is_drawn_anew(scripted):
    rollouts = scripted(lambda n, i, draw: np.nan if draw == 0 and i == 1 else float(i == 0), refill=5)
    _, told, (rolled, _, _, rewards, _, _) = refilled(rollouts)
    assert told["refills"] == 1  # one of two is no group, and the next draw is whole
    assert np.all(np.asarray(rolled.token) == 1)
    assert rewards.tolist() == [[1, 0]] * len(rewards)


def test_the_same_problem_may_have_a_signal_in_another_draw_only(scripted):
    rollouts = scripted(lambda n, i, draw: float(draw >= 2 and i == 0), refill=5)
    _, told, (rolled, _, _, rewards, base, _) = refilled(rollouts)
    assert told["refills"] == 2
    assert np.all(np.asarray(rolled.token) == 2)
    assert np.all(np.ptp(rewards, axis=1) > 0)
    assert base is None


def test_rounds_end_and_what_is_left_keeps_its_own_group(scripted):
    rollouts = scripted(lambda n, i, draw: 1.0, refill=3)
    before, told, (rolled, _, numbers, rewards, _, _) = refilled(rollouts)
    assert told["refills"] == 3
    assert np.array_equal(numbers, before)
    assert np.all(np.asarray(rolled.token) == 0)
    assert np.all(rewards == 1)


def test_other_problems_depend_on_step_draw_and_seed_and_stay_in_their_source(scripted):
    rollouts = scripted(signal)
    plain = rollouts.flow.index(8)
    found = {}
    for draw in (1, 2):
        for step in (3, 4):  # of one source, so that only the draws can differ
            for seed in (0, 1):
                one = rollouts._replace(seed=seed).index(step, {}, draw)
                assert np.array_equal(one.source, rollouts.flow.index(step).source)
                assert np.all(one.row < rollouts.flow.sizes[one.source])
                found[draw, step, seed] = one.row.tobytes()
    assert len(set(found.values())) == len(found)
    many = np.concatenate([rollouts.index(8, {}, draw).row[plain.source == 1] for draw in range(1, 200)])
    assert set(many) == set(range(rollouts.flow.sizes[1]))  # the last one too
    kept = {"2": [[1, 5], [0, 2, 3]]}
    for draw in range(4):
        one = rollouts.index(8, kept, draw)
        assert all(row in kept["2"][source] for source, row in zip(one.source, one.row, strict=True))
    assert np.array_equal(rollouts.index(3, kept).row, rollouts.flow.index(3).row)  # another stage


def test_the_filter_counts_what_is_rewarded_in_draws_of_its_own(scripted):
    """Neither a reward of 0 nor a penalty is a success; the rows of the last piece count once."""
    rule = {0: [1.0, 0.0], 1: [0.0, 0.0], 2: [-0.5, 0.0], 3: [1.0, 1.0], 4: [0.1, 0.0]}
    rollouts = scripted(lambda n, i, draw: rule[n % 5][i], filter=3 * GROUP)
    for source, size in enumerate(rollouts.flow.sizes):
        first = rollouts.practice.judge.first[source]
        want = [3 * sum(r > 0 for r in rule[(first + row) % 5]) for row in range(size)]
        assert rollouts.successes("now", source, 2, 7).tolist() == want
        assert size % rollouts.flow.width  # the last piece is not full
        used = rollouts.explorer.rolls
        assert len(set(used)) == len(used) == 3 * -(-size // rollouts.flow.width)
        assert all(draw < 0 for _, _, draw in used)  # those of training are not
        used.clear()
    kept = rollouts.solved(STATE, 2)
    assert {step for _, step, _ in rollouts.explorer.rolls} == {7}  # the first of the stage
    for source, rows in enumerate(kept):
        first = rollouts.practice.judge.first[source]
        assert rows == [row for row in range(rollouts.flow.sizes[source]) if (first + row) % 5 in (0, 3, 4)]
    nothing = scripted(lambda n, i, draw: 0.0, filter=GROUP).solved(STATE, 2)
    assert [len(rows) for rows in nothing] == rollouts.flow.sizes.tolist()


def feeder(rollouts, start, held=None):
    return feed.Feed(rollouts.flow.index, rollouts, start, rollouts.flow, held or Held())


def walk(one, steps, settle=True):
    """Returns the rows of some steps, each with parameters of its own."""
    found = []
    for step in steps:
        rows, _ = one.get(types.SimpleNamespace(params=f"at {step}", memory={}))
        found.append(rows)
        if settle:
            one.settle()
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_those_of_their_step_and_of_the_parameters_they_are_drawn_from(scripted, ahead):
    rollouts = scripted(signal, ahead=ahead)
    one = feeder(rollouts, 2)
    found = walk(one, range(2, 12))
    one.close()
    assert np.array_equal(found[0].row, rollouts.flow.index(2).row)  # a supervised step is given what was read
    for step, rows in enumerate(found[1:], 3):
        assert rows["step"] == (step - 3 if step < 7 else step - 7)  # within its stage
        assert np.array_equal(rows["numbers"], rollouts.practice.numbers(rollouts.flow, rollouts.flow.index(step)))
        # Nothing is drawn ahead over the boundaries of stages, 3 and 7.
        assert rows["params"] == (f"at {step}" if not ahead or step in (3, 7) else f"at {step - 1}")


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_feed_goes_on_with_what_it_remembered(scripted, ahead, monkeypatch):
    rule = {"rule": lambda n, i, draw: float(n % 2 and i == 0), "filter": GROUP, "ahead": ahead}
    rollouts = scripted(**rule)
    whole = feeder(rollouts, 7)
    straight = walk(whole, range(7, 12))
    whole.close()
    kept = whole.held.kept["2"]
    for rows in straight:
        assert np.all(rows["numbers"] % 2 == 1)
    begun = feeder(scripted(**rule), 7)
    walk(begun, (7, 8))
    begun.close()
    monkeypatch.setattr(feed, "_blank", lambda example: "zeros")

    @dataclasses.dataclass
    class State:
        params: str
        memory: dict

    state, host = feed.packed(State("p", {"own": 1}), rollouts, begun.held)
    assert set(state.memory) == ({"own", "ahead"} if ahead else {"own"})
    state, held = feed.unpacked(state, host["feed"])
    assert state.memory == {"own": 1}
    assert held.kept == {"2": kept}
    assert (held.rows is not None) == (held.told is not None) == ahead
    again = scripted(**rule)
    monkeypatch.setattr(type(again), "solved", lambda *_: pytest.fail("filtered twice"))
    later = feeder(again, 9, held)
    for rows, want in zip(walk(later, range(9, 12)), straight[2:], strict=True):
        assert {k: str(v) for k, v in rows.items()} == {k: str(v) for k, v in want.items()}
    later.close()
    state, host = feed.packed(State("p", {}), rollouts, Held({"2": kept}))
    assert feed.unpacked(state, host["feed"])[1] == Held({"2": kept})  # nothing waits


def test_rollouts_at_the_end_of_a_task_are_other_draws_of_kept_problems(scripted):
    rollouts = scripted(signal)
    kept = {"2": [[1, 5], [0, 2, 3]]}
    one = feeder(rollouts, 12, Held(kept))
    rows = one.task(STATE, range(10, 12))
    one.close()
    for step, part in zip((10, 11), rows, strict=True):
        assert np.array_equal(part["numbers"], rollouts.prompts(step, kept)[1])
    assert [(step, draw > 0) for _, step, draw in rollouts.explorer.rolls] == [(10, True), (11, True)]
