"""Vocabulary growth: old rows bit for bit, new rows as asked for, state of the optimiser and the methods with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl import mesh, vocabulary
from jaxcl.tree import named_leaves
from jaxcl.types import TrainState

OLD, NEW, D = 40, 47, 6
AXES = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab"), "norm": ("embed",), "bias": None}
KEY = jax.random.key(3)


def params(rows=OLD, dtype=jnp.float32):
    """Parameters whose rows beyond OLD are zero."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, D)) @ rng.normal(size=(D, D)) + 3
    table[OLD:] = 0
    head = rng.normal(size=(D, rows))
    head[:, OLD:] = 0
    made = {"embedding": table, "head": head, "norm": np.ones(D), "bias": np.ones(OLD)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), made)


def bits(x):
    return np.ascontiguousarray(x).tobytes()


@pytest.mark.parametrize(
    ("how", "dtype", "rows", "size", "out"),
    [
        ("mean", jnp.float32, OLD, None, NEW),
        ("mean", jnp.bfloat16, 44, 48, 48),
        ("normal", jnp.float32, 44, None, NEW),
        ("normal", jnp.bfloat16, 64, None, 64),
        ("zeros", jnp.float32, 64, None, 64),
    ],
)
def test_old_rows_stay_bit_for_bit(how, dtype, rows, size, out):
    before = params(rows, dtype)
    after = vocabulary.grow(before, AXES, OLD, NEW, how=how, key=KEY, size=size)
    assert after["embedding"].shape == (out, D)
    assert after["head"].shape == (D, out)
    assert bits(after["embedding"][:OLD]) == bits(before["embedding"][:OLD])
    assert bits(after["head"][:, :OLD]) == bits(before["head"][:, :OLD])
    assert not np.any(after["embedding"][NEW:])
    assert not np.any(after["head"][:, NEW:])
    assert after["norm"] is before["norm"]
    assert after["bias"] is before["bias"]  # has the size of the vocabulary, but not its name
    assert after["embedding"].dtype == dtype
    new = np.asarray(after["embedding"][OLD:NEW], np.float64)
    assert np.all(new == 0) if how == "zeros" else np.all(np.abs(new).sum(axis=1) > 0)


def test_the_mean_of_the_old_rows_and_nothing_else():
    before = params(64)
    after = vocabulary.grow(before, AXES, OLD, NEW, how="mean", key=KEY)
    mean = np.asarray(before["embedding"], np.float64)[:OLD].mean(axis=0)
    np.testing.assert_allclose(after["embedding"][OLD:NEW], np.tile(mean, (NEW - OLD, 1)), rtol=2e-6)
    mean = np.asarray(before["head"], np.float64)[:, :OLD].mean(axis=1)
    np.testing.assert_allclose(after["head"][:, OLD:NEW], np.tile(mean[:, None], (1, NEW - OLD)), rtol=2e-5)


def test_draws_have_mean_and_covariance_of_the_old_rows():
    before, count = params(), 4000
    after = vocabulary.grow(before, AXES, OLD, OLD + count, how="normal", key=KEY)
    table, new = (np.asarray(x, np.float64) for x in (before["embedding"], after["embedding"][OLD:]))
    wanted = np.cov(table.T)
    assert np.abs(np.cov(new.T) - wanted).max() < 0.12 * np.abs(wanted).max()
    error = (new.mean(axis=0) - table.mean(axis=0)) / np.sqrt(np.diag(wanted) / count)
    assert np.abs(error).max() < 4.5
    assert abs(np.corrcoef(after["embedding"][OLD:, 0], after["head"][0, OLD:])[0, 1]) < 0.08  # each draws for itself


def test_a_cut_array_grows_like_a_whole_one():
    devices = mesh.make(tensor=2, fsdp=2, data=2)
    cut = {"embedding": PartitionSpec("tensor", "fsdp"), "head": PartitionSpec("fsdp", "tensor")}
    shardings = {name: NamedSharding(devices, cut.get(name, PartitionSpec())) for name in AXES}
    before = params(64)
    grown = jax.jit(lambda tree: vocabulary.grow(tree, AXES, OLD, NEW, how="normal", key=KEY), out_shardings=shardings)(
        jax.device_put(before, shardings)
    )
    whole = vocabulary.grow(before, AXES, OLD, NEW, how="normal", key=KEY)
    for name in AXES:
        np.testing.assert_allclose(grown[name], whole[name], rtol=1e-5, atol=1e-5)
    assert grown["embedding"].sharding == shardings["embedding"]
    assert bits(grown["embedding"][:OLD]) == bits(before["embedding"][:OLD])


@pytest.mark.parametrize("rows", [OLD, 48])
def test_a_state_grows_with_its_parameters(rows):
    before = params(rows)
    tx = optax.adamw(1e-3)
    ones = jax.tree.map(lambda x: jnp.full_like(x, 0.5), before)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), before)
    memory = {
        "ewc": {"fisher": ones, "anchor": before},
        "lwf": {"teacher": before},
        "tasks": {"fisher": stacked, "anchor": stacked},
        "rows": jnp.arange(OLD),
    }
    opt_state = jax.tree.map(lambda x: x + 1, tx.init(before))
    state = TrainState(jnp.int32(7), before, opt_state, memory)
    after = vocabulary.grow_state(state, AXES, OLD, NEW, how="mean", key=KEY)
    old, new = dict(named_leaves(state)), dict(named_leaves(after))
    assert old.keys() == new.keys()
    grown = 0
    for name, x in new.items():
        axis = {"embedding": -2, "head": -1}.get(name.rsplit("/", 1)[-1])
        if axis is None:
            assert bits(x) == bits(old[name])
            continue
        grown += 1
        assert x.shape[axis] == max(rows, NEW)
        ours, theirs = (np.moveaxis(np.asarray(y), axis, 0) for y in (x, old[name]))
        assert bits(ours[:OLD]) == bits(theirs[:OLD])
        copy = name.startswith("params") or "anchor" in name or "teacher" in name
        assert np.all(ours[NEW:] == 0)
        if copy:
            param = np.moveaxis(np.asarray(after.params[name.rsplit("/", 1)[-1]]), axis, 0)
            param = param[:, None] if ours.ndim > param.ndim else param
            np.testing.assert_array_equal(ours[OLD:NEW], np.broadcast_to(param[OLD:NEW], ours[OLD:NEW].shape))
        else:
            assert np.all(ours[OLD:NEW] == 0)
    assert grown == 2 * (1 + 2 + 3 + 2)  # parameters, two moments, three of one task, two of several
    fresh = tx.init(after.params)
    assert jax.tree.structure(fresh) == jax.tree.structure(after.opt_state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, fresh, after.opt_state)))


@pytest.mark.parametrize(("old", "new", "size"), [(OLD, OLD - 1, None), (OLD, NEW, NEW - 1), (OLD + 1, NEW, None)])
def test_rows_are_never_removed(old, new, size):
    with pytest.raises(ValueError, match="vocabulary of"):
        vocabulary.grow(params(), AXES, old, new, key=KEY, size=size)
