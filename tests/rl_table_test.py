"""Worked rows of problems, their numbers through all domains, one vocabulary for several tasks, and what a stage uses.

Nothing here computes on a device but two small losses.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import losses, practice
from jaxcl.data import stream as streams
from jaxcl.data.rows import batch_of
from jaxcl.rl import supervised, table, tasks
from jaxcl.rl.judge import Judge
from jaxcl.rl.pool import EVENTS, Verdicts
from jaxcl.rl.sample import ANSWER, FORCED, NOTHING, THOUGHT
from jaxcl.schema import UserError
from jaxcl.types import Output

MNNS = {"name": "mnns", "count": 3, "low": 1, "high": 4, "held_out": 0.3}
SUMS = {"name": "modular", "count": 2, "modulus": 3, "held_out": 0.3}
LONG = {"name": "modular", "count": 4, "modulus": 4, "problems": 40, "held_out": 0.3}


def batch(rows, numbers):
    return batch_of(rows.fetch(np.asarray(numbers)), np.zeros(len(numbers), np.int32))


def test_csft_feeds_a_mixture_where_the_place_before_predicts_it():
    """Thought t is predicted at P - 1 + t and fed at P + t; the answer is predicted where the last thought is fed."""
    problems = tasks.make(MNNS)
    words, size = table.words_of(problems), table.Size(6, 4, 9)  # wider than these problems need
    have = problems.prompts.shape[1]
    thoughts = problems.targets.tokens.shape[1]
    rows = batch(table.rows(problems, "csft", size, words), range(5))
    dense = problems.targets.dense(np.arange(5), problems.vocab)

    def spread(numbers, shares):
        full = np.zeros((5, size.length, problems.vocab), "f")
        places = np.ogrid[:5, : size.length, :0][:2]
        np.add.at(full, (*places, rows.extra[numbers]), rows.extra[shares])
        return full

    fed, said = spread("support", "shares"), spread("goal", "goal_shares")
    np.testing.assert_allclose(said[:, size.prompt - 1 : size.prompt - 1 + thoughts], dense, atol=1e-6)
    np.testing.assert_allclose(fed[:, size.prompt : size.prompt + thoughts], dense, atol=1e-6)
    for whole, start in ((said, size.prompt - 1), (fed, size.prompt)):
        assert not whole[:, :start].any()
        assert not whole[:, start + thoughts :].any()
    assert np.array_equal(rows.extra["soft"], fed.any(-1))
    assert np.all(rows.weights[:, : size.prompt - 1] == 0)
    assert np.all(rows.weights[:, size.prompt - 1 : size.prompt + thoughts] == 1)  # all thoughts, and the answer
    assert np.all(rows.weights[:, size.prompt + thoughts :] == 0)
    assert np.array_equal(rows.targets[:, size.prompt - 1 + thoughts], problems.answers[:5, 0])
    assert not np.any(said[:, size.prompt - 1 + thoughts])
    assert np.array_equal(rows.inputs[:, size.prompt - have : size.prompt], problems.prompts[:5])
    assert np.all(rows.segments[:, : size.prompt - have] == 0)
    assert np.array_equal(rows.positions[0], [0] * (size.prompt - have) + [*range(have + thoughts + 1)])


def test_worked_rows_predict_their_chain_and_answer():
    problems = tasks.make(LONG)
    size = table.Size(7, 6, 0)
    rows = batch(table.rows(problems, "sft", size, table.words_of(problems)), range(6))
    for i in range(6):
        tail = [*problems.traces[i].tolist(), *problems.gold(i)]
        assert rows.targets[i, rows.weights[i] > 0].tolist() == tail
        first = size.prompt - 1
        assert np.flatnonzero(rows.weights[i]).tolist() == list(range(first, first + len(tail)))
        assert rows.inputs[i, first + 1 : first + len(tail)].tolist() == tail[:-1]
    assert set(rows.extra) == {"problem"}


def test_one_vocabulary_keeps_the_meaning_of_every_token():
    one, two = tasks.make(SUMS), tasks.make(MNNS)
    both = table.joined({"a": one, "b": two})
    assert both["a"].names == both["b"].names
    assert len(set(both["a"].names)) == len(both["a"].names) == both["a"].vocab == both["b"].vocab
    assert both["a"].names[:3] == tasks.SPECIAL

    def said(problems, tokens):
        return np.array(problems.names)[np.asarray(tokens)].tolist()

    for before, after in ((one, both["a"]), (two, both["b"])):
        for x, y in ((before, after), (before.held_out, after.held_out)):
            for name in ("prompts", "answers", "traces"):
                assert said(x, getattr(x, name)) == said(y, getattr(y, name))
            assert np.array_equal(x.segments, y.segments)
            assert y.names == both["a"].names
    assert said(two, two.targets.tokens) == said(both["b"], both["b"].targets.tokens)
    np.testing.assert_array_equal(two.targets.shares, both["b"].targets.shares)
    assert table.joined({"a": one, "b": one})["b"] is one
    with pytest.raises(UserError, match="a makes its own vocabulary and b is text"):
        table.joined({"a": one, "b": two._replace(names=())})


def made(stages=({"learn": "csft"}, {"learn": "sft"}, {}), objective="rloo", **rollout):
    options = practice.Options("soft", objective, {"group": 2, "thoughts": 2, **rollout})
    return practice.make({"b": tasks.make(MNNS), "a": tasks.make(MNNS | {"high": 5})}, None, stages, options)


def test_what_a_stage_learns_decides_its_columns():
    own = made()
    assert own.learns == ("csft", "sft", "rl")
    assert own.form == "csft"
    rows = batch(own.corpora()["a"].train, [0, 1])
    assert set(own.trim(rows, 0).extra) == {"soft", "support", "shares", "goal", "goal_shares"}
    assert not own.trim(rows, 1).extra
    assert not own.trim(rows, 2).extra
    assert made(({}, {"learn": "sft"})).form == "sft"
    assert made(({},)).form == "prompt"
    assert made(({},), demonstrations=True).form == "sft"
    assert made(({}, {"learn": "rl"}), objective="grpo").learns == ("rl", "rl")
    assert made(({},), objective=None).learns == ("sft",)


def test_the_loss_is_that_of_the_rows():
    own = made()
    loss, _ = own.loss({})
    rows = batch(own.corpora()["a"].train, [0, 1, 2])
    logits = np.random.default_rng(0).normal(size=(*rows.targets.shape, own.words.vocab)).astype("f")
    output = Output(jnp.asarray(logits))
    want = {0: supervised.csft(output, rows), 1: losses.cross_entropy(output, own.trim(rows, 1))}
    for stage, expected in want.items():
        np.testing.assert_allclose(loss(output, own.trim(rows, stage)), expected, rtol=1e-6)
    assert abs(float(want[0][0] / want[0][1]) - float(want[1][0] / want[1][1])) > 1e-2


def test_problems_are_numbered_as_the_stream_orders_their_sources():
    own = made(({},))
    assert list(own.problems) == ["a", "b"]
    corpora = own.corpora()
    rows = {name: one.train for name, one in corpora.items()}
    mixture = {"a": 0.5, "b": 0.5}
    flow = streams.make(rows, [{"name": "x", "steps": 4, "mixture": mixture}], batch=8)
    index = flow.index(1)
    numbers, shown = own.numbers(flow, index), flow.read(index)
    assert set(index.source) == {0, 1}
    assert np.array_equal(shown.extra["problem"], numbers)
    count = len(own.problems["a"].prompts)
    for i, number in enumerate(numbers):
        name, row = ("a", number) if number < count else ("b", number - count)
        problems = own.problems[name]
        assert shown.inputs[i].tolist() == problems.prompts[row].tolist()
    for name, one in own.problems.items():
        held = batch(corpora[name].held_out, range(len(one.held_out.prompts)))
        assert np.array_equal(held.inputs, one.held_out.prompts)
    padded = index._replace(source=np.where(np.arange(len(index.source)) == 2, -1, index.source))
    assert own.numbers(flow, padded)[2] == -1


class Echo:
    """A pool that notes what it is asked and rewards an answer by its own first token; it fails once a call."""

    def __init__(self):
        self.asked = []

    def rewards(self, golds, answers):
        self.asked += list(zip(golds, answers, strict=True))
        events = dict.fromkeys(EVENTS, 0) | {EVENTS[0]: 1}
        failed = np.arange(len(answers)) == len(answers) - 1
        return Verdicts(np.array([answer[0] for answer in answers], np.float32), failed, events, "said")


def test_each_row_is_judged_as_the_problem_it_answers():
    """The chunks of a domain are gathered from all over the batch, so every row has a reward of its own."""
    one, two = tasks.make(SUMS), tasks.make(MNNS)
    one, two = (x._replace(answers=np.arange(len(x.prompts))[:, None]) for x in (one, two))
    pools = [Echo(), Echo()]
    judge = Judge([one, two], pools)
    count = len(one.prompts)
    numbers = np.array([count + 2, 1, -1, count, 0, count + 2])
    kind = np.array([[THOUGHT, ANSWER, ANSWER, NOTHING], [THOUGHT, FORCED, ANSWER, NOTHING]] * 3, np.int8)
    token = np.arange(24).reshape(6, 4)
    found = judge(numbers, kind, token)
    want = [1, 6, 0, 14, 17, 22]
    assert found.rewards.tolist() == want
    assert [gold for gold, _ in pools[0].asked] == [one.gold(1), one.gold(0)]
    assert [gold for gold, _ in pools[1].asked] == [two.gold(2), two.gold(0), two.gold(2)]
    assert [answer for _, answer in pools[1].asked] == [[1, 2], [14], [22]]
    assert found.events[EVENTS[0]] == 2
    assert found.failed.tolist() == [False] * 4 + [True] * 2
