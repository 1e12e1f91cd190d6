"""CPO's anchor: masks and penalty against NumPy, ties and small tensors, stacked tensors, what the strength does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose
from jaxcl.methods import cpo

RNG = np.random.default_rng(0)


def key(i):
    return jax.random.key(i)


def masked(moved, share):
    """Returns the mask of one tensor, by sorting."""
    order = np.sort(moved, axis=None)[::-1]
    threshold = order[max(1, round(share * moved.size)) - 1]
    return (moved >= threshold) & (moved > 0)


@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
def test_the_largest_entries_of_a_tensor(share):
    find = jax.jit(lambda x: cpo.largest(x, share, tuple(range(x.ndim))))
    exact = [RNG.exponential(size=shape).astype("f") for shape in [(), (1,), (9,), (10,), (15,), (7, 11), (3, 4, 5)]]
    scales = [1e-30, 1e-8, 1e30]
    for moved in [*exact, *(exact[5] * np.float32(scale) for scale in scales)]:
        mask = np.asarray(find(moved))
        np.testing.assert_array_equal(mask, masked(moved, share))
        assert mask.sum() == max(1, round(share * moved.size))


def test_ties_count_together_and_what_did_not_move_never_counts():
    find = jax.jit(lambda x: cpo.largest(x, 0.1, (0,)))
    for moved in (np.r_[np.full(3, 2.0), np.zeros(17)], np.r_[1.0, np.zeros(29)], np.zeros(20), np.full(4, 0.5)):
        mixed = RNG.permutation(moved).astype("f")
        np.testing.assert_array_equal(find(mixed), masked(mixed, 0.1))
    assert np.asarray(find(np.zeros(20, "f"))).sum() == 0
    assert np.asarray(find(np.float32([1, 1, 1] + [0] * 17))).sum() == 3  # two were wanted


def test_stacked_layers_and_experts_are_tensors_of_their_own():
    moved = RNG.exponential(size=(2, 3, 5, 4)).astype("f") * np.float32([1, 100])[:, None, None, None]
    found = np.asarray(jax.jit(lambda x: cpo.largest(x, 0.1, (2, 3)))(moved))
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(found[i, j], masked(moved[i, j], 0.1))
    base = toys.language_model()
    model = base._replace(axes={"a": ("layers", "expert", "embed", "mlp"), "b": ("embed", "mlp")})
    part = cpo.make(toys.setting(model=model))
    start = {"a": jnp.zeros(moved.shape), "b": jnp.zeros((5, 4))}
    ended = part.end_task(part.init(start), {"a": jnp.asarray(moved), "b": jnp.asarray(moved[0, 0])}, None, key(0))
    np.testing.assert_array_equal(ended["mask"]["a"], found)
    np.testing.assert_array_equal(ended["mask"]["b"], found[0, 0])


def test_a_stream_of_tasks_is_its_transcription():
    """Three tasks of linear regression: the masks add up, the reference moves on, the first task is free."""
    size, strength, lr = 24, 3.0, 0.05
    example = toys.points(np.zeros((4, size), "f"), np.zeros(4, "f"))
    made = toys.setting(model=toys.linear(size), tx=optax.sgd(lr), example=example, loss=toys.squared)
    method = compose.make(f"cpo(strength={strength}, share=0.1)", made)
    step, end_task = toys.quick(method.step), toys.quick(method.end_task)
    w = RNG.normal(size=size)
    state, reference, mask = method.init({"w": jnp.asarray(w, jnp.float32)}), w, np.zeros(size, bool)
    for task in range(3):
        for i in range(3):
            x, y = RNG.normal(size=(4, size)), RNG.normal(size=4)
            state, metrics = step(state, toys.points(x.astype("f"), y.astype("f"), task), key(i))
            gap, count = mask * (w - reference), max(mask.sum(), 1)
            np.testing.assert_allclose(metrics["cpo"], strength * np.sum(gap**2) / count, rtol=1e-3, atol=1e-9)
            assert (float(metrics["cpo"]) > 0) == (task > 0 and i > 0)
            w = w - lr * (x.T @ (x @ w - y) / 4 + 2 * strength * gap / count)
            np.testing.assert_allclose(state.params["w"], w, rtol=1e-4, atol=1e-6)
        state = end_task(state, toys.stack([example]), key(task))
        mask, reference = mask | masked(np.abs(w - reference), 0.1), w
        np.testing.assert_array_equal(state.memory["cpo"]["mask"]["w"], mask)
        np.testing.assert_array_equal(state.memory["cpo"]["reference"]["w"], state.params["w"])
    assert 2 < mask.sum() <= 6


def stream(options, tx, microbatches=1, steps=8):
    """Returns the parameters at the end of two tasks, the mask of the first and the penalty at every step."""
    rng, size = np.random.default_rng(1), 30
    example = toys.points(np.zeros((8, size), "f"), np.zeros(8, "f"))
    parts = {"model": toys.linear(size), "example": example, "loss": toys.squared, "microbatches": microbatches}
    method = compose.make(options, toys.setting(tx=tx, **parts))
    state = method.init({"w": jnp.asarray(rng.normal(size=size), jnp.float32)})
    step, end_task = jax.jit(method.step), toys.quick(method.end_task)
    ends, told, mask = [], [], None
    for task in range(2):
        truth = rng.normal(size=size)
        for i in range(steps):
            x = rng.normal(size=(8, size)) / np.sqrt(size)
            batch = toys.points(x.astype("f"), (x @ truth).astype("f"), task)
            state, metrics = step(state, batch, key(i))
            told.append(float(metrics.get("cpo", 0.0)))
        ends.append(np.asarray(state.params["w"]))
        state = end_task(state, toys.stack([batch]), key(task))
        mask = np.asarray(state.memory["cpo"]["mask"]["w"]) if "cpo" in state.memory and mask is None else mask
    return ends, mask, told


@pytest.mark.parametrize("tx", [optax.sgd(0.3, momentum=0.5), optax.adamw(1e-2)], ids=["sgd", "adamw"])
def test_without_strength_the_run_is_the_same_bit_for_bit(tx):
    ends, mask, _ = stream("cpo(strength=0.0)", tx)
    np.testing.assert_array_equal(ends, stream("cpt", tx)[0])
    assert mask.sum() == 3


def test_more_strength_lets_the_masked_parameters_drift_less():
    drifts, others = [], []
    for strength in (0.0, 0.1, 1.0, 10.0):
        (first, last), mask, told = stream(f"cpo(strength={strength})", optax.sgd(0.2))
        drifts.append(np.sum((last - first)[mask] ** 2))
        others.append(np.sum((last - first)[~mask] ** 2))
        assert told[:9] == [0.0] * 9
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[0] > 10 * drifts[-1] > 0
    np.testing.assert_allclose(others[-1], others[0], rtol=0.5)  # the rest goes on learning


def test_microbatches_change_nothing():
    whole, _, told = stream("cpo(strength=3.0)", optax.sgd(0.1))
    assert told[-1] > 1e-5
    for count in (2, 4):
        cut, _, cut_told = stream("cpo(strength=3.0)", optax.sgd(0.1), count)
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(cut_told, told, rtol=1e-3, atol=1e-9)


def test_what_counts_is_the_way_since_the_end_of_the_last_task():
    part, zero = cpo.make(toys.setting(model=toys.linear(20)), share=0.1), {"w": jnp.zeros(20)}
    one = {"w": jnp.zeros(20).at[3].set(5.0)}
    two = {"w": one["w"].at[7].set(1.0)}
    memory = part.end_task(part.init(zero), one, None, key(0))
    memory = part.end_task(memory, two, None, key(1))
    assert np.flatnonzero(memory["mask"]["w"]).tolist() == [3, 7]
