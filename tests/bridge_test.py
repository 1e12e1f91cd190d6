"""Linen and NNX modules as models, and the perceptron."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models import mlp
from jaxcl.models.bridge import from_linen, from_nnx
from jaxcl.schema import UserError
from jaxcl.types import Batch, Output


def features(x):
    row = jnp.zeros(len(x), jnp.int32)
    return Batch(jnp.asarray(x, jnp.float32), row, jnp.ones(len(x)), row, row, row)


def inputs(batch):
    return (batch.inputs,)


class Dense(nn.Module):
    kind: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        named = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
        return self.kind(3, name="first", kernel_init=named)(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x)


class Stack(nnx.Module):
    def __init__(self, rngs, count=False):
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs, kernel_init=named), nnx.Linear(4, 2, rngs=rngs)])
        if count:
            self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def test_linen_gives_parameters_axes_and_logits():
    model = from_linen(Dense(), features(X[:1]), arguments=inputs)
    params = model.init(jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == {"first": {"kernel": (4, 3), "bias": (3,)}}
    assert model.axes == {"first": {"kernel": ("embed", "mlp"), "bias": (None,)}}
    np.testing.assert_allclose(model.apply(params, features(X)).logits, np.tile(X.sum(1)[:, None], 3), rtol=1e-5)
    with pytest.raises(ValueError, match="no key-value cache"):
        model.apply(params, features(X), 3)


def test_a_linen_module_may_speak_the_contract_itself():
    class Whole(nn.Module):
        @nn.compact
        def __call__(self, batch, cache=None):
            return Output(Dense()(batch.inputs), cache=cache)

    model = from_linen(Whole(), features(X))
    output = model.apply(model.init(jax.random.key(0)), features(X), "cache")
    assert output.cache == "cache"
    assert output.logits.shape == (5, 3)


def test_linen_state_is_refused():
    with pytest.raises(UserError, match="Normalised keeps state in 'batch_stats'"):
        from_linen(Normalised(), features(X), arguments=inputs)


def test_nnx_gives_the_same_function():
    model = from_nnx(Stack, arguments=inputs)
    params = model.init(jax.random.key(0))
    assert model.axes["layers"]["0"] == {"kernel": ("embed", "mlp"), "bias": (None,)}
    assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    first, second = params["layers"]["0"], params["layers"]["1"]
    want = np.tanh(X @ first["kernel"] + first["bias"][None]) @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(model.apply(params, features(X)).logits, want, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(params["layers"]["0"]["kernel"], model.init(jax.random.key(1))["layers"]["0"]["kernel"])


def test_nnx_apply_is_pure():
    model = from_nnx(Stack, arguments=inputs)
    params = model.init(jax.random.key(0))
    double = jax.tree.map(lambda x: 2 * x, params)
    once = model.apply(params, features(X)).logits
    assert np.abs(model.apply(double, features(X)).logits - once).max() > 0.1
    np.testing.assert_array_equal(model.apply(params, features(X)).logits, once)
    grads = jax.jit(jax.grad(lambda p, b: jnp.sum(model.apply(p, b).logits ** 2)))(params, features(X))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not jax.make_jaxpr(model.apply)(params, features(X)).consts


def test_nnx_state_is_refused():
    with pytest.raises(UserError, match="'calls' is not a parameter"):
        from_nnx(lambda rngs: Stack(rngs, count=True), arguments=inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_perceptron_follows_its_definition(bias):
    model = mlp.make(inputs=4, hidden=[6, 5], classes=3, bias=bias)
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    x = X.astype(np.float64)
    for i in range(3):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"layer_{i}"])
        x = x @ layer["kernel"] + (layer["bias"][None] if bias else 0)
        x = np.maximum(x, 0) if i < 2 else x
    output = model.apply(params, features(X.reshape(5, 2, 2)))
    assert output.head is None
    np.testing.assert_allclose(output.logits, x, rtol=1e-5, atol=1e-6)
    ranks = jax.tree.map(len, model.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == jax.tree.map(jnp.ndim, params)


def test_perceptron_sizes_are_checked():
    assert jax.eval_shape(mlp.make(inputs=4, hidden=[], classes=3).init, jax.random.key(0)).keys() == {"layer_0"}
    with pytest.raises(UserError, match=r"config\.model\.hidden=0"):
        mlp.make(inputs=4, hidden=[0], classes=3)
