"""HRPO: a model with a gate beside its equations, its rollouts beside a forward pass, and a run that moves the gate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_small

from jaxcl import network, program, saved, train, weights
from jaxcl.hf.__main__ import export
from jaxcl.models import transformer
from jaxcl.rl import gate, inference, teaching, thoughts
from jaxcl.rl import sample as samples
from jaxcl.rl.sample import ANSWER, THOUGHT, Limits
from jaxcl.schema import UserError
from jaxcl.tree import map_named, named_leaves
from jaxcl.types import Batch, Model, Output

QUICK = True  # compiling is most of the time

B, L, V, D = 3, 5, 24, 16
LIMITS = Limits(thoughts=4, answer=2, stop=((3,), (4,)), forced=(5,), late=(6,), end=(7, 8, 9))


@functools.cache
def plain():
    return transformer.make(preset="tiny", vocab=V, layers=1, embed=D, heads=2, kv_heads=1, mlp=32, max_length=32)


def opened(params, seed=0, size=1.0):
    """Returns the parameters with a gate far from its start."""
    rng = np.random.default_rng(seed)
    fresh = jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), params["gate"])
    return {**params, "gate": fresh}


@functools.cache
def made():
    model = gate.gated(plain())
    params = model.init(jax.random.key(0))
    base = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, gate.without(params))  # logits that differ
    return model, opened({**base, "gate": params["gate"]})


def rows(**columns):
    rng = np.random.default_rng(1)
    tokens, one = jnp.asarray(rng.integers(V, size=(B, L)), jnp.int32), jnp.ones((B, L), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(L), (B, L))
    return Batch(tokens, tokens, jnp.ones((B, L)), one, places, jnp.zeros((B,), jnp.int32), columns)


def columns():
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.random((B, L)) < 0.6), jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)


def equations(params, tokens, mixture):
    """Equations 3 and 4 in float64."""
    g, e = jax.tree.map(lambda x: np.asarray(x, np.float64), (params["gate"], params["embedding"]))
    e = e[np.asarray(tokens)]
    r, i = (1 / (1 + np.exp(-(e @ g[name]["kernel"] + g[name]["bias"]))) for name in ("recurrent", "input"))
    a = np.exp(-8 * np.log1p(np.exp(-g["decay"])) * r)
    return a * e + np.sqrt(1 - a**2) * i * np.asarray(mixture, np.float64)


def hidden(model, params, batch):
    return np.asarray(jax.jit(lambda params: model.apply(params, batch).hidden)(params))


def test_the_input_is_that_of_the_equations():
    (model, params), (soft, mixture) = made(), columns()
    found = hidden(model, params, rows(soft=soft, mixture=mixture))
    thought = jnp.asarray(equations(params, rows().inputs, mixture), jnp.float32)
    want = hidden(plain(), gate.without(params), rows(soft=soft, thought=thought))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    hard = hidden(plain(), gate.without(params), rows())
    assert np.max(np.abs(found - hard)) > 0.1
    # without the column the gate has no say, whatever else is fed
    np.testing.assert_array_equal(hidden(model, params, rows()), hard)
    soft_rows = rows(soft=soft, thought=mixture)
    np.testing.assert_array_equal(hidden(model, params, soft_rows), hidden(plain(), gate.without(params), soft_rows))


def test_a_closed_gate_passes_the_token_alone():
    (model, params), (soft, mixture) = made(), columns()
    closed = {**params, "gate": {**params["gate"], "decay": jnp.full((D,), 200.0)}}
    found = hidden(model, closed, rows(soft=soft, mixture=mixture))
    np.testing.assert_allclose(found, hidden(plain(), gate.without(params), rows()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("least", [0.98, 0.5])
def test_the_start_is_nearly_closed(least):
    params = gate.gated(plain(), least=least).init(jax.random.key(3))
    decay = np.asarray(params["gate"]["decay"], np.float64)
    square = np.exp(-8 * np.log1p(np.exp(-decay)))  # r = 1/2
    assert np.all((square >= least - 1e-5) & (square <= 0.999 + 1e-5))
    assert np.ptp(square) > 0.3 * (0.999 - least)
    assert not any(np.any(x) for name in ("recurrent", "input") for x in params["gate"][name].values())
    base = plain().init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, gate.without(params), base)


def test_columns_hold_anything_where_nothing_is_soft():
    (model, params), (soft, mixture) = made(), columns()

    def total(params, mixture, tokens):
        batch = rows(soft=soft, mixture=mixture)
        batch = Batch(
            tokens, *(getattr(batch, x) for x in ("targets", "weights", "segments", "positions", "task", "extra"))
        )
        return jnp.sum(model.apply(params, batch).hidden ** 2)

    slope = jax.jit(jax.grad(total, argnums=(0, 1)))
    clean = slope(params, mixture, rows().inputs)
    dirty = slope(params, jnp.where(soft[..., None], mixture, jnp.nan), rows().inputs)
    jax.tree.map(np.testing.assert_array_equal, clean[0], dirty[0])
    assert not np.any(clean[1])  # the mixture is data


def toy():
    """A model in float64 with one matrix behind its table."""

    def init(key):
        return {"embedding": jax.random.normal(key, (V, D)), "inner": 0.1 * jax.random.normal(key, (D, D))}

    def apply(params, batch, cache=None):
        x = params["embedding"][batch.inputs]
        if "thought" in batch.extra:
            x = jnp.where(batch.extra["soft"][..., None], batch.extra["thought"], x)
        y = jnp.tanh(jnp.cumsum(x, axis=1) @ params["inner"])
        return Output(y, params["embedding"].T, None, params["embedding"])

    return Model(init, apply, {"embedding": (None, None), "inner": (None, None)})


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        model = gate.gated(toy())
        params = opened(jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(0))), size=0.3)
        soft, mixture = columns()
        batch = rows(soft=soft, mixture=mixture.astype(jnp.float64))
        kind = np.where(np.arange(L) < 3, THOUGHT, ANSWER)
        batch.extra["kind"] = jnp.broadcast_to(jnp.asarray(kind, jnp.int8), (B, L))
        policy = thoughts.make("hrpo", temperature=0.7)

        def loss(params):
            output = model.apply(params, batch)
            return jnp.sum(
                policy.log_prob(output.logits.astype(jnp.float64), output.embedding, {"token": batch.targets})
            )

        def exact(params):  # Output.logits are float32
            output = model.apply(params, batch)
            logits = jnp.einsum("bld,dv->blv", output.hidden, output.head)
            return jnp.sum(policy.log_prob(logits, output.embedding, {"token": batch.targets}))

        np.testing.assert_allclose(jax.jit(loss)(params), jax.jit(exact)(params), rtol=1e-5)
        slope, value, step = jax.jit(jax.grad(exact))(params), jax.jit(exact), 1e-5
        rng = np.random.default_rng(5)
        for name, leaf in named_leaves(params):
            way = rng.normal(size=leaf.shape)
            ends = [value(_moved(params, name, by * way)) for by in (step, -step)]
            want = (ends[0] - ends[1]) / (2 * step)
            assert abs(want) > 1e-3, name
            np.testing.assert_allclose(np.sum(dict(named_leaves(slope))[name] * way), want, rtol=1e-6, err_msg=name)


def _moved(params, name, by):
    return map_named(lambda other, x: x + by if other == name else x, params)


PROMPT = np.array([[0, 0, 10, 11], [12, 13, 14, 15]], np.int32)
SEGMENTS = (PROMPT > 0).astype(np.int32)


@functools.cache
def drawn(slots=None, greedy=False):
    model, params = made()
    policy = thoughts.make("hrpo", temperature=0.5)
    options = {
        "policy": policy,
        "limits": LIMITS,
        "group": 4,
        "slots": slots,
        "greedy": greedy,
        "greedy_answer": greedy,
    }
    draw = jax.jit(lambda params: samples.sample(model, params, PROMPT, SEGMENTS, jax.random.key(1), **options))
    return policy, jax.tree.map(np.asarray, draw(params))


def test_a_forward_pass_gives_the_log_probabilities_of_the_sampler():
    (model, params), (policy, found) = made(), drawn()
    batch = teaching.batch(policy, found, PROMPT, SEGMENTS)
    assert not {"thought", "record_thought", "shares"} & set(batch.extra)
    shown = inference._inputs(batch)
    score = jax.jit(lambda params: teaching.log_probs(policy, limits=LIMITS)(model.apply(params, shown), batch))
    behaviour = np.asarray(batch.extra["behaviour"])
    np.testing.assert_allclose(score(params), behaviour, atol=1e-5)
    kind = np.asarray(batch.extra["kind"])
    assert np.sum(kind == THOUGHT) > 12
    assert np.any(behaviour[kind == THOUGHT] < -0.1)
    # what was drawn first is from the prompt alone; of all else the gate has a say
    closed = {**params, "gate": {**params["gate"], "decay": jnp.full((D,), 200.0)}}
    gap = np.abs(np.asarray(score(closed)) - behaviour)
    assert np.max(gap[:, : PROMPT.shape[1]]) < 1e-5
    assert np.max(gap) > 1e-2


def test_tokens_are_drawn_and_the_mixture_is_of_unit_shares():
    found = drawn()[1]
    few = drawn(slots=3)[1]
    np.testing.assert_array_equal(found.token, few.token)
    np.testing.assert_allclose(found.record["thought"], few.record["thought"], atol=1e-5)
    assert set(found.record) == {"thought"}
    still = drawn(greedy=True)[1]
    assert not np.array_equal(still.token, found.token)
    assert np.all(still.token.reshape(2, 4, -1) == still.token.reshape(2, 4, -1)[:, :1])
    model, params = made()
    first = model.apply(
        params, Batch(PROMPT, PROMPT, SEGMENTS, SEGMENTS, np.maximum(SEGMENTS.cumsum(1) - 1, 0), SEGMENTS[:, 0])
    )
    z = np.asarray(first.logits[:, -1], np.float64) / 0.5
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    want = p @ np.asarray(params["embedding"], np.float64)[:V] / np.linalg.norm(p, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        found.record["thought"].reshape(2, 4, -1, D)[:, :, 0], want[:, None].repeat(4, 1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(still.token[::4, 0], np.argmax(z, axis=-1))


# Runs.


def settings(**overrides):
    stages = [{"name": "three", "steps": 2, "mixture": {"three": 1.0}}]
    rates = {"^gate/(recurrent|input)/": 20.0, "^gate/decay$": 200.0}
    own = {"policy": "hrpo(temperature=0.5)", "stream__stages": stages, "method": "cpt", "schedule__peak": 1e-4}
    own |= {"optim__multipliers": rates, "rollout__modes": ["hard", "soft"]}
    return rl_small.config(**(own | overrides))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("hrpo") / "run"
    rl_small.run(settings(), found)
    return found


def begun(place, **overrides):
    """Returns the parameters of a run that starts from another."""
    given = settings(**overrides)
    return rl_small.build({**given, "model": {**given["model"], "start": str(place)}}).create().params


def test_a_run_moves_the_gate(place):
    before = rl_small.build(settings()).create().params
    after = saved.params(place / "checkpoints")[1]
    assert set(after) == set(before)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), before, after)
    assert all(x > 0 for x in jax.tree.leaves(moved["gate"]))
    # Adam moves every coordinate by about the rate
    assert 50 < moved["gate"]["decay"] / moved["embedding"] < 300
    assert 5 < moved["gate"]["input"]["bias"] / moved["embedding"] < 30
    steps = rl_small.records(place, "train")
    assert len(steps) == 2
    for record in steps:
        assert np.isfinite(record["loss"])
        assert record["thoughts"] == 1
    last = rl_small.records(place, "eval")[-1]
    assert set(last["inference"]["three"]) == {"hrpo", "hard", "soft"}
    assert np.isfinite(list(last["drift"]["three"].values())).all()


def test_meshes_agree_with_a_gate_that_is_cut():
    """Rollouts, losses and gradients of two steps on 1 device and on 2 x 2, with a gate that has its say."""
    given = settings(guard=None, optim={"name": "sgd", "clip": None, "momentum": 0.0}, rollout__modes=[])
    found = []
    for mesh in ({}, {"devices": 4, "fsdp": 2, "tensor": 2}):
        built = rl_small.build(given, **mesh)
        state = built.create()
        params = jax.device_get(opened(jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, state.params)))
        state = dataclasses.replace(
            state, params=jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), params, state.params)
        )
        kernel, bias = (state.params["gate"]["input"][name] for name in ("kernel", "bias"))
        cut = 2 if mesh else 1
        assert [x.addressable_shards[0].data.shape for x in (kernel, bias)] == [(D // cut, D), (D // cut,)]
        told = []
        for step in (0, 1):
            prompts, _ = built.rollouts.prompts(step, {})
            rows, values = built.rollouts.now(state, prompts, step, {})
            state, metrics = built.step(state, rows)
            told.append([values["reward"], float(metrics["loss"]), float(metrics["grad_norm"])])
        moved = jax.tree.map(lambda a, b: (a - np.asarray(b)) / 1e-4, params, jax.device_get(state.params))
        found.append((np.asarray(rows.targets), told, moved))
    (tokens, told, moved), (others, again, same) = found
    np.testing.assert_array_equal(others, tokens)
    np.testing.assert_allclose(again, told, rtol=1e-4, atol=1e-5)
    for (name, a), (_, b) in zip(named_leaves(same), named_leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * np.max(np.abs(b)), err_msg=name)
    assert all(np.max(np.abs(x)) > 0 for x in jax.tree.leaves(moved["gate"]))


def test_a_run_starts_from_another_with_its_gate_or_with_a_new_one(place, monkeypatch):
    _, there = saved.params(place / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, begun(place), there)
    fresh = rl_small.build(settings()).create().params["gate"]
    assert not np.array_equal(there["gate"]["decay"], fresh["decay"])
    monkeypatch.setattr(network.saved, "params", lambda directory: (2, gate.without(there)))
    found = begun(place)
    jax.tree.map(np.testing.assert_array_equal, gate.without(found), gate.without(there))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found["gate"], fresh)


def test_a_gate_is_not_lost_in_silence(place, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"config\.model\.start=.*the gate of hrpo; set config\.policy='hrpo', or start"
    ):
        begun(place, policy="hard", optim__multipliers={}, rollout__modes=[])
    monkeypatch.setattr(weights, "length_of", lambda run, about: 16)  # as if the problems were of text
    with pytest.raises(UserError, match="was trained with the gate of hrpo, which evaluation, export and merging"):
        export(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loaded_parameters_are_those_of_the_rest():
    model = plain()
    given = jax.tree.map(lambda x: x + 1, model.init(jax.random.key(1)))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load(key, abstract):
        assert set(abstract) == set(given)
        return given

    found = network.gated(network.Network(model, load, None))
    shapes = jax.eval_shape(found.model.init, jax.random.key(2))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    loaded = found.load(jax.random.key(2), shapes)
    jax.tree.map(np.testing.assert_array_equal, gate.without(loaded), given)
    fresh = found.model.init(jax.random.key(2))["gate"]  # not compiled: the logarithms round differently
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), loaded["gate"], fresh)
    assert network.gated(network.Network(model, None, None)).load is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy": "hrpo(gamma=0.1)"}, "config.policy.gamma: unknown key"),
        ({"policy": "hrpo(temperature=0.0)"}, "config.policy temperature=0.0: must be positive"),
        ({"policy": "soft", "optim__multipliers": {}, "rollout__modes": ["hrpo"]}, "rollout.modes: hrpo needs a gate"),
        (
            {
                "stream__stages": [
                    {"name": "worked", "steps": 2, "mixture": {"three": 1.0}, "learn": "csft"},
                    {"name": "drawn", "steps": 2, "mixture": {"three": 1.0}, "learn": "rl"},
                ]
            },
            r"config\.stream\.stages\[0\]\.learn='csft': feeds mixtures past the gate of hrpo; set learn='sft'",
        ),
        ({"adapter": "lora", "optim__multipliers": {}}, "config.adapter: 'hrpo' trains a gate beside the whole model"),
    ],
)
def test_bad_runs_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        program.build(**train.split(settings(**overrides))[1])


def test_bad_gates_are_refused():
    with pytest.raises(UserError, match=r"least=1.0: the gate starts between it and 0.999"):
        gate.gated(plain(), least=1.0)
    with pytest.raises(UserError, match="has no table of embeddings"):
        gate.gated(Model(lambda key: {"w": jnp.zeros(3)}, lambda params, batch: Output(params["w"]), {"w": (None,)}))
