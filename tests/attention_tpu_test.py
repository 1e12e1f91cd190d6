"""The TPU kernels of attention without a TPU: numbers by the interpreter, races by the detector, lowering for real."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcl.kernels.attention import reference, tiles, tpu

SMALL = tpu.Blocks(128, 128, 128)
LENGTH = 300  # three tiles, the last one ragged


def packed(length=LENGTH, rows=2):
    """Documents that end inside tiles and at their edges, ids out of order, padding before, between and after."""
    segments = np.zeros((rows, length), np.int32)
    for row, documents in zip(segments, [[(7, 0, 100), (3, 100, 256), (9, 260, length)], [(1, 20, 250)]], strict=True):
        for name, start, stop in documents:
            row[start:stop] = name
    return segments


def draw(width, heads=2, groups=1, length=LENGTH, rows=2, dtype=np.float32):
    rng = np.random.default_rng(width)
    shapes = [(rows, length, heads, width), *[(rows, length, groups, width)] * 2, (rows, length, heads, width)]
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    return arrays[:3], (arrays[3], jnp.asarray(rng.normal(size=(rows, heads, length)), jnp.float32))


def definition(q, k, v, segments, window, frozen, *, causal, scale, soft_cap):
    """Dense attention and its logsumexp; a frozen token is cut off on its way in and out."""
    cut = (lambda x, _: x) if frozen is None else (lambda x, at: jnp.where(at, jax.lax.stop_gradient(x), x))
    token = None if frozen is None else frozen[:, :, None, None]
    q, k, v = (cut(x.astype(jnp.float32), token) for x in (q, k, v))
    length, share = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, share, axis=2) for x in (k, v))
    scores = jnp.einsum("blhk,bshk->bhls", q, k) * scale
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    places = {"kv_segments": None, "positions": None, "kv_positions": None}
    mask = reference.visible(length, length, segments=segments, causal=causal, window=window, **places)
    mask = jnp.ones((1, 1, length, length), bool) if mask is None else mask[:, None]
    scores = jnp.where(mask, scores, -1e30)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
    lse = jnp.where(mask.any(-1), lse, -1e30)
    return cut(jnp.einsum("bhls,bshk->blhk", weights, v), token), cut(lse, None if frozen is None else frozen[:, None])


def close(got, want, limit, name):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error <= limit, f"{name}: {error:.1e}"


def compare(
    width, dtype, limit, *, segments, window=None, frozen=None, causal=True, soft_cap=None, blocks=SMALL, **sizes
):
    inputs, (d_mixed, d_lse) = draw(width, dtype=dtype, **sizes)
    static = {"causal": causal, "scale": width**-0.5, "soft_cap": soft_cap}
    window = None if window is None else jnp.int32(window)

    @toys.quick
    def ours(q, k, v, d_mixed, d_lse):
        run = {**static, "blocks": blocks, "interpret": True}
        mixed, lse = tpu.forward(q, k, v, segments, window, **run)
        return mixed, lse, *tpu.backward(q, k, v, segments, window, frozen, mixed, lse, d_mixed, d_lse, **run)

    @toys.quick
    def theirs(q, k, v, d_mixed, d_lse):
        run = functools.partial(definition, segments=segments, window=window, frozen=frozen, **static)
        (mixed, lse), pull = jax.vjp(run, q, k, v)
        return mixed, lse, *pull((d_mixed.astype(jnp.float32), jnp.where(lse > -1e29, d_lse, 0.0)))

    got, want = ours(*inputs, d_mixed, d_lse), theirs(*inputs, d_mixed, d_lse)
    unseen = np.asarray(want[1]) < -1e29
    np.testing.assert_array_equal(np.asarray(got[1]) < -1e29, unseen)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    got, want = ((x[0], jnp.where(unseen, 0.0, x[1]), *x[2:]) for x in (got, want))
    for name, a, b in zip(("mixed", "lse", "d_q", "d_k", "d_v"), got, want, strict=True):
        close(a, b, limit, name)
    return got


FROZEN = np.zeros((2, LENGTH), bool)
FROZEN[0, :110] = FROZEN[0, 150] = FROZEN[1, 200:] = True


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (64, {"segments": packed(), "heads": 4, "groups": 2, "blocks": tpu.Blocks(128, 256, 128)}),
        (128, {"segments": packed(), "window": 70, "frozen": FROZEN}),
        (256, {"segments": None, "soft_cap": 2.0, "window": 0}),
        (64, {"segments": None, "causal": False, "groups": 2, "frozen": FROZEN}),
        (
            64,
            {
                "segments": packed(),
                "causal": False,
                "window": 40,
                "soft_cap": 1.0,
                "blocks": tpu.Blocks(384, 128, 128),
            },
        ),
        (64, {"segments": None, "window": 130}),
    ],
    ids=["packed", "window frozen", "cap", "both ways", "both ways window cap", "window"],
)
def test_float32_follows_the_definition(width, options):
    compare(width, jnp.float32, 1e-5, **options)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_bfloat16_follows_the_definition(width):
    compare(width, jnp.bfloat16, 2e-2, segments=packed())


@functools.partial(toys.quick, static_argnames="interpret")
def both_passes(q, k, v, segments, frozen, d_mixed, interpret=True):
    static = {"causal": True, "scale": 0.1, "blocks": SMALL, "interpret": interpret}
    mixed, lse = tpu.forward(q, k, v, segments, None, **static)
    return mixed, *tpu.backward(q, k, v, segments, None, frozen, mixed, lse, d_mixed, None, **static)


def run_both(inputs, segments, frozen, d_mixed, **options):
    return [np.asarray(x) for x in both_passes(*inputs, segments, frozen, d_mixed, **options)]


def test_tiles_without_pairs_are_not_read():
    """A NaN in a tile reaches all sums that read it, whatever the mask says."""
    inputs, (d_mixed, _) = draw(64, length=512, rows=1)
    segments = np.repeat(np.array([[1, 2, 3, 0]], np.int32), 128, axis=1)
    bad = [x.at[:, 128:256].set(np.nan) for x in inputs]
    inside = np.r_[128:256]
    for x in run_both(bad, segments, np.zeros((1, 512), bool), d_mixed):
        assert np.isnan(x[:, inside]).all()
        assert np.isfinite(np.delete(x, inside, axis=1)).all()
    frozen = segments == 2
    for x in run_both(bad, segments, frozen, d_mixed)[1:]:
        assert not x[:, inside].any()
        assert np.isfinite(x).all()
    # A frozen prefix: its own tiles are dropped, those that lead from later queries to its keys only from d_k and d_v.
    prefix = np.arange(512)[None] < 128
    whole = np.ones((1, 512), np.int32)
    _, d_q, d_k, d_v = run_both([inputs[0].at[:, :128].set(np.nan), *inputs[1:]], whole, prefix, d_mixed)
    assert all(np.isfinite(x).all() for x in (d_q, d_k, d_v))
    assert d_q[:, 128:].any()
    assert not any(x[:, :128].any() for x in (d_q, d_k, d_v))


def test_the_grid_is_as_long_as_the_lists():
    segments = jnp.asarray(np.repeat(np.array([[1, 2, 3, 0], [1, 1, 1, 1]], np.int32), 128, axis=1))
    listed = functools.partial(tiles.forward, causal=True, block_q=128, block_kv=128)
    steps, number = toys.quick(lambda segments: tpu._steps(listed(segments, None), None, None))(segments)
    assert number == 3 + 1 + 10  # one step writes the zeros of the padding
    flags = np.asarray(steps.flags)[:14]
    assert np.asarray(steps.row)[:14].tolist() == [0] * 4 + [1] * 10
    assert np.asarray(steps.own)[4:14].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert np.asarray(steps.other)[4:14].tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert (flags & 3).tolist() == [1, 1, 1, 0, 1, 2, 1, 2, 2, 1, 2, 2, 2, 1]
    assert sum(flags & tpu.kernels.FIRST != 0) == sum(flags & tpu.kernels.LAST != 0) == 8


def test_two_runs_of_the_backward_pass_give_the_same_bits():
    inputs, (d_mixed, _) = draw(64)
    first, second = (run_both(inputs, packed(), FROZEN, d_mixed) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def races(run, capfd):
    """Whether the detector of the interpreter found a race: it prints one or, in later releases, raises."""
    try:
        jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:
        if "RACE DETECTED" not in str(error):
            raise
        pltpu.reset_tpu_interpret_mode_state()
        return True
    return "RACE DETECTED" in capfd.readouterr().out


def test_no_races(capfd):
    detect = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")

    def racy(x, o, semaphore):
        copy = pltpu.make_async_copy(x, o, semaphore)
        copy.start()
        o[...] = jnp.zeros_like(o)
        copy.wait()

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    scratch = [pltpu.SemaphoreType.DMA]
    assert races(
        lambda: pl.pallas_call(racy, shape, scratch_shapes=scratch, interpret=detect)(jnp.ones((8, 128))), capfd
    )
    inputs, (d_mixed, _) = draw(64, length=256, rows=1)
    segments = np.repeat(np.array([[1, 2]], np.int32), [100, 156], axis=1)
    assert not races(lambda: run_both(inputs, segments, np.zeros((1, 256), bool), d_mixed, interpret=detect), capfd)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_lowers_for_tpus(width, dtype):
    def run(q, k, v, segments, window, frozen, d_mixed):
        static = {"causal": True, "scale": 0.1, "soft_cap": 30.0}
        mixed, lse = tpu.forward(q, k, v, segments, window, **static)
        return tpu.backward(q, k, v, segments, window, frozen, mixed, lse, d_mixed, None, **static)

    q, k = (jax.ShapeDtypeStruct((2, 2500, heads, width), dtype) for heads in (4, 2))
    tokens = [jax.ShapeDtypeStruct((2, 2500), t) for t in (jnp.int32, bool)]
    text = jax.jit(run).trace(q, k, k, tokens[0], jax.ShapeDtypeStruct((), jnp.int32), tokens[1], q)
    assert text.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


def test_blocks():
    for length in (1, 128, 129, 1000, 1025, 8192):
        for width in (64, 128, 256):
            q, kv, compute = tpu.default_blocks(length, width, jnp.bfloat16)
            assert q % 128 == kv % compute == compute % 128 == 0
            assert -(-length // q) * q - length < q
            assert max(tpu.default_blocks(length, width, jnp.float32)) <= 512
            assert q <= 1024
    for blocks in (tpu.Blocks(100, 128, 128), tpu.Blocks(128, 128, 256), tpu.Blocks(128, 384, 256)):
        q = jnp.zeros((1, 128, 1, 64))
        with pytest.raises(ValueError, match="multiples of 128"):
            tpu.forward(q, q, q, None, None, causal=True, scale=1.0, blocks=blocks, interpret=True)
