"""Optimisers against NumPy, masks by name, and the step that the schedule sees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import optim, schedules, tree
from jaxcl.schema import UserError

rng = np.random.default_rng(0)


def example():
    shapes = {"embed": (7, 4), "layers": {"norm": (2, 4), "up": (2, 4, 8)}, "head": (4, 7)}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def run(tx, params, grads):
    """Parameters after one update for each gradient."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adamw_oracle(params, grads, *, lr, b1, b2, eps, decay, clip):
    """Loshchilov and Hutter, algorithm 2, in float64; `decay` per leaf."""
    params = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for t, gradient in enumerate(grads):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        for i, x in enumerate(g):
            clipped = x * min(1.0, clip / norm)
            m[i] = b1 * m[i] + (1 - b1) * clipped
            v[i] = b2 * v[i] + (1 - b2) * clipped**2
            step = m[i] / (1 - b1 ** (t + 1)) / (np.sqrt(v[i] / (1 - b2 ** (t + 1))) + eps)
            params[i] = params[i] - lr(t) * (step + decay[i] * params[i])
    return params


def test_adamw_with_schedule_clip_and_decay_mask_equals_numpy():
    params, grads = example(), [example() for _ in range(6)]
    lr = schedules.make(name="cosine", peak=1e-2, warmup=2, steps=6)
    ours, state = run(optim.make(lr=lr, weight_decay=0.3, clip=1.5, eps=1e-6), params, grads)
    decay = [0.3 if name in ("head", "layers/up") else 0.0 for name, _ in tree.named_leaves(params)]
    wanted = adamw_oracle(params, grads, lr=lr, b1=0.9, b2=0.95, eps=1e-6, decay=decay, clip=1.5)
    for mine, theirs in zip(jax.tree.leaves(ours), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6)
    assert int(optim.count(state)) == 6


def test_sgd_with_decoupled_decay_and_momentum():
    params, grads = example(), [example() for _ in range(3)]
    ours, _ = run(
        optim.make(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.5, clip=None, no_decay=["norm"]), params, grads
    )
    for name, p in tree.named_leaves(params):
        value, trace = np.asarray(p, np.float64), 0.0
        for g in grads:
            trace = 0.9 * trace + np.asarray(dict(tree.named_leaves(g))[name])
            value = value - 0.1 * (trace + (0.0 if "norm" in name else 0.5) * value)
        np.testing.assert_allclose(dict(tree.named_leaves(ours))[name], value, rtol=1e-5, atol=1e-6)


def test_lion_moves_by_the_sign():
    params, g = example(), example()
    ours, _ = run(optim.make(name="lion", lr=0.01, weight_decay=0.0, clip=None), params, [g])
    for p, q, d in zip(jax.tree.leaves(params), jax.tree.leaves(ours), jax.tree.leaves(g), strict=True):
        np.testing.assert_allclose(q, p - 0.01 * np.sign(d), rtol=1e-6, atol=1e-7)


def test_frozen_parameters_have_no_state_and_do_not_count_in_the_norm():
    params = example()
    grads = {**example(), "embed": 1e6 * params["embed"]}
    tx = optim.make(name="adam", lr=1e-2, frozen=["^embed", "norm"], multipliers={"embed": 2.0}, clip=1.0)
    ours, state = run(tx, params, [grads])
    np.testing.assert_array_equal(ours["embed"], params["embed"])
    np.testing.assert_array_equal(ours["layers"]["norm"], params["layers"]["norm"])
    names = [name for name, leaf in tree.named_leaves(state) if leaf.size > 1]
    assert not any("embed" in name or "norm" in name for name in names)
    assert len(names) == 4  # two moments of two parameters
    rest = {"layers": {"up": params["layers"]["up"]}, "head": params["head"]}
    alone, _ = run(
        optim.make(name="adam", lr=1e-2), rest, [{"layers": {"up": grads["layers"]["up"]}, "head": grads["head"]}]
    )
    np.testing.assert_array_equal(ours["head"], alone["head"])


def test_multipliers_scale_the_rate():
    params, g = example(), example()
    one, _ = run(optim.make(name="sgd", lr=0.1, clip=None), params, [g])
    two, _ = run(optim.make(name="sgd", lr=0.1, clip=None, multipliers={"layers": 0.5, "up$": 0.5}), params, [g])
    moved = lambda a: jax.tree.map(lambda x, y: x - y, a, params)  # noqa: E731
    factors = {"embed": 1.0, "layers": {"norm": 0.5, "up": 0.25}, "head": 1.0}
    jax.tree.map(
        lambda a, b, f: np.testing.assert_allclose(b, f * a, rtol=1e-4, atol=1e-6), moved(one), moved(two), factors
    )


def test_the_rate_is_the_one_the_next_update_uses():
    lr = schedules.make(name="cosine", peak=1.0, warmup=3, steps=9, end=0.1)
    tx = optim.make(name="sgd", lr=lr, clip=None)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for step in range(9):
        wanted = optim.rate(lr, state)
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        np.testing.assert_allclose(-updates["w"], wanted, rtol=1e-6)
        np.testing.assert_allclose(wanted, lr(step), rtol=1e-5)


def test_other_options_on_resume_take_effect_at_the_next_step():
    """A scheduler that stores its rates keeps the old ones after a resume; this one stores a count."""
    params = {"w": jnp.ones(2)}
    state = optim.make(name="sgd", lr=schedules.make(name="constant", peak=1.0), clip=None).init(params)
    updates, _ = optim.make(name="sgd", lr=schedules.make(name="constant", peak=0.25), clip=None).update(
        {"w": jnp.ones(2)}, state, params
    )
    np.testing.assert_array_equal(updates["w"], [-0.25, -0.25])


def test_state_is_arrays_only_and_the_update_is_closed():
    params = example()
    for name in ("adamw", "adam", "lion", "sgd"):
        tx = optim.make(name=name, lr=1e-3, frozen=["embed"], multipliers={"head": 0.1})
        state = jax.eval_shape(tx.init, params)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
        after = jax.eval_shape(tx.update, params, state, params)[1]
        assert jax.tree.structure(state) == jax.tree.structure(after)
        assert jax.tree.leaves(state) == jax.tree.leaves(after)


def test_moments_of_low_precision_parameters_are_float32():
    state = optim.make(lr=1e-3).init({"w": jnp.ones(2, jnp.bfloat16)})
    mu = [leaf for name, leaf in tree.named_leaves(state) if "mu" in name]
    assert mu[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamx"}, "adam"),
        ({"lr": -1.0}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"clip": 0.0}, "clip"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay"),
        ({"momentum": 0.9}, "momentum"),
        ({"frozen": ["("]}, "regular expression"),
        ({"frozen": ["nowhere"]}, r"frozen: 'nowhere' matches no parameter"),
        ({"no_decay": ["nowhere"]}, "no_decay"),
        ({"multipliers": {"nowhere": 1.0}}, "multipliers"),
        ({"frozen": ["."]}, "every parameter"),
    ],
)
def test_bad_options_name_the_field_and_the_remedy(options, words):
    with pytest.raises(UserError, match=words):
        optim.make(**({"lr": 1e-3} | options)).init(jax.eval_shape(example))
