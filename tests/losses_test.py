"""Losses: against a float64 transcription, plain automatic differentiation and finite differences."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import losses
from jaxcl.types import Batch, Output

B, L, D, V = 2, 5, 8, 37


def batch_of(targets, weights):
    zero = jnp.zeros(targets.shape, jnp.int32)
    return Batch(zero, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), zero, zero, zero[:, 0])


def rows(seed=0, dtype=jnp.float32, scale=1.0):
    r = np.random.default_rng(seed)
    hidden, head = scale * r.standard_normal((B, L, D)), r.standard_normal((D, V))
    weights = r.uniform(0.1, 2.0, (B, L)) * (r.uniform(size=(B, L)) < 0.7)
    batch = batch_of(r.integers(0, V, (B, L)).astype(np.int32), weights)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), batch


def log_softmax64(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def oracle(hidden, head, batch, z_loss=0.0):
    """Returns (sum, weight) in float64, one token at a time."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    total = weight = 0.0
    for i in np.ndindex(batch.targets.shape):
        w, row = float(batch.weights[i]), logits[i]
        lse = np.log(np.exp(row - row.max()).sum()) + row.max()
        total += w * (lse - row[int(batch.targets[i])] + z_loss * lse**2)
        weight += w
    return total, weight


def plain(hidden, head, batch, z_loss):
    """Returns the sum by automatic differentiation's own rules."""
    logits = jnp.einsum("bld,dv->blv", hidden, head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(batch.weights * (lse - chosen + z_loss * lse**2))


@pytest.mark.parametrize("chunk", [None, 1, 8, 36, 37, 64])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_cross_entropy_agrees_with_float64_and_plain_gradients(chunk, z_loss):
    hidden, head, batch = rows()

    def loss(h, w):
        return losses.cross_entropy(Output(h, w), batch, z_loss=z_loss, chunk=chunk)

    (total, weight), grads = jax.jit(lambda h, w: (loss(h, w), jax.grad(lambda *a: loss(*a)[0], (0, 1))(h, w)))(
        hidden, head
    )
    np.testing.assert_allclose((total, weight), oracle(hidden, head, batch, z_loss), rtol=2e-6)
    wanted = jax.grad(plain, (0, 1))(hidden, head, batch, z_loss)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 8])
def test_cross_entropy_gradient_agrees_with_float64_differences(chunk):
    hidden, head, batch = rows(1)
    grads = jax.grad(lambda h, w: losses.cross_entropy(Output(h, w), batch, z_loss=0.1, chunk=chunk)[0], (0, 1))(
        hidden, head
    )
    r = np.random.default_rng(2)
    for which, x in enumerate((hidden, head)):
        direction = r.standard_normal(x.shape)
        pair = [np.asarray(hidden, np.float64), np.asarray(head, np.float64)]

        def at(step, which=which, pair=pair, direction=direction):
            moved = list(pair)
            moved[which] = moved[which] + step * direction
            return oracle(*moved, batch, 0.1)[0]

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(grads[which], np.float64) * direction), slope, rtol=1e-5)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_any_vocabulary_and_chunk_give_the_same_loss(size, chunk, seed):
    r = np.random.default_rng(seed)
    hidden = jnp.asarray(r.standard_normal((1, 3, 4)), jnp.float32)
    head = jnp.asarray(r.standard_normal((4, size)), jnp.float32)
    batch = batch_of(r.integers(0, size, (1, 3)).astype(np.int32), np.ones((1, 3)))
    total, _ = losses.cross_entropy(Output(hidden, head), batch, chunk=chunk)
    np.testing.assert_allclose(total, oracle(hidden, head, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 8])
def test_large_logits_do_not_overflow(chunk):
    hidden, head, batch = rows(3, scale=300.0)
    total, grads = jax.value_and_grad(lambda h: losses.cross_entropy(Output(h, head), batch, chunk=chunk)[0])(hidden)
    np.testing.assert_allclose(total, oracle(hidden, head, batch)[0], rtol=1e-5)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("chunk", [None, 8])
def test_bfloat16_accumulates_in_float32(chunk):
    hidden, head, batch = rows(4, jnp.bfloat16)
    total, grads = jax.value_and_grad(
        lambda h, w: losses.cross_entropy(Output(h, w), batch, chunk=chunk)[0], argnums=(0, 1)
    )(hidden, head)
    assert total.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(total, oracle(hidden, head, batch)[0], rtol=1e-5)  # exact products of bf16 inputs
    wanted = jax.grad(plain, (0, 1))(hidden.astype(jnp.float32), head.astype(jnp.float32), batch, 0.0)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("chunk", [None, 8])
def test_targets_without_weight_may_be_anything(chunk):
    hidden, head, batch = rows(5)
    ignored = jnp.where(batch.weights == 0, -100, batch.targets)
    assert (ignored == -100).any()
    total, _ = losses.cross_entropy(Output(hidden, head), batch_of(ignored, batch.weights), chunk=chunk)
    np.testing.assert_allclose(total, oracle(hidden, head, batch)[0], rtol=2e-6)


def test_classifier_logits_and_infinite_loss_behind_zero_weight():
    logits = jnp.asarray([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [0.0, -jnp.inf, 0.0]])
    batch = batch_of(jnp.asarray([[0], [2], [1]], jnp.int32), jnp.asarray([[1.0], [3.0], [0.0]]))
    flat = Batch(batch.inputs, batch.targets[:, 0], batch.weights[:, 0], batch.segments, batch.positions, batch.task)
    total, weight = losses.cross_entropy(Output(logits), flat)
    want = -log_softmax64(logits[:1])[0, 0] + 3.0 * np.log(3.0)
    np.testing.assert_allclose((total, weight), (want, 4.0), rtol=1e-6)
    grad = jax.grad(lambda x: losses.cross_entropy(Output(x), flat)[0])(logits[:2].repeat(2, 0)[:3])
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[2], 0.0)


@pytest.mark.parametrize("chunk", [None, 1, 8, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_agree_with_float64(chunk, temperature):
    hidden, head, batch = rows(6)
    other, other_head, _ = rows(7)

    def loss(h, w, t):
        return losses.kl(Output(h, w), Output(t, other_head), batch, temperature=temperature, chunk=chunk)

    (total, weight), grads = jax.jit(lambda *a: (loss(*a), jax.grad(lambda *b: loss(*b)[0], (0, 1, 2))(*a)))(
        hidden, head, other
    )
    log_p = log_softmax64(np.asarray(other, np.float64) @ np.asarray(other_head, np.float64) / temperature)
    log_q = log_softmax64(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature)
    w = np.asarray(batch.weights, np.float64)
    np.testing.assert_allclose(total, (w * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, w.sum(), rtol=1e-6)
    d_logits = w[..., None] * (np.exp(log_q) - np.exp(log_p)) / temperature
    np.testing.assert_allclose(grads[0], d_logits @ np.asarray(head, np.float64).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        grads[1], np.einsum("bld,blv->dv", np.asarray(hidden, np.float64), d_logits), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(grads[2], 0.0)


@pytest.mark.parametrize("chunk", [None, 8])
def test_kl_of_equal_distributions_is_zero(chunk):
    hidden, head, batch = rows(8)
    total, _ = losses.kl(Output(hidden, head), Output(hidden, head), batch, chunk=chunk)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)


def shapes(jaxpr):
    """Yields the shape of every value in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield value.aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_logits_of_a_large_vocabulary_are_never_whole(loss):
    size, tokens, width = 150_001, 64, 16
    hidden = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    head = jax.ShapeDtypeStruct((width, size), jnp.float32)
    batch = batch_of(np.zeros((1, tokens), np.int32), np.ones((1, tokens)))

    def total(h, w):
        if loss == "kl":
            return losses.kl(Output(h, w), Output(h, w), batch)[0]
        return losses.cross_entropy(Output(h, w), batch)[0]

    step = jax.jit(jax.grad(total, (0, 1)))
    seen = set(shapes(step.trace(hidden, head).jaxpr.jaxpr))
    assert (width, size) in seen  # the gradient of the head
    assert not [s for s in seen if s and s[-1] >= size and s != (width, size)]
    temporary = step.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * tokens * size / 2  # half of what the logits alone would take


def test_a_chunk_without_columns_is_refused():
    hidden, head, batch = rows()
    with pytest.raises(ValueError, match="chunk=0"):
        losses.cross_entropy(Output(hidden, head), batch, chunk=0)
