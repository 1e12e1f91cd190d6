"""The decoder against a float64 NumPy transcription, and the equivalences that must hold between its paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import transformer
from jaxcl.models.config import REMAT
from jaxcl.schema import UserError
from jaxcl.types import Batch

SHAPE = dict(vocab=37, layers=2, embed=24, heads=6, kv_heads=2, head_dim=8, mlp=20, init_std=0.25, max_length=64)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
EVERYTHING = SHAPE | dict(qkv_bias=True, qk_norm=True, rope_theta=100.0, rope_scaling=SCALING, norm_eps=1e-3, tied=True)
FEATURES = {
    "plain": {},
    "tied": dict(tied=True),
    "bias": dict(qkv_bias=True),
    "qk_norm": dict(qk_norm=True),
    "theta": dict(rope_theta=50.0),
    "scaling": dict(rope_scaling=SCALING, rope_theta=100.0),
    "eps": dict(norm_eps=0.1),
    "one_group": dict(kv_heads=1),
    "all_heads": dict(kv_heads=6),
    "wide_heads": dict(head_dim=10),
    "everything": EVERYTHING,
}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2]], np.int32)


def rows(tokens, segments=SEGMENTS, positions=POSITIONS):
    """A batch of numpy or jax arrays as the model sees it."""
    shape = segments.shape
    ids = jnp.zeros(shape, jnp.int32)
    task = jnp.zeros(shape[:1], jnp.int32)
    return Batch(
        jnp.asarray(tokens), ids, jnp.ones(shape), jnp.asarray(segments, jnp.int32), jnp.asarray(positions), task
    )


def draw_tokens(shape=SEGMENTS.shape, seed=0):
    return np.random.default_rng(seed).integers(0, SHAPE["vocab"], shape).astype(np.int32)


def build(**fields):
    """A model, and parameters in which no bias is zero and no norm is one."""
    model = transformer.make(**(SHAPE | fields))
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(1)))
    rng = np.random.default_rng(2)
    return model, tree.unflatten([x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves])


# The transcription: one document at a time, no masks, no packing, no scan.


def norm64(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def angle_rates(k, theta, scaling):
    """As written in the Llama 3.1 reference: by wavelength, with a linear blend between the two bounds."""
    rates = []
    for i in range(k // 2):
        rate = 1.0 / theta ** (2 * i / k)
        if scaling is not None:
            wavelength = 2 * np.pi / rate
            low = scaling["original_max_position"] / scaling["low_freq_factor"]
            high = scaling["original_max_position"] / scaling["high_freq_factor"]
            blend = (scaling["original_max_position"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            if wavelength > low:
                rate = rate / scaling["factor"]
            elif wavelength > high:
                rate = (1 - blend) * rate / scaling["factor"] + blend * rate
        rates.append(rate)
    return np.array(rates)


def rotate64(x, positions, rates):
    """Multiplies the complex number x[i] + 1j x[i + K/2] by exp(1j angle)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, None] * rates)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def document64(params, x, positions, fields):
    """Hidden states [L, D] of one document given its embeddings [L, D]."""
    f = dict(norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, qkv_bias=False, qk_norm=False) | fields
    share, rates = f["heads"] // f["kv_heads"], angle_rates(f["head_dim"], f["rope_theta"], f["rope_scaling"])
    for n in range(f["layers"]):
        layer = jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n], np.float64), params["layers"])
        a, h = layer["attention"], norm64(x, layer["attention_norm"], f["norm_eps"])
        q, k, v = (np.tensordot(h, a[name], 1) for name in ("query", "key", "value"))
        if f["qkv_bias"]:
            q, k, v = q + a["query_bias"], k + a["key_bias"], v + a["value_bias"]
        if f["qk_norm"]:
            q, k = norm64(q, a["query_norm"], f["norm_eps"]), norm64(k, a["key_norm"], f["norm_eps"])
        q, k = rotate64(q, positions, rates), rotate64(k, positions, rates)
        for head in range(f["heads"]):
            group = head // share
            scores = q[:, head] @ k[:, group].T / np.sqrt(f["head_dim"])
            weights = np.tril(np.exp(scores))
            x = x + weights / weights.sum(1, keepdims=True) @ v[:, group] @ a["out"][head]
        h = norm64(x, layer["mlp_norm"], f["norm_eps"])
        gate = h @ layer["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
    return norm64(x, np.asarray(params["final_norm"], np.float64), f["norm_eps"])


def logits64(params, tokens, fields):
    table = np.asarray(params["embedding"], np.float64)
    head = table.T if fields.get("tied") else np.asarray(params["head"], np.float64)
    out = np.zeros((*tokens.shape, head.shape[1]))
    for b, row in enumerate(SEGMENTS):
        for segment in set(row) - {0}:
            at = np.flatnonzero(row == segment)
            out[b, at] = document64(params, table[tokens[b, at]], POSITIONS[b, at], fields) @ head
    return out


@pytest.mark.parametrize("name", FEATURES)
def test_forward_follows_the_transcription(name):
    model, params = build(**FEATURES[name])
    tokens = draw_tokens()
    got = np.asarray(jax.jit(model.apply)(params, rows(tokens)).logits)
    want = logits64(params, tokens, SHAPE | FEATURES[name])
    at = SEGMENTS > 0
    assert np.abs(want[at]).max() > 1
    np.testing.assert_allclose(got[at], want[at], atol=1e-5 * np.abs(want).max(), rtol=1e-5)
    assert np.isfinite(got).all()


def test_a_packed_row_equals_its_documents_alone():
    model, params = build(**EVERYTHING)
    tokens = draw_tokens()
    packed = model.apply(params, rows(tokens)).hidden
    one = np.ones((1, 3), np.int32)
    alone = model.apply(params, rows(tokens[1:, 8:], one, np.arange(3, dtype=np.int32)[None])).hidden
    np.testing.assert_allclose(packed[1, 8:], alone[0], atol=1e-5)


def test_padding_and_later_tokens_change_nothing():
    model, params = build(**EVERYTHING)
    tokens = draw_tokens()
    base = model.apply(params, rows(tokens)).hidden
    other = tokens.copy()
    other[0, 3:5] += 1  # later in the first document
    other[0, 5:] = 0  # another document, and padding
    changed = model.apply(params, rows(other % SHAPE["vocab"])).hidden
    np.testing.assert_array_equal(base[0, :3], changed[0, :3])
    assert np.abs(base[0, 3:5] - changed[0, 3:5]).max() > 0.1


def test_embeddings_take_the_path_of_tokens():
    model, params = build(**EVERYTHING)
    tokens = draw_tokens()
    soft = params["embedding"][tokens]
    np.testing.assert_array_equal(model.apply(params, rows(tokens)).hidden, model.apply(params, rows(soft)).hidden)
    grad = jax.grad(lambda x: jnp.sum(model.apply(params, rows(x)).hidden[0, :3] ** 2))(soft)
    assert np.abs(grad[0, :3]).min() > 0
    assert not np.any(np.asarray(grad)[0, 3:])


def test_a_token_outside_the_vocabulary_is_not_silent():
    model, params = build()
    assert np.isnan(model.apply(params, rows(np.full(SEGMENTS.shape, 37, np.int32))).hidden).any()


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "everything"])
def test_cache_agrees_with_the_full_forward_on_ragged_rows(fields):
    model, params = build(**fields)
    lengths, new, prompt = (5, 2, 4), 4, 5
    tokens = draw_tokens((3, 9), seed=3)
    full = model.apply(params, rows(tokens, np.ones((3, 9), np.int32), np.tile(np.arange(9, dtype=np.int32), (3, 1))))
    inside = np.arange(prompt)[None] < np.array(lengths)[:, None]
    places = np.tile(np.arange(prompt, dtype=np.int32), (3, 1)) * inside
    first = rows(np.where(inside, tokens[:, :prompt], 0).astype(np.int32), inside, places)
    step = jax.jit(model.apply)
    for cache in (12, transformer.init_cache(model, 3, 12)):  # prefill into a new cache, and into a given one
        output = model.apply(params, first, cache)
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(output.hidden[b, :length], full.hidden[b, :length], atol=1e-5)
        for i in range(new):
            at = np.array(lengths)[:, None] + i
            token = np.take_along_axis(tokens, at, 1)
            output = step(params, rows(token, np.ones((3, 1), np.int32), at.astype(np.int32)), output.cache)
            want = np.take_along_axis(np.asarray(full.hidden), at[..., None], 1)
            np.testing.assert_allclose(output.hidden, want, atol=1e-5)
        assert int(output.cache.index) == prompt + new


def test_a_full_cache_is_not_silent():
    model, params = build()
    one = np.ones((1, 1), np.int32)
    cache = transformer.init_cache(model, 1, 2)
    for expected in (True, True, False):
        output = model.apply(params, rows(one, one, one), cache)
        cache = output.cache
        assert bool(np.isfinite(output.hidden).all()) is expected
    with pytest.raises(UserError, match="max_length"):
        model.apply(params, rows(draw_tokens()), 4)
    with pytest.raises(UserError, match="max_length"):
        transformer.make(**(SHAPE | dict(max_length=8))).apply(params, rows(draw_tokens()))


def objective(model, batch):
    return lambda params: jnp.mean(jax.nn.logsumexp(model.apply(params, batch).logits, axis=-1) ** 2)


@pytest.mark.parametrize(
    "options", [*(dict(remat=name) for name in REMAT[1:]), dict(unroll=2), dict(unroll=2, remat="full")], ids=str
)
def test_remat_and_unroll_change_no_number(options):
    plain, params = build(**EVERYTHING)
    other, _ = build(**EVERYTHING, **options)
    batch = rows(draw_tokens())
    want = jax.jit(jax.value_and_grad(objective(plain, batch)))(params)
    got = jax.jit(jax.value_and_grad(objective(other, batch)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), got, want)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(want))


def test_remat_stores_less():
    batch, sizes = rows(draw_tokens()), {}
    for name in REMAT:
        model, params = build(remat=name)
        _, pullback = jax.eval_shape(lambda p, m=model: jax.vjp(objective(m, batch), p), params)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert sizes["full"] < sizes["attention"] < sizes["dots_no_batch"] < sizes["dots"] < sizes["none"]


def test_bfloat16_compute_keeps_float32_masters():
    wide, params = build(**EVERYTHING)
    narrow, _ = build(**EVERYTHING, compute_dtype="bfloat16")
    batch = rows(draw_tokens())
    output = narrow.apply(params, batch)
    assert output.hidden.dtype == output.head.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    loss, grads = jax.jit(jax.value_and_grad(objective(narrow, batch)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((narrow.init(jax.random.key(0)), grads))} == {np.dtype("float32")}
    np.testing.assert_allclose(loss, objective(wide, batch)(params), rtol=0.03)


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_dimension_has_one_axis_name(fields):
    model, params = build(**fields)
    axes = dict(jax.tree_util.tree_leaves_with_path(model.axes, is_leaf=lambda x: isinstance(x, tuple)))
    sizes = dict(SHAPE, head=SHAPE["head_dim"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert tuple(sizes[name] for name in axes.pop(path)) == leaf.shape, path
    assert not axes
    assert ("head" in params) is not bool(fields.get("tied"))


def test_params_are_a_plain_dict_that_depends_on_the_key_alone():
    model = transformer.make(**SHAPE)
    params = model.init(jax.random.key(0))
    nodes = [params]
    while nodes:
        node = nodes.pop()
        assert type(node) is dict
        nodes += [child for child in node.values() if not isinstance(child, jax.Array)]
    again = transformer.make(**(SHAPE | dict(unroll=2, remat="full", compute_dtype="bfloat16"))).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    query, out = params["layers"]["attention"]["query"], params["layers"]["attention"]["out"]
    assert not np.array_equal(query[0], query[1])
    np.testing.assert_allclose(np.std(query), 0.25, rtol=0.05)
    np.testing.assert_allclose(np.std(out), 0.25 / 2, rtol=0.05)  # sqrt(2 * layers) = 2


def test_no_array_is_captured():
    model, params = build(**(EVERYTHING | dict(max_length=256)))
    shape = (2, 256)
    batch = rows(draw_tokens(shape), np.ones(shape, np.int32), np.tile(np.arange(256, dtype=np.int32), (2, 1)))
    jaxpr = jax.make_jaxpr(lambda p, b: jax.grad(lambda q: jnp.sum(model.apply(q, b).logits))(p))(params, batch)
    for const in jaxpr.consts:
        assert np.asarray(const).nbytes <= 4096
    assert dataclasses.is_dataclass(transformer.init_cache(model, 2, 8))
