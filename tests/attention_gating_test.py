"""Frozen tokens: the TPU kernels do not visit their tiles in the backward pass, and a batch can name them."""

import attention_tpu_test as base
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models import transformer
from jaxcl.types import Batch


def test_frozen_queries_are_not_read_for_the_gradients_of_earlier_keys():
    """As a document that is replayed only to be evaluated; a NaN reaches every sum that reads it."""
    inputs, (d_mixed, _) = base.draw(64, length=384, rows=1)
    whole = np.ones((1, 384), np.int32)
    suffix = np.arange(384)[None] >= 256
    _, d_q, d_k, d_v = base.run_both([inputs[0].at[:, 256:].set(np.nan), *inputs[1:]], whole, suffix, d_mixed)
    assert all(np.isfinite(x).all() and x[:, :256].any() for x in (d_q, d_k, d_v))
    assert not any(x[:, 256:].any() for x in (d_q, d_k, d_v))


def test_a_row_that_is_frozen_in_a_batch_trains_no_attention():
    """`extra["frozen"]` reaches every layer: values stay, and projections of frozen tokens get no gradient."""
    model = transformer.make(preset="tiny", vocab=32, layers=2, embed=16, heads=2, kv_heads=1, mlp=24)
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)
    one, places = np.ones((2, 12), np.int32), np.tile(np.arange(12, dtype=np.int32), (2, 1))

    def run(frozen, row=None):
        extra = {} if frozen is None else {"frozen": np.asarray(frozen)}
        batch = Batch(tokens, tokens, one.astype(np.float32), one, places, np.zeros(2, np.int32), extra)

        def value(params):
            hidden = model.apply(params, batch).hidden
            return jnp.sum(hidden[row if row is not None else slice(None)] ** 3)

        return jax.value_and_grad(value)(params)

    frozen = np.array([[True] * 12, [False] * 12])
    (plain, whole), (gated, part), (_, second) = run(None), run(frozen), run(None, 1)
    np.testing.assert_allclose(gated, plain, rtol=1e-6)
    for name in ("query", "key", "value"):
        own, other, all_ = (x["layers"]["attention"][name] for x in (part, second, whole))
        np.testing.assert_allclose(own, other, atol=1e-6)  # that of the row that is not frozen
        assert not np.allclose(own, all_, atol=1e-4)
