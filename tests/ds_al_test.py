"""DS-AL and GKEAL against float64 transcriptions of their papers, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import compose
from jaxcl.methods import ds_al
from jaxcl.schema import UserError
from jaxcl.types import Batch

QUICK = True
D, C, WIDTH = 4, 5, 7
GAMMA, COMP, RATIO = 0.3, 0.9, 0.7
OPTIONS = {"gamma": GAMMA, "gamma_comp": COMP, "ratio": RATIO, "every": 1}
# The third task brings class 1 again.
TASKS = ((0, 1), (2, 3), (1, 4))


def batch(x, labels, weights):
    whole = jnp.zeros(len(labels), jnp.int32)
    return Batch(jnp.float32(x), jnp.int32(labels), jnp.float32(weights), whole + 1, whole, whole)


def stream(rows=24):
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((C, D))
    found = []
    for classes in TASKS:
        labels = rng.permutation(np.resize(classes, rows))
        found.append((centre[labels] + rng.standard_normal((rows, D)), labels))
    return found


def built(name, adapter, **options):
    setting = toys.solved(features=D, labels=C, **adapter)
    method = compose.make([{"name": name, **options}], setting)
    return setting, type(method)(*map(toys.quick, method)), toys.quick(setting.model.init)(jax.random.key(7))


def trained(method, params, tasks, size, *, close=True):
    """Returns the state after the tasks; padding of weight 0 fills the last batch of each."""
    state = method.init(params)
    for t, (x, labels) in enumerate(tasks):
        for start in range(0, len(labels), size):
            rows, own = x[start : start + size], labels[start : start + size]
            spare = size - len(own)
            one = batch(
                np.pad(rows, ((0, spare), (0, 0)), constant_values=np.nan),
                np.pad(own, (0, spare)),
                np.arange(size) < len(own),
            )
            state, _ = method.step(state, one, jax.random.key(0))
        if close or t + 1 < len(tasks):
            state = method.end_task(state, jax.tree.map(lambda a: a[None], one), jax.random.key(0))
    return state


def solved(gram, cross, gamma):
    return np.linalg.solve(gram + gamma * np.eye(len(gram)), cross)


def transcribed(tasks, main, side):
    """DS-AL over whole tasks: each stream by its recursion, equations 9, 10, 13 and 15 of the papers."""
    r, u = np.eye(WIDTH) / GAMMA, np.zeros((WIDTH, C))
    q, v = np.eye(WIDTH) / COMP, np.zeros((WIDTH, C))
    seen = set()
    for f, labels in tasks:
        x, z, y = main(f), side(f), np.eye(C)[labels]
        r = r - r @ x.T @ np.linalg.solve(np.eye(len(x)) + x @ r @ x.T, x @ r)
        u = u + r @ x.T @ (y - x @ u)
        residue = y - x @ u
        residue[:, sorted(seen)] = 0  # previous classes
        seen |= {*labels.tolist()}
        q = q - q @ z.T @ np.linalg.solve(np.eye(len(z)) + z @ q @ z.T, z @ q)
        v = v + q @ z.T @ (residue - z @ v)
    return np.concatenate([u, RATIO * v])


@pytest.fixture(scope="module")
def dual():
    return built("ds_al", {"expansion": "dual", "width": WIDTH}, **OPTIONS)


def raw_of(setting, params, tasks):
    """The tasks with the features of the frozen network, float64."""
    return [(np.asarray(setting.analytic.raw(params, batch(x, y, y)), np.float64), y) for x, y in tasks]


def both(params):
    p = np.asarray(params["expansion"]["projection"], np.float64)
    return (lambda f: np.maximum(f @ p, 0)), (lambda f: np.tanh(f @ p))


@pytest.mark.parametrize("size", [24, 7])
def test_both_heads_are_those_of_the_paper_whatever_the_batches(dual, size):
    setting, method, params = dual
    tasks = stream()
    assert params["head"].shape == (2 * WIDTH, C)
    for count in (1, 2, 3):
        wanted = transcribed(raw_of(setting, params, tasks[:count]), *both(params))
        state = trained(method, params, tasks[:count], size)
        np.testing.assert_allclose(state.params["head"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        open_task = trained(method, params, tasks[:count], size, close=False)  # weights of every step
        np.testing.assert_allclose(open_task.params["head"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert float(state.memory["bound"]) < 1e-5
    main, side = both(params)
    errors = [np.eye(C)[y] - main(f) @ wanted[:WIDTH] for f, y in raw_of(setting, params, tasks)]
    sharp = C * sum(map(len, errors)) / sum((e**2).sum() for e in errors)
    np.testing.assert_allclose(state.params["scale"], sharp, rtol=1e-4)
    x, y = tasks[0]
    f = raw_of(setting, params, tasks[:1])[0][0]
    logits = float(state.params["scale"]) * (main(f) @ wanted[:WIDTH] + side(f) @ wanted[WIDTH:])
    np.testing.assert_allclose(setting.model.apply(state.params, batch(x, y, y)).logits, logits, rtol=1e-4, atol=1e-4)


def test_residues_are_of_new_classes_alone_and_without_them_it_is_acil(dual):
    _, method, params = dual
    tasks = stream()
    first, last = (trained(method, params, tasks[:n], 24) for n in (2, 3))
    moved = np.asarray(last.memory["residue"].high - first.memory["residue"].high)
    assert [bool(np.any(moved[:, c])) for c in range(C)] == [False, False, False, False, True]
    none = built("ds_al", {"expansion": "dual", "width": WIDTH}, **OPTIONS | {"ratio": 0.0})
    acil = built("acil", {"expansion": "relu", "width": WIDTH}, gamma=GAMMA)
    np.testing.assert_array_equal(acil[2]["expansion"]["projection"], params["expansion"]["projection"])
    heads = [trained(one, begin, tasks, 24).params["head"] for _, one, begin in (none, acil)]
    np.testing.assert_allclose(heads[0][:WIDTH], heads[1], rtol=0, atol=1e-6)
    assert not np.any(heads[0][WIDTH:])


def test_the_bound_is_that_of_both_streams(dual):
    _, method, params = dual
    memory = trained(method, params, [(x[:4], y[:4]) for x, y in stream()[:1]], 4).memory  # fewer rows than features
    bounds = []
    for main, side in ((GAMMA, COMP), (1e-12, COMP), (GAMMA, 1e-12)):
        options = ds_al.Options(main, side, RATIO, None)
        bounds.append(
            float(toys.quick(lambda memory, options=options: ds_al._solved(params, memory, options)[2])(memory))
        )
    assert bounds[0] < 1e-5
    assert min(bounds[1:]) > 20 * bounds[0]


def test_gkeal_is_ridge_regression_in_the_kernel_of_fixed_centres():
    sigma = 1.7
    adapter = {"expansion": "gaussian", "width": WIDTH, "sigma": sigma}
    setting, method, params = built("gkeal", adapter, gamma=GAMMA, every=1, how="solve")
    assert "inverse" in built("gkeal", adapter, how="recursion")[1].init(params).memory
    tasks = stream()
    state = trained(method, params, tasks, 7, close=False)  # weights of every step
    np.testing.assert_array_equal(state.params["expansion"]["centres"], params["expansion"]["centres"])
    centres = np.asarray(params["expansion"]["centres"], np.float64)
    rows = [np.exp(-((f[:, None] - centres) ** 2).sum(-1) / (2 * sigma**2)) for f, _ in raw_of(setting, params, tasks)]
    x, y = np.concatenate(rows), np.eye(C)[np.concatenate([labels for _, labels in tasks])]
    wanted = solved(x.T @ x, x.T @ y, GAMMA)
    np.testing.assert_allclose(state.params["head"], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_models_and_options_that_do_not_fit_are_refused():
    dual = {"expansion": "dual", "width": WIDTH}
    cases = [
        ("expansion='relu': 'ds_al' has two streams; set it to 'dual'", "ds_al", {"expansion": "relu"}, {}),
        ("config.adapter.bias=True: 'ds_al' reads both", "ds_al", dual | {"bias": True}, {}),
        ("config.adapter.normalise=True: 'ds_al' reads both", "ds_al", dual | {"normalise": True}, {}),
        ("ds_al.gamma=0: must be above 0", "ds_al", dual, {"gamma": 0}),
        ("ds_al.gamma_comp=nan: must be above 0", "ds_al", dual, {"gamma_comp": float("nan")}),
        ("ds_al.ratio=-1: must not be negative", "ds_al", dual, {"ratio": -1}),
        ("ds_al.every=0: must be at least 1", "ds_al", dual, {"every": 0}),
        ("expansion='dual': 'gkeal' is of a kernel; set it to 'gaussian'", "gkeal", dual, {}),
        ("gkeal.gamma=-1.0: must be above 0", "gkeal", {"expansion": "gaussian"}, {"gamma": -1.0}),
        ("gkeal.every=0: must be at least 1", "gkeal", {"expansion": "gaussian"}, {"every": 0}),
    ]
    for words, name, adapter, options in cases:
        with pytest.raises(UserError) as error:
            compose.make([{"name": name, **options}], toys.solved(features=D, labels=C, **adapter))
        assert words in str(error.value)
