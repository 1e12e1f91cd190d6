"""Replay and gradient episodic memory: exact shares, which rows are drawn and stored, the projection."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose
from jaxcl import memory as store
from jaxcl.compose import Taken
from jaxcl.methods import agem, er
from jaxcl.random import named

ROWS = 8


def stream(part, steps, task_of=lambda i: jnp.int32(0)):
    """Runs recall and settle over a stream; returns the rows trained on, metrics and the memory, stacked by step."""

    def one(memory, i):
        numbers = (i * ROWS + jnp.arange(ROWS)).astype(jnp.float32)
        blank = jnp.zeros((ROWS,), jnp.int32)
        batch = toys.Batch(numbers[:, None], numbers, jnp.ones(ROWS), blank, blank, blank + task_of(i))
        key = jax.random.fold_in(jax.random.key(0), i)
        rows = part.recall(memory, batch, key)
        taken = Taken(batch, rows, {}, {}, {}, jax.random.fold_in(key, 1))
        return part.settle(memory, taken), (rows, part.metrics(memory, rows))

    memory, told = toys.quick(lambda: jax.lax.scan(one, part.init({}), jnp.arange(steps)))()
    return memory, jax.device_get(told[0]), jax.device_get(told[1])


def setting(tx=None, tasks=3):
    example = toys.points(np.zeros((ROWS, 1), "f"), np.zeros(ROWS, "f"))
    return toys.setting(model=toys.linear(1), tx=tx or optax.sgd(0.1), example=example, loss=toys.squared, tasks=tasks)


@pytest.mark.parametrize(
    ("options", "per_step"),
    [
        ({"fraction": 0.05}, fractions.Fraction(2, 5)),  # less than a row a step: carried over, not rounded away
        ({"fraction": 0.25}, fractions.Fraction(2)),
        ({"fraction": 0.3, "mode": "extend"}, fractions.Fraction(24, 7)),
        ({"rows": 3}, fractions.Fraction(3)),
        ({"fraction": 0.0}, fractions.Fraction(0)),
    ],
)
def test_the_share_is_exact(options, per_step):
    steps = 35
    memory, rows, metrics = stream(er.make(setting(), capacity=64, **options), steps)
    count = metrics["replayed_rows"]
    assert count[0] == 0  # nothing to draw yet
    due = [int(np.floor((t + 1) * per_step)) - int(np.floor(t * per_step)) for t in range(steps)]
    np.testing.assert_array_equal(count[1:], due[1:])
    np.testing.assert_array_equal(metrics["replayed_weight"], count)
    trained = (rows.weights > 0).sum(1)
    if options.get("mode") == "extend":
        np.testing.assert_array_equal(trained, ROWS + count)
        assert abs(count[1:].sum() / trained[1:].sum() - options["fraction"]) < 0.01
        assert int(memory["seen"]) == steps * ROWS
    else:
        assert (trained == ROWS).all()
        assert int(memory["seen"]) == steps * ROWS - count.sum()  # rows that gave way are not stored


@pytest.mark.parametrize("mode", ["replace", "extend"])
def test_only_earlier_rows_are_replayed_and_every_row_is_what_it_was(mode):
    _, rows, _ = stream(er.make(setting(), capacity=16, fraction=0.5, mode=mode), 20)
    for i in range(1, 20):
        old = (rows.extra["replayed"][i] > 0) & (rows.weights[i] > 0)
        assert old.any()
        assert (rows.targets[i][old] < i * ROWS).all()
        new = rows.targets[i][rows.extra["replayed"][i] == 0]
        assert set(new) <= set(range(i * ROWS, (i + 1) * ROWS))
        np.testing.assert_array_equal(rows.inputs[i][:, 0], rows.targets[i])


def test_past_draws_only_other_tasks():
    part = er.make(setting(), capacity=64, fraction=0.5, tasks="past")
    _, rows, metrics = stream(part, 12, task_of=lambda i: i // 4)
    assert not metrics["replayed_rows"][:4].any()
    assert (metrics["replayed_rows"][4:] == 4).all()
    for i in range(4, 12):
        old = rows.extra["replayed"][i] > 0
        assert (rows.task[i][old] < i // 4).all()
        assert (rows.task[i][~old] == i // 4).all()


def test_replaced_rows_are_spread_evenly():
    """So that every one of 4 devices with 2 rows each replaces one of its rows."""
    _, rows, _ = stream(er.make(setting(), capacity=16, rows=4), 3)
    np.testing.assert_array_equal(rows.extra["replayed"][2].reshape(4, 2).sum(1), [1, 1, 1, 1])


def test_without_rows_replay_is_plain_training():
    plain, none = (compose.make(text, setting()) for text in ("cpt", "er(rows=0)"))
    batch = toys.points(np.ones((ROWS, 1), "f"), np.arange(ROWS, dtype="f"))
    params = {"w": jnp.array([0.3])}
    a, b = plain.init(params), none.init(params)
    for i in range(3):
        a, b = (toys.quick(m.step)(s, batch, jax.random.key(i))[0] for m, s in ((plain, a), (none, b)))
    np.testing.assert_array_equal(a.params["w"], b.params["w"])


def test_projection_in_closed_form():
    """A single constraint: g + v r with v = max(0, -<g, r> / <r, r>), which is GEM's dual solved by hand."""
    rng = np.random.default_rng(0)
    project = toys.quick(agem.conflict_free)
    seen = set()
    for _ in range(40):
        g, r = (np.split(rng.normal(size=7).astype("f"), [3]) for _ in range(2))
        flat_g, flat_r = np.concatenate(g).astype("d"), np.concatenate(r).astype("d")
        out = np.concatenate(jax.tree.leaves(project(dict(enumerate(g)), dict(enumerate(r)))))
        v = max(0.0, -flat_g @ flat_r / (flat_r @ flat_r))
        np.testing.assert_allclose(out, flat_g + v * flat_r, rtol=2e-6, atol=2e-6)
        if v == 0:
            np.testing.assert_array_equal(out, np.concatenate(g))
        else:
            assert abs(out @ flat_r) < 1e-6 * np.linalg.norm(flat_g) * np.linalg.norm(flat_r)
        seen.add(v > 0)
    assert seen == {True, False}
    zero = project({"a": jnp.ones(3)}, {"a": jnp.zeros(3)})
    np.testing.assert_array_equal(zero["a"], np.ones(3))


def test_agem_takes_the_projected_step():
    """Nothing happens during the first task; then the step is that of a NumPy transcription with the same rows."""
    size = 2
    example = toys.points(np.zeros((4, size), "f"), np.zeros(4, "f"))
    made = toys.setting(model=toys.linear(size), tx=optax.sgd(0.1), example=example, loss=toys.squared)
    method = compose.make("agem(capacity=8)", made)
    step, rng = toys.quick(method.step), np.random.default_rng(3)
    state = method.init({"w": jnp.array([0.5, -0.2])})
    w, conflicts = np.array([0.5, -0.2]), 0
    for i in range(8):
        task = min(i // 2, 2)
        x, y = rng.normal(size=(4, size)).astype("f"), rng.normal(size=4).astype("f")
        key = jax.random.key(i)
        memory = state.memory["agem"]
        from_memory = store.draw(memory, 4, named(key, "agem/project"), jnp.arange(3) == task)
        g = x.T @ (x @ w - y) / 4
        if np.any(from_memory.weights):
            a, b = np.asarray(from_memory.inputs, "d"), np.asarray(from_memory.targets, "d")
            r = a.T @ (a @ w - b) / 4
            if g @ r < 0:
                g, conflicts = g - (g @ r) / (r @ r) * r, conflicts + 1
        else:
            assert task == 0
        w = w - 0.1 * g
        state, _ = step(state, toys.points(x, y, task), key)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    assert conflicts > 0
