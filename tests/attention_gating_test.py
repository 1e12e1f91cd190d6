"""Frozen queries behind trained keys: the TPU kernels do not visit their tiles for the gradient of the keys."""

import attention_tpu_test as base
import numpy as np


def test_frozen_queries_are_not_read_for_the_gradients_of_earlier_keys():
    """As a document that is replayed only to be evaluated; a NaN reaches every sum that reads it."""
    inputs, (d_mixed, _) = base.draw(64, length=384, rows=1)
    whole = np.ones((1, 384), np.int32)
    suffix = np.arange(384)[None] >= 256
    _, d_q, d_k, d_v = base.run_both([inputs[0].at[:, 256:].set(np.nan), *inputs[1:]], whole, suffix, d_mixed)
    assert all(np.isfinite(x).all() and x[:, :256].any() for x in (d_q, d_k, d_v))
    assert not any(x[:, 256:].any() for x in (d_q, d_k, d_v))
