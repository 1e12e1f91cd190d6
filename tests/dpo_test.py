"""Pairs as a stage of the loop: packed rows, loss and gradient of both sides apart, mixtures of stages, bad input."""

import contextlib
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_small

from jaxcl import train
from jaxcl.data import tokenizer
from jaxcl.models import transformer
from jaxcl.rl import supervised, table, tasks
from jaxcl.schema import UserError
from jaxcl.types import Batch

QUICK = True  # compiling is most of the time

WORDS = tokenizer.make()
RATE = 0.5
PAIRS = [
    {"question": f"{a}+{b}?", "answer": str(a + b), "good": "so " * a + str(a + b), "bad": "no " * b + str(a)}
    for a in range(4)
    for b in range(1, 4)
]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def source(path, **options):
    fields = {"form": "plain", "chosen": "good", "rejected": "bad", "template": "{question}", "held_out": 0.25}
    return {"name": "questions", "path": str(path)} | fields | options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions of which every fifth has no pair."""
    place = tmp_path_factory.mktemp("pairs")
    records = [{k: v for k, v in one.items() if i % 5 or len(k) > 4} for i, one in enumerate(PAIRS)]
    write(place / "pairs.jsonl", records)
    return place


def settings(folder, **overrides):
    """Returns a config whose steps are plain gradient descent: what a step changes is the gradient times the rate."""
    stage = {"name": "pairs", "steps": 3, "mixture": {"sums": 1.0}}
    plain = {
        "model": {"name": "transformer", "preset": "tiny", "layers": 1, "embed": 16, "mlp": 32, "heads": 2}
        | {"kv_heads": 1, "max_length": 64},
        "sources": {"sums": source(folder / "pairs.jsonl")},
        "stream": {"batch": 8, "stages": [stage]},
        "rollout": {"group": 2, "thoughts": 1, "answer": 1, "samples": 1, "modes": []},
        "policy": "hard",
        "objective": "dpo",
        "method": "reference",
        "optim": {"name": "sgd", "clip": None, "momentum": 0.0},
        "schedule": {"name": "constant", "peak": RATE},
        "guard": None,
    }
    return rl_small.config(**plain | overrides)


def sides(problems, number):
    """Returns the prompt and both completions of a problem, as tokens; None if it has no pair."""
    prompt = problems.prompts[number][problems.segments[number] > 0].tolist()
    if not problems.chosen[number]:
        return None
    texts = problems.chosen[number], problems.rejected[number]
    return prompt, *([*map(int, WORDS.encode(f" {text}")), WORDS.eos] for text in texts)


def test_a_row_holds_both_sides_as_documents_of_their_own(folder):
    problems = tasks.make(source(folder / "pairs.jsonl"), WORDS)
    assert 0 < problems.chosen.count("") < len(problems.chosen)
    size = table.Size(problems.prompts.shape[1], 1, 0, table.pair_of([problems], WORDS))
    rows = table.rows(problems, "prompt", size, WORDS)
    columns = rows.fetch(np.arange(len(rows)))
    longest = 0
    for i in range(len(rows)):
        inputs, targets, weights, segments, positions = (columns[table.PAIR + name][i] for name in table.NAMES)
        found, start = sides(problems, i), 0
        assert rows.tokens[i] == weights.sum()
        if found is None:
            assert not np.any(segments)
            assert not np.any(weights)
            continue
        for segment, tail in enumerate(found[1:], 1):
            whole = [*found[0], *tail]
            assert inputs[segments == segment].tolist()[: len(whole) - 1] == whole[:-1]
            assert positions[segments == segment].tolist() == list(range(np.sum(segments == segment)))
            assert targets[(segments == segment) & (weights == 1)].tolist() == tail
            assert np.flatnonzero(segments == segment)[0] == start
            start += len(whole)
        longest = max(longest, start)
        assert weights.sum() == len(found[1]) + len(found[2])
        assert not np.any(segments[start:])
    assert size.pair == longest
    held = table.corpus(problems, "prompt", size, WORDS, 0).held_out
    assert not any(name.startswith(table.PAIR) for name in held.fetch(np.arange(1)))


@pytest.mark.parametrize("options", [{"name": "mnns", "count": 3, "high": 6}, {"name": "reach", "problems": 20}])
def test_generated_pairs_prefer_the_right_answer(options):
    problems = tasks.make(options)
    words, own = table.words_of(problems), problems.traces.shape[1] + problems.answers.shape[1]
    made = table.pairs(problems, words)
    assert len(made) == len(problems.prompts)
    for i, (chosen, rejected) in enumerate(made):
        assert chosen[:-own] == rejected[:-own] == problems.prompts[i][problems.segments[i] > 0].tolist()
        assert problems.verify(i, chosen[-1:]) == 1
        assert problems.verify(i, rejected[-1:]) == 0


ROWS, ROOM = 8, 24  # of the rows that hold one completion each


@functools.cache
def forward(vocab):
    """Returns the logits of a model of `settings`."""
    shape = {"layers": 1, "embed": 16, "mlp": 32, "heads": 2, "kv_heads": 1, "max_length": 64}
    model = transformer.make(preset="tiny", vocab=vocab, **shape)
    return jax.jit(lambda params, rows: model.apply(params, rows).logits)


def apart(params, pairs, side):
    """Returns logits, targets and weights of one side of the pairs: a row of its own for each, [ROWS, ROOM]."""
    tokens, used, weights = np.zeros((3, ROWS, ROOM + 1), np.int32)
    for i, (prompt, *tails) in enumerate(pairs):
        end = len(prompt) + len(tails[side])
        tokens[i, :end], used[i, :end], weights[i, len(prompt) : end] = prompt + tails[side], 1, 1
    places = np.broadcast_to(np.arange(ROOM, dtype=np.int32), (ROWS, ROOM))
    columns = tokens[:, :-1], tokens[:, 1:], weights[:, 1:].astype("f"), used[:, :-1], places
    rows = Batch(*columns, np.zeros(ROWS, np.int32))
    return forward(params["embedding"].shape[0])(params, rows), tokens[:, 1:], weights[:, 1:]


def oracle(params, reference, pairs, beta, normalise):
    """The loss, the number of pairs and what is told of them, in float64: every side by itself, summed by hand."""
    gains = np.zeros((len(pairs), 2))
    for side, (sign, weights) in itertools.product((0, 1), ((1, params), (-1, reference))):
        logits, targets, counted = (np.asarray(x, "d") for x in apart(weights, pairs, side))
        for i in range(len(pairs)):
            for j in np.flatnonzero(counted[i]):
                row = logits[i, j] - logits[i, j].max()
                share = 1 / counted[i].sum() if normalise else 1
                gains[i, side] += sign * share * (row[int(targets[i, j])] - np.log(np.exp(row).sum()))
    one, other = beta * gains.T
    return np.mean(np.log1p(np.exp(other - one))), np.mean(one > other), np.mean(one - other), np.mean(one)


def slope(params, reference, pairs, beta, normalise):
    """The gradient of the mean loss, by autodiff through a forward pass for each side."""

    def gain(weights, side):
        logits, targets, counted = apart(weights, pairs, side)
        each = counted * jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return jnp.sum(each / (np.maximum(counted.sum(1, keepdims=True), 1) if normalise else 1), axis=1)[: len(pairs)]

    def loss(p):
        gaps = [gain(p, side) - gain(reference, side) for side in (0, 1)]
        return -jnp.mean(jax.nn.log_sigmoid(beta * (gaps[0] - gaps[1])))

    return jax.jit(jax.grad(loss))(params)


def stepped(settings, steps=2, **mesh):
    """Returns the program, the parameters before and after the last of some steps, its metrics and its pairs."""
    made = rl_small.build(settings, **mesh)
    state = made.create()
    for step in range(steps):
        before = jax.device_get(state)
        state, metrics = made.step(state, made.place(step))
    problems = tasks.make(settings["sources"]["sums"], WORDS)
    pairs = [sides(problems, row) for row in made.stream.index(steps - 1).row]
    return before, jax.device_get(state.params), jax.device_get(metrics), pairs


@pytest.fixture(scope="module")
def whole(folder):
    return stepped(settings(folder))


SUMS = {"objective": "dpo(beta=0.3, normalise=False)", "microbatches": 4}


@pytest.mark.parametrize(("change", "beta", "normalise"), [({}, 5.0, True), (SUMS, 0.3, False)], ids=["mean", "sums"])
def test_a_step_is_that_of_both_sides_apart(folder, whole, change, beta, normalise):
    before, after, metrics, rows = stepped(settings(folder, **change)) if change else whole
    pairs, reference = list(filter(None, rows)), before.memory["reference"]["reference"]
    loss, accuracy, margin, chosen = oracle(before.params, reference, pairs, beta, normalise)
    assert 0 < len(pairs) < len(rows)
    assert metrics["weight"] == len(pairs)
    assert abs(loss - np.log(2)) > 1e-3
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["dpo/accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(metrics["dpo/margin"], margin, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["dpo/chosen"], chosen, rtol=1e-3, atol=1e-5)
    wanted = slope(before.params, reference, pairs, beta, normalise)
    for a, b, g in zip(*(jax.tree.leaves(x) for x in (before.params, after, wanted)), strict=True):
        np.testing.assert_allclose((a - b) / RATE, g, rtol=1e-3, atol=2e-6)


def test_meshes_change_nothing(folder, whole):
    _, after, metrics, _ = stepped(settings(folder), devices=4, data=2, fsdp=2)
    assert metrics["weight"] == whole[2]["weight"]
    for name in ("loss", "dpo/accuracy", "dpo/margin", "grad_norm"):
        np.testing.assert_allclose(metrics[name], whole[2][name], rtol=2e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_it_learns_to_prefer(folder):
    given = settings(folder, schedule={"name": "constant", "peak": 3e-3}, optim={"name": "adam", "clip": 1.0})
    given["stream"]["stages"][0]["steps"] = 25
    made = rl_small.build(given)
    state, told = made.create(), []
    for step in range(25):
        state, metrics = made.step(state, made.place(step))
        told.append(jax.device_get(metrics))
    assert told[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert told[0]["dpo/accuracy"] == 0.5
    assert told[0]["dpo/margin"] == 0
    assert np.mean([m["dpo/accuracy"] for m in told[-5:]]) > 0.95
    assert told[-1]["loss"] < 0.4
    assert told[-1]["dpo/margin"] > 1


class Stop(Exception):
    """Ends a run in its middle."""


def test_pairs_and_rollouts_in_one_run_and_resume(tmp_path):
    """What is drawn has rows of its own; a stop between two steps of pairs changes no bit."""
    stages = [{"name": how, "steps": 2, "mixture": {"three": 1.0}, "learn": how} for how in ("dpo", "rl")]
    given = rl_small.config(
        sources={"three": {"name": "modular", "count": 2, "modulus": 3, "held_out": 0.3}},
        stream={"batch": 4, "stages": stages, "replay": {"fraction": 0.5, "mode": "replace", "over": "earlier"}},
        objective="rloo + dpo(beta=1.0)",
        policy="hard",
        method="reference",
        rollout={"group": 2, "samples": 1, "modes": []},
        checkpoint={"every_steps": 1, "every_minutes": None, "keep": 3},
        guard=None,
    )
    made, loop = rl_small.build(given), train.split(given)[0]

    def go(place, stop=None):
        def stopped(step):
            if step == stop:
                raise Stop

        with contextlib.closing(train.Session(made, loop, place, given)) as session:
            session.train(stopped)

    go(tmp_path / "straight")
    with pytest.raises(Stop):
        go(tmp_path / "run", 1)
    go(tmp_path / "run")
    straight, again = (rl_small.records(tmp_path / name) for name in ("straight", "run"))
    assert again == straight
    steps = [record for record in straight if record["kind"] == "train"]
    assert ["dpo/accuracy" in one for one in steps] == [True, True, False, False]
    assert ["reward" in one for one in steps] == [False, False, True, True]
    assert [one["weight"] for one in steps[:2]] == [4, 4]
    ends = [record for record in straight if record["kind"] == "eval" and record["boundary"] is not None]
    assert [set(record["inference"]) for record in ends] == [{"three"}] * 3
    ledger = [record for record in straight if record["kind"] == "ledger"][1]["sources"]["three"]
    assert ledger["new_tokens"] == 2 * 4 * 2 * 2  # steps x pairs x sides x tokens of chain and answer


def test_supervision_learns_the_chosen_side_where_nothing_is_worked(folder):
    given = settings(folder, objective=None, method="reference + ewc")
    given["stream"]["stages"] = [given["stream"]["stages"][0] | {"name": how, "learn": how} for how in ("sft", "dpo")]
    made = rl_small.build(given)
    first, problems = made.place(0), tasks.make(given["sources"]["sums"], WORDS)
    for row, number in enumerate(made.stream.index(0).row):
        found = sides(problems, number)
        said = np.asarray(first.targets[row])[np.asarray(first.weights[row]) > 0].tolist()
        assert said == (found[1] if found else [])
    assert set(first.extra) == {"replayed"}
    assert set(made.place(3).extra) == {"replayed", table.REJECTED}
    jax.eval_shape(made.end_task, made.abstract, made.place_task(1))  # the Fisher matrix of pairs needs the reference


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"good": "a", "bad": " a"}, {}, r"a\.jsonl:2: good and bad are equal; nothing is to be preferred"),
        ({"good": "a"}, {}, r"a\.jsonl:2: bad=None: expected a text, as the other side"),
        ({"good": 3, "bad": "a"}, {}, r"a\.jsonl:2: good=3: expected a text"),
        ({"good": "a", "bad": "b"}, {"rejected": None}, r"config\.task\.chosen='good', rejected=None: name two fields"),
        ({"good": "a", "bad": "b"}, {"rejected": "good"}, r"rejected='good': name two fields"),
    ],
)
def test_bad_pairs(tmp_path, record, options, message):
    path = write(tmp_path / "a.jsonl", [PAIRS[0], PAIRS[1] | {"good": None, "bad": None} | record, PAIRS[2]])
    with pytest.raises(UserError, match=message) as caught:
        tasks.make(source(path, **options), WORDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "learn", "message"),
    [
        (
            {"method": "cpt"},
            "dpo",
            r"config\.stream learn='dpo': compares with a reference; add reference to config\.met",
        ),
        ({"objective": "dpo(beta=0)"}, None, r"config\.objective dpo beta=0: must be above 0"),
        ({"objective": "dpo(beta=1e999)"}, None, r"config\.objective dpo beta=inf: must be above 0, and finite"),
        (
            {},
            "sft dpoo",
            r"config\.stream\.stages\[1\]\.learn='dpoo': expected 'rl' or 'sft' or 'csft' or 'dpo' or None",
        ),
        ({"objective": "rloo + dpo(beta=1.0"}, None, r"write one name, as in 'rloo' .* or two, as in 'rloo \+ dpo"),
        ({"objective": "dpo(bta=1.0)"}, None, r"config\.objective\.bta: unknown key; did you mean 'beta'"),
        ({"objective": "dpo(normalise=1)"}, None, r"config\.objective\.normalise=1: expected bool"),
        (
            {"objective": "rloo + grpo"},
            None,
            r"config\.objective='rloo \+ grpo': name one for rollouts and dpo for pairs",
        ),
        ({"objective": "rloo + dpo"}, None, r"config\.objective dpo: no stage learns from pairs"),
        ({"objective": "rloo"}, "dpo", r"config\.objective rloo: no stage learns from rollouts.* or leave rloo out"),
        ({"objective": "grpo(kl=0.1)"}, "sft", r"config\.objective grpo: no stage learns from rollouts"),
        (
            {"loss": {"z_loss": 1e-4}},
            "dpo",
            r"config\.loss\.z_loss=0\.0001: .* since the stages have 'dpo'$",
        ),
        ({"objective": "dpo"}, "rl", r"config\.objective: missing, but a stage has learn='rl'"),
        ({"method": "reference + er(capacity=8)"}, "sft dpo", r"config\.method: keeps rows.* learn in different ways"),
        ({"chosen": None, "rejected": None}, None, r"learn='dpo': questions has no pairs; name its fields chosen and"),
        (
            {"model": {"name": "transformer", "preset": "tiny", "max_length": 20}},
            None,
            r"max_length=20: rows of \d+ tok",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, change, learn, message):
    own = {key: change[key] for key in change if key in ("chosen", "rejected")}
    given = settings(folder, **{key: value for key, value in change.items() if key not in own})
    given["sources"]["sums"] |= own
    stage = given["stream"]["stages"][0]
    given["stream"]["stages"] = [stage | {"name": how, "learn": how} for how in learn.split()] if learn else [stage]
    with pytest.raises(UserError, match=message) as caught:
        rl_small.build(given)
    assert "\n" not in str(caught.value)


def test_the_loss_names_a_missing_reference():
    batch = Batch(*[jnp.ones((1, 2))] * 5, jnp.zeros(1, jnp.int32), {"rejected": jnp.array([[False, True]])})
    with pytest.raises(UserError, match=r"no column 'reference' in the batch; add reference to config\.method"):
        supervised.preference()(jnp.zeros((1, 2)), batch)
