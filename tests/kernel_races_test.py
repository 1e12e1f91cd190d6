"""The TPU kernels on two simulated cores, under a detector of races that is shown to find them.

The detector prints what it finds, or raises, by the version of JAX; it offers no other public way to ask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from vocabulary_kernels_test import close, cross_entropy64, draw, mixture64, operands

from jaxcl.kernels.attention import tpu as attention
from jaxcl.kernels.vocabulary import tpu as vocabulary

TILES = vocabulary.Tiles(16, 256)  # three of tokens, the second for both cores; two of columns
CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)  # which share the "parallel" steps of a grid


@pytest.fixture
def races(capsys):
    """Returns (whether a function has a race, what it returned)."""

    def run(function, *arguments):
        capsys.readouterr()
        try:
            fresh = toys.quick(lambda *x: function(*x))  # a trace of its own
            out = jax.block_until_ready(fresh(*arguments))
        except RuntimeError as error:
            if "RACE DETECTED" not in str(error):
                raise
            return True, None
        finally:
            pltpu.reset_tpu_interpret_mode_state()
        jax.effects_barrier()
        return "RACE DETECTED" in capsys.readouterr().out, out

    return run


def cross_entropy(*x):
    return vocabulary.cross_entropy(*x, tiles=TILES, interpret=CORES)


def cross_entropy_backward(*x):
    return vocabulary.cross_entropy_backward(*x, tiles=TILES, interpret=CORES)


def test_cross_entropy_has_no_race(races):
    hidden, head, _, targets = operands(40)
    d_logp, d_lse = draw(40, seed=5), draw(40, seed=6)
    want, want_grads = cross_entropy64(hidden, head, targets, d_logp, d_lse)
    raced, out = races(cross_entropy, hidden, head, targets)
    assert not raced
    close(out, want, 1e-5)
    raced, grads = races(cross_entropy_backward, hidden, head, targets, out[1], d_logp, d_lse)
    assert not raced
    close(grads, want_grads, 1e-5)


def test_a_mixture_has_no_race(races):
    hidden, head, embedding, _ = operands(40)
    mixture = functools.partial(vocabulary.mixture, tiles=TILES, interpret=CORES)
    raced, out = races(mixture, hidden, head, embedding, jnp.float32(2.0))
    assert not raced
    nothing = np.zeros(out[0].shape), np.zeros(40)
    close(out, mixture64(hidden, head, embedding, 0.5, *nothing)[0], 1e-5)


STATIC = {"causal": True, "scale": 0.125, "blocks": attention.Blocks(128, 128, 128), "interpret": CORES}


def attention_inputs():
    """Returns q, k, v of two heads and one key head, and two documents that end inside a tile and at the end."""
    q, k, v = draw(1, 256, 2, 64), draw(1, 256, 1, 64, seed=1), draw(1, 256, 1, 64, seed=2)
    return q, k, v, jnp.where(jnp.arange(256) < 100, 1, 2)[None]


def forward(q, k, v, segments):
    return attention.forward(q, k, v, segments, None, **STATIC)


def test_attention_has_no_race(races):
    inputs = attention_inputs()
    raced, (mixed, lse) = races(forward, *inputs)
    assert not raced
    raced, grads = races(
        lambda *x: attention.backward(*x[:4], None, None, *x[4:], None, **STATIC), *inputs, mixed, lse, mixed
    )
    assert not raced
    assert all(np.isfinite(x).all() for x in (mixed, lse, *grads))  # memory that was never written is NaN


def add(x, out):
    out[...] += x[...]


def total(order, x):
    """Adds the tiles of x [16, 128] to one tile of the result."""
    return pl.pallas_call(
        add,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(order,)),
        interpret=CORES,
    )(x)


@pytest.mark.parametrize(("order", "raced"), [("arbitrary", False), ("parallel", True)])
def test_the_detector_finds_two_cores_at_one_tile(races, order, raced):
    assert races(functools.partial(total, order), jnp.ones((16, 128)))[0] == raced


@pytest.mark.parametrize("kernel", [cross_entropy, cross_entropy_backward])
def test_the_detector_finds_sums_that_are_shared_out(races, kernel, monkeypatch):
    """Were the steps of a sum called parallel, two cores would write its tile."""
    real = pltpu.CompilerParams

    def parallel(dimension_semantics, **options):
        return real(dimension_semantics=("parallel",) * len(dimension_semantics), **options)

    monkeypatch.setattr(pltpu, "CompilerParams", parallel)
    hidden, head, _, targets = operands(40)
    others = [draw(40, seed=5)] * 3 if kernel is cross_entropy_backward else []
    assert races(kernel, hidden, head, targets, *others)[0]
