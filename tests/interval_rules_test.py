"""Rules of interval arithmetic that networks rarely touch: comparisons, and how much rounding is allowed for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.interval import Interval, bounds, products
from jaxcl.models.interval.span import dot_error

QUICK = True

COMPARISONS = {name: getattr(jax.lax, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("plain", ["neither", "left", "right"])
def test_comparisons_are_decided_where_all_points_agree(name, plain):
    """Of every pair of intervals between 0, 1 and 2, some of which touch, overlap or are points."""
    pairs = np.array([(a, b) for a in range(3) for b in range(a, 3)], np.float32)
    points = np.array([(a, a) for a in range(3)], np.float32)
    left, right = (points if plain == side else pairs for side in ("left", "right"))
    both = [x.reshape(-1, 2) for x in np.broadcast_arrays(left[:, None], right[None])]
    given = [x[:, 0] if plain == side else Interval(*x.T) for side, x in zip(("left", "right"), both, strict=True)]
    compare = COMPARISONS[name]
    low, high = bounds(lambda a, b: jnp.where(compare(a, b), 1.0, 0.0))(*given)
    grid = np.arange(0, 2.25, 0.25)
    x, y = (np.where((grid >= z[:, :1]) & (grid <= z[:, 1:]), grid, z[:, :1]) for z in both)  # points of each
    found = np.asarray(compare(x[:, :, None], y[:, None]))
    np.testing.assert_array_equal(low, found.all((1, 2)))
    np.testing.assert_array_equal(high, found.any((1, 2)))


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
KINDS = {"any sign": False, "nonnegative": True}


@pytest.mark.parametrize("plain", ["neither", "left", "right"])
@pytest.mark.parametrize("signs", [(a, b) for a in KINDS for b in KINDS], ids=", ".join)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_is_bounded_outward(name, signs, plain):
    """Every branch of signs against float64, no tolerance; and little more than that."""
    rng = np.random.default_rng(0)
    known = [KINDS[sign] for sign in signs]
    size = rng.uniform(1, 2, (2, 1000)) * 10.0 ** rng.integers(-9, 2, (2, 1000))
    size = size * np.where(np.array(known)[:, None], 1, rng.choice([-1, 1], (2, 1000)))
    size[:, 0] = 1, 1e-9
    ends = np.sort([size, size * rng.choice([1, 1.5], (2, 1000))], axis=0).astype("f").transpose(1, 0, 2)
    fixed = [side == plain for side in ("left", "right")]
    given = [x[0] if one else Interval(*x) for x, one in zip(ends, fixed, strict=True)]

    def function(*values):
        return getattr(jax.lax, name)(*(jnp.abs(x) if one else x for x, one in zip(values, known, strict=True)))

    low, high = (np.asarray(end, "d") for end in bounds(function, outward=True)(*given))
    left, right = (x[:1] if one else x for x, one in zip(ends.astype("d"), fixed, strict=True))
    corners = np.stack([BINARY[name](a, b) for a in left for b in right])
    assert (low <= corners).all()
    assert (corners <= high).all()
    room = 1e-6 * np.abs(corners).max(0) + 1e-30
    assert (low >= corners.min(0) - room).all()
    assert (high <= corners.max(0) + room).all()


SHIFTED = {
    "sub": lambda y: y - 1,
    "sub of two": lambda y: y - 2 * y[::-1],
    "neg": lambda y: -y,
    "log": lambda y: jnp.log(y + 0.1),
    "add": lambda y: y + jnp.float32(-1),
    "mul": lambda y: y * jnp.float32(-1),
    "div": lambda y: y / jnp.float32(-1),
    "min": lambda y: jnp.minimum(y, -0.5),
    "clamp": lambda y: jnp.clip(y, -1, -0.5),
    "select_n": lambda y: jnp.where(y > 0.5, -1.0, y),
    "pad": lambda y: jnp.pad(y, ((0, 0), (0, 1)), constant_values=-1)[:, 1:],
}


@pytest.mark.parametrize("name", SHIFTED)
def test_what_may_have_become_negative_is_not_taken_for_nonnegative(name):
    """Of plain numbers behind a ReLU; a product with weights of any sign then needs both of their ends."""
    rng, shifted = np.random.default_rng(0), SHIFTED[name]
    x, w = rng.normal(size=(4, 3)).astype("f"), Interval(-jnp.ones((3, 2)), jnp.ones((3, 2)))
    every = np.asarray(shifted(jax.nn.relu(x))) @ rng.choice([-1, 1], (50, 3, 2))
    for outward in (False, True):
        low, high = jax.device_get(bounds(lambda x, w: shifted(jax.nn.relu(x)) @ w, outward=outward)(x, w))
        assert (low - 1e-5 <= every).all()
        assert (every <= high + 1e-5).all()


@pytest.mark.parametrize(
    ("function", "shapes", "terms"),
    [
        (lambda x, w: x @ w, ((2, 7), (7, 3)), 7),
        (lambda x, w: jnp.einsum("abc,bdc->ad", x, w), ((2, 5, 3), (5, 4, 3)), 15),
        (lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), ((1, 4, 9, 9), (6, 4, 3, 5)), 4 * 3 * 5),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=2),
            ((1, 4, 9, 9), (6, 2, 3, 5)),
            2 * 3 * 5,
        ),
        (lambda x, _: x.sum((0, 2)), ((4, 5, 6), ()), 24),
        (lambda x, _: jnp.cumsum(x, 1), ((4, 5, 6), ()), 5),
        (lambda x, _: nn.avg_pool(x, (2, 3), (2, 3)), ((1, 4, 6, 2), ()), 6),
    ],
)
def test_rounding_of_every_term_of_a_sum_is_counted(monkeypatch, function, shapes, terms):
    """Rounding errors of few terms hide in the room that is left, so that no sum shows whether all were counted."""
    counted, error = [], products.dot_error
    monkeypatch.setattr(products, "dot_error", lambda n, dtype: counted.append(n) or error(n, dtype))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    jax.eval_shape(lambda low, high, w: bounds(function, outward=True)(Interval(low, high), w), x, x, w)
    assert terms in counted


@pytest.mark.parametrize("terms", [1, 100, 100_000])
def test_the_error_of_a_sum_is_that_of_higham(terms):
    """gamma_n, for magnitudes that are rounded themselves; and not much more."""
    unit = 2.0**-24
    gamma = terms * unit / (1 - terms * unit)
    room = dot_error(terms, jnp.float32)
    assert gamma / (1 - gamma) <= room <= 3 * gamma + 100 * unit
