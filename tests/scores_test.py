"""Held-out losses are exact token means whatever the batches look like."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcl import grad, scores
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output

V, D, L = 11, 6, 5


def apply(params, batch, cache=None):
    return Output(params["embed"][batch.inputs], params["head"])


MODEL = Model(init=lambda key: {}, apply=apply, axes={})


def loss(output, batch):
    logp = jax.nn.log_softmax(output.logits)
    nats = -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    return (nats * batch.weights).sum(), batch.weights.sum()


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {"embed": rng.normal(size=(V, D)).astype(np.float32), "head": rng.normal(size=(D, V)).astype(np.float32)}


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    weights = (rng.uniform(size=(n, L)) < 0.6).astype(np.float32)
    ones = np.ones((n, L), np.int32)
    tokens = rng.integers(V, size=(2, n, L)).astype(np.int32)
    return Batch(tokens[0], tokens[1], weights, ones, ones, np.zeros(n, np.int32))


def expected(params, batch):
    logits = params["embed"].astype(np.float64)[batch.inputs] @ params["head"].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    return (nats * batch.weights).sum() / batch.weights.sum()


def cut(batch, *sizes):
    ends = np.cumsum(sizes)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_token_mean_is_exact_and_does_not_depend_on_the_batches():
    params, batch = parameters(), rows(12)
    run = scores.make(MODEL, loss)
    means = [run(params, scores.put({"a": cut(batch, *sizes)}))["a"] for sizes in ((12,), (4, 4, 4), (1, 8, 3))]
    np.testing.assert_allclose(means, expected(params, batch), rtol=1e-6)
    mean_of_means = np.mean([expected(params, piece) for piece in cut(batch, 1, 8, 3)])
    assert abs(mean_of_means - means[0]) > 1e-3  # the wrong average would be seen


def test_stacked_batches_equal_listed_ones_and_repeats_are_bit_equal():
    params, batch = parameters(), rows(12)
    listed = cut(batch, 4, 4, 4)
    stacked = jax.tree.map(lambda *x: np.stack(x), *listed)
    run = scores.make(MODEL, loss)
    kept = scores.put({"a": stacked, "b": listed, "c": listed[0]})
    first = run(params, kept)
    assert first["a"] == first["b"] != first["c"]
    assert run(params, kept) == first


def test_one_compilation_and_rows_stay_on_the_device():
    traces = []

    def counting(output, batch):
        traces.append(1)
        return loss(output, batch)

    run = scores.make(MODEL, counting)
    kept = scores.put({"a": cut(rows(8), 4, 4), "b": rows(4, 1)})
    params = jax.device_put(parameters())
    run(params, kept)
    with jax.transfer_guard_host_to_device("disallow"):
        run(params, kept)
    assert len(traces) == 1


def test_sharded_rows_give_the_same_loss():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    placed = []

    def place(batch):
        placed.append(batch)
        return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    params, batch = parameters(), rows(8)
    run = scores.make(MODEL, loss)
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = run(replicated, scores.put({"a": cut(batch, 4, 4)}, place))
    assert len(placed) == 2
    assert sharded["a"] == pytest.approx(run(params, scores.put({"a": batch}))["a"], rel=1e-6)


def test_accuracy_counts_weighted_targets():
    params, batch = parameters(), rows(6)
    logits = params["embed"][batch.inputs] @ params["head"]
    correct = ((logits.argmax(-1) == batch.targets) * batch.weights).sum() / batch.weights.sum()
    got = scores.make(MODEL, scores.accuracy)(params, scores.put({"a": batch}))
    assert got["a"] == pytest.approx(correct)


def test_a_domain_without_counted_tokens_is_refused():
    empty = dataclasses.replace(rows(2), weights=np.zeros((2, L), np.float32))
    with pytest.raises(UserError, match="'b': no token of its rows counts"):
        scores.put({"a": rows(2), "b": empty})
    with pytest.raises(UserError, match="'b': no token of its rows counts"):
        scores.put({"b": []})


def test_bits_per_byte():
    losses = {"a": np.log(2.0), "b": np.log(4.0)}
    assert scores.bits_per_byte(losses) == pytest.approx({"a": 1.0, "b": 2.0})
    # 4 bytes per token: a quarter of the bits falls on each byte
    assert scores.bits_per_byte(losses, {"a": 1.0, "b": 0.25}) == pytest.approx({"a": 1.0, "b": 0.5})


def test_uniform_model_has_the_loss_of_the_alphabet():
    params = jax.tree.map(np.zeros_like, parameters())
    got = scores.make(MODEL, loss)(params, scores.put({"a": rows(3)}))
    assert got["a"] == pytest.approx(np.log(V), rel=1e-6)
    assert grad.mean(*loss(apply(params, rows(3)), rows(3))) == pytest.approx(np.log(V), rel=1e-6)
