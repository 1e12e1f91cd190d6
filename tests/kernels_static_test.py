"""What numbers on a CPU cannot show of the kernels: precision of products, sizes of tiles, tiles that are skipped."""

import attention_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxcl.kernels import vocabulary
from jaxcl.kernels.attention import cpu
from jaxcl.kernels.attention import tpu as attention_tpu
from jaxcl.kernels.vocabulary import chunked
from jaxcl.kernels.vocabulary import tpu as vocabulary_tpu
from jaxcl.models import transformer
from jaxcl.types import Batch


def products(jaxpr):
    """Yields (dtype of the operands, precision, dtype of the sum) of every matrix product, kernels included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            precision = eqn.params["precision"]
            kinds = {x.aval.dtype.name for x in eqn.invars}
            yield max(kinds), set(precision or ("default",)), eqn.outvars[0].aval.dtype.name
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
            if hasattr(inner, "eqns"):
                yield from products(inner)


def attend(q, k, segments, d_mixed):
    static = {"causal": True, "scale": 0.1, "soft_cap": 2.0}
    mixed, lse = attention_tpu.forward(q, k, k, segments, None, **static)
    return attention_tpu.backward(q, k, k, segments, None, None, mixed, lse, d_mixed, None, **static)


def read_words(hidden, head, embedding, targets):
    logp, lse = vocabulary_tpu.cross_entropy(hidden, head, targets)
    mean = vocabulary_tpu.mixture(hidden, head, embedding, jnp.float32(2))
    return vocabulary_tpu.cross_entropy_backward(hidden, head, targets, lse, logp, lse), mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_kernels_are_full_for_float32_and_always_sum_in_float32(dtype):
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), dtype) for n in (2, 1))
    words = [jax.ShapeDtypeStruct(s, dtype) for s in ((32, 128), (128, 512), (512, 128))]
    numbers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 256), (32,))]
    for program, operands, least in ((attend, (q, k, numbers[0], q), 9), (read_words, (*words, numbers[1]), 7)):
        found = list(products(jax.make_jaxpr(program)(*operands).jaxpr))
        assert len(found) >= least
        for kind, precision, total in found:
            assert total == "float32"
            assert kind == dtype
            assert dtype != "float32" or precision == {jax.lax.Precision.HIGHEST}


def test_products_of_a_chunked_mixture_are_full():
    x = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5, 8), (8, 30), (30, 6), (), (5, 6), (5,), (5, 6), (5,))]

    def both(hidden, head, embedding, inverse, *rest):
        out = chunked.mixture(7, hidden, head, embedding, inverse)
        return out, chunked.mixture_backward(7, hidden, head, embedding, inverse, *rest)

    found = list(products(jax.make_jaxpr(both)(*x).jaxpr))
    assert len(found) >= 14  # seven in the loop over blocks and in the narrow last block
    assert all(precision == {jax.lax.Precision.HIGHEST} for _, precision, _ in found)


def test_default_tiles_of_attention_are_small_where_heads_or_numbers_are_wide():
    assert attention_tpu.default_blocks(8192, 128, jnp.bfloat16) == (1024, 1024, 512)
    for width, dtype in ((256, jnp.bfloat16), (128, jnp.float32), (64, jnp.float32), (256, jnp.float32)):
        assert attention_tpu.default_blocks(8192, width, dtype) == (512, 512, 512)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [24, 768, 2048, 4096, 8192, 16384])
def test_default_tiles_of_a_vocabulary_fit_the_memory_of_a_core(width, itemsize):
    rows, columns = vocabulary_tpu.default_tiles(4096, width, 128_256, itemsize)
    assert rows % 128 == columns % 128 == 0
    buffers = 2 * itemsize * width * (rows + columns) + 4 * width * max(rows, columns) + 4 * rows * columns
    assert buffers < 64 * 2**20
    assert width > 768 or rows == columns == 512
    assert vocabulary_tpu.default_tiles(40, width, 100, itemsize) == (40, 100)


@pytest.mark.parametrize(
    ("kind", "dtype", "kernels"),
    [("TPU v5 lite", "bfloat16", 1), ("TPU v4", "bfloat16", 0), ("TPU v5 lite", "float16", 0)],
)
def test_the_vocabulary_kernel_is_for_chips_and_dtypes_that_it_fits(kind, dtype, kernels):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    x = [jax.ShapeDtypeStruct(s, t) for s, t in (((32, 128), dtype), ((128, 512), dtype), ((32,), jnp.int32))]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        traced = jax.jit(lambda *x: vocabulary.cross_entropy(*x, chunk=128)).trace(*x)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == kernels


@pytest.mark.parametrize("window", [0, 1, 8, 9, 30, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_over_whole_rows_skips_what_lies_before_it(causal, window):
    length, block = 96, 8
    how = cpu._Scores(block, (length // block,) * 2, None, None, jnp.int32(window), causal, None, None)
    held = attention_test.sight(length, None, causal, window)[0].reshape(12, 8, 12, 8).any((1, 3))
    want = [(i, j) for j in range(12) for i in range(12) if held[i, j]]
    assert attention_test.tiles(how) == want


@pytest.mark.parametrize(("chosen", "kernels"), [("auto", 1), ("kernel", 1), ("tiles", 0)])
def test_a_model_asks_for_the_attention_that_its_config_names(chosen, kernels):
    model = transformer.make(preset="tiny", head_dim=64, compute_dtype="bfloat16", attention=chosen)
    params = jax.eval_shape(model.init, jax.random.key(0))
    row = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    batch = Batch(row, row, row, row, row, jax.ShapeDtypeStruct((1,), jnp.int32))
    traced = jax.jit(lambda p, b: model.apply(p, b).hidden).trace(params, batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert (text.count("@tpu_custom_call") > 0) == kernels
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_narrow_window_is_cheaper_than_the_row():
    """The loop is as long as its list: a count of tiles, not of the whole table."""
    segments = jnp.asarray(np.repeat(np.arange(1, 13), 8)[None].astype(np.int32))
    counts = [
        len(attention_test.tiles(cpu._Scores(8, (12, 12), own, own, at, True, None, None)))
        for own, at in ((None, None), (None, jnp.int32(8)), (segments, None), (segments, jnp.int32(3)))
    ]
    assert counts == [78, 23, 12, 12]
