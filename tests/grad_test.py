"""Gradients over microbatches are those of the whole batch; per-row squares are those of a Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import grad

MODEL = toys.language_model()
RNG = np.random.default_rng(0)
WEIGHTS = RNG.uniform(0, 2, (8, toys.L)) * (RNG.random((8, toys.L)) < 0.6)
WEIGHTS[2] = 0.0  # a row of padding
BATCH = toys.text(1, weights=WEIGHTS)
PARAMS = MODEL.init(jax.random.key(0))


def losses(params, rows):
    """Three losses: over tokens, over tokens with other weights, and a penalty."""
    output = MODEL.apply(params, rows)
    square = jnp.square(output.logits).mean(-1)
    other = (rows.inputs % 3).astype(jnp.float32)
    return {
        "loss": toys.cross_entropy(output, rows),
        "square": (jnp.sum(square * other), jnp.sum(other)),
        "penalty": (0.1 * jnp.sum(jnp.square(params["head"])), jnp.ones(())),
    }


def close(a, b, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol * np.abs(np.asarray(y)).max())


@functools.cache
def accumulated(count):
    return toys.quick(lambda p: grad.value_and_grad(losses, p, BATCH, count))(PARAMS)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_equals_the_whole_batch(count):
    whole, parts = accumulated(1), accumulated(count)
    close(parts[1], whole[1])
    for name, (total, weight) in whole[0].items():
        np.testing.assert_allclose(grad.mean(*parts[0][name]), grad.mean(total, weight), rtol=1e-6)


def test_gradient_is_that_of_the_sum_of_means():
    direct = toys.quick(jax.grad(lambda p: sum(grad.mean(s, w) for s, w in losses(p, BATCH).values())))(PARAMS)
    close(accumulated(1)[1], direct)


def test_the_mean_of_the_means_is_something_else():
    """The weights of this test tell the two apart: a framework that averages microbatch means would fail above."""
    of_piece = toys.quick(lambda rows: grad.value_and_grad(losses, PARAMS, rows)[1])
    each = [of_piece(jax.tree.map(lambda x, i=i: x[i::4], BATCH)) for i in range(4)]
    naive, whole = jax.tree.map(lambda *g: sum(g) / 4, *each), accumulated(1)[1]
    assert np.abs(naive["head"] - whole["head"]).max() > 0.02 * np.abs(whole["head"]).max()


def test_losses_are_traced_once_and_the_forward_pass_is_compiled_once():
    traces = []

    def counted(params, rows):
        traces.append(rows.task.shape)
        return losses(params, rows)

    def products(count):
        traces.clear()
        text = toys.quick(lambda p: grad.value_and_grad(counted, p, BATCH, count)).lower(PARAMS).compile().as_text()
        return text.count(" dot(") + text.count("__onednn$matmul") + text.count(" custom-call(")

    single = products(1)
    assert len(traces) == 1
    assert products(4) == single  # the pass that adds up the weights has no matrix product left in it


def losses_of_text(params, rows):
    return {"loss": row_loss(params, rows)}


def test_nothing_has_weight():
    empty = toys.text(0, weights=np.zeros((8, toys.L)))
    values, grads = toys.quick(lambda p: grad.value_and_grad(losses_of_text, p, empty, 2))(PARAMS)
    assert float(grad.mean(*values["loss"])) == 0.0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@given(count=st.sampled_from([1, 2, 3, 4, 6, 12]), width=st.integers(1, 3))
def test_split_covers_every_row_once_and_keeps_neighbours_apart(count, width):
    rows = np.arange(12 * width).reshape(12, width)
    pieces = np.asarray(grad.split({"x": jnp.asarray(rows)}, count)["x"])
    assert pieces.shape == (count, 12 // count, width)
    for i in range(count):
        np.testing.assert_array_equal(pieces[i], rows[i::count])


def test_split_names_the_mismatch():
    with pytest.raises(ValueError, match="microbatches=5 does not divide the batch of 8 rows"):
        grad.split(BATCH, 5)


def row_loss(params, rows):
    return toys.cross_entropy(MODEL.apply(params, rows), rows)


@pytest.mark.parametrize("chunk", [1, 4])
def test_squares_are_those_of_each_row(chunk):
    squared = toys.quick(lambda p: grad.squares(row_loss, p, BATCH, chunk))(PARAMS)
    gradient = toys.quick(jax.grad(lambda p, row: row_loss(p, row)[0]))
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], BATCH) for i in range(8)]
    each = [jax.tree.map(np.square, gradient(PARAMS, row)) for row in rows]
    close(squared, jax.tree.map(lambda *g: sum(g) / 7, *each))  # the row of padding does not count
    of_batch = jax.tree.map(np.square, gradient(PARAMS, BATCH))
    ratio = sum(map(np.sum, jax.tree.leaves(squared))) / sum(map(np.sum, jax.tree.leaves(of_batch)))
    assert abs(ratio - 1) > 0.1  # the squared gradient of the batch is another quantity
