"""Intervals through whole models: composition with jit, grad and vmap, bit-equality of plain values, refusals."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import cnn, mlp
from jaxcl.models.bridge import from_linen
from jaxcl.models.interval import Interval, bounds, check_rows, interval
from jaxcl.schema import UserError
from jaxcl.types import Batch

MODELS = {
    "mlp": mlp.make(inputs=16, hidden=[5], classes=3),
    "max": cnn.make(inputs=(4, 4, 1), channels=[2], hidden=[3], classes=3),
    "mean, residual": cnn.make(inputs=(4, 4, 1), channels=[2, 2], hidden=[], classes=3, pool="mean", residual=True),
}


def batch(inputs):
    rows = jnp.zeros(inputs.shape[0], jnp.int32)
    return Batch(inputs, rows, jnp.ones(rows.shape), rows, rows, rows)


def inputs(rows=2):
    return jax.random.normal(jax.random.key(9), (rows, 16))


def around(tree, radius):
    return jax.tree.map(lambda x: Interval(x - radius, x + radius), tree)


def dense(scale, x):
    return jnp.tanh(jax.nn.relu(x * scale) @ jnp.array([[1.0, -2.0], [3.0, 0.5]]))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_are_bounded(name):
    model, key = MODELS[name], jax.random.key(0)
    params, x = model.init(key), inputs()
    bounded = interval(model)
    assert bounded.axes == model.axes
    jax.tree.map(np.testing.assert_array_equal, bounded.init(key), params)
    shares = jax.random.randint(key, (256,), 0, 2**30)

    def sample(seed):
        def one(value):
            share = jax.random.bernoulli(jax.random.key(seed), shape=value.lower.shape)
            return jnp.where(share, value.upper, value.lower)

        box = (around(params, 0.05), around(x, 0.01))
        params_, x_ = jax.tree.map(one, box, is_leaf=lambda value: isinstance(value, Interval))
        return model.apply(params_, batch(x_)).logits

    values = np.asarray(jax.jit(jax.vmap(sample))(shares))
    boxed = dataclasses.replace(batch(x), inputs=around(x, 0.01))
    output = jax.jit(bounded.apply)(around(params, 0.05), boxed)
    assert isinstance(output.hidden, Interval)
    assert output.head is None
    lower, upper = (np.asarray(end) for end in output.logits)
    assert (lower <= values + 1e-5).all()
    assert (values <= upper + 1e-5).all()
    assert (upper - lower < 100 * np.ptp(values, axis=0)).all()


@pytest.mark.parametrize("name", MODELS)
def test_plain_values_go_through_bit_by_bit(name):
    model = MODELS[name]
    params = model.init(jax.random.key(1))
    expected = jax.jit(lambda params: model.apply(params, batch(inputs())).logits)(params)
    for outward in (False, True):
        logits = jax.jit(interval(model, outward=outward).apply)(params, batch(inputs())).hidden
        np.testing.assert_array_equal(logits, expected)
    # Of two results the one that depends on no interval stays plain.
    box = Interval(jnp.float32(0), jnp.float32(1))
    for outward in (False, True):
        both = bounds(lambda x, y: {"x": x + 1, "y": jnp.exp(y) / 3, "n": jnp.arange(2)}, outward=outward)(
            box, jnp.float32(2)
        )
        assert isinstance(both["x"], Interval)
        assert both["y"] == jnp.exp(jnp.float32(2)) / 3
        np.testing.assert_array_equal(both["n"], [0, 1])


def test_ends_that_are_equal_give_the_plain_logits():
    model = MODELS["max"]
    params = model.init(jax.random.key(1))
    expected = model.apply(params, batch(inputs())).logits
    lower, upper = interval(model).apply(around(params, 0.0), batch(inputs())).logits
    np.testing.assert_allclose(lower, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(upper, expected, rtol=1e-5, atol=1e-6)

    def plain(params):
        return jnp.sum(model.apply(params, batch(inputs())).logits ** 2)

    def middle(params):
        low, high = interval(model).apply(around(params, 0.0), batch(inputs())).hidden
        return jnp.sum(((low + high) / 2) ** 2)

    for a, b in zip(*(jax.tree.leaves(jax.grad(f)(params)) for f in (plain, middle)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_it_composes_with_jit_grad_and_vmap():
    scale = Interval(jnp.array([[0.3, -0.4]]), jnp.array([[0.5, -0.2]]))
    x = jnp.array([[1.0, -0.7], [-0.2, 0.9]])

    def loss(lower, upper, x):
        low, high = bounds(dense)(Interval(lower, upper), x)
        return jnp.sum(high**2 - low)

    whole = bounds(dense)(scale, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.jit(bounds(dense))(scale, x), whole)
    rows = jax.vmap(bounds(dense), in_axes=(None, 0))(scale, x[:, None])
    np.testing.assert_allclose(rows.lower[:, 0], whole.lower, rtol=1e-6)
    np.testing.assert_allclose(rows.upper[:, 0], whole.upper, rtol=1e-6)
    for outward in (False, True):  # the result of a transform is a function like any other
        jitted = bounds(jax.jit(lambda s, y: jax.vmap(lambda row: dense(s, row[None])[0])(y)), outward=outward)(
            scale, x
        )
        np.testing.assert_allclose(jitted.lower, whole.lower, atol=1e-5)
    slopes = jax.grad(loss, argnums=(0, 1, 2))(*scale, x)
    for i, slope in enumerate(slopes):
        arguments = [*scale, x]
        for j in np.ndindex(slope.shape):
            h = 1e-2
            up, down = (loss(*arguments[:i], arguments[i].at[j].add(s * h), *arguments[i + 1 :]) for s in (1, -1))
            assert float(slope[j]) == pytest.approx(float(up - down) / (2 * h), abs=3e-3), (i, j)
    assert float(jnp.abs(slopes[0]).max()) > 0.1


def test_refusals():
    x = Interval(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(UserError, match=r"primitive 'sin'.*no interval rule.*rewrite"):
        bounds(jnp.sin)(x)
    with pytest.raises(UserError, match="primitive 'argmax'"):
        bounds(jnp.argmax)(x)
    with pytest.raises(UserError, match="result is bool and depends on an Interval"):
        bounds(lambda y: y > 0.5)(x)
    with pytest.raises(UserError, match="an Interval cannot become int32"):
        bounds(lambda y: y.astype(jnp.int32))(x)
    with pytest.raises(UserError, match="depends on an Interval"):
        bounds(lambda y: jax.lax.switch(jnp.where(y[0] > 0.5, 1, 0), [lambda: 1.0, lambda: 2.0]))(x)
    with pytest.raises(UserError, match="exponent is an Interval"):
        bounds(lambda y: jnp.float32(2) ** y)(x)
    with pytest.raises(UserError, match=r"lower is float32\[2\], upper float32\[1\]"):
        bounds(jnp.exp)(Interval(jnp.zeros(2), jnp.ones(1)))
    with pytest.raises(UserError, match="only float arrays"):
        bounds(jnp.exp)(Interval(jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32)))
    with pytest.raises(UserError, match="no error bound for bfloat16"):
        bounds(lambda y: y * y, outward=True)(x.astype(jnp.bfloat16))
    with pytest.raises(UserError, match="key-value cache"):
        interval(MODELS["mlp"]).apply({}, batch(inputs()), cache={})


def test_what_no_interval_reaches_needs_no_rule():
    x = Interval(jnp.zeros(2), jnp.ones(2))

    def function(y, plain):
        jnp.argmax(y)  # of which nothing is returned
        return y * jnp.sin(plain)

    assert isinstance(bounds(function)(x, jnp.ones(2)), Interval)
    with pytest.raises(UserError, match="primitive 'sin'"):  # its rounding error is not known
        bounds(function, outward=True)(x, jnp.ones(2))


class Normalised(nn.Module):
    """One layer after a normalisation by the statistics of the batch, or of each row."""

    rows: bool

    @nn.compact
    def __call__(self, x):
        axis = -1 if self.rows else 0
        return nn.Dense(3)((x - x.mean(axis, keepdims=True)) / (x.std(axis, keepdims=True) + 1e-3))


def test_rows_must_not_mix():
    mixing, apart = (from_linen(Normalised(rows), batch(inputs()), arguments=lambda b: (b.inputs,)) for rows in (0, 1))
    params = mixing.init(jax.random.key(0))
    with pytest.raises(UserError, match=r"mixes the rows of a batch .*use_running_average=True"):
        check_rows(mixing, params, batch(inputs(4)))
    check_rows(apart, params, batch(inputs(4)))
    for model in MODELS.values():
        check_rows(model, model.init(jax.random.key(0)), batch(inputs(4)))
    with pytest.raises(UserError, match="at least two"):
        check_rows(apart, params, batch(inputs(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, r"model\.classes=0: must be at least 1"),
        ({"channels": [4, 0]}, r"model\.channels=0: must be at least 1"),
        ({"inputs": (28, 28)}, r"must be height, width and channels"),
        ({"inputs": (3, 28, 1)}, r"2 stages need height and width of at least 4"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        cnn.make(**options)


def test_the_convolutional_network_is_what_it_says():
    model = cnn.make(inputs=(5, 4, 2), channels=[3], hidden=[4], classes=2, pool="mean", residual=True)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    assert sorted(params) == ["conv_0", "layer_0", "layer_1", "residual_0"]
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 40)))

    def convolved(y, p):
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return np.maximum(np.einsum("bhwcij,ijcd->bhwd", windows, p["kernel"]) + p["bias"], 0)

    y = convolved(x.reshape(2, 5, 4, 2), params["conv_0"])
    y = y + convolved(y, params["residual_0"])
    y = y[:, :4].reshape(2, 2, 2, 2, 2, 3).mean((2, 4)).reshape(2, -1)
    y = np.maximum(y @ params["layer_0"]["kernel"] + params["layer_0"]["bias"], 0)
    y = y @ params["layer_1"]["kernel"] + params["layer_1"]["bias"]
    np.testing.assert_allclose(model.apply(params, batch(jnp.asarray(x))).logits, y, rtol=1e-4, atol=1e-5)


def test_ends_that_cross_are_refused():
    crossed = Interval(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.5]))
    with pytest.raises(UserError, match="lower is above upper in 1 of 2 places; a radius must not be negative"):
        bounds(jax.nn.relu)(crossed)
    point = Interval(jnp.ones(2), jnp.ones(2))
    assert (bounds(jax.nn.relu)(point).lower == 1).all()
