"""Softmax over a vocabulary by blocks: against float64, without logits in memory, on every platform's own form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.kernels import vocabulary
from jaxcl.kernels.vocabulary import chunked, reference, tpu

D, V, E = 24, 300, 20  # no multiple of any tile
TILES = tpu.Tiles(16, 128)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(*batch, dtype=jnp.float32, vocab=V):
    """Returns hidden, head, embedding, targets; two targets name no class."""
    targets = np.random.default_rng(4).integers(0, vocab, batch).astype(np.int32)
    targets.flat[0], targets.flat[-1] = -1, vocab
    return (
        draw(*batch, D, seed=1, dtype=dtype),
        draw(D, vocab, seed=2, dtype=dtype),
        draw(vocab, E, seed=3, dtype=dtype),
        jnp.asarray(targets),
    )


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def outer64(a, b):
    """Returns the sum over tokens of a [..., m] times b [..., n]."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def softmax64(scores):
    """Returns p and the logsumexp."""
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - top)
    return e / e.sum(-1, keepdims=True), (np.log(e.sum(-1, keepdims=True)) + top)[..., 0]


def cross_entropy64(hidden, head, targets, d_logp, d_lse):
    """Returns (logp, lse) and the cotangents of (hidden, head) in float64."""
    hidden, head, d_logp, d_lse = wide(hidden, head, d_logp, d_lse)
    scores = hidden @ head
    p, lse = softmax64(scores)
    hit = np.asarray(targets)[..., None] == np.arange(head.shape[1])
    d = p * (d_lse - d_logp)[..., None] + hit * d_logp[..., None]
    return (np.where(hit, scores, 0).sum(-1) - lse, lse), (d @ head.T, outer64(hidden, d))


def mixture64(hidden, head, embedding, temperature, d_mean, d_lse):
    """Returns (mean, lse) and the cotangents of (hidden, head, embedding, temperature) in float64."""
    hidden, head, embedding, d_mean, d_lse = wide(hidden, head, embedding, d_mean, d_lse)
    scores = hidden @ head / temperature
    p, lse = softmax64(scores)
    mean = p @ embedding
    d_p = d_mean @ embedding.T
    d = p * (d_p - (p * d_p).sum(-1, keepdims=True) + d_lse[..., None])  # of the scores
    d_hidden, d_head = d @ head.T / temperature, outer64(hidden, d) / temperature
    d_embedding = outer64(p, d_mean)
    return (mean, lse), (d_hidden, d_head, d_embedding, -(d * scores).sum() / temperature)


def close(got, want, limit):
    """Compares arrays by their largest error relative to the largest value."""
    for i, pair in enumerate(zip(got, want, strict=True)):
        a, b = wide(*pair)
        assert a.shape == b.shape
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert error <= limit, f"result {i}: {error:.1e}"


def limit(dtype):
    return 1e-5 if dtype == jnp.float32 else 2e-2


FORMS = {  # name -> (forward, backward) of the cross-entropy
    "chunk 64": (functools.partial(chunked.cross_entropy, 64), functools.partial(chunked.cross_entropy_backward, 64)),
    "tpu": tuple(
        functools.partial(f, tiles=TILES, interpret=True) for f in (tpu.cross_entropy, tpu.cross_entropy_backward)
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_agrees_with_float64_and_itself(form, dtype):
    forward, backward = FORMS[form]
    hidden, head, _, targets = operands(3, 11, dtype=dtype)  # 33 tokens: two tiles and a ragged one
    d_logp, d_lse = draw(3, 11, seed=5), draw(3, 11, seed=6)

    @jax.jit
    def run(hidden, head):
        out = forward(hidden, head, targets)
        return out, backward(hidden, head, targets, out[1], d_logp, d_lse)

    out, grads = run(hidden, head)
    want, want_grads = cross_entropy64(hidden, head, targets, d_logp, d_lse)
    assert [x.dtype for x in (*out, *grads)] == [jnp.float32] * 2 + [dtype] * 2
    close(out, want, 1e-5)
    close(grads, want_grads, limit(dtype))
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves(run(hidden, head)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", ["chunk 64", "tpu"])
def test_a_mixture_agrees_with_float64_and_itself(form, dtype):
    hidden, head, embedding, _ = operands(3, 11, dtype=dtype)
    d_mean, d_lse = draw(3, 11, E, seed=5), draw(3, 11, seed=6)
    inverse = jnp.float32(1 / 0.5)
    forward = functools.partial(chunked.mixture, 64)
    if form == "tpu":
        forward = functools.partial(tpu.mixture, tiles=TILES, interpret=True)

    @jax.jit
    def run(hidden, head, embedding):
        out = forward(hidden, head, embedding, inverse)
        return out, chunked.mixture_backward(64, hidden, head, embedding, inverse, *out, d_mean, d_lse)

    out, grads = run(hidden, head, embedding)
    want, want_grads = mixture64(hidden, head, embedding, 0.5, d_mean, d_lse)
    assert [x.dtype for x in (*out, *grads)] == [jnp.float32] * 2 + [dtype] * 3 + [jnp.float32]
    close(out[:1], want[:1], limit(dtype))
    close(out[1:], want[1:], 1e-5)
    close(grads[:3], want_grads[:3], limit(dtype))
    close([-grads[3] * inverse**2], [want_grads[3]], limit(dtype))
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves(run(hidden, head, embedding)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("chunk", [None, 7, 64, V])
def test_gradients_of_a_mixture_are_those_of_its_definition(chunk, temperature):
    hidden, head, embedding, _ = operands(5)
    d_mean, d_lse = draw(5, E, seed=5), draw(5, seed=6)

    def value(function, *x):
        mean, lse = function(*x[:3], temperature=x[3])
        return jnp.sum(mean * d_mean) + jnp.sum(lse * d_lse)

    x = (hidden, head, embedding, jnp.float32(temperature))
    got = jax.jit(jax.grad(functools.partial(value, functools.partial(vocabulary.mixture, chunk=chunk)), (0, 1, 2, 3)))
    close(got(*x), jax.grad(functools.partial(value, reference.mixture), (0, 1, 2, 3))(*x), 1e-5)


def test_a_cold_mixture_is_the_embedding_of_the_best_token():
    hidden, head, embedding, _ = operands(5)
    mean, lse = vocabulary.mixture(hidden, head, embedding, temperature=1e-4, chunk=64)
    best = np.argmax(np.asarray(hidden @ head), axis=-1)
    np.testing.assert_allclose(mean, np.asarray(embedding)[best], rtol=1e-6)
    np.testing.assert_allclose(lse, np.max(np.asarray(hidden @ head), axis=-1) / 1e-4, rtol=1e-5)


def test_tied_embeddings_share_one_gradient():
    hidden, _, embedding, _ = operands(5)
    table = jnp.pad(embedding, ((0, 0), (0, D - E)))  # [V, D]

    def value(function, table):
        return jnp.sum(function(hidden, table.T, table, temperature=0.7)[0] ** 2)

    got = jax.grad(functools.partial(value, functools.partial(vocabulary.mixture, chunk=64)))(table)
    close([got], [jax.grad(functools.partial(value, reference.mixture))(table)], 1e-5)


def test_the_density_is_that_of_a_normal_and_moves_the_mean_alone():
    x, mean, scale = draw(4, E, seed=7), draw(4, E, seed=8), 0.3
    gap = (wide(x)[0] - wide(mean)[0]) / scale
    want = -0.5 * (gap**2).sum(-1) - E * np.log(scale * np.sqrt(2 * np.pi))
    close([vocabulary.log_density(x, mean, scale)], [want], 1e-5)
    grads = jax.grad(lambda *a: vocabulary.log_density(*a).sum(), (0, 1, 2))(x, mean, jnp.float32(scale))
    close(grads[1:2], [gap / scale], 1e-5)
    assert not np.any(grads[0])
    assert not np.any(grads[2])
    # Noise added within the derivative is still data: the score is noise / scale, not zero.
    noise = draw(4, E, seed=9)
    score = jax.grad(lambda m: vocabulary.log_density(m + scale * noise, m, scale).sum())(mean)
    close([score], [np.asarray(noise) / scale], 1e-5)


def losses_of(kernel, chunk=64):
    def cross_entropy(hidden, head, embedding, targets):
        logp, lse = vocabulary.cross_entropy(hidden, head, targets, chunk=chunk, kernel=kernel)
        return jnp.sum(lse**2) - jnp.sum(logp)

    def mixture(hidden, head, embedding, targets):
        mean, lse = vocabulary.mixture(hidden, head, embedding, temperature=0.5, chunk=chunk, kernel=kernel)
        return jnp.sum(mean**2) + jnp.sum(lse)

    return {"cross_entropy": cross_entropy, "mixture": mixture}


@pytest.mark.parametrize("name", ["cross_entropy", "mixture"])
def test_the_platform_of_the_lowered_program_decides(name):
    x = operands(32)
    for kernel in (True, False):
        step = jax.jit(jax.grad(losses_of(kernel)[name], (0, 1, 2))).trace(*x)
        calls = step.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")
        assert calls == kernel * {"cross_entropy": 3, "mixture": 1}[name]
        assert "tpu_custom_call" not in step.lower(lowering_platforms=("cpu",)).as_text()
    grads = [jax.jit(jax.grad(losses_of(kernel)[name], (0, 1, 2)))(*x) for kernel in (True, False)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_array_equal(a, b)


def calls_in(mesh):
    """Returns the kernels of a cross-entropy that is lowered for TPUs with this mesh in context."""
    hidden, head, _, targets = operands(32)

    def loss(*x):
        return vocabulary.cross_entropy(*x, chunk=64)[0].sum()

    with jax.set_mesh(mesh):
        return jax.jit(loss).trace(hidden, head, targets).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_c")


def test_a_kernel_is_not_used_where_the_compiler_would_have_to_cut_it():
    hidden, head, _, targets = operands(32)
    auto = (jax.sharding.AxisType.Auto,)
    one, four = (jax.make_mesh((n,), ("data",), axis_types=auto, devices=jax.devices()[:n]) for n in (1, 4))
    assert (calls_in(one), calls_in(four)) == (1, 0)
    rows = jax.sharding.PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=four, in_specs=(rows, None, rows), out_specs=rows, check_vma=False)
    def cut(*x):
        return vocabulary.cross_entropy(*x, chunk=64)[0]

    step = jax.jit(cut).trace(hidden, head, targets)
    assert step.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 1
    close([jax.jit(cut)(hidden, head, targets)], [reference.cross_entropy(hidden, head, targets)[0]], 1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "mixture"])
def test_no_array_has_a_row_of_logits_for_every_token(name):
    tokens, vocab, block = 512, 16384, 1024
    shapes = [(tokens, D), (D, vocab), (vocab, E)]
    x = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes] + [jax.ShapeDtypeStruct((tokens,), jnp.int32)]
    step = jax.jit(jax.grad(losses_of(None, block)[name], (0, 1, 2)))
    temporary = step.lower(*x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * tokens * vocab / 2
    tall = jax.jit(jax.grad(losses_of(None, vocab)["cross_entropy"], (0, 1, 2)))
    assert tall.lower(*x).compile().memory_analysis().temp_size_in_bytes > 4 * tokens * vocab / 2


def test_vmap_is_a_loop_over_its_rows():
    hidden, head, embedding, targets = operands(3, 5)

    def both(h, t):
        return vocabulary.cross_entropy(h, head, t, chunk=64), vocabulary.mixture(h, head, embedding, temperature=0.5)

    got, want = jax.tree.leaves(jax.vmap(both)(hidden, targets)), jax.tree.leaves(both(hidden, targets))
    close(got, want, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": draw(5, D + 1)}, r"hidden \[5, 25\] and head \[24, 300\]"),
        ({"head": draw(D)}, r"head \[24\]"),
        ({"targets": jnp.zeros((4,), jnp.int32)}, r"targets int32\[4\]"),
        ({"targets": jnp.zeros((5,))}, r"targets float32\[5\]"),
        ({"embedding": draw(V - 1, E)}, r"embedding \[299, 20\]: expected one row for each of 300"),
        ({"temperature": 0.0}, r"temperature=0.0: expected a positive"),
        ({"temperature": float("nan")}, r"temperature=nan"),
        ({"chunk": 0}, r"chunk=0"),
    ],
)
def test_bad_input_is_refused(change, message):
    hidden, head, embedding, targets = operands(5)
    x = {"hidden": hidden, "head": head, "embedding": embedding, "targets": targets, "temperature": 0.5, "chunk": 9}
    x |= change
    names = ("hidden", "head", "embedding", "temperature")
    function = vocabulary.mixture
    if not {"embedding", "temperature"} & change.keys():
        names, function = ("hidden", "head", "targets", "chunk"), vocabulary.cross_entropy
    given = {name: x[name] for name in names}
    with pytest.raises(ValueError, match=message):
        function(**given)
