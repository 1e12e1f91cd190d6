"""Thought policies: one contract for all of them, limits, exact gradients by enumeration and quadrature, densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.rl import thoughts
from jaxcl.schema import UserError

B, L, V, D = 4, 3, 11, 6
KEY = jax.random.key(5)
OPTIONS = {
    "hard": {"temperature": 0.8},
    "hrpo": {"temperature": 0.8},
    "soft": {},
    "fuzzy": {},
    "none": {},
    "mts": {"count": 3, "temperature": 1.3},
    "dirichlet": {"concentration": 2.0},
    "dirichlet-top": {"top_k": 4, "floor": 1e-3},
    "gumbel": {},
    "gumbel-paper": {"clamp": (-1.5, 3.0), "reduction": "mean", "temperature": 0.6},
}
every = pytest.mark.parametrize("label", list(OPTIONS))


def policy_of(label):
    return thoughts.make(label.split("-")[0], **OPTIONS[label])


def case(dtype=jnp.float32, shape=(B, L), size=V, spread=2.0):
    rng = np.random.default_rng(1)
    logits = spread * rng.normal(size=(*shape, size))
    return jnp.asarray(logits, jnp.float32), jnp.asarray(rng.normal(size=(size, D)), dtype)


# The contract.


@functools.cache
def drawer(label):
    return jax.jit(policy_of(label).sample)


@every
def test_what_is_fed_and_recorded(label):
    policy = policy_of(label)
    logits, table = case()
    fed, record = drawer(label)(logits, table, KEY)
    assert policy.soft == (label != "hard") == ("thought" in record)
    assert policy.name == label.split("-")[0]
    np.testing.assert_array_equal(fed, record["thought"] if policy.soft else table[record["token"]])
    assert policy.gated == (label == "hrpo")
    if policy.soft and not policy.gated:
        np.testing.assert_array_equal(record["token"], np.argmax(logits, axis=-1))
    again, found, (mean, still) = jax.jit(
        lambda: (policy.feed(table, record), policy.log_prob(logits, table, record), policy.greedy(logits, table))
    )()
    np.testing.assert_allclose(fed, again, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(found))
    assert mean.shape == (B, L, D)
    np.testing.assert_array_equal(still["token"], np.argmax(logits, axis=-1))
    assert set(still) == ({"token", "thought"} if policy.soft else {"token"})


@every
def test_a_mixture_is_what_is_fed(label):
    policy = policy_of(label)
    logits, table = case()
    assert (policy.mixture is None) == (policy.name in ("hard", "soft", "fuzzy", "none", "hrpo"))
    if policy.mixture is None:
        return
    fed, record = drawer(label)(logits, table, KEY)
    tokens, shares = policy.mixture(record)
    assert (tokens is None) == (label == "dirichlet")
    tokens = np.broadcast_to(np.arange(V), (B, L, V)) if tokens is None else np.asarray(tokens)
    assert shares.shape == tokens.shape
    np.testing.assert_allclose(np.sum(shares, axis=-1), 1, rtol=1e-6)
    want = np.einsum("bls,blsd->bld", np.asarray(shares, np.float64), np.asarray(table, np.float64)[tokens])
    np.testing.assert_allclose(fed, want, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda floats: jnp.sum(policy.mixture({**record, **floats})[1] ** 2))(
        {name: x for name, x in record.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    )
    assert not any(np.any(x) for x in slope.values())


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (B, L)])
def test_shapes_and_dtypes(label, dtype, shape):
    policy = policy_of(label)

    def draw(key):
        logits, table = jnp.zeros((*shape, V), dtype), jnp.zeros((V, D), dtype)
        fed, record = policy.sample(logits, table, key)
        return fed, record, policy.log_prob(logits, table, record), policy.feed(table, record)

    fed, record, log_prob, again = jax.eval_shape(draw, KEY)
    assert (fed.shape, fed.dtype) == (again.shape, again.dtype) == ((*shape, D), dtype)
    assert (log_prob.shape, log_prob.dtype) == (shape, jnp.float32)
    assert (record["token"].shape, record["token"].dtype) == (shape, jnp.int32)
    for name, leaf in record.items():
        assert leaf.shape[: len(shape)] == shape, name
        assert leaf.dtype == dtype if name == "thought" else leaf.dtype in (jnp.int32, jnp.float32, jnp.bool), name


@every
def test_keys(label):
    logits, table = case()
    (fed, record), (again, same) = drawer(label)(logits, table, KEY), drawer(label)(logits, table, KEY)
    drawn = (lambda pair: table[pair[1]["token"]]) if label == "hrpo" else (lambda pair: pair[0])  # beside its token
    other = drawn(drawer(label)(logits, table, jax.random.key(6)))
    np.testing.assert_array_equal(fed, again)
    jax.tree.map(np.testing.assert_array_equal, record, same)
    assert bool(np.any(np.asarray(drawn((fed, record))) != np.asarray(other))) == (label != "none")
    equal = drawn(drawer(label)(jnp.asarray(np.broadcast_to(logits[:1, :1], logits.shape)), table, KEY))
    if label != "none":  # rows with equal logits differ from each other
        assert len(np.unique(np.asarray(equal).reshape(B * L, D), axis=0)) > 2


@every
def test_a_row_with_a_key_of_its_own_does_not_depend_on_the_others(label):
    policy = policy_of(label)
    (logits, table), order = case(), np.array([2, 0, 3, 1])
    logits = np.asarray(logits)[:, 0]
    keys = jax.random.split(KEY, B)
    draw = jax.jit(jax.vmap(policy.sample, (0, None, 0)))
    whole, moved = draw(logits, table, keys), draw(logits[order], table, keys[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), whole, moved)


@every
def test_a_draw_is_data(label):
    policy = policy_of(label)
    logits, table = case()
    record = drawer(label)(logits, table, KEY)[1]
    floats = {k: v for k, v in record.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def size(tree):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(tree))

    def total(logits, table, floats, blind):
        drawn = size(policy.sample(logits, table, KEY)) + size(policy.greedy(logits, table))
        stored = {**record, **floats}
        used = policy.log_prob(blind, table, stored) if "thought" in record else jnp.zeros(())
        return drawn, size(used) + size(policy.feed(jax.lax.stop_gradient(table), stored))

    slopes = jax.jit(jax.grad(lambda *a: total(*a, logits)[0], argnums=(0, 1)))(logits, table, floats)
    assert all(not np.any(slope) for slope in slopes)
    slopes = jax.jit(jax.grad(lambda f: total(logits, table, f, logits)[1]))(floats)
    assert all(not np.any(slope) for slope in slopes.values())


@every
def test_padding_has_no_nan(label):
    """Records of zeros, and logits of -inf that mask a part of the vocabulary."""
    policy = policy_of(label)
    logits, table = case()
    masked = jnp.asarray(np.where(np.arange(V) < 7, logits, -np.inf))
    drawn = drawer(label)(masked, table, KEY)[1]
    empty = {name: np.zeros_like(leaf) for name, leaf in drawn.items()}
    assert np.all(np.isfinite(jax.jit(policy.feed)(table, empty)))
    slope = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(policy.log_prob(*a)), argnums=(0, 1)))
    for value, slopes in (slope(logits, table, empty), slope(masked, table, drawn)):
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hard", {"temperature": 0}, "config.policy temperature=0: must be positive"),
        ("soft", {"gamma": -1}, "config.policy gamma=-1: must not be negative"),
        ("soft", {"gamma": float("nan")}, "gamma=nan: must not be negative"),
        ("soft", {"norm": "row"}, "norm='row': expected 'coordinate' or 'vector'"),
        ("fuzzy", {"temperature": -1e-4}, "temperature=-0.0001: must be positive"),
        ("none", {"gamma": 0.1}, "config.policy.gamma: unknown key"),
        ("hrpo", {"temperature": 0.0}, "config.policy temperature=0.0: must be positive"),
        ("hrpo", {"gamma": 0.1}, "config.policy.gamma: unknown key"),
        ("mts", {"count": 0}, "count=0: must be at least 1"),
        ("mts", {"count": 1.5}, "count=1.5: expected int"),
        ("mts", {"ratio": "mean"}, "ratio='mean': expected 'product' or 'geometric'"),
        ("dirichlet", {"concentration": 0.0}, "concentration=0.0: must be positive"),
        ("dirichlet", {"floor": 0.0}, "floor=0.0: must be positive"),
        ("dirichlet", {"top_k": 1}, "top_k=1: must be at least 2"),
        ("gumbel", {"top_k": 0}, "top_k=0: must be at least 1"),
        ("gumbel", {"top_p": 1.1}, r"top_p=1.1: must lie in \(0, 1\]"),
        ("gumbel", {"tau_g": 0.0}, "tau_g=0.0: must be positive"),
        ("gumbel", {"clamp": (3.0, -1.5)}, "must be .low, high. with low < high"),
        ("gumble", {}, "did you mean 'gumbel'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        thoughts.make(name, **options)


# Limits.


def rollout(policy, steps=8, size=7):
    """Tokens and inputs of a greedy or sampled chain on a small recurrent network."""
    rng = np.random.default_rng(3)
    table, inner, outer = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((size, D), (D, D), (D, size)))

    @jax.jit
    def step(x, key):
        logits = 3 * jnp.tanh(x @ inner) @ outer
        fed, record = policy.greedy(logits, table) if key is None else policy.sample(logits, table, key)
        return fed, (record["token"], fed)

    def run(keys):
        x, out = jnp.asarray(rng.normal(size=(16, D)), jnp.float32), []
        for i in range(steps):
            x, seen = step(x, None if keys is None else keys[i])
            out.append(seen)
        return [np.asarray(jnp.stack(part)) for part in zip(*out, strict=True)], np.asarray(table)

    return run


def test_cold_soft_tokens_without_noise_are_greedy_tokens():
    (tokens, fed), table = rollout(thoughts.make("hard"))(None)
    np.testing.assert_array_equal(fed, table[tokens])
    assert len(np.unique(tokens)) > 3
    for cold in (
        thoughts.make("soft", temperature=1e-6, gamma=0.0),
        thoughts.make("soft", temperature=1e-6, gamma=1e-7),
    ):
        (found, near), _ = rollout(cold)(jax.random.split(KEY, 8))
        np.testing.assert_array_equal(found, tokens)
        np.testing.assert_allclose(near, fed, atol=2e-6)


def test_fuzzy_greedy_is_hard_greedy_in_nearly_every_row():
    logits, table = case(shape=(4000,), size=50, spread=8.0)
    hard, record = thoughts.make("hard").greedy(logits, table)
    fuzzy, shadow = thoughts.make("fuzzy").greedy(logits, table)
    np.testing.assert_array_equal(record["token"], shadow["token"])
    same = np.max(np.abs(hard - fuzzy), axis=-1) < 1e-5
    assert same.mean() >= 0.999
    near = np.argmin(np.sum((np.asarray(fuzzy)[:, None] - np.asarray(table)[None]) ** 2, -1), axis=1)
    assert (near == record["token"]).mean() >= 0.999


def test_no_noise_is_the_mean_embedding():
    logits, table = case()
    z = np.asarray(logits, np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    still = thoughts.make("soft", temperature=1.0, gamma=0.0)
    for name, fed in (
        ("none", thoughts.make("none").sample(logits, table, KEY)[0]),
        ("gamma 0", still.sample(logits, table, KEY)[0]),
        ("greedy", thoughts.make("soft", temperature=1.0).greedy(logits, table)[0]),
        ("many", thoughts.make("mts").greedy(logits, table)[0]),
    ):
        np.testing.assert_allclose(fed, p @ np.asarray(table, np.float64), rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.any(still.log_prob(logits, table, still.sample(logits, table, KEY)[1]))


@pytest.mark.parametrize(("rows", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)])
def test_one_token_of_many_is_a_hard_token_bit_for_bit(rows, dtype):
    logits, table = case(dtype)
    one, hard = thoughts.make("mts", count=1, temperature=0.7), thoughts.make("hard", temperature=0.7)
    key = jax.random.split(KEY, B) if rows else KEY
    draw = (lambda p: jax.jit(jax.vmap(p.sample, (0, None, 0)))) if rows else (lambda p: jax.jit(p.sample))
    (fed, record), (want, token) = draw(one)(logits, table, key), draw(hard)(logits, table, key)
    np.testing.assert_array_equal(record["tokens"][..., 0], token["token"])
    np.testing.assert_array_equal(fed, want)
    found, known = jax.jit(lambda: (one.log_prob(logits, table, record), hard.log_prob(logits, table, token)))()
    np.testing.assert_allclose(found, known, rtol=1e-6)


def test_many_tokens_approach_the_mean_as_their_root():
    logits, table = case(shape=(32,))
    mean = thoughts.make("none").greedy(logits, table)[0]
    counts = (16, 1024)
    fed = [jax.jit(thoughts.make("mts", count=k).sample)(logits, table, KEY)[0] for k in counts]
    errors = [np.sqrt(np.mean(np.asarray(x - mean) ** 2)) for x in fed]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.06
    assert errors[-1] < 0.04


def test_the_geometric_ratio_is_a_share_of_the_density():
    logits, table = case()
    full, part = (thoughts.make("mts", count=4, ratio=r) for r in ("product", "geometric"))
    record = {"tokens": jnp.asarray(np.random.default_rng(0).integers(V, size=(B, L, 4)), jnp.int32)}
    whole, share = jax.jit(lambda: [p.log_prob(logits, table, record) for p in (full, part)])()
    np.testing.assert_allclose(share * 4, whole, rtol=1e-6)


# Draws follow their densities.


@pytest.mark.parametrize(("gamma", "norm"), [(0.33, "coordinate"), (1.0, "coordinate"), (0.1, "vector")])
def test_the_noise_is_a_share_gamma_of_the_embeddings(gamma, norm):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(200, 30)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(30, 64)) * rng.uniform(0.1, 2, size=(30, 1)), jnp.float32)
    policy = thoughts.make("soft", gamma=gamma, norm=norm)
    (fed, record), (mean, _) = jax.jit(lambda *a: (policy.sample(*a, KEY), policy.greedy(*a)))(logits, table)
    norms = np.linalg.norm(np.asarray(fed - mean), axis=-1)
    typical = np.sqrt(np.mean(np.sum(np.asarray(table) ** 2, axis=-1)))
    want = gamma * (8 if norm == "vector" else 1)
    assert abs(np.mean(norms) / typical / want - 1) < 0.02
    np.testing.assert_allclose(record["scale"], want * typical / 8, rtol=1e-5)


def test_the_density_is_that_of_what_was_fed_at_the_noise_it_was_fed_with():
    logits, table = case(jnp.bfloat16)
    policy = thoughts.make("soft")
    _, record = policy.sample(logits, table, KEY)
    z, wide = np.asarray(logits, np.float64) / 0.5, np.asarray(table, np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    sigma = np.asarray(record["scale"], np.float64)[..., None]
    gap = (np.asarray(record["thought"], np.float64) - p @ wide) / sigma
    want = np.sum(-0.5 * gap**2 - np.log(sigma * np.sqrt(2 * np.pi)), axis=-1)
    np.testing.assert_allclose(policy.log_prob(logits, table, record), want, rtol=1e-4)
    # a table that has grown since changes the mean, not the noise that was used
    changed = policy.log_prob(logits, 2 * table, record)
    gap = (np.asarray(record["thought"], np.float64) - 2 * p @ wide) / sigma
    np.testing.assert_allclose(changed, np.sum(-0.5 * gap**2 - np.log(sigma * np.sqrt(2 * np.pi)), -1), rtol=1e-4)


def frequencies(tokens, size):
    return np.bincount(np.asarray(tokens).ravel(), minlength=size) / np.asarray(tokens).size


def test_tokens_are_drawn_from_the_cooled_softmax():
    logits, table = case(shape=(1,), size=5, spread=1.0)
    many = jnp.broadcast_to(logits, (20000, 5))
    z = np.asarray(logits[0], np.float64) / 0.7
    want = np.exp(z) / np.exp(z).sum()
    hard = jax.jit(thoughts.make("hard", temperature=0.7).sample)(many, table, KEY)[1]
    several = jax.jit(thoughts.make("mts", temperature=0.7).sample)(many, table, KEY)[1]
    for found in (hard["token"], several["tokens"], several["tokens"][:, 2]):
        np.testing.assert_allclose(frequencies(found, 5), want, atol=0.015)
    same = np.mean(np.asarray(several["tokens"][:, 0] == several["tokens"][:, 1]))
    assert abs(same - np.sum(want**2)) < 0.015  # independent


@pytest.mark.parametrize("top_k", [None, 3])
def test_dirichlet_weights_have_their_moments(top_k):
    logits, table = case(shape=(1,), size=5, spread=1.0)
    policy = thoughts.make("dirichlet", concentration=3.0, floor=0.1, top_k=top_k, temperature=0.7)
    fed, record = jax.jit(policy.sample)(jnp.asarray(np.broadcast_to(logits, (20000, 5))), table, KEY)
    support = np.argsort(-np.asarray(logits[0]))[:top_k] if top_k else np.arange(5)
    z = np.asarray(logits[0], np.float64)[support] / 0.7
    a = 3 * np.exp(z) / np.exp(z).sum() + 0.1
    x = np.exp(np.asarray(record["log_shares"], np.float64))
    np.testing.assert_allclose(x.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(x.mean(0), a / a.sum(), atol=0.01)
    m = a / a.sum()
    np.testing.assert_allclose(x.var(0), m * (1 - m) / (a.sum() + 1), atol=0.005)
    np.testing.assert_allclose(fed, x @ np.asarray(table, np.float64)[support], atol=1e-5)
    np.testing.assert_allclose(jax.jit(policy.greedy)(logits, table)[0][0], m @ np.asarray(table)[support], atol=1e-5)


def test_gumbel_support_noise_and_mixture():
    p = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    logits, table = jnp.log(jnp.asarray(p, jnp.float32)), case(size=5)[1]
    many = jnp.broadcast_to(logits[jnp.array([3, 0, 4, 1, 2])], (20000, 5))  # 0.06, 0.5, 0.04, 0.3, 0.1
    policy = thoughts.make("gumbel", top_k=4, top_p=0.85, tau_g=0.5)
    fed, record = jax.jit(policy.sample)(many, table, KEY)
    np.testing.assert_array_equal(record["support"][0], [1, 3, 4, 0])
    np.testing.assert_array_equal(record["kept"][0], [True, True, True, False])  # 0.8 is not enough, 0.9 is
    log_p = np.log(p[:3] / p[:3].sum())
    noise = np.asarray(record["perturbed"], np.float64)[:, :3] - log_p
    np.testing.assert_allclose(noise.mean(0), np.euler_gamma, atol=0.03)
    np.testing.assert_allclose(noise.var(0), np.pi**2 / 6, rtol=0.05)
    y = np.exp((log_p + noise) / 0.5)
    y /= y.sum(-1, keepdims=True)
    np.testing.assert_allclose(fed, y @ np.asarray(table, np.float64)[np.array([1, 3, 4])], atol=1e-5)
    want = np.sum(-noise - np.exp(-noise), axis=-1)
    np.testing.assert_allclose(jax.jit(policy.log_prob)(many, table, record), want, rtol=1e-4, atol=1e-4)
    mean = thoughts.make("gumbel", top_k=4, top_p=0.85, tau_g=0.5, reduction="mean")
    np.testing.assert_allclose(jax.jit(mean.log_prob)(many, table, record), want / 3, rtol=1e-4, atol=1e-4)
    whole = jax.jit(thoughts.make("gumbel", top_k=4, top_p=1.0).sample)(many[:1], table, KEY)[1]
    assert np.all(whole["kept"])
    sample = thoughts.make("gumbel", top_k=4, top_p=0.85, clamp=(-0.5, 1.0)).sample
    clamped = jax.jit(sample)(many, table, KEY)[1]
    noise = np.asarray(clamped["perturbed"])[:, :3] - log_p
    np.testing.assert_allclose([noise.min(), noise.max()], [-0.5, 1.0], atol=1e-5)
    z, table = jnp.asarray([0.0, -4.0]), table[:2]  # the paper's mean is over tokens with log p > -3
    paper = thoughts.make("gumbel", top_k=2, top_p=1.0, reduction="mean")
    rare = jax.jit(paper.sample)(z, table, KEY)[1]
    eps = float(rare["perturbed"][0]) + np.log1p(np.exp(-4))
    found = jax.jit(paper.log_prob)(z, table, rare)
    np.testing.assert_allclose(found, -eps - np.exp(-eps), rtol=1e-4)
