"""The TPU kernels of the vocabulary on a mesh: interpreted on four devices, against float64, counted in the program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from vocabulary_kernels_test import TILES, D, E, V, close, cross_entropy64, draw, mixture64, operands

from jaxcl import mesh as meshes
from jaxcl.kernels import sharded, vocabulary
from jaxcl.kernels.vocabulary import tpu


def on_a_mesh(function, sizes, arrays, cuts):
    """Returns the traced function of arrays that lie on four devices, cut as told."""
    mesh = meshes.make(**{"data": 1, **sizes}, devices=jax.devices()[:4])
    arrays = [jax.device_put(x, NamedSharding(mesh, cut)) for x, cut in zip(arrays, cuts, strict=True)]
    return jax.jit(meshes.on(mesh, function)).trace(*arrays), arrays


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the TPU kernels wherever a program for TPUs would; returns the shapes of hidden and head on a device."""
    seen = []

    def spy(f):
        def run(*x, **options):
            seen.append((x[0].shape, x[1].shape))
            return f(*x, tiles=TILES, interpret=True, **options)

        return run

    for name in ("cross_entropy", "cross_entropy_backward", "mixture"):
        monkeypatch.setattr(tpu, name, spy(getattr(tpu, name)))
    monkeypatch.setattr(vocabulary, "_platform", lambda fast, plain, *x: (fast or plain)(*x))
    return seen


MESHES = [  # sizes, rows x positions, how the head is cut, tokens of a device
    ({"data": 2, "fsdp": 2}, (4, 5), P("fsdp"), (1, 5)),
    ({"replica": 2, "fsdp": 2}, (8, 5), P(None, "fsdp"), (2, 5)),
    ({"fsdp": 2, "tensor": 2}, (4, 6), P("fsdp", "tensor"), (2, 3)),
    ({"fsdp": 2, "tensor": 2}, (4, 5), P("tensor", "fsdp"), (2, 5)),  # two devices of tensor with the same tokens
    ({"context": 4}, (3, 8), P(), (3, 2)),
    ({"fsdp": 4}, (8,), P("fsdp"), (2,)),
    ({"data": 2, "fsdp": 2}, (6, 8), P("fsdp"), None),  # rows that do not divide: the chunked form
]


@pytest.mark.parametrize(("sizes", "batch", "head_cut", "local"), MESHES)
def test_a_mesh_changes_neither_cross_entropy_nor_gradients(interpreted, sizes, batch, head_cut, local):
    hidden, head, _, targets = operands(*batch)
    d_logp, d_lse = draw(*batch, seed=5), draw(*batch, seed=6)

    def run(hidden, head, targets, *d):
        out, pull = jax.vjp(lambda *x: vocabulary.cross_entropy(*x, targets, chunk=64), hidden, head)
        return out, pull(d)

    rows = P() if local is None else P(meshes.BATCH)
    cuts = (rows, head_cut, rows, rows, rows)
    step, arrays = on_a_mesh(run, sizes, (hidden, head, targets, d_logp, d_lse), cuts)
    assert interpreted == ([] if local is None else [((*local, D), (D, V))] * 2)
    out, grads = step.lower().compile()(*arrays)
    want, want_grads = cross_entropy64(hidden, head, targets, d_logp, d_lse)
    close((*out, *grads), (*want, *want_grads), 1e-5)


@pytest.mark.parametrize(("sizes", "batch", "head_cut", "local"), [MESHES[2], MESHES[6]])
def test_a_mesh_changes_neither_a_mixture_nor_gradients(interpreted, sizes, batch, head_cut, local):
    x = operands(*batch)[:3]
    d_mean, d_lse = draw(*batch, E, seed=5), draw(*batch, seed=6)

    def run(hidden, head, embedding, temperature, *d):
        out, pull = jax.vjp(
            lambda *x: vocabulary.mixture(*x[:3], temperature=x[3], chunk=64), hidden, head, embedding, temperature
        )
        return out, pull(d)

    rows = P() if local is None else P(meshes.BATCH)
    arrays = (*x, jnp.float32(0.5), d_mean, d_lse)
    step, arrays = on_a_mesh(run, sizes, arrays, (rows, head_cut, P(*head_cut[::-1]), P(), rows, rows))
    assert interpreted == ([] if local is None else [((*local, D), (D, V))])
    out, grads = step.lower().compile()(*arrays)
    want, want_grads = mixture64(*x, 0.5, d_mean, d_lse)
    close((*out, *grads), (*want, *want_grads), 1e-5)


def test_on_a_mesh_the_gradient_of_the_head_is_summed_once_and_in_float32():
    x = [operands(4, 6, dtype=jnp.bfloat16)[i] for i in (0, 1, 3)]

    def loss(*x):
        return vocabulary.cross_entropy(*x, chunk=64)[0].sum()

    cuts = (P(meshes.BATCH), P("fsdp", "tensor"), P(meshes.BATCH))
    step, arrays = on_a_mesh(jax.grad(loss, (0, 1)), {"fsdp": 2, "tensor": 2}, x, cuts)
    text = step.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    assert text.count('"stablehlo.all_reduce"') == 1
    assert f"(tensor<{D}x{V}xf32>) -> tensor<{D}x{V}xf32>" in text
    grads = step.lower(lowering_platforms=("cpu",)).compile()(*arrays)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_on_a_mesh_other_platforms_communicate_as_without_kernels():
    x = [operands(4, 6)[i] for i in (0, 1, 3)]
    cuts = (P(meshes.BATCH), P("fsdp", "tensor"), P(meshes.BATCH))

    def collectives(kernel):
        def loss(*x):
            return vocabulary.cross_entropy(*x, chunk=64, kernel=kernel)[0].sum()

        step, _ = on_a_mesh(jax.grad(loss, (0, 1)), {"fsdp": 2, "tensor": 2}, x, cuts)
        text = step.lower().compile().as_text()
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "fusion", "dot")
        return {kind: text.count(f" {kind}(") for kind in kinds}

    assert collectives(None) == collectives(False)


def test_tokens_are_cut_where_rows_allow_it_and_nothing_is_cut_twice():
    mesh = meshes.make(fsdp=2, tensor=2, data=2)

    def axes(*shape):
        found = meshes.on(mesh, sharded.tokens)(shape)
        return found and found.axes

    assert axes(8, 6) == (meshes.BATCH, ("context", "tensor"))
    assert axes(8, 5) == (meshes.BATCH, ("context",))
    assert axes(8) == (meshes.BATCH,)
    assert axes(6, 8) is axes() is sharded.tokens((8, 6)) is None
