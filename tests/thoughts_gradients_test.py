"""Thought policies: exact gradients by enumeration and quadrature in float64, the fused densities, the gate of HRPO."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import betaln

from jaxcl.rl import gate, thoughts
from jaxcl.rl.thoughts import soft

D = 2
KEY = jax.random.key(5)


def network(size, seed=0):
    """Parameters of a chain: logits of an input are tanh(x inner) outer + bias, inputs are made of the table."""
    rng = np.random.default_rng(seed)
    shapes = {"table": (size, D), "inner": (D, D), "outer": (D, size), "bias": (size,)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def logits_of(theta, x):
    z = jnp.einsum("...d,de->...e", x, theta["inner"])
    return jnp.einsum("...d,dv->...v", jnp.tanh(z), theta["outer"]) + jnp.broadcast_to(
        theta["bias"], (*x.shape[:-1], theta["bias"].size)
    )


def start(paths):
    return jnp.broadcast_to(jnp.array([0.4, -0.7]), (paths, D))


def rewards(size):
    return jnp.asarray(np.random.default_rng(7).normal(size=size))


def answer(theta, x):
    """Expected reward of an answer drawn after the thoughts, [...]."""
    z = logits_of(theta, x)
    p = jax.nn.softmax(z, axis=-1)
    return jnp.einsum("...v,v->...", p, rewards(z.shape[-1]))


def score(policy, theta, steps, weights):
    """Gradient of the surrogate of REINFORCE, summed over paths with their probabilities."""

    def surrogate(theta):
        x, total = start(weights.size), jnp.zeros(weights.shape)
        for record in steps:
            total = total + policy.log_prob(logits_of(theta, x), theta["table"], record)
            x = policy.feed(theta["table"], record)
        log_p = jax.nn.log_softmax(logits_of(theta, x), axis=-1)
        share = jax.lax.stop_gradient(jnp.exp(log_p)) * rewards(log_p.shape[-1])[None] * weights[:, None]
        return jnp.sum(share * (total[:, None] + log_p))

    return jax.jit(jax.grad(surrogate))(theta)


def distance(found, want):
    """Largest difference of a leaf, relative to its own largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def check(objective, theta, found):
    """Asserts that `found` is the gradient of `objective`, by differentiation and by finite differences."""
    objective = jax.jit(objective)
    want = jax.jit(jax.grad(objective))(theta)
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want)) > 1e-3
    assert distance(found, want) < 1e-6
    rng, step = np.random.default_rng(9), 1e-5
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), theta)
    up, down = (objective(jax.tree.map(lambda x, v, s=s: x + s * v, theta, way)) for s in (step, -step))
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(way), strict=True))
    assert abs(float((up - down) / (2 * step) / slope) - 1) < 1e-4


def hermite(nodes=60, least=1e-10):
    """Nodes [N, 2] and weights [N] for the mean over a standard normal plane; nodes of no weight are left out."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    weights = np.outer(w, w).ravel() / (2 * np.pi)
    return points[weights > least], weights[weights > least]


def test_soft_by_quadrature_and_the_mutant_without_stop_gradient():
    with jax.enable_x64(True):
        policy, theta = thoughts.make("soft"), network(5)
        sigma = 0.33 * float(np.sqrt(np.mean(np.asarray(theta["table"]) ** 2)))
        eps, w = hermite()
        first, second = (jnp.asarray(np.repeat(eps, len(w), 0)), jnp.asarray(np.tile(eps, (len(w), 1))))
        weights = jnp.asarray(np.outer(w, w).ravel())
        drift = jax.jit(jax.value_and_grad(lambda t: soft.scale_of(t, 0.33, "coordinate")))(theta["table"])
        assert abs(float(drift[0]) / sigma - 1) < 1e-12
        assert not np.any(drift[1])

        def mean(theta, x):
            return jax.nn.softmax(logits_of(theta, x) / 0.5, axis=-1) @ theta["table"]

        def thoughts_of(theta):
            x = mean(theta, start(weights.size)) + sigma * first
            return x, mean(theta, x) + sigma * second

        scale = jnp.full(weights.shape, sigma)
        steps = [{"thought": x, "scale": scale} for x in jax.jit(thoughts_of)(theta)]
        check(lambda p: weights @ answer(p, thoughts_of(p)[1]), theta, score(policy, theta, steps, weights))

        # One step, where thoughts are made again from the noise inside the loss.
        x, few = start(eps.shape[0]), jnp.asarray(w)

        def surrogate(theta, density):
            z = logits_of(theta, x)
            thought = mean(theta, x) + sigma * jnp.asarray(eps)
            reward = jax.lax.stop_gradient(few * answer(theta, thought))
            return reward @ density(theta, z, thought)

        def mutant(theta, z, thought):
            return soft.log_density(thought, mean(theta, x), scale[: few.size])

        def ours(theta, z, thought):
            return policy.log_prob(z, theta["table"], {"thought": thought, "scale": scale[: few.size]})

        size = {
            name: jax.jit(jax.grad(lambda t, f=f: surrogate(t, f)))(theta)
            for name, f in (("no", mutant), ("yes", ours))
        }
        assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(size["no"])) < 1e-12
        fixed = jax.lax.stop_gradient(theta)
        want = jax.jit(jax.grad(lambda t: few @ answer(fixed, mean(t, x) + sigma * jnp.asarray(eps))))(theta)
        assert distance(size["yes"], want) < 1e-6


@pytest.mark.parametrize(("name", "count"), [("hard", 1), ("mts", 1), ("mts", 2)])
def test_tokens_by_enumeration(name, count):
    with jax.enable_x64(True):
        options = {"temperature": 0.7} | ({"count": count} if name == "mts" else {})
        policy, theta, size = thoughts.make(name, **options), network(5), 5
        paths = jnp.asarray(list(itertools.product(range(size), repeat=2 * count)), jnp.int32)
        tokens = [paths[:, :count], paths[:, count:]]

        def walk(theta):
            """Probability [P] of every path and the input [P, D] that it ends with."""
            x, p = start(len(paths)), jnp.ones(len(paths))
            for drawn in tokens:
                share = jax.nn.softmax(logits_of(theta, x) / 0.7, axis=-1)
                p = p * jnp.prod(jnp.take_along_axis(share, drawn, axis=-1), axis=-1)
                x = jnp.mean(theta["table"][drawn], axis=1)
            return p, x

        weights = walk(theta)[0]
        assert abs(float(weights.sum()) - 1) < 1e-12
        steps = [{"token": t[:, 0]} if name == "hard" else {"tokens": t} for t in tokens]

        def objective(theta):
            p, x = walk(theta)
            return p @ answer(theta, x)

        check(objective, theta, score(policy, theta, steps, weights))


@pytest.mark.parametrize("top_k", [None, 2])
def test_dirichlet_by_quadrature(top_k):
    """Weights x, 1 - x of two tokens; the trapezoidal rule in the logit of x converges geometrically."""
    with jax.enable_x64(True):
        size = 5 if top_k else 2
        policy = thoughts.make("dirichlet", concentration=4.0, floor=1.0, top_k=top_k, temperature=0.9)
        theta = network(size)
        u = np.arange(-24, 24.1, 0.4)
        first, second = (jnp.asarray(g.ravel()) for g in np.meshgrid(u, u, indexing="ij"))
        paths = first.size

        def choose(z):
            return jnp.argsort(-z, axis=-1)[:, :2] if top_k else jnp.broadcast_to(jnp.arange(2), (paths, 2))

        def density(theta, x, support, u):
            """Of the logit u of the first weight."""
            p = jnp.take_along_axis(jax.nn.softmax(logits_of(theta, x) / 0.9, axis=-1), support, axis=-1)
            a = 4 * p / jnp.sum(p, axis=-1, keepdims=True) + 1
            log_x, log_y = -jax.nn.softplus(-u), -jax.nn.softplus(u)
            return 0.4 * jnp.exp(a[:, 0] * log_x + a[:, 1] * log_y - betaln(a[:, 0], a[:, 1]))

        def feed(theta, support, u):
            x, rows = jax.nn.sigmoid(u)[:, None], theta["table"][support]
            return x * rows[:, 0] + (1 - x) * rows[:, 1]

        one = jax.jit(lambda t: choose(logits_of(t, start(paths))))(theta)
        two = jax.jit(lambda t: choose(logits_of(t, feed(t, one, first))))(theta)

        def walk(theta):
            x = feed(theta, one, first)
            return density(theta, start(paths), one, first) * density(theta, x, two, second), feed(theta, two, second)

        def objective(theta):
            p, x = walk(theta)
            return p @ answer(theta, x)

        steps = []
        for support, v in ((one, first), (two, second)):
            shares = {"log_shares": jnp.stack([-jax.nn.softplus(-v), -jax.nn.softplus(v)], axis=-1)}
            steps.append(shares | ({"support": support} if top_k else {}))
        weights = jax.jit(walk)(theta)[0]
        assert abs(float(weights.sum()) - 1) < 1e-9
        density_of = jax.jit(lambda t: policy.log_prob(logits_of(t, start(paths)), t["table"], steps[0]))
        mass = np.exp(density_of(theta) + np.sum(np.asarray(steps[0]["log_shares"]), axis=-1))
        assert abs(np.sum(0.4 * mass) / len(u) - 1) < 1e-9
        check(objective, theta, score(policy, theta, steps, weights))


@pytest.mark.parametrize("size", [2, 5])
def test_gumbel_by_quadrature(size):
    """Two tokens of support; the truth moves thoughts with the parameters, the score leaves them where they are."""
    with jax.enable_x64(True):
        policy, theta = thoughts.make("gumbel", top_k=2, top_p=1.0, tau_g=0.7, temperature=0.9), network(size)
        line = np.arange(-3.6, 34, 0.4)
        eps = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
        weights = jnp.exp(jnp.sum(-eps - jnp.exp(-eps), axis=-1)) * 0.4**2
        assert abs(float(weights.sum()) - 1) < 1e-9
        paths = len(eps)
        support = jnp.argsort(-logits_of(theta, start(paths)), axis=-1)[:, :2]

        def perturb(theta):
            z = jnp.take_along_axis(logits_of(theta, start(paths)), support, axis=-1) / 0.9
            return z - jax.nn.logsumexp(z, axis=-1, keepdims=True) + eps

        def objective(theta):
            y = jax.nn.softmax(perturb(theta) / 0.7, axis=-1)
            return weights @ answer(theta, jnp.einsum("pk,pkd->pd", y, theta["table"][support]))

        record = {"support": support, "kept": jnp.ones((paths, 2), bool), "perturbed": jax.jit(perturb)(theta)}
        density_of = jax.jit(lambda t: policy.log_prob(logits_of(t, start(paths)), t["table"], record))
        assert abs(np.sum(np.exp(density_of(theta))) * 0.4**2 - 1) < 1e-9
        check(objective, theta, score(policy, theta, [record], weights))


# float32


@pytest.mark.parametrize(
    ("name", "options"),
    [("hard", {}), ("hard", {"temperature": 0.6}), ("soft", {}), ("fuzzy", {"temperature": 0.02}), ("none", {})],
)
def test_the_fused_density_and_its_gradients(name, options):
    policy, rng = thoughts.make(name, **options), np.random.default_rng(2)
    hidden, head, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 8), (8, 30), (30, 6)))
    record = jax.jit(policy.sample)(jnp.einsum("bld,dv->blv", hidden, head), table, KEY)[1]

    def whole(hidden, head, table):
        return policy.log_prob(jnp.einsum("bld,dv->blv", hidden, head, precision="highest"), table, record)

    def blocks(hidden, head, table):
        return policy.fused(hidden, head, table, record)

    cotangent = rng.normal(size=(3, 4)).astype(np.float32)
    found, pull_fused = jax.vjp(jax.jit(blocks), hidden, head, table)
    slopes = pull_fused(cotangent)
    with jax.enable_x64(True):
        want, pull = jax.vjp(jax.jit(whole), *(jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, head, table)))
        exact = [np.asarray(x) for x in pull(cotangent.astype(np.float64))]
    # A score of 20 is rounded by 1e-6, and its rounding is divided by the temperature.
    tolerance = 2e-4 if name == "fuzzy" else 5e-6
    np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(slopes, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(2, float(np.max(np.abs(b)))))
    assert bool(np.any(want)) == (name != "none")
    empty = jax.tree.map(jnp.zeros_like, record)  # padding
    slopes = jax.jit(jax.grad(lambda *a: jnp.sum(policy.fused(*a, empty)), argnums=(0, 1, 2)))(hidden, head, table)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_fuzzy_near_a_tie_is_finite_and_right():
    """Gaps of the two largest logits from an exact tie to 40 temperatures, among large logits."""
    gaps = np.array([0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 4e-3])
    z = np.tile(np.array([31.0, 31.0, 12.0, -60.0]), (len(gaps), 1)).astype(np.float32)
    z[:, 1] -= gaps
    rng = np.random.default_rng(0)
    logits, table = jnp.asarray(z), jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    policy = thoughts.make("fuzzy")
    exact = (z - z.max(-1, keepdims=True).astype(np.float64)) / 1e-4
    np.testing.assert_allclose(thoughts.scores(logits, 1e-4), exact, rtol=1e-6)
    _, record = jax.jit(policy.sample)(logits, table, KEY)
    slopes = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(policy.log_prob(*a, record)), (0, 1)))
    value, (slope, rows) = slopes(logits, table)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert np.all(np.isfinite(rows))
    wide, e = z.astype(np.float64), np.asarray(table, np.float64)
    p = np.exp((wide - wide.max(-1, keepdims=True)) / 1e-4)
    p /= p.sum(-1, keepdims=True)
    gap = (np.asarray(record["thought"]) - p @ e) / np.asarray(record["scale"])[:, None] ** 2
    want = p * (gap @ e.T - np.sum(gap * (p @ e), axis=-1, keepdims=True)) / 1e-4
    np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    assert np.abs(want).max() > 1e3


def test_the_gate_is_its_equations():
    rng = np.random.default_rng(4)
    e, table, logits = rng.normal(size=(3, 4, 6)), rng.normal(size=(9, 6)), rng.normal(size=(3, 4, 9))
    kernels, biases, decay = rng.normal(size=(2, 6, 6)), rng.normal(size=(2, 6)), rng.normal(size=6)
    params = {
        "recurrent": {"kernel": jnp.asarray(kernels[0], jnp.float32), "bias": jnp.asarray(biases[0], jnp.float32)},
        "input": {"kernel": jnp.asarray(kernels[1], jnp.float32), "bias": jnp.asarray(biases[1], jnp.float32)},
        "decay": jnp.asarray(decay, jnp.float32),
    }
    p = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum(-1, keepdims=True)
    h = p @ table / np.sqrt((p**2).sum(-1, keepdims=True))
    r, i = (1 / (1 + np.exp(-(e @ k + b))) for k, b in zip(kernels, biases, strict=True))
    a = np.exp(-8 * np.log1p(np.exp(-decay)) * r)
    want = a * e + np.sqrt(1 - a**2) * (i * h)
    narrow = [jnp.asarray(x, jnp.float32) for x in (e, logits, table)]
    mixed = jax.jit(gate.mixture)(narrow[1], narrow[2], 0.5)
    np.testing.assert_allclose(mixed, h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(gate.gate)(params, narrow[0], mixed), want, rtol=1e-5, atol=1e-5)
    token = jnp.asarray(rng.integers(9, size=(3, 4)), jnp.int32)
    found = jax.jit(gate.log_prob)(narrow[1], token, 0.5)
    np.testing.assert_allclose(found, np.log(np.take_along_axis(p, token[..., None], -1))[..., 0], rtol=1e-5)
    # a closed gate passes the token's embedding on, and has a finite slope
    closed = {**params, "decay": jnp.full(6, 200.0)}
    fed, slope = jax.jit(jax.value_and_grad(lambda q: jnp.sum(gate.gate(q, narrow[0], mixed))))(closed)
    np.testing.assert_allclose(fed, e.sum(), rtol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope))
    assert jax.eval_shape(gate.gate, params, narrow[0].astype(jnp.bfloat16), mixed).dtype == jnp.bfloat16
