"""Affine forms through functions and networks: they hold every value, against float64, and are exact where they say."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl.models import cnn, mlp, patches
from jaxcl.models.interval import Form, Interval, affine_bounds, bounds
from jaxcl.models.interval.span import Span
from jaxcl.schema import UserError

QUICK = True
K, S, SAMPLES, ROWS = 3, 5, 300, 4
MODELS = {
    "linear": mlp.make(inputs=16, hidden=[], classes=3),
    "mlp": mlp.make(inputs=16, hidden=[6, 5], classes=3),
    "max": cnn.make(inputs=(4, 4, 1), channels=[2], hidden=[3], classes=3),
    "mean, residual": cnn.make(inputs=(4, 4, 1), channels=[2, 2], hidden=[], classes=3, pool="mean", residual=True),
    "patches": patches.make(side=4, filters=7, classes=3, window=2, threshold=0.2, hidden=(4,)),
}


def drawn(shape, rng, size):
    """Returns a form of this shape and all it is made of, in float64."""
    centre, slope = rng.normal(size=shape).astype("f"), (size * rng.normal(size=(*shape, K))).astype("f")
    return centre, slope


def of(centre, slope, generators):
    """Returns the form, with bounds by interval arithmetic of its own."""
    reach = np.abs(slope @ generators.T).sum(-1).astype("f")
    mass = (np.abs(slope) @ np.abs(generators).sum(0)).astype("f")
    ends = Interval(centre - mass - 1e-4 * mass, centre + mass + 1e-4 * mass)
    return Form.of(*map(jnp.asarray, (centre, slope, reach, mass)), jax.tree.map(jnp.asarray, ends), S)


def symbols(rng, count=SAMPLES):
    """Returns values of the symbols, [count, S]: half of them corners."""
    found = rng.uniform(-1, 1, (count, S))
    found[::2] = np.sign(found[::2])
    return found


def over(slope, d):
    """Returns slope d of many d [count, K], [count, ...]."""
    return np.tensordot(d, slope.astype("d"), (1, -1))


def margins(apply, params, rows):
    """Returns how far the logit of the target is above every logit, [B, V]."""
    logits = apply(params, rows).hidden
    return jnp.take_along_axis(logits, rows.targets[:, None], axis=-1) - logits


@functools.cache
def bounded(name):
    """Returns bounds of the margins of a network by both arithmetics, and those margins of many networks."""
    model = MODELS[name]
    fixed = {key: value for key, value in model.init(jax.random.key(0)).items() if key == "filters"}

    def own(params, rows):
        return margins(model.apply, {**params, **fixed}, rows)

    def run(forms, generators, rows):
        ends = jax.tree.map(lambda x: Interval(*x.span.ends), forms, is_leaf=lambda x: isinstance(x, Form))
        return affine_bounds(own, generators)(forms, rows), bounds(own)(ends, rows)

    return toys.quick(run), toys.quick(jax.vmap(own, (0, None)))


@pytest.mark.parametrize("name", MODELS)
def test_margins_of_all_networks_are_bounded(name):
    """Also by rounding: every network is evaluated in float64, and nothing is allowed for."""
    rng, (both, plain) = np.random.default_rng(3), bounded(name)
    params = jax.device_get(MODELS[name].init(jax.random.key(0)))
    params.pop("filters", None)
    rows = toys.points(rng.normal(size=(ROWS, 16)).astype("f"), np.array([0, 1, 2, 0], "i"))
    for size, most in ((0.004, 0.5), (0.02, 0.5), (0.1, 0.8)):
        generators = rng.normal(size=(S, K)).astype("f")
        slopes = jax.tree.map(lambda x, size=size: (size * rng.normal(size=(*x.shape, K))).astype("f"), params)
        forms = jax.tree.map(lambda c, s, g=generators: of(c, s, g), params, slopes)
        (low, high), box = jax.device_get(both(forms, generators, rows))
        d = symbols(rng) @ generators.astype("d")
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda c, s, d=d: c.astype("d") + over(s, d), params, slopes)
            every = np.asarray(plain(wide, rows))
        assert every.dtype == np.float64
        assert (every >= low[None]).all()
        assert (every <= high[None]).all()
        assert np.ptp(every, axis=0).sum() > (0.2 if size < 0.01 else 0.001) * (high - low).sum()
        assert (high - low).sum() < most * (box.upper - box.lower).sum()


def test_a_linear_network_is_bounded_exactly():
    """What two logits share cancels, which boxes cannot know."""
    rng = np.random.default_rng(0)
    generators = rng.normal(size=(S, K)).astype("f")
    rows = toys.points(rng.normal(size=(ROWS, 16)).astype("f"), np.array([0, 1, 2, 0], "i"))
    layer = {"kernel": drawn((16, 3), rng, 0.3), "bias": drawn((3,), rng, 0.3)}
    layer["kernel"][1][:] += 2 * rng.normal(size=(16, 1, K)).astype("f")  # the same for all three logits
    forms = {"layer_0": {part: of(*one, generators) for part, one in layer.items()}}
    (low, high), box = bounded("linear")[0](forms, generators, rows)
    x = np.asarray(rows.inputs, np.float64)
    centre, slope = (
        np.tensordot(x, layer["kernel"][i].astype("d"), (1, 0)) + layer["bias"][i].astype("d") for i in (0, 1)
    )
    own = np.arange(ROWS), np.asarray(rows.targets)
    centre, slope = centre[own][:, None] - centre, slope[own][:, None] - slope
    far = np.abs(slope @ generators.T.astype("d")).sum(-1)
    np.testing.assert_allclose(low, centre - far, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(high, centre + far, rtol=1e-4, atol=1e-2)
    assert (np.asarray(low) - np.asarray(box.lower)).max() > 10


X = np.random.default_rng(8).normal(size=(4, 4)).astype("f")
MASK = X > 0
FUNCTIONS = {  # of two forms [4, 4]: (function, whether the bounds are those of a linear function)
    "sum": (lambda a, b: a + b - 2.0 * b, True),
    "nothing": (lambda a, b: a - a + 0.0 * b, True),
    "shapes": (lambda a, b: jnp.concatenate([a.T, b[::-1], jnp.ones((1, 4))]).reshape(3, 12)[:, 1:], True),
    "padded": (lambda a, b: jnp.pad(a, 1, constant_values=2.0), True),
    "chosen": (lambda a, b: jnp.where(MASK, a, b)[jnp.array([0, 2])], True),
    "products with numbers": (lambda a, b: (X @ a - b @ X) / (1 + jnp.abs(X)), True),
    "totals": (lambda a, b: a.sum(0) + jnp.cumsum(b, 1)[0], True),
    "pooled": (lambda a, b: jax.lax.reduce_window(a, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4, True),
    "products": (lambda a, b: a @ b + a * b, False),
    "squares": (lambda a, b: a * a - b**2, False),
    "largest": (lambda a, b: jnp.maximum(a, X) + jnp.maximum(0.25, b), False),
    "relu": (lambda a, b: jax.nn.relu(a) - jax.nn.relu6(3 * b), False),
    "leaky": (lambda a, b: jax.nn.leaky_relu(a) + jnp.maximum(a, b), False),
    "curves": (lambda a, b: jnp.tanh(a) * jax.nn.sigmoid(b) + jax.nn.silu(a), False),
    "quotient": (lambda a, b: a / (jnp.exp(b) + 1), False),
    "unbounded": (lambda a, b: jnp.minimum(a / b, 7.0) + a, False),
    "remat": (lambda a, b: jax.checkpoint(lambda x: jnp.exp(x) @ X)(a) + b, False),
    "scanned": (lambda a, b: jax.lax.scan(lambda c, row: (c + row, c), a[0], b)[1], False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_of_functions_are_bounded(name):
    rng, (function, linear) = np.random.default_rng(1), FUNCTIONS[name]
    generators = rng.normal(size=(S, K)).astype("f")
    parts = [drawn((4, 4), rng, 0.1) for _ in range(2)]
    found = toys.quick(affine_bounds(function, generators))(*(of(*x, generators) for x in parts))
    low, high = jax.device_get(found)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=S)))
    d = (corners if linear else symbols(rng, 2000)) @ generators.astype("d")
    with jax.enable_x64(True):
        wide = [c.astype("d")[None] + over(s, d) for c, s in parts]
        every = np.asarray(toys.quick(jax.vmap(function))(*wide))
    assert every.dtype == np.float64
    assert (every >= low[None]).all()
    assert (every <= high[None]).all()
    if linear:
        np.testing.assert_allclose(low, every.min(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(high, every.max(0), rtol=1e-4, atol=1e-4)
    elif name != "unbounded":
        assert np.isfinite(low).all()
        assert np.isfinite(high).all()


@pytest.mark.parametrize("other", [lambda b: b, jax.nn.relu], ids=["one", "both"])
def test_products_of_forms_with_room_are_bounded(other):
    """A ReLU leaves room that has no symbol: that of both factors counts; intervals are too wide to make up for it."""
    rng = np.random.default_rng(2)
    generators = rng.normal(size=(2, 2)).astype("f")
    parts = [(rng.normal(size=60).astype("f"), rng.normal(size=(60, 2)).astype("f")) for _ in range(2)]
    wide = Interval(jnp.full(60, -50.0), jnp.full(60, 50.0))
    forms = [dataclasses.replace(of(*one, generators), span=Span(*wide)) for one in parts]
    low, high = jax.device_get(affine_bounds(lambda a, b: jax.nn.relu(a) * other(b), generators)(*forms))
    grid = np.linspace(-1, 1, 41)
    d = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2) @ generators.astype("d")
    a, b = (c.astype("d") + over(s, d) for c, s in parts)
    every = np.maximum(a, 0) * np.asarray(np.maximum(b, 0) if other is jax.nn.relu else b)
    assert (every >= low).all()
    assert (every <= high).all()


@pytest.mark.parametrize("name", ["mlp", "max", "patches"])
def test_rounding_is_covered_and_little_more(name):
    """Without any unknown the bounds are those of one network, which float32 does not hit."""
    rng, (both, plain) = np.random.default_rng(5), bounded(name)
    params = jax.device_get(MODELS[name].init(jax.random.key(1)))
    params.pop("filters", None)
    rows = toys.points(rng.normal(size=(ROWS, 16)).astype("f"), np.array([0, 1, 2, 0], "i"))
    generators = np.zeros((S, K), "f")
    forms = jax.tree.map(lambda c: of(c, np.ones((*c.shape, K), "f"), generators), params)
    low, high = jax.device_get(both(forms, generators, rows)[0])
    with jax.enable_x64(True):
        every = np.asarray(plain(jax.tree.map(lambda c: c.astype("d")[None], params), rows))[0]
    assert (low <= every).all()
    assert (every <= high).all()
    assert (high - low).max() < 3e-3
    middle = np.float32(low / 2 + high / 2)
    assert (middle != every).any()


def test_sums_may_be_wrong_by_what_float32_allows(monkeypatch):
    """What is given of many symbols, and what is summed later, as far off as sums in an unlucky order can be."""
    rng, many = np.random.default_rng(6), 3000
    centre, slope = drawn((4,), rng, 1.0)
    generators = rng.normal(size=(many, K)).astype("f")
    far = np.abs(slope.astype("d") @ generators.T.astype("d")).sum(-1)
    mass = np.abs(slope.astype("d")) @ np.abs(generators.astype("d")).sum(0)
    unlucky = 0.9 * (many + K) * float(np.finfo(np.float32).eps) / 2

    def short(weight, generators):
        exact = jnp.sum(jnp.abs(weight @ generators.T), 1)
        return exact - unlucky * jnp.abs(weight) @ jnp.sum(jnp.abs(generators), 0)

    monkeypatch.setattr("jaxcl.kernels.boxes.row_sums", short)
    wide = Interval(*(jnp.asarray(centre + side * 2 * mass, jnp.float32) for side in (-1, 1)))
    given = (jnp.float32(x) for x in (centre, slope, far - unlucky * mass, mass * (1 - unlucky)))
    one = Form.of(*given, wide, many)
    for function, scale in ((lambda x: x, 1.0), (lambda x: x + x, 2.0)):
        low, high = jax.device_get(affine_bounds(function, jnp.asarray(generators))(one))
        assert (low <= scale * (centre - far)).all()
        assert (high >= scale * (centre + far)).all()
        assert (high - low < 2.01 * scale * far).all()


def test_long_sums_hold_the_exact_sum():
    """Terms that cancel, of which interval arithmetic is told nothing: the room for rounding is that of the form."""
    rng = np.random.default_rng(7)
    centre, w = rng.normal(size=(64, 2048)).astype("f"), rng.normal(size=2048).astype("f")
    zero, nothing = jnp.zeros((64, 2048)), jnp.full((64, 2048), jnp.inf)
    one = Form.of(jnp.asarray(centre), jnp.zeros((64, 2048, K)), zero, zero, Interval(-nothing, nothing), S)
    for function, factor in ((lambda x: x.sum(1), 1.0), (lambda x: x @ w, w)):
        low, high = jax.device_get(affine_bounds(function, jnp.ones((S, K)))(one))
        exact = (centre.astype("d") * factor).sum(1)
        assert (low <= exact).all()
        assert (exact <= high).all()
        assert (high - low < 10).all()


def test_what_has_no_rule_is_refused():
    generators = np.ones((S, K), "f")
    one = of(*drawn((2,), np.random.default_rng(0), 0.1), generators)
    with pytest.raises(UserError, match="primitive 'sin'"):
        affine_bounds(jnp.sin, generators)(one)
