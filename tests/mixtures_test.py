"""CHORD and the reference model: both ends, transcriptions, microbatches, order of the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose, grad, losses
from jaxcl.compose import Part
from jaxcl.methods import chord, er, reference
from jaxcl.rl import objectives
from jaxcl.schema import UserError
from jaxcl.types import Output

QUICK = True  # compiling is most of the time

FREE = objectives.make("rloo", proximal="current")
PENALISED = objectives.make("rloo", kl=0.5, proximal="current")


def key(i):
    return jax.random.key(i)


def reinforce(output, rows):
    """Linear in the advantage; demonstrations have a share of 0."""
    weights = rows.weights * rows.extra["share"][:, None]
    return -jnp.sum(weights * rows.extra["advantage"][:, None] * losses.log_probs(output, rows.targets)[0]), jnp.sum(
        weights
    )


def imitate(output, rows):
    """Supervised learning of the demonstrations alone."""
    weights = rows.weights * rows.extra["demonstration"][:, None]
    return -jnp.sum(weights * losses.log_probs(output, rows.targets)[0]), jnp.sum(weights)


def setting(loss=reinforce, microbatches=1, lr=0.5):
    return toys.setting(
        tx=optax.sgd(lr), example=toys.rollouts(0), loss=loss, microbatches=microbatches, score=toys.score
    )


def run(options, made, steps=4, begin=None):
    """Returns the states and the metrics of a few steps, the start included."""
    method = compose.make(options, made)
    state, step = method.init(begin or toys.language_model().init(key(7))), toys.quick(method.step)
    states, told = [state], []
    for i in range(steps):
        state, metrics = step(state, toys.rollouts(i), key(i))
        states.append(state)
        told.append(jax.device_get(metrics))
    return states, told


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("mu", "alone"), [(0.0, reinforce), (1.0, imitate)])
def test_each_end_is_one_of_the_two_bit_for_bit(mu, alone):
    both, told = run(f"chord(mu={mu}, end={mu}, steps=3)", setting())
    one, _ = run("cpt", setting(alone))
    assert_same([s.params for s in both], [s.params for s in one])
    assert [m["chord/mu"] for m in told] == [mu] * 4
    assert all(m["chord/rows"] == 2 for m in told)
    start, final = both[0].params, both[-1].params
    assert float(jnp.abs(start["head"] - final["head"]).max()) > 1e-3


def test_between_the_ends_the_gradients_mix_and_the_share_falls_along_a_cosine():
    states, told = run("chord(mu=0.9, end=0.1, steps=4)", setting(lr=1.0), steps=6)
    gradient = toys.quick(
        lambda params, rows: [
            grad.value_and_grad(lambda p, r, f=f: {"x": f(toys.language_model().apply(p, r), r)}, params, rows)
            for f in (reinforce, imitate)
        ]
    )
    for i, metrics in enumerate(told):
        mu = 0.1 + 0.8 * (1 + np.cos(np.pi * min(i, 4) / 4)) / 2
        np.testing.assert_allclose(metrics["chord/mu"], mu, rtol=1e-6)
        assert int(states[i].memory["chord"]["step"]) == min(i, 4)
        (rl, rl_grad), (sft, sft_grad) = gradient(states[i].params, toys.rollouts(i))
        np.testing.assert_allclose(metrics["chord"], mu * grad.mean(*sft["x"]), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], (1 - mu) * grad.mean(*rl["x"]), rtol=1e-4, atol=1e-6)
        for was, now, a, b in zip(
            *map(jax.tree.leaves, (states[i].params, states[i + 1].params, rl_grad, sft_grad)), strict=True
        ):
            np.testing.assert_allclose(was - now, (1 - mu) * a + mu * b, rtol=1e-3, atol=1e-6)
    _, steady = run("chord(mu=0.3, steps=0)", setting(), steps=2)
    np.testing.assert_allclose([m["chord/mu"] for m in steady], 0.3, rtol=1e-6)


@pytest.mark.parametrize("phi", ["none", "p", "p(1-p)"])
def test_phi_weighs_tokens_and_carries_no_gradient(phi):
    r, part = np.random.default_rng(0), chord.make(setting(), mu=0.4, steps=0, phi=phi)
    rows = toys.rollouts(0)
    weights = r.choice([0.0, 0.5, 1.0], (toys.B, toys.L)).astype("f")
    rows = dataclasses.replace(rows, weights=jnp.asarray(weights))
    logits = r.normal(size=(toys.B, toys.L, toys.V)).astype("f")
    memory = part.init(None)

    def loss(x):
        return part.loss(memory, None, Output(x), rows)

    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), dtype="d")
    own = np.take_along_axis(p, np.asarray(rows.targets)[..., None], -1)[..., 0]
    counted = weights * np.asarray(rows.extra["demonstration"])[:, None]
    factor = {"none": np.ones_like(own), "p": own, "p(1-p)": own * (1 - own)}[phi]
    np.testing.assert_allclose(loss(jnp.asarray(logits))[0], -0.4 * np.sum(counted * factor * np.log(own)), rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.asarray(logits))[1], counted.sum())
    slope = 0.4 * (counted * factor)[..., None] * (p - np.eye(toys.V)[np.asarray(rows.targets)])
    np.testing.assert_allclose(jax.grad(lambda x: loss(x)[0])(jnp.asarray(logits)), slope, rtol=1e-4, atol=1e-6)
    unlikely = jnp.where(counted[..., None] > 0, logits, -jnp.inf)  # what does not count may be anything
    np.testing.assert_array_equal(loss(unlikely)[0], loss(jnp.asarray(logits))[0])


def test_a_batch_without_demonstrations_is_named():
    rollouts = toys.rollouts(0)
    columns = {name: x for name, x in rollouts.extra.items() if name != "demonstration"}
    for rows, made in ((dataclasses.replace(rollouts, extra=columns), setting()), (toys.text(0), toys.setting())):
        method = compose.make("chord", made)
        state = jax.eval_shape(method.init, toys.language_model().init(key(0)))
        message = "config.method chord: no demonstration rows in the batch; set config.rollout.demonstrations"
        with pytest.raises(UserError) as told:
            jax.eval_shape(method.step, state, rows, key(0))
        assert str(told.value) == message


def test_supervised_stages_are_left_alone():
    """A run whose stages learn in different ways: the mixture waits, the reference is the model after the first."""

    def loss(output, rows):
        return reinforce(output, rows) if "advantage" in rows.extra else toys.cross_entropy(output, rows)

    made, start = setting(loss), toys.language_model().init(key(7))
    both = compose.make("chord(steps=2) + reference(at='task')", made)
    plain = compose.make("cpt", made)
    (state, metrics), (expected, _) = (
        toys.quick(method.step)(method.init(start), toys.text(0), key(0)) for method in (both, plain)
    )
    assert_same(state.params, expected.params)
    assert float(metrics["chord"]) == 0
    assert int(state.memory["chord"]["step"]) == 0
    state = both.end_task(state, toys.stack([toys.text(0)]), key(1))
    assert_same(state.memory["reference"]["reference"], expected.params)
    state, _ = toys.quick(both.step)(state, toys.rollouts(1), key(2))
    assert int(state.memory["chord"]["step"]) == 1


def assert_microbatches_change_nothing(options, loss, counts):
    whole, whole_told = run(options, setting(loss), steps=3)
    for count in counts:
        cut, told = run(options, setting(loss, count), steps=3)
        for a, b in zip(told, whole_told, strict=True):
            for name, value in b.items():
                np.testing.assert_allclose(a[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        for x, y in zip(jax.tree.leaves(cut[-1].params), jax.tree.leaves(whole[-1].params), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_microbatches_do_not_change_the_mixture():
    """All demonstrations are in one microbatch of four."""
    assert_microbatches_change_nothing("chord(steps=2)", reinforce, (2, 4))


def test_microbatches_do_not_change_the_reference():
    """Twelve rows in four pieces, each of which has to find its way back to its place."""

    def loss(output, rows):
        return PENALISED.surrogate(toys.score(output, rows), rows)

    assert_microbatches_change_nothing("er(rows=4, capacity=16, mode='extend') + reference", loss, (4,))


def test_the_penalty_is_0_at_the_reference_and_positive_after_a_step():
    part, params = reference.make(setting()), toys.language_model().init(key(7))

    @toys.quick
    def penalty(params, memory, rows):
        rows = part.annotate(memory, rows)

        def loss(p, objective):
            return grad.mean(*objective.surrogate(toys.score(toys.language_model().apply(p, rows), rows), rows))

        (own, slope), (other, rest) = (jax.value_and_grad(lambda p, o=o: loss(p, o))(params) for o in (PENALISED, FREE))
        return own - other, jax.tree.map(jnp.subtract, slope, rest), rows.extra["reference"]

    rows, memory = toys.rollouts(0), part.init(params)
    value, slope, column = penalty(params, memory, rows)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert all(float(jnp.abs(g).max()) < 1e-6 for g in jax.tree.leaves(slope))
    logits = np.asarray(toys.language_model().apply(params, rows).logits, "d")
    told = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        column, np.take_along_axis(told, np.asarray(rows.targets)[..., None], -1)[..., 0], rtol=1e-5
    )
    assert column.dtype == jnp.float32
    moved = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    value, slope, again = penalty(moved, memory, rows)
    assert float(value) > 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope)) > 1e-4
    np.testing.assert_allclose(again, column, rtol=1e-6)


@pytest.mark.parametrize("parts", [{"score": toys.score}, {"example": toys.rollouts(0)}])
def test_a_reference_needs_rollouts_and_their_score(parts):
    with pytest.raises(UserError, match=r"config\.method reference: only for runs with config\.objective"):
        reference.make(toys.setting(**parts))


def test_rows_of_supervision_get_no_column():
    part, rows = reference.make(setting()), toys.text(0)
    assert part.annotate(part.init(toys.language_model().init(key(7))), rows) is rows


@pytest.mark.parametrize("at", ["start", "task"])
def test_the_reference_is_kept_or_renewed(at):
    part = reference.make(setting(), at=at)
    first, later = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    ended = part.end_task(part.init(first), later, None, key(0))
    np.testing.assert_array_equal(ended["reference"]["w"], first["w"] if at == "start" else later["w"])


@pytest.mark.parametrize("order", [("er", "reference", "chord"), ("chord", "reference", "er")])
def test_replayed_rows_are_annotated_in_any_order_and_stored_as_they_came(order):
    mu = 0.25
    parts = {
        "er": er.make(setting(), rows=4, capacity=16, mode="extend"),
        "reference": reference.make(setting()),
        "chord": chord.make(setting(), mu=mu, steps=0),
        "probe": Part(metrics=lambda memory, rows: {"inputs": rows.inputs, **rows.extra}),
    }
    method = compose.compose([(name, parts[name]) for name in (*order, "probe")], setting())
    start, first, step = toys.language_model().init(key(7)), toys.rollouts(0), toys.quick(method.step)
    state, _ = step(method.init(start), first, key(0))
    kept = state.memory["er"]["rows"].extra
    assert set(kept) == set(first.extra)
    np.testing.assert_array_equal(kept["advantage"][: toys.B], first.extra["advantage"])
    _, metrics = step(state, toys.rollouts(1), key(1))
    told = {name: np.asarray(metrics[f"probe/{name}"])[toys.B :] for name in ("inputs", "advantage", "reference")}
    source = [np.flatnonzero((np.asarray(first.inputs) == row[None]).all(1)).item() for row in told["inputs"]]
    scores = toys.score(toys.language_model().apply(start, first), first)
    np.testing.assert_allclose(told["reference"], np.asarray(scores)[source], rtol=1e-5)
    np.testing.assert_allclose(told["advantage"], (1 - mu) * np.asarray(first.extra["advantage"])[source], rtol=1e-6)


def test_a_gradient_rule_gets_annotated_rows_too():
    """Three rows do not divide into the microbatches; the objective needs the column of the reference."""

    def loss(output, rows):
        return PENALISED.surrogate(toys.score(output, rows), rows)

    _, told = run("agem(rows=3, capacity=16, tasks='seen') + reference", setting(loss, microbatches=2), steps=2)
    assert np.isfinite([m["loss"] for m in told]).all()
