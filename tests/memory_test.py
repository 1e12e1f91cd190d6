"""The reservoir: exact inclusion probabilities, order, empty slots, padding and saturation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from scipy import stats

from jaxcl import memory as store
from jaxcl.types import Batch

N, TOTAL, TRIALS, STEP = 20, 200, 2000, 25

write = toys.quick(store.write)
draw = toys.quick(store.draw, static_argnums=1)


def rows(numbers, weights=None, task=None):
    """One token per row: its number in the stream."""
    numbers = jnp.asarray(numbers, jnp.int32)
    column = numbers[:, None]
    ones = jnp.ones(column.shape) if weights is None else jnp.asarray(weights, jnp.float32)[:, None]
    return Batch(column, column, ones, column, column, jnp.zeros_like(numbers) if task is None else jnp.asarray(task))


@functools.cache
def kept(write=store.write):
    """Returns which numbers each of many reservoirs holds after a stream written 25 rows at a time: bool [R, TOTAL]."""

    def trial(key):
        def one(memory, i):
            batch = rows(i * STEP + jnp.arange(STEP))
            return write(memory, batch, jax.random.fold_in(key, i)), None

        memory = store.reservoir(rows([0]), N)
        memory, _ = jax.lax.scan(one, memory, jnp.arange(TOTAL // STEP))
        return jnp.zeros((TOTAL,), bool).at[memory["rows"].inputs[:, 0]].set(True)

    return np.asarray(toys.quick(jax.vmap(trial))(jax.random.split(jax.random.key(1), TRIALS)))


def age_p_value(held):
    """Returns the p-value of the hypothesis that all deciles of age are kept equally often."""
    deciles = held.sum(0).reshape(10, -1).sum(1)
    # Inclusions within a trial are negatively correlated (their sum is N), hence the factor (1 - N / TOTAL).
    expected = TRIALS * N / 10
    chi2 = np.sum((deciles - expected) ** 2) / (expected * (1 - N / TOTAL))
    return stats.chi2.sf(chi2, 9)


def test_every_age_is_kept_equally_often():
    held = kept()
    assert (held.sum(1) == N).all()
    assert age_p_value(held) > 0.01


def overwrite(memory, batch, key):
    """The published buffer: once it is full, every row overwrites a random slot."""
    number = memory["seen"] + jnp.arange(STEP)
    slot = jnp.where(number < N, number, jax.random.randint(key, (STEP,), 0, N))
    return {
        "rows": jax.tree.map(lambda kept, new: kept.at[slot].set(new), memory["rows"], batch),
        "seen": number[-1] + 1,
    }


def test_the_published_buffer_fails_the_same_test():
    held = kept(overwrite)
    assert (held.sum(1) == N).all()
    assert age_p_value(held) < 1e-100


def test_pairs_are_kept_as_often_as_they_should():
    held = kept().astype(float)
    pairs = held.T @ held / TRIALS
    expected = N * (N - 1) / (TOTAL * (TOTAL - 1))
    off = pairs[~np.eye(TOTAL, dtype=bool)]
    assert abs(off.mean() / expected - 1) < 1e-9  # every trial keeps exactly N rows
    error = np.sqrt(expected * (1 - expected) / TRIALS)
    blocks = pairs.reshape(4, 50, 4, 50).mean((1, 3))[~np.eye(4, dtype=bool)]
    assert np.abs(blocks - expected).max() < 5 * error / np.sqrt(50)


@pytest.mark.parametrize("extra", [0, 1])
def test_the_off_by_one_of_the_published_code(extra):
    """Row number n enters with probability N / n, in the published code N / (n + 1)."""
    size, seen, draws = 2, 5, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    entered = toys.quick(jax.vmap(lambda k: store.slots(jnp.int32(seen), jnp.ones(1, bool), size, k, extra)))(keys)
    share, expected = np.mean(np.asarray(entered) < size), size / (seen + 1 + extra)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / draws)


def test_a_batch_is_written_as_its_rows_one_by_one():
    """Of rows that draw the same slot the later one stays; the transcription writes with the same draws."""
    memory, expected = store.reservoir(rows([0]), 4), np.zeros(4, int)
    collisions = 0
    for i in range(12):
        key = jax.random.key(i)
        numbers = 1 + 6 * i + np.arange(6)
        slot = np.asarray(store.slots(memory["seen"], jnp.ones(6, bool), 4, key))
        inside = slot[slot < 4]
        collisions += len(inside) - len(set(inside))
        for s, number in zip(slot, numbers, strict=True):
            if s < 4:
                expected[s] = number
        memory = write(memory, rows(numbers), key)
        np.testing.assert_array_equal(memory["rows"].inputs[:, 0], expected)
    assert collisions > 0
    assert int(memory["seen"]) == 72


def test_padding_is_neither_stored_nor_counted():
    memory = write(store.reservoir(rows([0]), 8), rows([1, 2, 3, 4], weights=[1, 0, 0, 1]), jax.random.key(0))
    assert int(memory["seen"]) == 2
    np.testing.assert_array_equal(memory["rows"].inputs[:, 0], [1, 4, 0, 0, 0, 0, 0, 0])


def test_empty_slots_are_never_drawn():
    memory = store.reservoir(rows([0]), 50)
    assert not np.any(draw(memory, 7, jax.random.key(0)).weights)
    memory = write(memory, rows([5, 6, 7]), jax.random.key(0))
    drawn = draw(memory, 300, jax.random.key(1))
    assert set(np.asarray(drawn.inputs[:, 0])) == {5, 6, 7}
    assert (np.asarray(drawn.weights) == 1).all()
    assert stats.chisquare(np.bincount(np.asarray(drawn.inputs[:, 0]))[5:]).pvalue > 0.01


@pytest.mark.parametrize("absent", [0, 1])
def test_tasks_can_be_left_out(absent):
    memory = store.reservoir(rows([0]), 10)
    memory = write(memory, rows(np.arange(1, 7), task=jnp.asarray([0, 1, 0, 1, 0, 0], jnp.int32)), jax.random.key(0))
    drawn = draw(memory, 400, jax.random.key(2), jnp.asarray([absent == 0, absent == 1]))
    assert set(np.asarray(drawn.inputs[:, 0])) == ({2, 4} if absent == 0 else {1, 3, 5, 6})
    assert set(np.asarray(drawn.task)) == {1 - absent}
    none = draw(memory, 4, jax.random.key(2), jnp.asarray([True, True]))
    assert not np.any(none.weights)


def test_the_count_saturates():
    top = np.iinfo(np.int32).max
    memory = store.reservoir(rows([0]), 4) | {"seen": jnp.int32(top - 5)}
    for i in range(3):
        memory = write(memory, rows([1, 2, 3, 4]), jax.random.key(i))
    assert int(memory["seen"]) == top - 2
    assert not np.any(memory["rows"].inputs)  # four of 2^31 rows: none of these was drawn, none overflowed to slot 0


def test_appended_and_substituted_rows_are_marked():
    batch, drawn = rows([1, 2]), rows([8, 9])
    longer = store.append(batch, drawn)
    np.testing.assert_array_equal(longer.inputs[:, 0], [1, 2, 8, 9])
    np.testing.assert_array_equal(store.replayed(longer), [0, 0, 1, 1])
    swapped = store.substitute(batch, drawn, jnp.asarray([False, True]))
    np.testing.assert_array_equal(swapped.inputs[:, 0], [1, 9])
    np.testing.assert_array_equal(store.fresh(swapped).weights[:, 0], [1, 0])
    annotated = dataclasses.replace(batch, extra={"score": jnp.ones((2, 3))})
    assert store.append(annotated, drawn).extra["score"].shape == (4, 3)  # rows from memory have zeros there
