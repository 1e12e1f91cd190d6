"""Soundness of interval arithmetic against networks evaluated in float64 NumPy, tightness, composition, refusals."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jaxcl.models.interval import Interval, bounds, layer_norm_bounds, standardise

QUICK = False  # radii of the size of rounding depend on it

SAMPLES = 48
EPSILON = float(np.float32(1e-3))


# Networks, each written for JAX and transcribed to float64 NumPy with a first axis of samples for every array.


def dense(p, x):
    return jnp.tanh(jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"])


def dense_oracle(p, x):
    return np.tanh(np.maximum(x @ p["a"] + p["b"][:, None], 0) @ p["c"])


def activations(p, x):
    y = x @ p["a"] + p["b"][None]
    functions = jax.nn.leaky_relu, jax.nn.silu, jax.nn.sigmoid, jax.nn.softplus, jax.nn.elu, jnp.abs, jnp.exp
    gelus = partial(jax.nn.gelu, approximate=False), jax.nn.gelu, lambda z: jax.nn.leaky_relu(z, 0.5), lambda z: z**3
    return jnp.concatenate([f(y) for f in (*functions, *gelus)], axis=-1)


def activations_oracle(p, x):
    y = x @ p["a"] + p["b"][:, None]
    root, cubic = float(np.float32(np.sqrt(2 / np.pi))), float(np.float32(0.044715))
    return np.concatenate(
        [
            np.where(y > 0, y, float(np.float32(0.01)) * y),
            y * special.expit(y),
            special.expit(y),
            np.logaddexp(y, 0),
            np.where(y > 0, y, np.expm1(np.minimum(y, 0))),
            np.abs(y),
            np.exp(y),
            0.5 * y * special.erfc(-y * float(np.float32(np.sqrt(0.5)))),
            0.5 * y * (1 + np.tanh(root * (y + cubic * y**3))),
            np.where(y > 0, y, 0.5 * y),
            y**3,
        ],
        axis=-1,
    )


def residual(p, x):
    y = x @ p["a"]
    for _ in range(2):
        y = y + jax.nn.relu(y @ p["d"])
    return y


def residual_oracle(p, x):
    y = x @ p["a"]
    for _ in range(2):
        y = y + np.maximum(y @ p["d"], 0)
    return y


def layer_norm(p, x):
    norm = nn.LayerNorm(epsilon=EPSILON)
    return norm.apply({"params": {"scale": p["b"], "bias": p["e"]}}, x @ p["a"])


def standard(p, x):
    return standardise(x @ p["a"], epsilon=EPSILON) * p["b"][None] + p["e"][None]


def norm_oracle(p, x):
    y = x @ p["a"]
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + EPSILON) * p["b"][:, None] + p["e"][:, None]


def batch_norm(p, x):
    norm = nn.BatchNorm(use_running_average=True, epsilon=EPSILON)
    statistics = {"mean": jnp.full(3, 0.3), "var": jnp.full(3, 0.7)}
    return norm.apply({"params": {"scale": p["b"], "bias": p["e"]}, "batch_stats": statistics}, x @ p["a"])


def batch_norm_oracle(p, x):
    mean, var = (float(np.float32(value)) for value in (0.3, 0.7))
    return (x @ p["a"] - mean) / np.sqrt(var + EPSILON) * p["b"][:, None] + p["e"][:, None]


def convolution(p, x):
    y = nn.Conv(3, (2, 2), padding="VALID").apply({"params": {"kernel": p["f"], "bias": p["b"]}}, x)
    return jnp.concatenate([nn.max_pool(y, (2, 2), (1, 1)), nn.avg_pool(jax.nn.relu(y), (2, 2), (1, 1))], axis=-1)


def windows(x, axes=(2, 3)):
    return np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=axes)


def convolution_oracle(p, x):
    y = np.einsum("sbhwcij,sijcd->sbhwd", windows(x), p["f"]) + p["b"][:, None, None, None]
    pooled = windows(y).max((-1, -2)), windows(np.maximum(y, 0)).mean((-1, -2))
    return np.concatenate(pooled, axis=-1)


FAMILIES = {
    "dense": (dense, dense_oracle),
    "activations": (activations, activations_oracle),
    "residual": (residual, residual_oracle),
    "layer_norm": (layer_norm, norm_oracle),
    "standardise": (standard, norm_oracle),
    "batch_norm": (batch_norm, batch_norm_oracle),
    "convolution": (convolution, convolution_oracle),
}
SHAPES = {"a": (4, 3), "b": (3,), "c": (3, 2), "d": (3, 3), "e": (3,), "f": (2, 2, 2, 3)}
USED = {"dense": "abc", "residual": "ad", "activations": "ab", "convolution": "fb"}


@cache
def bounded(family, outward):
    return jax.jit(bounds(FAMILIES[family][0], outward=outward))


def box(rng, family, radius, center=1.0):
    """Returns parameters and inputs as Intervals whose centres have any sign and whose radii vary from 0 on."""

    def one(shape):
        middle = (rng.normal(size=shape) * center).astype(np.float32)
        extent = (radius * rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32)
        return Interval(middle - extent, middle + extent)

    params = {name: one(SHAPES[name]) for name in USED.get(family, "abe")}
    return params, one((2, 3, 3, 2) if family == "convolution" else (2, 4))


def is_interval(x):
    return isinstance(x, Interval)


def sampled(rng, tree, samples=SAMPLES):
    """Returns float64 points of the box [samples, ...], half of the coordinates at an end."""

    def one(x):
        share = np.clip(rng.uniform(-0.5, 1.5, (samples, *x.lower.shape)), 0, 1)
        low, high = x.lower.astype(np.float64), x.upper.astype(np.float64)
        return np.where(share == 1, high, np.minimum(low + (high - low) * share, high))

    return jax.tree.map(one, tree, is_leaf=is_interval)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=200)
@given(seed=st.integers(0, 2**31), radius=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 3.0, 10.0]))
def test_bounds_hold_every_network_of_the_box(family, seed, radius):
    rng = np.random.default_rng(seed)
    arguments = box(rng, family, radius)
    exact = FAMILIES[family][1](*sampled(rng, arguments))
    outward, nearest = (jax.tree.map(np.asarray, bounded(family, o)(*arguments)) for o in (True, False))
    assert (outward.lower <= exact).all()  # float32 against float64, no tolerance
    assert (exact <= outward.upper).all()
    slack = 3e-5 * (1 + np.abs(exact).max())
    assert (nearest.lower - slack <= exact).all()
    assert (exact <= nearest.upper + slack).all()
    ulp = 2.0**-22  # a compiler may compute the tanh of one end twice, and not to the same last bit
    assert (nearest.lower <= nearest.upper + ulp * np.abs(nearest.upper)).all()
    assert (outward.lower <= outward.upper).all()
    if radius == 0.0 and family != "layer_norm":
        assert (nearest.upper - nearest.lower <= slack).all()
        assert (outward.upper - outward.lower <= 1e-3 * (1 + np.abs(exact).max())).all()


@pytest.mark.parametrize("plain", ["weights", "inputs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_hold_where_weights_or_inputs_are_plain(family, plain):
    rng, function = np.random.default_rng(0), toys.quick(bounds(FAMILIES[family][0], outward=True))
    for radius in (1e-6, 0.3, 3.0):
        given = list(box(rng, family, radius))
        side = ("weights", "inputs").index(plain)
        points = jax.tree.map(lambda x: x.lower, given[side], is_leaf=is_interval)
        given[side] = jax.tree.map(lambda x: Interval(x, x), points)
        exact = FAMILIES[family][1](*sampled(rng, tuple(given)))
        given[side] = points
        low, high = jax.device_get(function(*given))
        assert (low <= exact).all()  # no tolerance
        assert (exact <= high).all()


@pytest.mark.parametrize("family", ["residual", "convolution"])  # XLA's tanh is not monotone to the last bit
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.5, 0.999]))
def test_a_smaller_box_has_smaller_bounds(family, seed, share):
    rng = np.random.default_rng(seed)
    outer = box(rng, family, 0.5)

    def shrunk(x):
        low, high = np.float32(rng.random(x.lower.shape) * (1 - share) / 2), np.float32(1 - (1 - share) / 2)
        inner = np.sort([x.lower + low * (x.upper - x.lower), x.lower + high * (x.upper - x.lower)], axis=0)
        return Interval(*np.clip(inner, x.lower, x.upper))

    inner = jax.tree.map(shrunk, outer, is_leaf=is_interval)
    wide, narrow = bounded(family, False)(*outer), bounded(family, False)(*inner)
    assert (wide.lower <= narrow.lower).all()
    assert (narrow.upper <= wide.upper).all()


@pytest.mark.parametrize("sign", ["plain", "nonnegative", "one side"])
def test_bounds_of_a_product_are_attained(sign):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 3)).astype(np.float32)
    w = Interval(*np.sort(rng.normal(size=(2, 3, 1)).astype(np.float32), axis=0))
    if sign == "plain":
        y, ends = x, [x, x]
    else:  # an interval on one side of zero, of weights on both sides
        ends = [np.abs(x), np.abs(x) + 1] if sign == "nonnegative" else [-np.abs(x) - 1, -np.abs(x)]
        y = Interval(*ends)
    function = (lambda x, w: jax.nn.relu(x) @ w) if sign == "nonnegative" else jnp.matmul
    result = bounds(function)(y, w)
    picks = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    corners = [
        np.where(pick[:3], ends[1], ends[0]) @ np.where(pick[3:, None], w.upper, w.lower).astype(np.float64)
        for pick in picks
    ]
    np.testing.assert_allclose(result.lower, np.min(corners, axis=0), rtol=1e-6)
    np.testing.assert_allclose(result.upper, np.max(corners, axis=0), rtol=1e-6)


def test_a_nonnegative_operand_saves_products():
    w = Interval(jnp.zeros((3, 2)), jnp.ones((3, 2)))
    x = Interval(-jnp.ones((2, 3)), jnp.ones((2, 3)))

    def dots(function, *arguments):
        return str(jax.make_jaxpr(bounds(function))(*arguments)).count("dot_general[")

    assert dots(jnp.matmul, x, w) == 8
    assert dots(jnp.matmul, x.lower, w) == 4
    assert dots(lambda x, w: jax.nn.relu(x) @ w, x, w) == 4
    assert dots(lambda x, w: jax.nn.relu(x) @ w, x.lower, w) == 2
    assert dots(lambda x, w: jnp.concatenate([jnp.square(x), jnp.exp(x)]).reshape(4, 3) @ w, x.lower, w) == 2


UNARY = {
    "exp": (np.exp, -87, 88),
    "log": (np.log, 1e-37, 1e37),
    "log1p": (np.log1p, -0.99, 1e6),
    "expm1": (np.expm1, -20, 80),
    "tanh": (np.tanh, -12, 12),
    "logistic": (special.expit, -90, 90),
    "erf": (special.erf, -5, 5),
    "erfc": (special.erfc, -5, 9),
    "sqrt": (np.sqrt, 0, 1e37),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-37, 1e37),
    "square": (np.square, -1e18, 1e18),
    "cbrt": (np.cbrt, -1e3, 1e3),
    "asinh": (np.arcsinh, -1e3, 1e3),
    "atan": (np.arctan, -1e3, 1e3),
}


@pytest.mark.parametrize("name", UNARY)
def test_elementary_functions_are_bounded_outward(name):
    function, low, high = UNARY[name]
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, high, 50_000), np.exp(rng.uniform(-85, np.log(high), 50_000))])
    if low < 0:
        x = np.concatenate([x, -np.exp(rng.uniform(-85, np.log(-low), 20_000))])
    x = np.clip(x, low, high).astype(np.float32)
    x = x[(x >= low) & (x <= high)]
    result = jax.jit(bounds(getattr(jax.lax, name), outward=True))(Interval(x, x))
    exact = function(x.astype(np.float64))
    assert (np.asarray(result.lower, np.float64) <= exact).all()
    assert (exact <= np.asarray(result.upper, np.float64)).all()


def test_normalised_activations_are_bounded_outward():
    """Without scale and bias behind it, whose own rounding hides what is missing; to nearest, many are beyond."""
    x = (np.random.default_rng(0).normal(size=(500, 16)) * 10.0 ** np.arange(-2, 3).repeat(100)[:, None]).astype("f")
    wide = x.astype(np.float64)
    wide = wide - wide.mean(-1, keepdims=True)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + float(np.float32(EPSILON)))
    beyond = {}
    for outward in (True, False):
        found = jax.jit(bounds(lambda x: standardise(x, epsilon=EPSILON), outward=outward))(Interval(x, x))
        beyond[outward] = (np.asarray(found.lower) > exact).mean() + (np.asarray(found.upper) < exact).mean()
    assert beyond[True] == 0
    assert beyond[False] > 0.1


def test_narrower_types_are_bounded_outward():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=1000)
        found = {}
        for outward in (True, False):
            function = jax.jit(bounds(lambda x: x.astype(jnp.float32), outward=outward))
            found[outward] = [np.asarray(end, np.float64) for end in function(Interval(x, x))]
    assert (found[True][0] <= x).all()
    assert (x <= found[True][1]).all()
    assert (found[False][0] > x).any()


def test_long_sums_are_bounded_outward():
    """Terms that cancel, so that the rounding error of the sum is far beyond an ulp of the result."""
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(64, 4096)).astype(np.float32), rng.normal(size=(4096, 8)).astype(np.float32)
    exact = {"dot": x.astype(np.float64) @ w.astype(np.float64), "sum": x.astype(np.float64).sum(1, keepdims=True)}
    functions = {"dot": lambda x, w: x @ w, "sum": lambda x, w: x.sum(1, keepdims=True)}
    for name, function in functions.items():
        result = jax.jit(bounds(function, outward=True))(Interval(x, x), w)
        assert (np.asarray(result.lower, np.float64) <= exact[name]).all(), name
        assert (exact[name] <= np.asarray(result.upper, np.float64)).all(), name
        assert (np.asarray(result.upper) - np.asarray(result.lower) < 10).all(), name


def test_subnormal_numbers_are_not_lost():
    """Hardware that flushes them to zero must not make a bound too tight."""
    tiny = np.float32(1e-40)
    x = Interval(tiny.reshape(1), (tiny * 2).reshape(1))
    big = np.full(1, 1e30, np.float32)
    cases = {
        "product": (lambda x, y: x * y, 2.0 * tiny * 1e30),
        "dot": (jnp.dot, 2.0 * tiny * 1e30),
        "root": (lambda x, y: jnp.sqrt(x), np.sqrt(2.0 * float(tiny))),
        "quotient": (lambda x, y: x / (1 / y), 2.0 * tiny * 1e30),
    }
    for name, (function, exact) in cases.items():
        result = jax.jit(bounds(function, outward=True))(x, big)
        assert np.asarray(result.upper).item() >= exact, name
        assert np.asarray(result.lower).item() <= exact / 2, name


def test_where_nothing_is_known_bounds_are_infinite():
    x = Interval(jnp.float32(-1), jnp.float32(2))
    functions = (lambda x: 1 / x, jnp.log, lambda x: x**0.5 - jnp.exp(1e3 * x), lambda x: x**-1)
    for function in functions:
        result = bounds(function)(x)
        assert result.lower == -np.inf
        assert not jnp.isnan(result.upper)
    assert bounds(jax.lax.rsqrt)(x).upper == np.inf
    assert bounds(jax.lax.rsqrt)(x).lower == pytest.approx(0.5**0.5)
    assert tuple(bounds(jnp.sqrt)(x)) == (0, pytest.approx(2**0.5))
    assert tuple(bounds(lambda x: x * x)(x)) == (0, 4)
    assert tuple(bounds(lambda x: jnp.where(x > 0, x, -x))(x)) == (-2, 2)  # loose, both cases
    assert tuple(bounds(lambda x: jnp.where(x > -3, x, 9))(x)) == (-1, 2)  # decided


def structures(p, x):
    """Every remaining rule, in a function that is linear in p for a given x."""

    @jax.custom_vjp
    def twice(y):
        return 2 * y

    twice.defvjp(lambda y: (2 * y, None), lambda _, d: (2 * d,))

    def step(carry, row):
        return carry * x[0] + row, carry - row

    carry, rows = jax.lax.scan(step, jnp.zeros(3), p)
    kept = jax.checkpoint(lambda y: jnp.cumsum(y, axis=0))(p)
    pick = jax.lax.dynamic_slice(p, (jnp.int32(1), jnp.int32(0)), (2, 3)) + p[jnp.array([2, 0])]
    branch = jax.lax.cond(x[1] > 0, lambda y: y, lambda y: -y, p)
    parts = [
        carry[None],
        rows,
        twice(kept),
        pick,
        branch,
        jnp.pad(p, ((1, 0), (0, 0))),
        jnp.flip(p),
        -p,
        p.sum(0)[None],
    ]
    return jnp.concatenate([*parts, p @ p[:0].T @ jnp.ones((0, 3)), jnp.split(p, [1])[1]])


def test_loops_calls_and_structure():
    rng = np.random.default_rng(5)
    lower = rng.normal(size=(4, 3)).astype(np.float32)
    p = Interval(lower, lower + rng.random((4, 3), np.float32))
    x = jnp.array([-0.5, -1.0])
    for outward in (False, True):
        result = jax.jit(bounds(structures, outward=outward))(p, x)
        points = jnp.where(rng.random((4096, 4, 3)) < 0.5, jnp.asarray(p.lower)[None], jnp.asarray(p.upper)[None])
        values = np.asarray(jax.jit(jax.vmap(structures, (0, None)))(points, x))
        assert (result.lower - 1e-5 <= values.min(0)).all()
        assert (values.max(0) <= result.upper + 1e-5).all()
        tight = np.asarray(result.upper - result.lower) - np.ptp(values, axis=0)
        assert (tight[5:] < 1e-4).all()  # all but the loop attain their bounds


def test_layer_norm_bounds_are_those_of_the_function():
    rng = np.random.default_rng(1)
    x = Interval(*np.sort(rng.normal(size=(2, 3, 5)).astype(np.float32), axis=0))
    scale = Interval(*np.sort(rng.normal(size=(2, 5)).astype(np.float32), axis=0))
    bias = rng.normal(size=5).astype(np.float32)
    result = layer_norm_bounds(x, 1e-3, scale, bias)
    same = bounds(lambda x, scale: standardise(x, epsilon=1e-3) * scale[None] + bias[None])(x, scale)
    np.testing.assert_allclose(result, same, rtol=1e-6, atol=1e-6)
    points = sampled(rng, (x, scale))
    assert (np.asarray(result.lower) <= 1e-5 + normalised(points, bias)).all()
    assert (normalised(points, bias) <= 1e-5 + np.asarray(result.upper)).all()


def normalised(points, bias):
    y, scale = points
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + EPSILON) * scale[:, None] + bias


standardised = jax.jit(bounds(standardise))
standardised_parts = jax.jit(
    bounds(lambda y: (y - y.mean(1, keepdims=True)) / jnp.sqrt(y.var(1, keepdims=True) + 1e-6))
)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), radius=st.sampled_from([2**-10, 0.125, 1.0, 1024.0]))
def test_standardise_is_tight(seed, radius):
    """Never beyond sqrt(n - 1), attained by two elements away from zero, and within the bounds of its parts."""
    rng = np.random.default_rng(seed)
    middle = np.round(rng.normal(size=(4, 2)) * 64).astype(np.float32) / 64  # so that differences are exact
    x = Interval(middle - radius, middle + radius)
    result = [np.asarray(end) for end in standardised(x)]
    assert (np.abs(result) <= 1 + 1e-6).all()
    gap = np.stack([x.lower[:, 0] - x.upper[:, 1], x.upper[:, 0] - x.lower[:, 1]]) / 2
    attained = gap / np.sqrt(gap**2 + np.float32(1e-6))
    # Where the sign is certain, the end next to zero is loose: the other element is then taken at its own largest.
    away = np.stack([attained[0] < 0, attained[1] > 0])
    np.testing.assert_allclose(np.stack(result)[:, :, 0][away], attained[away], rtol=1e-5, atol=1e-6)
    wide = Interval(*(np.tile(end, (1, 4)) for end in x))
    parts, whole = standardised_parts(wide), standardised(wide)
    assert (parts.lower <= whole.lower + 1e-5).all()
    assert (whole.upper <= parts.upper + 1e-5).all()


def test_a_function_of_the_same_name_is_not_taken_for_another():
    @jax.jit
    def relu(x):
        return -jnp.maximum(x, 0)

    @jax.jit
    def standardise(x):
        return -x

    x = Interval(jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0]))
    for function in (relu, lambda y: -relu(-standardise(y)) * -1):
        np.testing.assert_array_equal(bounds(function)(x), [[-3, 0], [-1, 0]])
