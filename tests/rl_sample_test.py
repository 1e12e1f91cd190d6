"""Rollouts beside a forward pass over what was fed, whatever the slots, and the phases that they walk through."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl.models import transformer
from jaxcl.rl import inference, teaching, thoughts
from jaxcl.rl import sample as samples
from jaxcl.rl.sample import ANSWER, FORCED, NOTHING, THOUGHT, Limits

QUICK = True  # compiling is most of the time

LENGTHS = (7, 3, 5)
SEGMENTS = np.array([[0] * (7 - n) + [1] * n for n in LENGTHS], np.int32)
PROMPTS = np.where(SEGMENTS > 0, np.random.default_rng(0).integers(1, 64, SEGMENTS.shape), 0).astype(np.int32)
LIMITS = Limits(
    thoughts=5, answer=4, stop=((3,), (4,), (6,), (5, 9)), forced=(11, 12), late=(13,), end=tuple(range(20, 30))
)
SHAPE = {
    "preset": "tiny",
    "vocab": 64,
    "layers": 2,
    "embed": 32,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 48,
    "max_length": 64,
}
POLICIES = ("hard", "soft", "fuzzy", "none", "mts", "dirichlet", "gumbel")
DIRICHLET = {"dirichlet-all": {}, "dirichlet-top": {"top_k": 4}}
COMPOSED = ("mts", *DIRICHLET, "gumbel")


def policy_of(name):
    return thoughts.make(name.split("-")[0], **DIRICHLET.get(name, {}))


@functools.cache
def made(tied=True):
    model = transformer.make(**SHAPE, tied=tied)
    params = model.init(jax.random.key(0))
    # Larger matrices than at the start of training, so that the logits differ enough to see mistakes.
    return model, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)


@functools.cache
def run(name, slots=None, group=4, seed=1, limits=LIMITS, greedy=False, tied=True):
    model, params = made(tied)
    policy = policy_of(name)
    options = {"policy": policy, "limits": limits, "group": group, "slots": slots}
    draw = jax.jit(
        lambda params, prompts, segments, key: samples.sample(
            model, params, prompts, segments, key, **options, greedy=greedy, greedy_answer=greedy
        )
    )
    return jax.tree.map(np.asarray, draw(params, PROMPTS, SEGMENTS, jax.random.key(seed)))


@pytest.mark.parametrize("name", POLICIES)
def test_a_forward_pass_over_what_was_fed_gives_the_log_probabilities_of_the_sampler(name):
    model, params = made()
    found = run(name)
    rows = teaching.batch(thoughts.make(name), found, PROMPTS, SEGMENTS)
    score = teaching.log_probs(thoughts.make(name))
    shown = inference._inputs(rows)  # all columns that a model reads
    log_prob = jax.jit(lambda params: score(model.apply(params, shown), rows))(params)
    for used, places in zip(np.asarray(rows.segments) > 0, np.asarray(rows.positions), strict=True):
        assert np.array_equal(places[used], np.arange(np.sum(used)))  # counted from the first token of the prompt
    scale = np.maximum(1, np.abs(rows.extra["behaviour"]))
    assert float(np.max(np.abs(log_prob - rows.extra["behaviour"]) / scale)) < 1e-5
    assert np.any(found.kind == THOUGHT)
    assert np.any(np.asarray(rows.extra["behaviour"])[np.asarray(rows.extra["kind"]) == ANSWER] < -0.1)
    assert not np.any(rows.extra["behaviour"][np.isin(rows.extra["kind"], (NOTHING, FORCED))])


@pytest.mark.parametrize("name", ["hard", "soft", "mts"])
@pytest.mark.parametrize("slots", [1, 5])
def test_the_number_of_slots_changes_nothing(name, slots):
    few, all_ = run(name, slots), run(name)
    for a, b in zip(jax.tree.leaves(few[:-1]), jax.tree.leaves(all_[:-1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert few.steps > all_.steps
    busy = np.sum(few.kind != NOTHING)
    assert slots * few.steps >= busy  # and no slot waits for the longest row of its round:
    assert slots * few.steps < busy + slots * LIMITS.total


def test_rows_follow_their_phases():
    found = run("hard", seed=3, group=16)
    reasons = set()
    for kind, token, stopped, ended in zip(found.kind, found.token, found.stopped, found.ended, strict=True):
        steps = int(np.sum(kind != NOTHING))
        thoughts_, forced = int(np.sum(kind == THOUGHT)), int(np.sum(kind == FORCED))
        assert list(kind) == [
            *[THOUGHT] * thoughts_,
            *[FORCED] * forced,
            *[ANSWER] * (steps - thoughts_ - forced),
            *[NOTHING] * (LIMITS.total - steps),
        ]
        chain, queue = list(token[:thoughts_]), tuple(token[thoughts_ : thoughts_ + forced])
        hits = [t for t in range(thoughts_) if chain[t] in (3, 4, 6) or chain[max(t - 1, 0) : t + 1] == [5, 9]]
        assert hits == ([thoughts_ - 1] if stopped else [])
        assert queue == (LIMITS.forced if stopped else LIMITS.late)
        assert stopped or thoughts_ == LIMITS.thoughts
        answer = list(token[thoughts_ + forced : steps])
        assert [t in LIMITS.end for t in answer] == [False] * (len(answer) - 1) + [bool(ended)]
        assert ended or len(answer) == LIMITS.answer
        assert not np.any(token[steps:])
        reasons.add((bool(stopped), bool(ended)))
    assert reasons == {(False, False), (False, True), (True, False), (True, True)}


def test_draws_belong_to_their_request_and_key():
    one, again, other = run("soft"), run("soft", group=4), run("soft", seed=2)
    assert np.array_equal(one.record["thought"], again.record["thought"])
    assert not np.array_equal(one.record["thought"], other.record["thought"])
    rows = one.record["thought"][:4, 0]  # of one prompt
    assert len({x.tobytes() for x in rows}) == 4


@pytest.mark.parametrize("name", ["hard", "soft", "mts"])
def test_windows_of_the_limits_change_neither_log_probabilities_nor_gradients(name):
    """With stop phrases, so that thoughts and answers begin and end at different places in every row."""
    model, params = made()
    limits = LIMITS._replace(stop=tuple((t,) for t in range(0, 64, 3)))
    rows = teaching.batch(thoughts.make(name), run(name, limits=limits), PROMPTS, SEGMENTS)
    kind = np.asarray(rows.extra["kind"])
    assert len({int(np.sum(row == THOUGHT)) for row in kind}) > 1
    assert len({int(np.argmax(row == ANSWER)) for row in kind}) > 1
    share = jax.random.normal(jax.random.key(5), rows.weights.shape)

    def value(params, limits):
        score = teaching.log_probs(thoughts.make(name), temperature=0.7, limits=limits)(model.apply(params, rows), rows)
        return jnp.sum(share * score), score

    results = [jax.jit(jax.grad(functools.partial(value, limits=x), has_aux=True))(params) for x in (None, limits)]
    (slopes, whole), (others, some) = results
    np.testing.assert_allclose(some, whole, atol=1e-5, rtol=1e-5)
    assert np.any(whole)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.max(np.abs(a)))


@pytest.mark.parametrize("limits", [Limits(0, 3), Limits(3, 0)])
def test_a_phase_that_is_left_out_has_no_log_probability(limits):
    model, params = made()
    rows = teaching.batch(thoughts.make("soft"), run("soft", limits=limits), PROMPTS, SEGMENTS)
    score = teaching.log_probs(thoughts.make("soft"), limits=limits)
    kind = np.asarray(rows.extra["kind"])
    assert set(np.unique(kind)) == {NOTHING, THOUGHT if limits.thoughts else ANSWER}
    log_prob = score(model.apply(params, rows), rows)
    np.testing.assert_allclose(log_prob, rows.extra["behaviour"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_soft_thoughts_are_the_mixture_and_greedy_hard_ones_the_likeliest_tokens(tied):
    model, params = made(tied)
    limits = Limits(thoughts=3, answer=2)
    soft = run("none", group=1, limits=limits, greedy=True, tied=tied)
    rows = teaching.batch(thoughts.make("none"), soft, PROMPTS, SEGMENTS)
    output = model.apply(params, rows)
    shares = jax.nn.softmax(output.logits, axis=-1)
    want = np.einsum("blv,vd->bld", shares, output.embedding)
    places = np.asarray(rows.extra["kind"]) == THOUGHT
    np.testing.assert_allclose(np.asarray(rows.extra["record_thought"])[places], want[places], atol=1e-5)
    hard = run("hard", group=1, limits=limits, greedy=True, tied=tied)
    rows = teaching.batch(thoughts.make("hard"), hard, PROMPTS, SEGMENTS)
    best = np.argmax(model.apply(params, rows).logits, -1)
    drawn = np.asarray(rows.extra["kind"]) != NOTHING
    assert np.array_equal(np.asarray(rows.targets)[drawn], best[drawn])
    assert not np.any(hard.log_prob[hard.kind == ANSWER])


def test_forced_tokens_and_the_prompt_change_neither_loss_nor_gradient():
    """Their logits do not enter: moving the hidden states that predict them leaves the loss as it is."""
    model, params = made()
    rows = teaching.batch(thoughts.make("hard"), run("hard"), PROMPTS, SEGMENTS)
    output = model.apply(params, rows)
    score = teaching.log_probs(thoughts.make("hard"))

    def loss(hidden):
        return jnp.sum(rows.weights * score(output._replace(hidden=hidden), rows))

    slope = np.asarray(jax.grad(loss)(output.hidden))
    drawn = np.asarray(rows.weights) > 0
    assert not np.any(slope[~drawn])
    assert np.all(np.any(slope[drawn], axis=-1))
    assert np.array_equal(drawn, np.isin(rows.extra["kind"], (THOUGHT, ANSWER)))


@pytest.fixture
def double(monkeypatch):
    """All that asks for float32 gets float64: where a density has thousands of nats, float32 hides small mistakes."""
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        yield lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else None)


def drawn(name, tied, double):
    """Returns a model, its parameters and rollouts in float64; they are drawn in float32."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setattr(jnp, "float32", np.float32)
        (_, params), found = made(tied), run(name, tied=tied)
    config = transformer.shape(**SHAPE, tied=tied)
    model = transformer.from_config(dataclasses.replace(config, compute_dtype="float64"))
    params, found = jax.tree.map(double, (jax.tree.map(np.asarray, params), found))
    thought = policy_of(name).feed(params["embedding"], found.record)  # what was fed, with all its digits
    return model, params, found._replace(record={**found.record, "thought": thought})


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, True) for name in COMPOSED), *((name, False) for name in COMPOSED if "top" not in name)]
)
def test_the_gradient_of_a_composed_input_is_exact(name, tied, double):
    """Beside embeddings that `policy.feed` puts together inside the derivative, and beside thoughts that are data."""
    model, params, found = drawn(name, tied, double)
    policy = policy_of(name)
    rows = teaching.batch(policy, found, PROMPTS, SEGMENTS)
    assert {"thought", "record_thought"}.isdisjoint(rows.extra)
    assert ("support" in rows.extra) == (name != "dirichlet-all")
    score, factor = teaching.log_probs(policy), np.random.default_rng(3).normal(size=rows.weights.shape)
    width, length = PROMPTS.shape[1], rows.weights.shape[1]
    soft = np.zeros(rows.weights.shape, bool)
    soft[:, width:] = found.kind[:, :-1] == THOUGHT
    thought = np.zeros((*soft.shape, 32))
    thought[:, width:] = found.record["thought"][:, :-1]

    def loss(params, kind):
        inputs, columns = rows, rows.extra
        if kind == "explicit":
            table = params["embedding"]
            record = {key: x[:, : length - width] for key, x in found.record.items() if key != "thought"}
            fed = jnp.pad(policy.feed(table, record), ((0, 0), (width, 0), (0, 0)))
            inputs = dataclasses.replace(rows, inputs=jnp.where(soft[..., None], fed, table[rows.inputs]), extra={})
        elif kind == "constant":
            inputs = dataclasses.replace(rows, extra={"soft": soft, "thought": thought})
        log_prob = score(model.apply(params, inputs), dataclasses.replace(rows, extra=columns))
        return jnp.sum(rows.weights * factor * log_prob), log_prob

    ways = {
        kind: toys.quick(jax.value_and_grad(functools.partial(loss, kind=kind), has_aux=True))(params)
        for kind in ("ours", "explicit", "constant")
    }
    ((_, value), slopes), ((_, want), exact), ((_, same), data) = ways.values()
    assert {x.dtype for x in jax.tree.leaves((value, slopes))} == {np.dtype(np.float64)}
    for other in (want, same):
        assert np.max(np.abs(value - other) / np.maximum(1, np.abs(value))) < 1e-12
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(exact))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12 * size)
    jax.tree.map(close, slopes, exact)
    jax.tree.map(close, slopes["layers"], data["layers"])
    assert np.abs(slopes["embedding"] - data["embedding"]).max() > 0.01 * np.abs(exact["embedding"]).max()


@pytest.mark.parametrize("name", COMPOSED)
def test_greedy_thoughts_are_data(name):
    found = run(name, group=1, limits=Limits(thoughts=3, answer=2), greedy=True)
    rows = teaching.batch(policy_of(name), found, PROMPTS, SEGMENTS)
    assert {"support", "shares"}.isdisjoint(rows.extra)
    width = PROMPTS.shape[1]
    np.testing.assert_array_equal(rows.extra["thought"][:, width : width + 3], found.record["thought"][:, :3])
    assert np.array_equal(np.asarray(rows.extra["soft"])[:, width:], found.kind[:, :-1] == THOUGHT)
