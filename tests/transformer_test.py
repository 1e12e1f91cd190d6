"""The decoder against a float64 NumPy transcription, and the equivalences that must hold between its paths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import mesh as meshes
from jaxcl.models import transformer
from jaxcl.models.config import REMAT
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

SHAPE = {
    "vocab": 37,
    "layers": 2,
    "embed": 24,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp": 20,
    "init_std": 0.25,
    "max_length": 64,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 16}
YARN = {
    "kind": "yarn",
    "factor": 4.0,
    "original_max_position": 64,
    "attention_factor": 1.3,
    "beta_fast": 5.0,
    "beta_slow": 0.7,
}
EVERYTHING = SHAPE | {
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "window": 3,
    "window_layers": (False, True),
    "vocab_multiple": 8,
    "qk_norm": True,
    "rope_theta": 100.0,
    "rope_scaling": SCALING,
    "norm_eps": 1e-3,
    "tied": True,
}
FEATURES = {
    "plain": {},
    "bias": {"qkv_bias": True, "kv_heads": 1},
    "qk_norm": {"qk_norm": True, "kv_heads": 6},
    "theta": {"rope_theta": 50.0, "norm_eps": 0.1},
    "scaling": {"rope_scaling": SCALING, "rope_theta": 100.0, "head_dim": 10},
    "out_bias": {"out_bias": True, "window": 2, "window_layers": (True, False)},
    "mlp_bias": {"mlp_bias": True, "rope_scaling": {"kind": "linear", "factor": 3.0}, "rope_theta": 50.0, "window": 2},
    "yarn": {"rope_scaling": YARN, "rope_theta": 100.0, "head_dim": 16},
    "yarn_untruncated": {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 100.0, "head_dim": 16},
    "padded": {"vocab_multiple": 8},
    "everything": EVERYTHING,
}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2]], np.int32)


def rows(tokens, segments=SEGMENTS, positions=POSITIONS):
    """A batch as the model sees it; NumPy arrays, as every jnp.zeros of a new shape is a compilation."""
    ids, segments = np.zeros(segments.shape, np.int32), segments.astype(np.int32)
    return Batch(tokens, ids, np.ones(ids.shape, np.float32), segments, positions.astype(np.int32), ids[:, 0])


def draw_tokens(shape=SEGMENTS.shape, seed=0):
    return np.random.default_rng(seed).integers(0, SHAPE["vocab"], shape).astype(np.int32)


compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # tests mostly compile


@functools.cache
def build(name, **fields):
    """A model, parameters in which no bias is zero and no norm is one, and its compiled `apply`."""
    model = transformer.make(**(SHAPE | FEATURES[name] | fields))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        center = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (center + SHAPE["init_std"] * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))
    return model, params, compiled(model.apply)


# The transcription: one document at a time, no masks, no packing, no scan.


def norm64(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def angle_rates(k, theta, scaling):
    """The rate of every pair, scaled as the source of each kind writes it."""
    rates = np.array([1.0 / theta ** (2 * i / k) for i in range(k // 2)])
    if scaling is None:
        return rates
    kinds = {"llama3": llama3_rate, "linear": lambda i, k, theta, rate, s: rate / s["factor"], "yarn": yarn_rate}
    scaled = kinds[scaling.get("kind", "llama3")]
    return np.array([scaled(i, k, theta, rate, scaling) for i, rate in enumerate(rates)])


def llama3_rate(i, k, theta, rate, scaling):
    """As written in the Llama 3.1 reference: by wavelength, with a linear blend between the two bounds."""
    wavelength = 2 * np.pi / rate
    low = scaling["original_max_position"] / scaling["low_freq_factor"]
    high = scaling["original_max_position"] / scaling["high_freq_factor"]
    blend = (scaling["original_max_position"] / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    if wavelength > low:
        return rate / scaling["factor"]
    return (1 - blend) * rate / scaling["factor"] + blend * rate if wavelength > high else rate


def yarn_rate(i, k, theta, rate, scaling):
    """A ramp between the (fractional) pairs whose wavelength fits beta_fast and beta_slow times into the context."""
    fast, slow = (
        k / 2 * np.log(scaling["original_max_position"] / beta / (2 * np.pi)) / np.log(theta)
        for beta in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling.get("truncate", True):
        fast, slow = np.floor(fast), np.ceil(slow)
    assert 0 < fast < slow < k // 2 - 1  # the case has pairs on both sides of the ramp
    blend = min(max((i - fast) / (slow - fast), 0), 1)
    return rate * (1 - blend) + rate / scaling["factor"] * blend


def rotate64(x, positions, rates, factor):
    """Multiplies the complex number x[i] + 1j x[i + K/2] by factor * exp(1j angle)."""
    half = x.shape[-1] // 2
    turned = factor * (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, None] * rates)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def document64(params, x, positions, fields):
    """Hidden states [L, D] of one document given its embeddings [L, D]."""
    f = {"norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None, "window": 99} | fields
    f = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "qk_norm"), False) | f
    factor = (f["rope_scaling"] or {}).get("attention_factor", 1.0)
    distance = positions[:, None] - positions[None]
    share, rates = f["heads"] // f["kv_heads"], angle_rates(f["head_dim"], f["rope_theta"], f["rope_scaling"])
    for n in range(f["layers"]):
        layer = jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n], np.float64), params["layers"])
        a, h = layer["attention"], norm64(x, layer["attention_norm"], f["norm_eps"])
        q, k, v = (np.tensordot(h, a[name], 1) for name in ("query", "key", "value"))
        if f["qkv_bias"]:
            q, k, v = q + a["query_bias"], k + a["key_bias"], v + a["value_bias"]
        if f["qk_norm"]:
            q, k = norm64(q, a["query_norm"], f["norm_eps"]), norm64(k, a["key_norm"], f["norm_eps"])
        q, k = rotate64(q, positions, rates, factor), rotate64(k, positions, rates, factor)
        window = f["window"] if f.get("window_layers", [True] * f["layers"])[n] else 99
        for head in range(f["heads"]):
            group = head // share
            scores = q[:, head] @ k[:, group].T / np.sqrt(f["head_dim"])
            weights = np.exp(scores) * ((distance >= 0) & (distance < window))
            x = x + weights / weights.sum(1, keepdims=True) @ v[:, group] @ a["out"][head]
        x = x + (a["out_bias"] if f["out_bias"] else 0)
        m, h = layer["mlp"], norm64(x, layer["mlp_norm"], f["norm_eps"])
        gate, up, down = (m[f"{name}_bias"] if f["mlp_bias"] else 0 for name in ("gate", "up", "down"))
        gate, up = gate + h @ m["gate"], up + h @ m["up"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ m["down"] + down
    return norm64(x, np.asarray(params["final_norm"], np.float64), f["norm_eps"])


def logits64(params, tokens, fields):
    table = np.asarray(params["embedding"], np.float64)
    head = table.T if fields.get("tied") else np.asarray(params["head"], np.float64)
    head = head[:, : fields["vocab"]]
    out = np.zeros((*tokens.shape, fields["vocab"]))
    for b, row in enumerate(SEGMENTS):
        for segment in set(row) - {0}:
            at = np.flatnonzero(row == segment)
            out[b, at] = document64(params, table[tokens[b, at]], POSITIONS[b, at], fields) @ head
    return out


@pytest.mark.parametrize("name", FEATURES)
def test_forward_follows_the_transcription(name):
    _, params, apply = build(name)
    tokens = draw_tokens()
    got = np.asarray(apply(params, rows(tokens)).logits)
    want = logits64(params, tokens, SHAPE | FEATURES[name])
    at = SEGMENTS > 0
    assert np.abs(want[at]).max() > 1
    np.testing.assert_allclose(got[at], want[at], atol=1e-5 * np.abs(want).max(), rtol=1e-5)
    assert np.isfinite(got).all()


def test_a_packed_row_equals_its_documents_alone():
    _, params, apply = build("everything")
    tokens = draw_tokens()
    packed = apply(params, rows(tokens)).hidden
    moved, segments, positions = np.zeros_like(tokens), np.zeros_like(SEGMENTS), np.zeros_like(POSITIONS)
    moved[0, :3], segments[0, :3], positions[0, :3] = tokens[1, 8:], 7, range(3)
    alone = apply(params, rows(moved, segments, positions)).hidden
    np.testing.assert_allclose(packed[1, 8:], alone[0, :3], atol=1e-5)


def test_padding_and_later_tokens_change_nothing():
    _, params, apply = build("everything")
    tokens = draw_tokens()
    base = apply(params, rows(tokens)).hidden
    other = tokens.copy()
    other[0, 3:5] += 1  # later in the first document
    other[0, 5:] = 0  # another document, and padding
    changed = apply(params, rows(other % SHAPE["vocab"])).hidden
    np.testing.assert_array_equal(base[0, :3], changed[0, :3])
    assert np.abs(base[0, 3:5] - changed[0, 3:5]).max() > 0.1


def test_embeddings_take_the_path_of_tokens():
    model, params, apply = build("everything")
    tokens = draw_tokens()

    def score(x):
        hidden = model.apply(params, rows(x)).hidden
        return jnp.sum(hidden[0, :3] ** 2), hidden

    grad, hidden = compiled(jax.grad(score, has_aux=True))(params["embedding"][tokens])
    np.testing.assert_allclose(hidden, apply(params, rows(tokens)).hidden, atol=1e-6)
    assert np.abs(grad[0, :3]).min() > 0
    assert not np.any(np.asarray(grad)[0, 3:])


def mixtures(**batch):
    """A batch with mixtures of four tokens, one of them twice, at a third of the places; elsewhere lies anything."""
    r = np.random.default_rng(6)
    soft = r.uniform(size=SEGMENTS.shape) < 0.4
    support = r.integers(0, SHAPE["vocab"], (*SEGMENTS.shape, 4)).astype(np.int32)
    support[..., 3] = support[..., 1]
    shares = r.dirichlet(np.ones(4), SEGMENTS.shape).astype(np.float32)
    columns = {"soft": soft, "support": np.where(soft[..., None], support, 99)}
    columns["shares"] = np.where(soft[..., None], shares, np.nan)
    return dataclasses.replace(rows(draw_tokens(), **batch), extra=columns)


def composed(params, batch):
    """The same as embeddings that are put together outside the model, from all rows of the table."""
    table, extra = params["embedding"][: SHAPE["vocab"]], batch.extra
    shares = jnp.where(extra["soft"][..., None], extra["shares"], 0)
    whole = jnp.einsum("bls,blsv->blv", shares, jax.nn.one_hot(extra["support"], SHAPE["vocab"]))
    mixed = jnp.einsum("blv,vd->bld", whole, table, precision="highest")
    return dataclasses.replace(batch, inputs=jnp.where(extra["soft"][..., None], mixed, table[batch.inputs]), extra={})


@pytest.mark.parametrize("name", ["plain", "everything"])  # untied, tied
def test_mixtures_of_tokens_and_their_gradient_are_those_of_composed_embeddings(name):
    model, params, _ = build(name)
    batch = mixtures()

    def outside(params):
        return objective(model, params, composed(params, batch))

    def constant(params):
        made = composed(jax.lax.stop_gradient(params), batch).inputs
        return objective(
            model, params, dataclasses.replace(batch, extra={"soft": batch.extra["soft"], "thought": made})
        )

    value, grads = loss_and_gradient(name)(params, batch)
    want, slopes = compiled(jax.value_and_grad(outside))(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), grads, slopes)
    same, data = compiled(jax.value_and_grad(constant))(params)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    assert np.abs(grads["embedding"] - data["embedding"]).max() > 0.01 * np.abs(grads["embedding"]).max()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), grads["layers"], data["layers"])


def test_the_shares_of_mixtures_have_no_gradient_and_no_array_has_the_size_of_the_vocabulary():
    model, params, _ = build("plain")
    batch = mixtures()

    def hidden(params, shares):
        extra = batch.extra | {"shares": shares}
        return jnp.sum(model.apply(params, dataclasses.replace(batch, extra=extra)).hidden ** 2)

    slope = jax.grad(hidden, 1)(params, jnp.nan_to_num(batch.extra["shares"]))
    assert not np.any(slope)
    jaxpr = str(jax.make_jaxpr(jax.grad(hidden))(params, batch.extra["shares"]))
    assert "[37,24]" in jaxpr
    assert "[2,11,37" not in jaxpr
    assert "[2,11,4,37" not in jaxpr


def test_mixtures_are_the_same_on_a_mesh_and_in_a_cache():
    model, params, apply = build("padded")
    batch = mixtures()
    value, grads = loss_and_gradient("padded")(params, batch)
    mesh = meshes.make(data=2, tensor=4)
    shardings = meshes.state_shardings(mesh, model.axes, TrainState(np.int32(0), params, (), {})).params
    run = compiled(meshes.on(mesh, jax.value_and_grad(functools.partial(objective, model))))
    there, cut = run(jax.device_put(params, shardings), meshes.place(mesh, batch))
    np.testing.assert_allclose(there, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), cut, grads)
    batch = dataclasses.replace(batch, segments=np.ones_like(SEGMENTS), positions=np.tile(np.arange(11), (2, 1)))
    full, cache = apply(params, batch).hidden, None
    for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 11))):
        part = jax.tree.map(lambda x, at=at: x[:, at] if x.ndim > 1 else x, batch)
        output = model.apply(params, part, 11 if cache is None else cache)
        np.testing.assert_allclose(output.hidden, full[:, at], atol=1e-5)
        cache = output.cache


def test_all_tokens_are_mixed_without_a_support_and_one_token_alone_is_that_token():
    _, params, apply = build("padded", compute_dtype="bfloat16")
    batch = rows(draw_tokens())
    soft, one = np.ones(SEGMENTS.shape, bool), np.ones((*SEGMENTS.shape, 1), np.float32)
    want = np.asarray(apply(params, batch).hidden)
    wrong = dataclasses.replace(batch, inputs=np.zeros_like(batch.inputs))
    for columns in (
        {"support": batch.inputs[..., None], "shares": one},
        {"shares": np.eye(37, dtype=np.float32)[batch.inputs]},
    ):
        got = apply(params, dataclasses.replace(wrong, extra={"soft": soft} | columns)).hidden
        np.testing.assert_array_equal(got, want)
    columns = {"support": np.full((*SEGMENTS.shape, 1), 37, np.int32), "shares": one}
    assert np.isnan(apply(params, dataclasses.replace(batch, extra={"soft": soft} | columns)).hidden).any()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"thought": np.zeros((*SEGMENTS.shape, 24))}, "has both thought and shares"),
        ({"shares": None}, "has no shares"),
        ({"soft": None}, "has no soft"),
        ({"shares": np.zeros((*SEGMENTS.shape, 1), np.float32)}, r"shares \[2, 11, 1\]; expected .*\[2, 11, 4\]"),
        ({"support": None}, r"shares \[2, 11, 4\]; expected \[2, 11\], \[2, 11, 37\]"),
    ],
)
def test_columns_that_do_not_fit_together_are_named(columns, words):
    model, params, _ = build("plain")
    batch = mixtures()
    extra = {name: x for name, x in (batch.extra | columns).items() if x is not None}
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.apply, params, dataclasses.replace(batch, extra=extra))


def test_a_token_outside_the_vocabulary_is_not_silent():
    for name in ("plain", "padded", "everything"):  # in the padding of the table too
        _, params, apply = build(name)
        assert np.isnan(apply(params, rows(np.full(SEGMENTS.shape, 37, np.int32))).hidden).any()


def without_padding(tied):
    """The loss and gradient of the parameters of 'padded' without the last three of their 40 rows."""
    _, params, _ = build("padded", tied=tied)
    less = params | {"embedding": params["embedding"][:37]}
    if not tied:
        less["head"] = params["head"][:, :37]
    return loss_and_gradient("plain", tied=tied)(less, rows(draw_tokens()))


def same_without_padding(tied, value, grads):
    """Asserts that loss and gradient are those without padding, and that the padding has no gradient."""
    want, slopes = without_padding(tied)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name in ("embedding",) if tied else ("embedding", "head"):
        grad, slope = (np.asarray(x if name == "embedding" else x.T) for x in (grads.pop(name), slopes.pop(name)))
        np.testing.assert_allclose(grad[:37], slope, atol=1e-5, rtol=1e-5)
        assert grad.shape[0] == 40
        assert not np.any(grad[37:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), grads, slopes)


def test_padding_of_a_tied_vocabulary_changes_no_number():
    _, params, _ = build("padded", tied=True)
    same_without_padding(True, *loss_and_gradient("padded", tied=True)(params, rows(draw_tokens())))


def test_a_padded_vocabulary_is_cut_over_the_tensor_axis():
    """Four devices hold ten rows each of the 40 for 37 tokens."""
    model, params, _ = build("padded")
    mesh = meshes.make(data=2, tensor=4)
    shardings = meshes.state_shardings(mesh, model.axes, TrainState(np.int32(0), params, (), {})).params
    placed = jax.device_put(params, shardings)
    assert {shard.data.shape for shard in placed["embedding"].addressable_shards} == {(10, 24)}
    assert {shard.data.shape for shard in placed["head"].addressable_shards} == {(24, 10)}
    same_without_padding(False, *loss_and_gradient("padded")(placed, meshes.place(mesh, rows(draw_tokens()))))


def test_cache_agrees_with_the_full_forward_on_ragged_rows():
    model, params, apply = build("everything")
    lengths, new, prompt = (5, 2, 4), 4, 5
    tokens = draw_tokens((3, 9), seed=3)
    full = apply(params, rows(tokens, np.ones((3, 9)), np.tile(np.arange(9), (3, 1)))).hidden
    inside = np.arange(prompt)[None] < np.array(lengths)[:, None]
    first = rows(tokens[:, :prompt] * inside, inside, np.arange(prompt)[None] * inside)
    fresh = compiled(functools.partial(model.apply, cache=12))(params, first)
    given = apply(params, first, transformer.init_cache(model, 3, 12))
    for output in (fresh, given):
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(output.hidden[b, :length], full[b, :length], atol=1e-5)
        cache = output.cache
        for i in range(new):
            at = np.array(lengths)[:, None] + i
            later = apply(params, rows(np.take_along_axis(tokens, at, 1), np.ones((3, 1)), at), cache)
            np.testing.assert_allclose(later.hidden, np.take_along_axis(full, at[..., None], 1), atol=1e-5)
            cache = later.cache
        assert int(cache.index) == prompt + new


def test_a_full_cache_is_not_silent():
    model, params, apply = build("everything")
    one = np.ones((3, 1), np.int32)
    cache = dataclasses.replace(transformer.init_cache(model, 3, 12), index=np.int32(11))
    output = apply(params, rows(one, one, one), cache)
    assert np.isfinite(output.hidden).all()
    assert np.isnan(apply(params, rows(one, one, one), output.cache).hidden).all()
    with pytest.raises(UserError, match="max_length"):
        model.apply(params, rows(draw_tokens()), 4)
    with pytest.raises(UserError, match="max_length"):
        build("plain", max_length=8)[0].apply(params, rows(draw_tokens()))


def objective(model, params, batch):
    values = jax.nn.logsumexp(model.apply(params, batch).logits, axis=-1) ** 2
    return jnp.mean(values, where=batch.segments > 0)


@functools.cache
def loss_and_gradient(name, **fields):
    return compiled(jax.value_and_grad(functools.partial(objective, build(name, **fields)[0])))


def test_gradient_follows_the_transcription():
    """Along a random direction, against a central difference in float64."""
    _, params, _ = build("everything")
    _, grads = loss_and_gradient("everything")(params, rows(draw_tokens()))
    rng, at = np.random.default_rng(5), SEGMENTS > 0
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

    def loss(step):
        moved = jax.tree.map(lambda p, d: np.asarray(p, np.float64) + step * d, params, direction)
        logits = logits64(moved, draw_tokens(), SHAPE | EVERYTHING)[at]
        return np.mean(np.log(np.exp(logits).sum(-1)) ** 2)

    slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose(slope, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-4)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("options", [*({"remat": name} for name in REMAT[1:]), {"unroll": 2, "remat": "full"}], ids=str)
def test_remat_and_unroll_change_no_number(options):
    _, params, _ = build("plain")
    want = loss_and_gradient("plain")(params, rows(draw_tokens()))
    got = loss_and_gradient("plain", **options)(params, rows(draw_tokens()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), got, want)


def test_remat_stores_less():
    batch, sizes = rows(draw_tokens()), {}
    for name in REMAT:
        model, params, _ = build("plain", remat=name)
        _, pullback = jax.eval_shape(lambda p, m=model: jax.vjp(lambda q: objective(m, q, batch), p), params)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert sizes["full"] < sizes["attention"] < sizes["dots_no_batch"] < sizes["none"]
    assert sizes["dots"] == sizes["dots_no_batch"]  # the only products with batches are those inside the attention


def test_bfloat16_compute_keeps_float32_masters():
    _, params, apply = build("everything")
    narrow, _, narrow_apply = build("everything", compute_dtype="bfloat16")
    batch = rows(draw_tokens())
    output = narrow_apply(params, batch)
    assert output.hidden.dtype == output.head.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    hidden = apply(params, batch).hidden
    error = np.linalg.norm(output.hidden.astype(jnp.float32) - hidden) / np.linalg.norm(hidden)
    assert 1e-3 < error < 0.03  # bfloat16 has 8 bits: neither ignored nor lossy beyond its precision
    masters = jax.eval_shape(narrow.init, jax.random.key(0))
    grads = jax.eval_shape(jax.grad(lambda p: objective(narrow, p, batch)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((masters, grads))} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_every_dimension_has_one_axis_name(name):
    model, params, _ = build(name)
    axes = dict(jax.tree_util.tree_leaves_with_path(model.axes, is_leaf=lambda x: isinstance(x, tuple)))
    sizes = dict(SHAPE, head=SHAPE["head_dim"], vocab=40 if name == "everything" else 37)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert tuple(sizes[name] for name in axes.pop(path)) == leaf.shape, path
    assert not axes
    assert ("head" in params) is not (name == "everything")


def test_params_are_a_plain_dict_that_depends_on_the_key_alone():
    params = compiled(build("plain")[0].init)(jax.random.key(0))
    nodes = [params]
    while nodes:
        node = nodes.pop()
        assert type(node) is dict
        nodes += [child for child in node.values() if not isinstance(child, jax.Array)]
    other = build("plain", unroll=2, remat="full", compute_dtype="bfloat16")[0]
    again = compiled(other.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    query, out = params["layers"]["attention"]["query"], params["layers"]["attention"]["out"]
    assert not np.array_equal(query[0], query[1])
    np.testing.assert_allclose(np.std(query), 0.25, rtol=0.05)
    np.testing.assert_allclose(np.std(out), 0.25 / 2, rtol=0.05)  # sqrt(2 * layers) = 2


def test_no_array_is_captured():
    model, params, _ = build("everything", max_length=256)
    shape = (2, 256)
    batch = rows(draw_tokens(shape), np.ones(shape, np.int32), np.tile(np.arange(256, dtype=np.int32), (2, 1)))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: jnp.sum(model.apply(p, b).logits)))(params, batch)
    assert all(np.asarray(const).nbytes <= 4096 for const in constants(jaxpr))
    big = np.ones(2048, np.float32)  # the walk does find a constant inside a loop
    loop = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c + jnp.asarray(big), None), x, None, length=2))(big)
    assert max(np.asarray(const).nbytes for const in constants(loop)) > 4096


def constants(jaxpr):
    """Yields the constants of a closed jaxpr and of every closed jaxpr inside it."""
    yield from jaxpr.consts
    for equation in jaxpr.jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "consts")):
            if hasattr(value, "consts"):
                yield from constants(value)
