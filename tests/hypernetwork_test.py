"""Boxes that a hypernetwork makes: sound, nested, tight inside wide, points at scale 0, one by one as together."""

import functools

import boxed_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.kernels import boxes as products
from jaxcl.models import boxed as boxes
from jaxcl.models import hypernetwork
from jaxcl.models.interval import Interval

KINDS = [False, True]  # universal
CONFIGS, GAMMA, M = 50, 2.0, 4
SIZES = (4, 8, 4)
SCALES = (1.0, 0.4, 0.0)
ONE = jnp.ones(1)


def made_of(universal, **options):
    return toys.boxed("hypernetwork", universal=universal, **{"gamma": GAMMA, "hidden": (6, 5)} | options).boxed


def drawn(made, key):
    """Returns parameters that are not those of the start: any v, and weights of any size."""
    a, b, c = jax.random.split(key, 3)
    params = made.model.init(a)
    generator = params["generator"]
    place = generator["embedding"]
    place = {"centre": place["centre"], "radius": 2 * jax.random.normal(b, place["radius"].shape)}
    head = {**generator["head"], "weight": generator["head"]["weight"] * 10 ** jax.random.uniform(c, (), minval=-1)}
    return {**params, "generator": {**generator, "embedding": place, "head": head}}


def through(generator, place):
    for i in range(len(generator["hidden"])):
        layer = generator["hidden"][f"layer_{i}"]
        place = jax.nn.relu(place @ layer["kernel"] + layer["bias"][None])
    return place @ generator["head"]["weight"].T + generator["head"]["bias"][None]


def embedded(generator, universal):
    """Returns the centres of all embeddings, [T, M]."""
    place = generator["embedding"]["centre"]
    return GAMMA / (2 * M) * jnp.cos(place) if universal else place


@functools.cache
def many(universal):
    """Returns, of random configurations: parameters, boxes at every scale, tight ones, logits over both, gradients."""
    made = made_of(universal)
    rows = toys.classes(0)

    def one(key):
        params = drawn(made, key)
        generator, task = params["generator"], jnp.int32(1)
        centre, radius = made.boxes(generator, jnp.full(3, task), jnp.array(SCALES))
        ends = [(centre[i] - radius[i], centre[i] + radius[i]) for i in range(3)]
        tight = made.tight(generator, task)
        seen = [boxes.logits(made, params, Interval(*end), rows) for end in ends]
        pull = jax.random.normal(key, (made.size,))
        ours = jax.grad(lambda g: jnp.vdot(pull, made.boxes(g, task[None], 0 * ONE)[0][0]))(generator)
        theirs = jax.grad(lambda g: jnp.vdot(pull, through(g, embedded(g, universal)[task][None])[0]))(generator)
        return {
            "params": params,
            "radius": radius,
            "ends": ends,
            "tight": (tight[0] - tight[1], tight[0] + tight[1]),
            "tight_radius": tight[1],
            "layer": made.layer(generator, task)[2:],
            "logits": [(bound.lower, bound.upper) for bound in seen],
            "certain": [boxes.certain(bound, rows) for bound in seen],
            "gradients": (ours, theirs),
        }

    keys = jax.random.split(jax.random.key(5), CONFIGS)
    return made, rows, jax.device_get(toys.quick(jax.vmap(one))(keys))


def each(universal):
    """Yields the configurations one by one, with the generator in float64 and its sampled networks [S, N]."""
    _, _, found = many(universal)
    rng = np.random.default_rng(0)
    for i in range(CONFIGS):
        one = jax.tree.map(lambda x, i=i: x[i], found)
        generator = oracle.wide(one["params"]["generator"])
        centre, radius = oracle.embedded(generator, 1, GAMMA, universal)
        yield one, generator, oracle.point(generator, oracle.sampled(rng, centre, radius, 16))


def slack(ends):
    """Rounding of float32 sums that are as large as the ends."""
    return 1e-5 * (1 + np.maximum(np.abs(ends[0]), np.abs(ends[1])))


@pytest.mark.parametrize("universal", KINDS)
def test_boxes_are_those_of_interval_arithmetic(universal):
    for one, generator, _ in each(universal):
        for scale, ends in zip(SCALES, one["ends"], strict=True):
            want = oracle.box(generator, *oracle.embedded(generator, 1, GAMMA, universal, scale))
            np.testing.assert_allclose(ends[0], want[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ends[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("universal", KINDS)
@pytest.mark.parametrize("form", ["wide", "tight"])
def test_boxes_hold_corners_and_interiors(universal, form):
    filled = []
    for one, _, networks in each(universal):
        ends = one["ends"][0] if form == "wide" else one["tight"]
        assert (networks >= ends[0] - slack(ends)).all()
        assert (networks <= ends[1] + slack(ends)).all()
        filled.append(np.mean((networks.max(0) - networks.min(0)) / (ends[1] - ends[0] + 1e-9)))
    assert np.mean(filled) > (0.2 if form == "tight" else 0.05)  # and are not boundless


@functools.cache
def enclosing(universal, place, hidden, gamma):
    """Returns a model with embeddings of that size, and its compiled enclosure with bounds of logits."""
    made = made_of(universal, embedding=place, hidden=hidden, gamma=gamma)

    def enclose(params, task, rows):
        found = hypernetwork.enclosure(made, params, task)
        return found, boxes.logits(made, params, found, rows, outward=True)

    return made, toys.quick(enclose)


@settings(max_examples=200)
@given(
    st.booleans(),
    st.sampled_from([(1, (4,)), (5, (6, 3)), (32, (7,))]),
    st.sampled_from([0.0, 1e-6, 0.1, 10.0]),
    st.integers(0, 2**31 - 1),
)
def test_no_network_is_outside_an_enclosure_by_rounding(universal, sizes, gamma, seed):
    """Float64 networks at corners and inside, and their logits, without tolerance."""
    made, enclose = enclosing(universal, *sizes, gamma)
    rng, params = np.random.default_rng(seed), made.model.init(jax.random.key(seed))
    draw = [np.float32(rng.normal(size=x.shape) * 10.0 ** rng.uniform(-2, 2)) for x in jax.tree.leaves(params)]
    drawn = jax.tree.unflatten(jax.tree.structure(params), draw)
    params = {**drawn, boxes.LEDGER: {**params[boxes.LEDGER], "current": jnp.ones(())}}
    rows = toys.classes(seed % 1000, task=1)
    found, outputs = enclose(params, jnp.int32(1), rows)
    generator = oracle.wide(params["generator"])
    networks = oracle.point(generator, oracle.sampled(rng, *oracle.embedded(generator, 1, gamma, universal), 40))
    assert (networks >= np.asarray(found.lower, np.float64)).all()
    assert (networks <= np.asarray(found.upper, np.float64)).all()
    inputs = np.asarray(rows.inputs, np.float64)
    logits = np.stack([oracle.logits(vector, inputs, SIZES) for vector in networks])
    assert (logits >= np.asarray(outputs.lower, np.float64)[None]).all()
    assert (logits <= np.asarray(outputs.upper, np.float64)[None]).all()
    lower, upper = oracle.box(generator, *oracle.embedded(generator, 1, gamma, universal))
    size = np.abs(networks).max() + np.abs(generator["head"]["weight"]).sum(1).max() * 1e-3
    assert np.abs(np.asarray(found.upper, np.float64) - upper).max() <= 1e-3 * max(size, upper.max() - lower.min())


@pytest.mark.parametrize("universal", KINDS)
def test_what_enters_the_last_layer_lies_in_a_zonotope(universal):
    """In every direction as far as its symbols reach; undecided ReLUs have symbols of their own."""
    rng, fresh = np.random.default_rng(4), 0
    for one, generator, _ in each(universal):
        centre, generators = (np.asarray(part, np.float64) for part in one["layer"])
        place, radius = oracle.embedded(generator, 1, GAMMA, universal)
        inside = {**generator, "head": {"weight": np.eye(5), "bias": np.zeros(5)}}
        found = oracle.point(inside, oracle.sampled(rng, place, radius, 40))
        ways = np.concatenate([np.eye(5), rng.normal(size=(30, 5))])
        far = np.abs(generators @ ways.T).sum(0)
        assert (np.abs((found - centre) @ ways.T) <= far * (1 + 1e-5) + 1e-5).all()
        fresh += np.any(generators[-5:])
        assert generators.shape == (4 + 6 + 5, 5)
    assert fresh > CONFIGS / 4


@pytest.mark.parametrize("universal", KINDS)
def test_affine_forms_use_the_ranges_of_interval_arithmetic_in_hidden_layers(universal):
    """Against float64: a ReLU is relaxed over what both arithmetics have in common, which makes some forms narrower.

    Three layers: what they have in common in the second counts in the third.
    """
    made = made_of(universal, hidden=(6, 6, 5))

    def one(key):
        generator = drawn(made, key)["generator"]
        return generator, made.layer(generator, jnp.int32(1))[2:]

    found = jax.device_get(toys.quick(jax.vmap(one))(jax.random.split(jax.random.key(7), CONFIGS)))
    narrower = 0
    for i in range(CONFIGS):
        generator, ours = jax.tree.map(lambda x, i=i: x[i], found)
        exact = oracle.wide(generator)
        place = oracle.embedded(exact, 1, GAMMA, universal)
        want, loose = oracle.forms(exact, *place), oracle.forms(exact, *place, meet=False)
        for a, b in zip(ours, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        narrower += np.abs(want[1]).sum() < 0.99 * np.abs(loose[1]).sum()
    assert narrower > CONFIGS / 10


@pytest.mark.parametrize("universal", KINDS)
def test_tight_boxes_are_inside_wide_ones(universal):
    share = []
    for one, _, _ in each(universal):
        (low, high), (below, above) = one["ends"][0], one["tight"]
        assert (below >= low - slack((low, high))).all()
        assert (above <= high + slack((low, high))).all()
        assert (one["tight_radius"] >= 0).all()
        share.append(np.mean(one["tight_radius"]) / np.mean(one["radius"][0]))
    assert np.mean(share) < 0.8


@pytest.mark.parametrize("universal", KINDS)
def test_logits_of_every_network_are_within_their_bounds(universal):
    _, rows, _ = many(universal)
    inputs, spread = np.asarray(rows.inputs, np.float64), []
    assert (inputs < 0).any()
    for one, _, networks in each(universal):
        low, high = one["logits"][0]
        found = np.stack([oracle.logits(vector, inputs, SIZES) for vector in networks])
        assert (found >= low[None] - slack((low, high))[None]).all()
        assert (found <= high[None] + slack((low, high))[None]).all()
        wrong = found.argmax(-1) != np.asarray(rows.targets)[None]
        assert not (wrong & one["certain"][0][None]).any()
        spread.append(one["certain"][1].mean())
    assert np.mean(spread) > 0.01  # something is certified


@pytest.mark.parametrize("universal", KINDS)
def test_less_is_inside_more(universal):
    """Weights, logits and certified rows of a smaller embedding box."""
    for one, _, _ in each(universal):
        for k in (1, 2):
            for name in ("ends", "logits"):
                (low, high), (below, above) = one[name][k - 1], one[name][k]
                assert (below >= low - slack((low, high))).all()
                assert (above <= high + slack((low, high))).all()
            assert one["certain"][k].sum() >= one["certain"][k - 1].sum()


@pytest.mark.parametrize("universal", KINDS)
def test_scale_nothing_is_the_network_of_points(universal):
    moved = []
    for one, generator, _ in each(universal):
        np.testing.assert_array_equal(one["radius"][2], 0)
        np.testing.assert_array_equal(*one["ends"][2])
        centre, _ = oracle.embedded(generator, 1, GAMMA, universal)
        np.testing.assert_allclose(one["ends"][2][0], oracle.point(generator, centre), rtol=1e-5, atol=1e-5)
        ours, theirs = one["gradients"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
        moved.append(np.abs(ours["embedding"]["centre"][1]).max())
    assert np.median(moved) > 1e-3


@pytest.mark.parametrize("universal", KINDS)
def test_scale_nothing_is_the_network_of_points_bit_for_bit(universal):
    """Layer by layer: a point goes through the hidden layers as through any network, the last is that of all boxes."""
    made = made_of(universal)
    generator = drawn(made, jax.random.key(2))["generator"]
    high = jax.lax.Precision.HIGHEST

    def both(generator):
        place = embedded(generator, universal)[1][None]
        for i in range(len(generator["hidden"])):
            layer = generator["hidden"][f"layer_{i}"]
            place = jax.nn.relu(jnp.dot(place, layer["kernel"], precision=high) + layer["bias"][None])
        head = generator["head"]
        plain = products.affine(head["weight"], head["bias"], place, jnp.zeros_like(place))[0]
        return plain, made.boxes(generator, jnp.array([1]), 0 * ONE)[0], made.boxes(generator, jnp.array([1]), ONE)

    plain, ours, (middle, radius) = both(generator)  # not compiled as one, so that each product is that of its shapes
    np.testing.assert_array_equal(ours, plain)
    assert np.any(radius)
    assert np.any(middle != plain)  # a ReLU that is undecided moves the middle


@pytest.mark.parametrize("universal", KINDS)
def test_gamma_nothing_is_the_network_of_points(universal):
    made = made_of(universal, gamma=0.0)
    generator = drawn(made, jax.random.key(0))["generator"]
    (low, radius), (middle, near) = toys.quick(
        lambda g: (made.boxes(g, jnp.arange(3), jnp.ones(3)), made.tight(g, jnp.int32(2)))
    )(generator)
    np.testing.assert_array_equal(radius, 0)
    np.testing.assert_allclose(near, 0, atol=1e-6)
    np.testing.assert_allclose(middle, low[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("universal", KINDS)
def test_all_tasks_at_once_are_one_after_the_other(universal):
    """Values and gradients, with a task that is asked for twice."""
    made = made_of(universal)
    generator = drawn(made, jax.random.key(1))["generator"]
    which, scales = jnp.array([2, 0, 1, 0]), jnp.array([1.0, 0.0, 0.7, 1.0])
    pulls = jax.random.normal(jax.random.key(2), (2, 4, made.size))

    def total(pairs):
        return sum(jnp.vdot(a, b) for a, b in zip(pulls, pairs, strict=True))

    def together(g):
        return total(made.boxes(g, which, scales))

    def apart(g):
        pairs = [made.boxes(g, which[i : i + 1], scales[i : i + 1]) for i in range(4)]
        return total([jnp.concatenate(part) for part in zip(*pairs, strict=True)])

    (a, ours), (b, theirs) = (toys.quick(jax.value_and_grad(f))(generator) for f in (together, apart))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("universal", KINDS)
@pytest.mark.parametrize(("size", "hidden", "gamma"), [(1, (3,), 1e-6), (32, (7, 4, 5), 10.0)])
def test_boxes_of_other_sizes_hold_their_networks(universal, size, hidden, gamma):
    made = made_of(universal, embedding=size, hidden=hidden, gamma=gamma)

    def one(key):
        generator = drawn(made, key)["generator"]
        return generator, made.boxes(generator, jnp.array([1]), ONE), made.tight(generator, jnp.int32(1))

    found = jax.device_get(toys.quick(jax.vmap(one))(jax.random.split(jax.random.key(6), 20)))
    rng = np.random.default_rng(6)
    for i in range(20):
        generator, (middles, radii), tight = jax.tree.map(lambda x, i=i: x[i], found)
        exact = oracle.wide(generator)
        centre, radius = oracle.embedded(exact, 1, gamma, universal)
        assert radius.sum() == pytest.approx(gamma)
        networks = oracle.point(exact, oracle.sampled(rng, centre, radius, 100))
        for middle, half in ((middles[0], radii[0]), tight):
            low, high = np.float64(middle) - half, np.float64(middle) + half
            assert (networks >= low - slack((low, high))).all()
            assert (networks <= high + slack((low, high))).all()


def test_small_boxes_of_the_published_start_are_a_tenth_of_those_of_interval_arithmetic():
    """Few ReLUs are undecided, so that the hypernetwork is almost linear in a box; see the README of hyperinterval."""
    made = toys.boxed(universal=False, embedding=72, hidden=(75, 75), gamma=1.0, start="published").boxed
    generator = toys.quick(made.model.init)(jax.random.key(0))["generator"]
    radii = toys.quick(lambda g, t: (made.boxes(g, t[None], ONE)[1], made.tight(g, t)[1]))
    for task in range(toys.T):
        wide, tight = radii(generator, jnp.int32(task))
        assert 0 < tight.mean() < 0.1 * wide.mean()


def test_nested_embeddings_have_an_intersection():
    """Of any seven: it is there, its radius is between one and two sigma, and its weights are in the box of each."""
    gamma, tasks = 3.0, 7
    sigma = gamma / (2 * M)
    generator = oracle.wide(drawn(made_of(True, tasks=tasks), jax.random.key(3))["generator"])
    rng = np.random.default_rng(1)
    for _ in range(100):
        generator["embedding"]["centre"] = rng.normal(size=(tasks, M)) * 10 ** rng.uniform(-1, 1)
        every = [oracle.embedded(generator, t, gamma, True) for t in range(tasks)]
        centres, radii = (np.stack(part) for part in zip(*every, strict=True))
        middle, near = hypernetwork.intersection(np.float32(centres), np.float32(radii))
        middle, near = np.asarray(middle, np.float64), np.asarray(near, np.float64)
        assert (near >= sigma * (1 - 1e-6)).all()
        assert (near <= 2 * sigma * (1 + 1e-6)).all()
        assert (np.abs(middle[None] - centres) <= radii - near[None] + 1e-6).all()
        low, high = oracle.box(generator, middle, near)
        for centre, radius in every:
            below, above = oracle.box(generator, centre, radius)
            assert (low >= below - 1e-5).all()
            assert (high <= above + 1e-5).all()


def test_networks_of_the_intersection_are_in_the_box_of_every_task():
    """By the boxes of the model; those of a task network are made of any embedding, so also of the intersection."""
    tasks = 5
    nested, free = (made_of(universal, tasks=tasks) for universal in (True, False))

    def one(key):
        generator = drawn(nested, key)["generator"]
        place = {"centre": 3 * jax.random.normal(key, (tasks, M)), "radius": jnp.zeros((tasks, M))}
        generator = {**generator, "embedding": place}
        centres = embedded(generator, True)
        middle, near = hypernetwork.intersection(centres, jnp.full_like(centres, GAMMA / M))
        shared = {**generator, "embedding": {"centre": middle[None], "radius": jnp.log(near)[None]}}
        every = nested.boxes(generator, jnp.arange(tasks), jnp.ones(tasks))
        return every, free.boxes(shared, jnp.array([0]), jnp.sum(near)[None] / GAMMA)

    every, own = jax.device_get(toys.quick(jax.vmap(one))(jax.random.split(jax.random.key(8), 20)))
    (low, high), (below, above) = ((centre - radius, centre + radius) for centre, radius in (own, every))
    assert (low >= below - slack((below, above))).all()
    assert (high <= above + slack((below, above))).all()
    assert (own[1] > 0.2 * every[1]).mean() > 0.9


@pytest.mark.parametrize("start", ["fan", "published"])
def test_how_a_run_starts(start):
    """'fan': the networks of all tasks are near one that the target's own start drew; 'published': 1 / sqrt(K)."""
    made = toys.boxed("hypernetwork", start=start, universal=False, features=64, width=48).boxed
    generator = toys.quick(made.model.init)(jax.random.key(0))["generator"]
    head, kernels = generator["head"], toys.quick(made.target.init)(jax.random.key(0))
    assert np.ptp(np.asarray(generator["embedding"]["radius"])) == 0
    if start == "published":
        bound = 1 / np.sqrt(6)
        assert 0.9 * bound < np.abs(head["weight"]).max() <= bound
        assert 0.9 * bound < np.abs(head["bias"]).max() <= bound
    else:
        bias = made.network({"fixed": {}}, head["bias"])
        for own, drawn_so in zip(jax.tree.leaves(bias), jax.tree.leaves(kernels), strict=True):
            np.testing.assert_allclose(np.std(own), np.std(drawn_so), rtol=0.3)
        weights = toys.quick(made.boxes)(generator, jnp.arange(3), jnp.zeros(3))[0]
        first = np.std(np.asarray(weights - head["bias"][None])[:, 48 : 48 + 64 * 48])
        assert 0.05 < first / np.std(bias["layer_0"]["kernel"]) < 1
