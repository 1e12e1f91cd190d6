"""Evaluation of held-out problems beside forward passes that know neither sampler nor cache, and sums by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import mesh as meshes
from jaxcl import practice
from jaxcl.models import transformer
from jaxcl.rl import gate, inference, tasks
from jaxcl.rl.sample import ANSWER, FORCED, NOTHING, THOUGHT, Rollouts
from jaxcl.types import Batch

QUICK = True  # compiling is most of the time

SAMPLES, ROWS = 64, 5
TEMPERATURE = 0.8  # of the soft thoughts


@functools.cache
def parts(policy=f"soft(temperature={TEMPERATURE}, gamma=0.0)", devices=1, **rollout):
    problems = {
        "three": tasks.make({"name": "modular", "count": 2, "modulus": 3, "held_out": 0.4}),
        "four": tasks.make({"name": "modular", "count": 2, "modulus": 4, "held_out": 0.4}),
    }
    options = {"group": 2, "samples": SAMPLES, "modes": ["hard"], **rollout}
    own = practice.make(problems, None, [{}], practice.Options(policy, "rloo", options))
    shape = {"layers": 1, "embed": 16, "heads": 2, "kv_heads": 1, "mlp": 32, "max_length": 16}
    model = transformer.make(preset="tiny", vocab=own.words.vocab, **shape)
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, model.init(jax.random.key(4)))
    if own.policy.gated:
        model = gate.gated(model)
        fresh = model.init(jax.random.key(4))["gate"]
        params["gate"] = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    mesh = meshes.make(devices=jax.devices()[:devices])
    held = {name: one.held_out for name, one in own.problems.items()}
    bench = inference.make(mesh, model, own.explorer(mesh, model, 0), own.policies, held, own.words, rows=ROWS)
    return own, model, params, held, bench


def after(model, params, prompts, fed=None):
    """Returns the log-probabilities after each prompt, [n, V], and after what is fed behind it, [n, D]."""
    n, length = prompts.shape
    tokens = np.concatenate([prompts, np.zeros((n, int(fed is not None)), np.int32)], axis=1)
    ones = np.ones_like(tokens)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    inputs = params["embedding"][tokens]
    if fed is not None:
        inputs = inputs.at[:, length].set(fed)
    batch = Batch(inputs, tokens, ones.astype("f"), ones, places, np.zeros(n, np.int32))
    return np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(params, batch).logits[:, -1]), np.float64)


def test_figures_are_those_of_forward_passes(monkeypatch):
    monkeypatch.setattr(inference, "CHUNK", 4)
    parts.cache_clear()
    own, model, params, held, bench = parts()
    assert max(len(chunks) for chunks in bench.chunks.values()) == 2
    assert list(bench.modes) == ["soft", "hard"]
    found, quick = bench.compare(params), bench.evaluate(params)
    vocab, table = own.words.vocab, params["embedding"]
    differ = 0
    for domain, problems in held.items():
        n = min(ROWS, len(problems.prompts))
        prompts, gold = problems.prompts[:n], np.array([problems.gold(i)[0] for i in range(n)])
        first = after(model, params, prompts)
        soft = np.exp(first / TEMPERATURE) / np.exp(first / TEMPERATURE).sum(1, keepdims=True)
        fed = {"soft": jnp.asarray(soft.astype("f")) @ table, "hard": table[first.argmax(1)]}
        entropy = float(np.mean(-(np.exp(first) * first).sum(1)))
        chains = after(model, params, np.repeat(prompts, vocab, 0), table[np.tile(np.arange(vocab), n)])
        solves = chains.argmax(1).reshape(n, vocab) == gold[:, None]
        chance = (np.exp(first) * solves).sum(1)  # of a hard thought that leads to the right answer
        for mode, vectors in fed.items():
            second = after(model, params, prompts, vectors)
            right = second.argmax(1) == gold
            told = found["inference"][domain][mode]
            assert told["greedy"] == pytest.approx(right.mean())
            assert found["entropy"][domain][mode] == pytest.approx([entropy], rel=1e-4)
            drift = -second[np.arange(n), gold].mean()
            assert found["drift"][domain][mode] == pytest.approx(drift, rel=1e-4)
            assert set(told["sample"]) == {"1", "4", "16", "64"}
            for k, value in told["sample"].items():
                # Without noise a soft thought is its mean, so that all samples are the greedy one.
                want = right.mean() if mode == "soft" else np.mean(1 - (1 - chance) ** int(k))
                assert value == pytest.approx(want, abs=1e-9 if mode == "soft" else 0.12)
            differ += abs(told["sample"]["1"] - told["sample"]["16"]) > 0.05
        assert quick["loss"][domain] == found["drift"][domain]["soft"]
        assert quick["accuracy"][domain] == found["inference"][domain]["soft"]["greedy"]
        assert quick["inference"][domain] == {"soft": found["inference"][domain]["soft"]}
    assert differ


def test_entropy_is_that_after_what_was_fed_and_of_thoughts_alone(monkeypatch):
    """Of second thoughts, which a stop phrase leaves out in some rows: an answer stands in their place there."""
    _, model, params, _, bench = parts("hrpo", modes=(), samples=8, thoughts=2, stop=("0", "1"))
    draw, fed = inference.samples.sample, []

    def sample(*rest, **options):
        found = draw(*rest, **options)
        jax.debug.callback(lambda *x: fed.extend(map(np.asarray, x)), found.record["thought"][:, 0], found.token[:, 0])
        return found

    monkeypatch.setattr(inference.samples, "sample", sample)
    chunk = bench.chunks["three"][0]
    found = bench.modes[bench.own].sample(params, chunk.prompts, chunk.segments, bench.whole(np.int32(3)))
    kind, _, profile, inside = map(np.asarray, found)
    assert np.array_equal(inside > 0, kind[:, :2] == THOUGHT)
    second = inside[:, 1] > 0
    assert 0 < second.sum() < len(second)
    thought = gate.gate(params["gate"], params["embedding"][fed[1]], fed[0])
    log_p = after(model, params, np.repeat(np.asarray(chunk.prompts), 8, 0), thought)
    np.testing.assert_allclose(profile[second, 1], -(np.exp(log_p) * log_p).sum(1)[second], rtol=1e-4)
    other = bench.modes[bench.own].sample(params, chunk.prompts, chunk.segments, bench.whole(np.int32(4)))
    assert not np.array_equal(other[1], found[1])  # the next problems are not thought about with the same draws


class Called(Exception):
    pass


@pytest.mark.parametrize(("name", "thoughts"), [("hard", 0), ("hard", 1), ("none", 1)])
def test_answers_are_greedy_unless_nothing_else_is_drawn(name, thoughts, monkeypatch):
    _, _, params, _, bench = parts(name, thoughts=thoughts, temperature=0.5, slots=3)
    chunk, asked = bench.chunks["three"][0], []

    def spy(model, params, prompts, segments, key, **options):
        asked.append(options)
        raise Called

    monkeypatch.setattr(inference.samples, "sample", spy)
    for draw, rest in ((bench.modes[name].greedy, (chunk.gold, chunk.used)), (bench.modes[name].sample, ())):
        with pytest.raises(Called):
            draw(params, chunk.prompts, chunk.segments, *rest, jnp.int32(0))
    assert [one["greedy"] for one in asked] == [True, False]
    assert [one["greedy_answer"] for one in asked] == [True, thoughts > 0 and name == "hard"]
    assert [one["group"] for one in asked] == [1, SAMPLES]
    for one in asked:
        assert one["temperature"] == 0.5
        assert one["slots"] == 3
        assert one["limits"].thoughts == thoughts
        assert one["policy"].name == name


def test_rows_are_filled_up_to_what_a_mesh_divides():
    *_, held, bench = parts(devices=4)
    for name, chunks in bench.chunks.items():
        (chunk,) = chunks
        count = min(ROWS, len(held[name].prompts))
        assert np.sum(chunk.numbers >= 0) == count
        assert len(chunk.numbers) == 8
        assert {piece.data.shape[0] for piece in chunk.prompts.addressable_shards} == {2}


@pytest.mark.parametrize("long", ["three", "four"])
def test_longer_answers_of_one_domain_make_room_in_all(long, monkeypatch):
    own, model, params, held, _ = parts()
    mesh = meshes.make(devices=jax.devices()[:1])
    monkeypatch.setattr(
        inference, "_golds", lambda problems, count, words: [[1, 2] if problems is held[long] else [1]] * count
    )
    made = inference.make(mesh, model, own.explorer(mesh, model, 0), own.policies, held, own.words, rows=ROWS)
    for name, chunks in made.chunks.items():
        for chunk in chunks:
            assert np.array_equal(chunk.used, np.tile([True, name == long], (len(chunk.used), 1)))
    nll = made.modes["soft"].greedy(params, *made.chunks[long][0][1:], made.whole(np.int32(0)))[2]
    assert np.all(np.asarray(nll)[:, 1] == 2)


def test_right_answers_take_the_place_of_those_drawn():
    kind = jnp.array(
        [[THOUGHT, THOUGHT, FORCED, ANSWER, ANSWER], [THOUGHT, ANSWER, NOTHING, NOTHING, NOTHING]], jnp.int8
    )
    token = jnp.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
    gold, used = jnp.array([[21, 0, 0], [31, 32, 33]]), jnp.array([[True, False, False], [True, True, True]])
    flags = jnp.zeros(2, bool)
    record = {"thought": jnp.arange(20.0).reshape(2, 5, 2)}
    made = inference._answered(Rollouts(kind, token, -token / 10, record, flags, flags, jnp.int32(5)), gold, used)
    assert made.kind.tolist() == [
        [THOUGHT, THOUGHT, FORCED, ANSWER, *[NOTHING] * 4],
        [THOUGHT, ANSWER, ANSWER, ANSWER, *[NOTHING] * 4],
    ]
    assert made.token.tolist() == [[1, 2, 3, 21, 0, 0, 0, 0], [6, 31, 32, 33, 0, 0, 0, 0]]
    assert made.kind.dtype == jnp.int8
    np.testing.assert_array_equal(made.record["thought"][:, :5], record["thought"])


def bench_of(samples, judge=None):
    return inference.Bench("own", {}, {}, judge, samples, np.asarray)


def test_summaries_count_problems_tokens_and_live_thoughts_alike():
    """Longer answers count for as many tokens as they have, chains for as many thoughts."""
    nan = np.nan
    pieces = [
        {"greedy": np.array([True, False]), "sample": np.array([[True, False, False, False], [False] * 4])}
        | {"failed": np.array([2])}
        | {"nll": np.array([[2.0, 1], [9.0, 3]]), "entropy": np.array([[[1.0, 2.0]] * 4, [[3.0, nan]] * 4])}
        | {"inside": np.array([[[1, 1]] * 4, [[1, 0]] * 4])},
        {"greedy": np.array([False]), "sample": np.array([[True, True, False, False]]), "nll": np.array([[1.0, 2]])}
        | {"failed": np.array([1])}
        | {"entropy": np.array([[[5.0, nan]] * 4]), "inside": np.array([[[1, 0]] * 4])},
    ]
    made = bench_of(4).summary(pieces)
    assert made["greedy"] == pytest.approx(1 / 3)
    assert made["sample"] == pytest.approx({"1": (1 / 4 + 0 + 1 / 2) / 3, "4": 2 / 3})
    assert made["drift"] == pytest.approx(12 / 6)
    assert made["failed"] == 3
    assert made["entropy"] == pytest.approx([3.0, 2.0])


def test_an_evaluation_tells_what_the_mode_of_the_run_does(monkeypatch):
    one = {"drift": 2.0, "greedy": 0.5, "sample": {"1": 0.25}, "failed": 3, "entropy": []}
    found = {"a": {"own": one}, "b": {"own": one | {"failed": 0}}}
    monkeypatch.setattr(inference.Bench, "measure", lambda self, params, modes: found if modes == ["own"] else {})
    told = bench_of(4).evaluate(None)
    assert told["loss"] == {"a": 2.0, "b": 2.0}
    assert told["accuracy"] == {"a": 0.5, "b": 0.5}
    assert told["failed"] == {"a": 3}
    found["a"]["own"] = found["b"]["own"]
    assert "failed" not in bench_of(4).evaluate(None)


def test_samples_belong_to_their_problems_and_filled_rows_count_for_nothing():
    chunk = inference.Chunk(np.array([7, 9, -1]), *(np.zeros((3, 1), np.int32),) * 4)
    asked, steps = [], []

    class Judge:
        def __call__(self, numbers, kind, token):
            asked.append((numbers.tolist(), token[:, 0].tolist()))
            rewards = np.where(numbers >= 0, numbers + token[:, 0] / 100, 0)
            return types.SimpleNamespace(rewards=rewards, events={"error": 1, "timeout": 2})

        def right(self, numbers, rewards):
            return rewards * 10  # told apart from the rewards

    def greedy(params, prompts, segments, gold, used, step):
        steps.append(int(step))
        return np.zeros((3, 1)), np.arange(3)[:, None], np.array([[1.0, 1], [2.0, 1], [50.0, 1]])

    def sample(params, prompts, segments, step):
        steps.append(int(step))
        wide = np.arange(12.0)[:, None]  # one thought of 3 problems x 4 samples
        return np.zeros((12, 1)), np.arange(12)[:, None], wide, np.ones_like(wide)

    found = bench_of(4, Judge()).piece(None, inference.Mode(greedy, sample), chunk, 5)
    assert asked == [([7] * 4 + [9] * 4 + [-1] * 4, list(range(12))), ([7, 9, -1], [0, 1, 2])]
    assert steps == [5, 5]
    np.testing.assert_allclose(found["greedy"], [70, 90.1])
    np.testing.assert_allclose(found["sample"], [[70, 70.1, 70.2, 70.3], [90.4, 90.5, 90.6, 90.7]])
    assert found["failed"] == [6]
    np.testing.assert_allclose(found["nll"][:, 0], [1, 2])
    np.testing.assert_allclose(found["entropy"][:, :, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_chunks_are_padded_on_the_left_and_numbered_through_the_domains():
    problems = tasks.make({"name": "modular", "count": 2, "modulus": 3})
    explorer = types.SimpleNamespace(size=types.SimpleNamespace(prompt=5))
    golds = [[4], [5, 6], [7]]
    mesh = meshes.make(devices=jax.devices()[:1])
    chunk = inference._chunk(mesh, problems, golds, range(1, 3), 4, 2, 100, explorer)
    assert chunk.numbers.tolist() == [101, 102, -1, -1]
    assert np.array_equal(chunk.prompts[:2, 2:], problems.prompts[1:3])
    assert np.array_equal(chunk.segments, [[0, 0, 1, 1, 1]] * 4)
    assert chunk.gold[:2].tolist() == [[5, 6], [7, 0]]
    assert chunk.used[:2].tolist() == [[True, True], [True, False]]
