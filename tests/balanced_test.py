"""AIR and AEF-OCL against float64 transcriptions: nothing but sums is kept, and rare classes are learned."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import compose
from jaxcl.kernels.ridge import pair
from jaxcl.methods import aef_ocl, air
from jaxcl.random import named
from jaxcl.ridge import classes as spreads
from jaxcl.ridge import expected, moments
from jaxcl.schema import UserError
from jaxcl.types import Batch

QUICK = True
B, D, C = 16, 4, 4
GAMMA = 0.37
RELU, PLAIN = {"expansion": "relu", "width": 9}, {"expansion": "none", "width": None}


def wide(pair):
    return np.asarray(pair.high, np.float64) + np.asarray(pair.low, np.float64)


def batch(x, labels, weights=None):
    n = len(labels)
    weights = np.ones(n) if weights is None else weights
    whole = jnp.zeros(n, jnp.int32)
    return Batch(jnp.float32(x), jnp.int32(labels), jnp.float32(weights), whole + 1, whole, whole)


def tasks(counts, seed=0, offset=1.0):
    """Rows [N, D] and labels of the tasks, each a list of classes with their numbers of rows."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((C, D)) + offset
    found = []
    for task in counts:
        labels = rng.permutation(np.concatenate([np.full(n, c) for c, n in task.items()]))
        found.append((centre[labels] + 0.7 * rng.standard_normal((len(labels), D)) * (1 + labels[:, None]), labels))
    return found


class Built(typing.NamedTuple):
    """A method, what it was made for and where it begins."""

    method: typing.Any  # its functions are compiled
    setting: compose.Setting
    params: typing.Any


@functools.cache
def model(adapter):
    setting = toys.solved(features=D, labels=C, **(dict(adapter) or RELU))
    return setting, toys.quick(setting.model.init)(jax.random.key(7))


@functools.cache
def made_of(name, adapter, options):
    setting, params = model(adapter)
    method = compose.make([{"name": name, **dict(options)}], setting)
    return Built(type(method)(*map(toys.quick, method)), setting, params)


def built(name, adapter=None, **options):
    return made_of(name, tuple((adapter or {}).items()), tuple(options.items()))


def trained(made, stream, size=B):
    """Returns the state after the tasks, in batches filled with padding of weight 0, and the sums of all metrics."""
    init, step, end = made.method
    state, told = init(made.params), {}
    for x, labels in stream:
        for start in range(0, len(labels), size):
            rows, own = x[start : start + size], labels[start : start + size]
            spare = size - len(own)
            padded = np.pad(rows, ((0, spare), (0, 0)), constant_values=np.nan)
            one = batch(padded, np.pad(own, (0, spare)), np.arange(size) < len(own))
            state, metrics = step(state, one, jax.random.key(5))
            told = {name: told.get(name, 0.0) + float(v) for name, v in metrics.items()}
        state = end(state, jax.tree.map(lambda a: a[None], one), jax.random.key(5))
    return state, told


def features_of(made, x):
    return np.asarray(made.setting.analytic.features(made.params, batch(x, np.zeros(len(x)))), np.float64)


def rectified(x, labels, gamma):
    """AIR as published: sums of every class, weights from their numbers."""
    seen = np.unique(labels)
    sums = [x[labels == c].T @ x[labels == c] for c in seen]
    cross = np.stack([x[labels == c].sum(0) for c in seen], 1)
    numbers = np.array([(labels == c).sum() for c in seen])
    w = len(seen) / numbers / (1 / numbers).sum()
    head = np.zeros((x.shape[1], C))
    gram = sum(a * b for a, b in zip(w, sums, strict=True)) + gamma * np.eye(x.shape[1])
    head[:, seen] = np.linalg.solve(gram, cross * w)
    return head, sum(s / n for s, n in zip(sums, numbers, strict=True))


APART = [{0: 40, 2: 9}, {1: 23, 3: 3}]


@pytest.mark.parametrize("slots", [2, None])
def test_air_is_the_published_solution_without_the_sums_of_all_classes(slots):
    made, stream = built("air", gamma=GAMMA, slots=slots, every=2), tasks(APART)
    state, told = trained(made, stream)
    x, labels = (np.concatenate(part) for part in zip(*stream, strict=True))
    x = features_of(made, x)
    head, balanced = rectified(x, labels, GAMMA)
    np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=2e-6 * np.abs(head).max())
    errors = ((np.eye(C)[labels] - x @ head) ** 2).sum(1)
    errors = sum(errors[labels == c].mean() for c in range(C))
    np.testing.assert_allclose(state.params["scale"], C * C / errors, rtol=1e-4)
    assert float(state.memory["bound"]) < 1e-6
    assert told.get("crowded", 0) == told.get("again", 0) == 0
    found = wide(state.memory["closed"] if slots else air._balanced(state.memory))
    np.testing.assert_allclose(found, balanced, rtol=0, atol=1e-10 * np.abs(balanced).max())
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.memory["open"].gram))
    assert kept == 2 * (slots or C) * x.shape[1] ** 2
    state = made.method.init(made.params)  # within a task weights are those of its rows so far
    for i in range(2):
        rows = slice(i * B, (i + 1) * B)
        assert not np.any(state.params["head"])
        state, _ = made.method.step(state, batch(*(part[rows] for part in stream[0])), jax.random.key(0))
    head, _ = rectified(x[: 2 * B], labels[: 2 * B], GAMMA)
    np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=2e-6 * np.abs(head).max())


def test_air_with_a_slot_for_each_class_is_exact_when_classes_come_again_and_says_so_otherwise():
    stream = tasks([{0: 30, 2: 9}, {0: 12, 1: 5}, {2: 4, 3: 11}])
    x, labels = (np.concatenate(part) for part in zip(*stream, strict=True))
    made = built("air", gamma=GAMMA, slots=None, every=2)
    rows = features_of(made, x)
    head, _ = rectified(rows, labels, GAMMA)
    state, told = trained(made, stream)
    np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=2e-6 * np.abs(head).max())
    assert "again" not in told
    state, told = trained(built("air", gamma=GAMMA, slots=2, every=2), stream)
    assert told["again"] == 12 + 4
    assert np.abs(np.asarray(state.params["head"]) - head).max() > 1e-3
    apart = {
        c: [rows[start:end][labels[start:end] == c] for start, end in ((0, 39), (39, 56), (56, 71))] for c in range(C)
    }
    wanted = sum(
        sum(part.T @ part / sum(map(len, parts[: i + 1])) for i, part in enumerate(parts) if len(part))
        for parts in apart.values()
    )  # every part has the weight of the number that its class had then
    np.testing.assert_allclose(wide(state.memory["closed"]), wanted, rtol=1e-6)


def test_air_puts_classes_without_a_slot_of_their_own_into_the_last():
    stream = tasks([{0: 20, 1: 10, 2: 6, 3: 4}])
    made = built("air", gamma=GAMMA, slots=2, every=2)
    state, told = trained(made, stream)
    assert told["crowded"] > 0
    x, labels = features_of(made, stream[0][0]), stream[0][1]
    rest = x[labels > 0]
    wanted = x[labels == 0].T @ x[labels == 0] / 20 + 3 * rest.T @ rest / 20
    np.testing.assert_allclose(wide(state.memory["closed"]), wanted, rtol=1e-10)


def test_variances_keep_their_digits_where_means_are_large():
    rng = np.random.default_rng(0)
    x = (1e3 + 1e-3 * rng.standard_normal((300, 5))).astype(np.float32)
    x[::3] += np.float32(7)
    labels = np.arange(300) % 3
    s = spreads.empty(5, 4)
    add = toys.quick(spreads.add)
    for start in range(0, 300, 60):
        part = slice(start, start + 60)
        s = add(s, jnp.asarray(x[part]), jnp.asarray(labels[part], jnp.int32), jnp.ones(60))
    for c in range(3):
        own = x[labels == c].astype(np.float64)
        np.testing.assert_allclose(wide(s.mean)[c], own.mean(0), rtol=1e-13)
        np.testing.assert_allclose(wide(s.squares)[c], ((own - own.mean(0)) ** 2).sum(0), rtol=1e-12)
        np.testing.assert_allclose(wide(spreads.variance(s))[c], own.var(0, ddof=1), rtol=1e-12)
    assert not np.any(wide(s.mean)[3])
    assert not np.any(wide(spreads.variance(s))[3])
    plain = (x[labels == 1] ** 2).mean(0) - x[labels == 1].mean(0) ** 2  # as published
    assert (np.abs(plain / x[labels == 1].astype(np.float64).var(0) - 1) > 0.5).all()


def test_variances_have_twelve_digits_whatever_the_weights_and_the_process():
    rng = np.random.default_rng(2)
    x, labels = (5 + rng.standard_normal((90, 4))).astype(np.float32), rng.integers(0, 3, 90)
    w = rng.uniform(0.2, 3, 90).astype(np.float32)
    with jax.enable_x64(True):
        found = [spreads.add(spreads.empty(4, 3), jnp.asarray(x), jnp.asarray(labels, jnp.int32), jnp.asarray(w))]
    found.append(toys.quick(spreads.add)(spreads.empty(4, 3), x, labels.astype(np.int32), w))
    for s in found:
        assert {leaf.dtype for leaf in jax.tree.leaves(s)} == {np.dtype("float32")}
        for c in range(3):
            own, weight = x[labels == c].astype(np.float64), w[labels == c].astype(np.float64)[:, None]
            mean = (weight * own).sum(0) / weight.sum()
            squares = (weight * (own - mean) ** 2).sum(0)
            np.testing.assert_allclose(wide(s.mean)[c], mean, rtol=1e-12)
            np.testing.assert_allclose(wide(s.counts)[c], weight.sum(), rtol=1e-12)
            np.testing.assert_allclose(wide(spreads.variance(s))[c], squares / (weight.sum() - 1), rtol=1e-12)


def test_variances_take_weights_padding_and_any_batches():
    rng = np.random.default_rng(1)
    x, labels, w = rng.standard_normal((200, 3)).astype(np.float32), rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    add = toys.quick(spreads.add)
    for size, end in ((200, 200), (40, 200)):
        s = spreads.empty(3, 3)
        for start in range(0, end, size):
            part = slice(start, start + size)
            s = add(s, jnp.where(w[part, None] > 0, x[part], jnp.nan), jnp.int32(labels[part]), jnp.float32(w[part]))
        for c in range(3):
            own = labels[:end] == c
            mean = np.average(x[:end][own], axis=0, weights=w[:end][own])
            squares = (w[:end][own, None] * (x[:end][own] - mean) ** 2).sum(0)
            np.testing.assert_allclose(wide(s.squares)[c], squares, rtol=1e-9)


UNEQUAL = [{0: 37, 1: 4}, {2: 11, 3: 1}]


ADAPTERS = {"draw": None, "expect": PLAIN}


@pytest.mark.parametrize("how", ["draw", "expect"])
def test_what_is_made_up_is_in_the_head_and_not_in_the_sums(how):
    stream, noise = tasks(UNEQUAL), 0.5
    options = {"how": how, "noise": noise, "every": 2} if how == "expect" else {}
    made = built("aef_ocl", ADAPTERS[how], gamma=GAMMA, **options)
    state, _ = trained(made, stream)
    before = trained(built("acil", ADAPTERS[how], gamma=GAMMA), stream)[0]
    jax.tree.map(np.testing.assert_array_equal, state.memory["moments"], before.memory["moments"])  # to the bit
    assert float(state.memory["made_up"]) == (37 - 4) + (37 - 11) + (37 - 1)
    acil = before.params
    assert np.abs(np.asarray(state.params["head"] - acil["head"])).max() > 1e-2
    np.testing.assert_array_equal(state.params["seen"], acil["seen"])
    if how == "expect":
        s, missing = state.memory["spread"], np.array([0, 33, 26, 36])
        mean, variance = wide(s.mean), wide(spreads.variance(s))
        gram = wide(before.memory["moments"].gram) + (missing * mean.T) @ mean + np.diag(noise**2 * missing @ variance)
        cross = wide(before.memory["moments"].cross) + missing * mean.T
        head = np.linalg.solve(gram + GAMMA * np.eye(len(gram)), cross)
        np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=1e-5 * np.abs(head).max())
        errors = 4 * 37 - np.sum(head * cross) - GAMMA * np.sum(head**2)  # of the rows of four equal classes
        np.testing.assert_allclose(state.params["scale"], 4 * 37 * 4 / errors, rtol=1e-4)
        state = made.method.init(made.params)  # within a task there are weights every second step
        for i in range(2):
            assert not np.any(state.params["head"])
            rows = slice(i * B, (i + 1) * B)
            state, _ = made.method.step(state, batch(*(part[rows] for part in stream[0])), jax.random.key(0))
        assert np.any(state.params["head"])


def test_expected_rows_are_those_of_the_kernel_of_the_model():
    noise, sigma = 0.5, 0.8
    adapter = {"expansion": "gaussian", "width": 7, "sigma": sigma, "bias": True}
    made = built("aef_ocl", adapter, gamma=GAMMA, how="expect", noise=noise)
    state, _ = trained(made, tasks(UNEQUAL))
    m, s = state.memory["moments"], state.memory["spread"]
    add = toys.quick(functools.partial(expected.gaussian, sigma=sigma, bias=True))
    variance = noise**2 * spreads.variance(s).high
    copy = add(m, made.params["expansion"], s.mean.high, variance, jnp.float32([0, 33, 26, 36]))
    head = np.linalg.solve(wide(copy.gram) + GAMMA * np.eye(8), wide(copy.cross))
    np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=1e-5 * np.abs(head).max())


def test_a_class_that_was_not_seen_lacks_nothing():
    np.testing.assert_array_equal(aef_ocl.lacking(pair.of(np.float32([5, 0, 2]))), [0, 0, 3])


def test_drawn_rows_are_those_of_the_classes_and_make_them_equal():
    """The head is that of float64, with the same random numbers for the made-up rows."""
    noise = 0.5
    made, stream = built("aef_ocl", gamma=GAMMA, noise=noise), tasks([{0: 150, 1: 4}, {2: 11, 3: 1}])
    state, _ = trained(made, stream)
    m, s = state.memory["moments"], state.memory["spread"]
    np.testing.assert_array_equal(aef_ocl.lacking(m.counts), [0, 146, 139, 149])
    key = named(jax.random.key(5), "pseudo")
    blocks = [jax.random.normal(jax.random.fold_in(key, i), (128, 8)) for i in range(4)]
    label = np.repeat([1, 2, 3], [146, 139, 149])
    drawn = np.concatenate(blocks).astype(np.float64)[: len(label)]
    rows = wide(s.mean)[label] + noise * np.sqrt(wide(spreads.variance(s)))[label] * drawn
    x = np.maximum(rows @ np.asarray(made.params["expansion"]["projection"], np.float64), 0)
    gram, cross = wide(m.gram) + x.T @ x, wide(m.cross) + x.T @ np.eye(C)[label]
    head = np.linalg.solve(gram + GAMMA * np.eye(9), cross)
    np.testing.assert_allclose(state.params["head"], head, rtol=0, atol=1e-5 * np.abs(head).max())


def simulated(expand, mean, deviation, count=200_000):
    rng = np.random.default_rng(3)
    rows = mean + deviation * np.concatenate([(e := rng.standard_normal((count // 2, len(mean)))), -e])
    return expand(rows)


@pytest.mark.parametrize("expansion", sorted(expected.KNOWN))
def test_expected_moments_are_the_mean_of_many_draws(expansion):
    """Within five standard errors, entry by entry, of 200,000 rows in float64; the last feature is 1."""
    rng = np.random.default_rng(2)
    mean, variance = rng.standard_normal((2, 3)), rng.random((2, 3)) ** 2
    centres, sigma = rng.standard_normal((5, 3)), 1.3
    own = {"centres": jnp.float32(centres)} if expansion == "gaussian" else {}
    size = (5 if own else 3) + 1
    count = jnp.float32([3.0, 5.0])
    add = toys.quick(functools.partial(expected.KNOWN[expansion], sigma=sigma, bias=True))
    found = add(moments.empty(size, 2), own, jnp.float32(mean), jnp.float32(variance), count)

    def expand(f):
        x = np.exp(-((f[:, None] - centres) ** 2).sum(-1) / (2 * sigma**2)) if own else f
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    x = [simulated(expand, m, np.sqrt(v)) for m, v in zip(mean, variance, strict=True)]
    products = [rows[:, :, None] * rows[:, None] for rows in x]
    wanted = 3 * products[0].mean(0) + 5 * products[1].mean(0)
    error = np.sqrt((3**2 * products[0].var(0) + 5**2 * products[1].var(0)) / 200_000)
    np.testing.assert_array_less(np.abs(wide(found.gram) - wanted), 5 * error + 1e-5)
    cross = np.stack([n * rows.mean(0) for n, rows in zip((3, 5), x, strict=True)], 1)
    error = np.stack([n * rows.std(0) for n, rows in zip((3, 5), x, strict=True)], 1) / np.sqrt(200_000)
    np.testing.assert_array_less(np.abs(wide(found.cross) - cross), 5 * error + 1e-5)
    np.testing.assert_array_equal(wide(found.counts), [3, 5])
    np.testing.assert_array_equal(found.gram.high, found.gram.high.T)


def test_kernel_moments_are_those_of_quadrature():
    """One feature, to 1e-6: against Gauss-Hermite quadrature with 80 nodes."""
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    mean, deviation, centres, beta = 0.3, 0.8, np.array([-1.0, 0.2, 1.5]), 0.7
    f = mean + deviation * node
    x = np.exp(-beta * (f[:, None] - centres) ** 2)
    weight = weight / weight.sum()
    first, second = expected.kernel_moments(jnp.float32(centres[:, None] - mean), jnp.float32([deviation**2]), beta)
    np.testing.assert_allclose(first, weight @ x, rtol=1e-6)
    np.testing.assert_allclose(second, np.einsum("n,ni,nj->ij", weight, x, x), rtol=2e-6)


def test_a_long_tail_is_learned_class_by_class():
    """1:100: mean-class accuracy of both is more than five points above that of the plain ridge, over three seeds."""
    found = {"acil": [], "air": [], "aef_ocl": []}
    counts = [round(800 * 100 ** (-c / (C - 1))) for c in range(C)]
    assert counts[0] == 100 * counts[-1]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        centre = 1.1 * rng.standard_normal((C, D))

        def rows(labels, rng=rng, centre=centre):
            return centre[labels] + rng.standard_normal((len(labels), D)), labels

        stream = [rows(rng.permutation(np.repeat([a, a + 1], counts[a : a + 2]))) for a in (0, 2)]
        x, y = rows(np.repeat(np.arange(C), 500))
        for name, accuracies in found.items():
            made = built(name, gamma=GAMMA, **({"slots": 2, "every": 2} if name == "air" else {}))
            params = trained(made, stream)[0].params
            right = np.asarray(made.setting.model.apply(params, batch(x, y)).logits.argmax(-1)) == y
            accuracies.append(np.mean([right[y == c].mean() for c in range(C)]))
    plain = np.mean(found.pop("acil"))
    assert {name: np.mean(values) - plain >= 0.05 for name, values in found.items()} == {"air": True, "aef_ocl": True}


def test_options_that_cannot_be_are_refused():
    cases = [
        ("air.gamma=0: must be above 0", "air", {"gamma": 0}, None),
        ("air.slots=0: must be at least 1", "air", {"slots": 0}, None),
        ("air.every=0", "air", {"every": 0}, None),
        ("aef_ocl.gamma=-1.0", "aef_ocl", {"gamma": -1.0}, None),
        ("aef_ocl.noise=-1", "aef_ocl", {"noise": -1}, None),
        (
            "how='expect': not known of expansion='relu'; set how='draw'",
            "aef_ocl",
            {"how": "expect"},
            {"expansion": "relu"},
        ),
        (
            "how='expect': not known of normalise=True",
            "aef_ocl",
            {"how": "expect"},
            {"expansion": "none", "width": None, "normalise": True},
        ),
    ]
    for words, name, options, adapter in cases:
        with pytest.raises(UserError) as error:
            built(name, adapter, **options)
        assert words in str(error.value)
    for name in ("air", "aef_ocl", "ds_al", "gkeal"):
        with pytest.raises(UserError, match=r"set config\.adapter='analytic'"):
            compose.make(name, toys.setting())
