"""The gradient-alignment probe on linear regression, where gradients are known."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

from jaxcl import alignment

W = np.array([0.5, -1.0, 2.0], "f")
PARAMS = {"w": jnp.asarray(W)}
RNG = np.random.default_rng(0)
SETTING = toys.setting(
    model=toys.linear(3), example=toys.points(np.zeros((4, 3), "f"), np.zeros(4, "f")), loss=toys.squared
)
measure = toys.quick(alignment.alignment(SETTING))


def rows(x, y):
    return toys.points(np.asarray(x, "f"), np.asarray(y, "f"))


def gradient(x, y):
    return x.T @ (x @ W - y) / len(y)


def test_it_is_the_cosine_of_the_gradients():
    for _ in range(5):
        (xa, xb), (ya, yb) = RNG.normal(size=(2, 4, 3)), RNG.normal(size=(2, 4))
        a, b = gradient(xa, ya), gradient(xb, yb)
        told = measure(PARAMS, rows(xa, ya), rows(xb, yb))
        norms = np.linalg.norm(a), np.linalg.norm(b)
        expected = {"dot": a @ b, "cosine": a @ b / norms[0] / norms[1], "norm_a": norms[0], "norm_b": norms[1]}
        for name, value in expected.items():
            np.testing.assert_allclose(told[f"alignment/{name}"], value, rtol=1e-4, atol=1e-5)


def test_limits():
    x = np.eye(4, 3)
    base = x @ W
    first, second = np.eye(4)[:2]
    up, down = rows(x, base + first), rows(x, base - first)
    other, none = rows(x, base + second), rows(x, base)
    assert float(measure(PARAMS, up, up)["alignment/cosine"]) == 1.0
    assert float(measure(PARAMS, up, down)["alignment/cosine"]) == -1.0
    assert float(measure(PARAMS, up, other)["alignment/cosine"]) == 0.0
    assert float(measure(PARAMS, up, none)["alignment/cosine"]) == 0.0  # no gradient, no direction


def test_gram_matrix_takes_parameters_of_any_shape():
    """The inner products are those of the flattened gradients, whatever the number of dimensions of a leaf."""
    rng = np.random.default_rng(3)
    rows = toys.stack([toys.text(seed, task=seed % 3) for seed in range(3)])
    model = toys.language_model()
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    params = {
        **params,
        "scale": jnp.float32(1.5),
        "mlp": {**params["mlp"], "w": params["mlp"]["w"].reshape(2, 8, 4, 4)},
    }

    def apply(params, batch, cache=None):
        scaled = {**params, "mlp": {**params["mlp"], "w": params["scale"] * params["mlp"]["w"].reshape(16, 16)}}
        return model.apply(scaled, batch)

    setting = toys.setting(model=model._replace(apply=apply))
    products = toys.quick(alignment.gram(setting))(params, rows)
    of = toys.quick(alignment.gradient(setting))
    flat = []
    for i in range(3):
        grads = of(params, jax.tree.map(lambda x, i=i: x[i], rows))
        flat.append(np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(grads)]))
    np.testing.assert_allclose(products, np.stack(flat) @ np.stack(flat).T, rtol=1e-4)


def test_gram_matrix_of_several_tasks():
    x, y = RNG.normal(size=(5, 4, 3)), RNG.normal(size=(5, 4))
    y[3] = x[3] @ W
    g = np.stack([gradient(a, b) for a, b in zip(x, y, strict=True)])
    stacked = toys.stack([rows(a, b) for a, b in zip(x, y, strict=True)])
    products = toys.quick(alignment.gram(SETTING))(PARAMS, stacked)
    np.testing.assert_allclose(products, g @ g.T, rtol=1e-4, atol=1e-4)
    cosines = np.asarray(toys.quick(alignment.cosines)(jnp.asarray(g @ g.T, jnp.float32)))
    live = [0, 1, 2, 4]
    np.testing.assert_allclose(np.diagonal(cosines)[live], 1, rtol=1e-5)
    assert jax.tree.leaves(cosines)[0].shape == (5, 5)
    assert np.isfinite(cosines).all()
