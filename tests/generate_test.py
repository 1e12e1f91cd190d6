"""Greedy generation with the cache is the argmax of the whole forward pass, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import generate
from jaxcl.models import transformer
from jaxcl.types import Batch

V, STEPS = 29, 9
SHAPE = {"vocab": V, "layers": 2, "embed": 16, "heads": 4, "kv_heads": 2, "mlp": 24, "max_length": 24, "init_std": 0.4}
KINDS = {"plain": {}, "window": {"window": 3}, "tied": {"tied": True, "qk_norm": True, "qkv_bias": True}}
KINDS["experts"] = {"experts": 5, "experts_per_token": 2}


@functools.cache
def build(kind):
    model = transformer.make(**SHAPE | KINDS[kind])
    params = toys.quick(model.init)(jax.random.key(5))
    return model, params, toys.quick(functools.partial(generate.greedy, model), static_argnames="steps")


@functools.cache
def whole_of(kind):
    return toys.quick(build(kind)[0].apply)


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).astype(np.int32) for n in lengths]


def padded(rows, length):
    tokens, segments = np.full((len(rows), length), 3, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], segments[i, length - len(row) :] = row, 1
    return tokens, segments


def forced(kind, row, steps):
    """Returns the continuation by whole forward passes without a cache, on a row without padding."""
    width, params = 24, build(kind)[1]
    row = list(row)
    for _ in range(steps):
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(row)] = row
        place = np.arange(width, dtype=np.int32)[None]
        segments = (place < len(row)).astype(np.int32)
        batch = Batch(tokens, tokens, np.ones((1, width), np.float32), segments, place, np.zeros(1, np.int32))
        row.append(int(whole_of(kind)(params, batch).logits[0, len(row) - 1].argmax()))
    return np.array(row[-steps:])


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_give_the_argmax_of_the_whole_forward_pass(kind):
    _, params, greedy = build(kind)
    rows = prompts((7, 1, 4, 12))
    tokens, segments = padded(rows, 14)
    got = np.asarray(greedy(params, tokens, segments, steps=STEPS, stop=np.zeros(0, np.int32)))
    want = np.stack([forced(kind, row, STEPS) for row in rows])
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want)) > 5  # not a constant


def test_a_row_repeats_its_stop_token_and_the_others_go_on():
    _, params, greedy = build("plain")
    tokens, segments = padded(prompts((7, 1, 4, 12)), 14)
    free = np.asarray(greedy(params, tokens, segments, steps=STEPS, stop=np.zeros(0, np.int32)))
    stop = np.array([free[0, 3], free[1, 0]], np.int32)
    got = np.asarray(greedy(params, tokens, segments, steps=STEPS, stop=stop))
    for row, whole in zip(got, free, strict=True):
        ends = np.flatnonzero(np.isin(whole, stop))
        end = ends[0] if ends.size else STEPS
        np.testing.assert_array_equal(row[: end + 1], whole[: end + 1])
        assert (row[end:] == row[-1]).all() or not ends.size


def test_the_loop_ends_when_all_rows_have_and_compiles_once_for_a_shape():
    calls, traces = [], []
    inner = build("plain")[0]

    def apply(params, batch, cache=None):
        traces.append(1)
        jax.debug.callback(lambda: calls.append(1))
        return inner.apply(params, batch, cache=cache)

    params = build("plain")[1]
    greedy = toys.quick(functools.partial(generate.greedy, inner._replace(apply=apply)), static_argnames="steps")
    tokens, segments = padded(prompts((5,)), 6)
    free = np.asarray(build("plain")[2](params, tokens, segments, steps=STEPS, stop=jnp.zeros(1, jnp.int32) - 1))
    for at in (0, 2):
        calls.clear()
        greedy(params, tokens, segments, steps=STEPS, stop=free[0, at : at + 1]).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 1 + list(free[0]).index(free[0, at])
    assert len(traces) <= 3  # the prefill, and the body of one loop
