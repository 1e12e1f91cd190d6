"""The TPU kernels on two simulated cores, under a detector of races that is shown to find them.

The detector prints what it finds, or raises, by the version of JAX; it offers no other public way to ask.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from boxes_kernels_test import affine64, problem, row_sums64
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from ridge_kernels_test import symmetric
from vocabulary_kernels_test import close, cross_entropy64, draw, mixture64, operands

from jaxcl.kernels.attention import tpu as attention
from jaxcl.kernels.boxes import tpu as boxes
from jaxcl.kernels.ridge import pair
from jaxcl.kernels.ridge import tpu as ridge
from jaxcl.kernels.vocabulary import tpu as vocabulary

TILES = vocabulary.Tiles(16, 256)  # three of tokens, the second for both cores; two of columns
CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)  # which share the "parallel" steps of a grid


@pytest.fixture
def races(capsys):
    """Returns (whether a function has a race, what it returned)."""

    def run(function, *arguments):
        capsys.readouterr()
        try:
            out = jax.block_until_ready(toys.quick(partial(function))(*arguments))  # partial: a trace of its own
        except RuntimeError as error:
            if "RACE DETECTED" not in str(error):
                raise
            return True, None
        finally:
            pltpu.reset_tpu_interpret_mode_state()
        jax.effects_barrier()
        return "RACE DETECTED" in capsys.readouterr().out, out

    return run


def cross_entropy(hidden, head, targets, d_logp, d_lse):
    logp, lse = vocabulary.cross_entropy(hidden, head, targets, tiles=TILES, interpret=CORES)
    pull = partial(vocabulary.cross_entropy_backward, tiles=TILES, interpret=CORES)
    return logp, lse, *pull(hidden, head, targets, lse, d_logp, d_lse)


def test_cross_entropy_has_no_race(races):
    hidden, head, _, targets = operands(40)
    inputs = hidden, head, targets, draw(40, seed=5), draw(40, seed=6)
    raced, out = races(cross_entropy, *inputs)
    assert not raced
    want, want_grads = cross_entropy64(*inputs)
    close(out, (*want, *want_grads), 1e-5)


def test_a_mixture_has_no_race(races):
    hidden, head, embedding, _ = operands(40)
    mixture = partial(vocabulary.mixture, tiles=TILES, interpret=CORES)
    raced, out = races(mixture, hidden, head, embedding, jnp.float32(2.0))
    assert not raced
    nothing = np.zeros(out[0].shape), np.zeros(40)
    close(out, mixture64(hidden, head, embedding, 0.5, *nothing)[0], 1e-5)


STATIC = {"causal": True, "scale": 0.125, "blocks": attention.Blocks(128, 128, 128), "interpret": CORES}


def both_passes(q, k, v, segments):
    mixed, lse = attention.forward(q, k, v, segments, None, **STATIC)
    return mixed, lse, *attention.backward(q, k, v, segments, None, None, mixed, lse, mixed, None, **STATIC)


def test_attention_has_no_race(races):
    q, k, v = draw(1, 256, 2, 64), draw(1, 256, 1, 64, seed=1), draw(1, 256, 1, 64, seed=2)
    segments = jnp.where(jnp.arange(256) < 100, 1, 2)[None]  # the first document ends inside a tile
    raced, out = races(both_passes, q, k, v, segments)
    assert not raced
    assert all(np.isfinite(x).all() for x in out)  # memory that was never written is NaN


def boxes_and_generators(weight, bias, centre, radius, d_centre, d_radius):
    options = {"rows": 128, "interpret": CORES}
    forward = boxes.affine(weight, bias, centre, radius, **options), boxes.row_sums(weight, centre, **options)
    back = boxes.affine_backward(weight, centre, radius, d_centre, d_radius, **options)
    more = boxes.row_sums_backward(weight, centre, d_centre[0], **options)
    numbers = jnp.array([0.1, 0.9, 0.99, 1e-3, 0.1, 0.01])
    kept, cut = weight[:256], slice(256)  # what is overwritten has whole tiles here
    moments = jnp.zeros_like(kept), jnp.zeros_like(kept)
    moved = boxes.update(kept, *moments, centre, radius, d_centre[:, cut], d_radius[:, cut], numbers, **options)
    return *forward, back, more, moved


def test_boxes_have_no_race(races):
    """Three tiles of rows, the last of them not full; gradients of boxes are sums over tiles."""
    arguments, cotangents = problem(3, 300, 21)
    raced, out = races(boxes_and_generators, *arguments, *cotangents)
    assert not raced
    want, pulled = affine64(*arguments, *cotangents)
    sums, back = row_sums64(arguments[0], arguments[2], cotangents[0][0])
    close([*out[0], out[1], *out[2], *out[3]], [*want, sums, *pulled, *back], 1e-5)
    assert all(np.isfinite(x).all() for x in out[4])


def every_update(r, v, x):
    side = {"side": 128, "interpret": CORES}
    return ridge.stream(r, v, x, **side), ridge.gram_update(pair.Pair(r, 0 * r), pair.Pair(v, 0 * v), **side).high


def test_symmetric_updates_have_no_race(races):
    """Blocks fit: the simulation of a ragged matrix that is updated in place is not lowered (JAX 0.10)."""
    r, v, x = symmetric(256), draw(9, 256), draw(5, 256, seed=1)
    raced, ((new, seen), gram) = races(every_update, r, v, x)
    assert not raced
    product = np.asarray(v, np.float64).T @ np.asarray(v, np.float64)
    want = np.asarray(r, np.float64) - product
    close((new, seen, gram), (want, x @ want, np.asarray(r, np.float64) + product), 1e-5)


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
    assert races(partial(total, order), jnp.ones((16, 128)))[0] == raced


def test_the_detector_finds_sums_that_are_shared_out(races, monkeypatch):
    """Were the steps of a sum called parallel, two cores would write its tile."""
    real = pltpu.CompilerParams

    def parallel(dimension_semantics, **options):
        return real(dimension_semantics=("parallel",) * len(dimension_semantics), **options)

    monkeypatch.setattr(pltpu, "CompilerParams", parallel)
    assert races(every_update, symmetric(256), draw(9, 256), draw(5, 256, seed=1))[0]
    hidden, head, _, targets = operands(40)
    assert races(partial(vocabulary.cross_entropy, tiles=TILES, interpret=CORES), hidden, head, targets)[0]
