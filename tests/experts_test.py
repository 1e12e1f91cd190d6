"""Experts against a float64 loop over tokens; capacity, padding, balance; meshes, microbatches, methods, refusals."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rl_small
import small
import toys

from jaxcl import compose, flops, grad, losses, plan, program, scores, train
from jaxcl import mesh as meshes
from jaxcl.aot import abstract
from jaxcl.hf import families
from jaxcl.kernels import experts as kernels
from jaxcl.models import experts, lora, transformer
from jaxcl.network import Network
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

B, L, D, F, E = 4, 12, 10, 14, 4
SHAPE = {"vocab": 40, "layers": 2, "embed": D, "heads": 2, "head_dim": 6, "mlp": 99, "max_length": 64, "init_std": 0.4}
SHAPE |= {"experts": E, "experts_per_token": 2, "expert_mlp": F, "balance": 0.3, "router_z": 0.1}


def silu(x):
    return x / (1 + np.exp(-x))


def unit(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def layer(p, x, segments, taken=2, norm=True, capacity=None):
    """Returns what one layer of experts gives, token by token in float64, and (balance, z, dropped) of every row."""
    count = p["gate"].shape[0]
    y, told = np.zeros_like(x), []
    for b, row in enumerate(x):
        used, probability, full, z, dropped = np.zeros(count), np.zeros(count), np.zeros(count), 0.0, 0
        n = max(int((segments[b] > 0).sum()), 1)
        for t in np.flatnonzero(segments[b]):
            scores_ = row[t] @ p["router"]
            share = np.exp(scores_ - scores_.max())
            share /= share.sum()
            best = np.argsort(-share, kind="stable")[:taken]
            z += np.log(np.exp(scores_).sum()) ** 2
            probability += share / n
            for e in best:
                used[e] += 1 / n
                full[e] += 1
                if capacity is not None and full[e] > max(round(capacity * taken * n / count), 1):
                    dropped += 1
                    continue
                weight = share[e] / (share[best].sum() if norm else 1.0)
                y[b, t] += weight * unit(row[t], p["gate"][e], p["up"][e], p["down"][e])
        told.append((n * count * (used * probability).sum(), z, dropped))
    return y, np.array(told)


def weights_of(seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}


def inside(length=L):
    """Returns segments: two documents, one row with padding behind it and one that is mostly padding."""
    segments = np.ones((B, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[1, length - 3 :] = 0
    segments[2, 1:] = 0
    return segments


def module(**fields):
    return experts.Experts(transformer.shape(**SHAPE | fields), bounded=True)


def applied(p, x, segments, **fields):
    run = toys.quick(lambda p, x: module(**fields).apply({"params": p}, x, segments))
    return run(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x)))


@pytest.mark.parametrize("count", [40, 3])  # several blocks for an expert; less than one
def test_mixture_and_its_gradients_are_those_of_the_loop(count):
    rng = np.random.default_rng(count)
    p, x, c = weights_of(1), rng.normal(size=(2, count, D)), rng.normal(size=(2, count, D))
    choice = np.stack([rng.permutation(E - 1)[:2] for _ in range(2 * count)]).reshape(2, count, 2)  # none for the last
    choice[0, :2] = [[E, E], [1, E]]
    choice[1, :, 0] = np.where(choice[1, :, 1] == 0, choice[1, :, 0], 0)  # many for the first
    shares = rng.random((2, count, 2))
    y, d = np.zeros_like(x), {"x": np.zeros_like(x), "shares": np.zeros_like(shares)}
    d |= {name: np.zeros_like(p[name]) for name in ("gate", "up", "down")}
    for b, t, j in itertools.product(range(2), range(count), range(2)):
        if (e := choice[b, t, j]) == E:
            continue
        g, u = x[b, t] @ p["gate"][e], x[b, t] @ p["up"][e]
        h, s, o = silu(g) * u, shares[b, t, j], c[b, t]
        y[b, t] += s * h @ p["down"][e]
        d["shares"][b, t, j] = h @ p["down"][e] @ o
        d["down"][e] += s * np.outer(h, o)
        d_h, sigma = s * p["down"][e] @ o, 1 / (1 + np.exp(-g))
        d_g, d_u = d_h * u * sigma * (1 + g * (1 - sigma)), d_h * silu(g)
        d["gate"][e] += np.outer(x[b, t], d_g)
        d["up"][e] += np.outer(x[b, t], d_u)
        d["x"][b, t] += p["gate"][e] @ d_g + p["up"][e] @ d_u

    def f(x, shares, gate, up, down):
        return kernels.mixture(x, jnp.asarray(choice, jnp.int32), shares, gate, up, down)

    args = [jnp.asarray(a, jnp.float32) for a in (x, shares, p["gate"], p["up"], p["down"])]

    @toys.quick
    def both(*args):
        out, back = jax.vjp(f, *args)
        return out, back(jnp.asarray(c, jnp.float32))

    got, back = both(*args)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)
    for name, found in zip(("x", "shares", "gate", "up", "down"), back, strict=True):
        np.testing.assert_allclose(found, d[name], rtol=1e-4, atol=1e-5 * np.abs(d[name]).max(), err_msg=name)


def test_a_sum_over_experts_is_rounded_once():
    one = jnp.ones((4, 1, 1), jnp.bfloat16)
    down = jnp.bfloat16([256, 1, 1, 1]).reshape(4, 1, 1)
    y = kernels.mixture(one[:1], jnp.arange(4)[None, None], jnp.ones((1, 1, 4)), 64 * one, one / 64, down)
    assert float(y[0, 0, 0]) == 260  # of 259; in bfloat16 256 + 1 is 256


def test_gradients_of_many_tokens_are_summed_in_float32():
    """Blocks are of few tokens, as an expert of 128 has few on average; here one has them all."""
    rng, tokens, count = np.random.default_rng(5), 4096, 128
    x, c = (np.abs(rng.normal(size=(1, tokens, D))) for _ in range(2))
    weights = [np.abs(rng.normal(size=shape)) for shape in ((count, D, F), (count, D, F), (count, F, D))]
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (x, *weights)]
    choice, shares = jnp.zeros((1, tokens, 1), jnp.int32), jnp.ones((1, tokens, 1))

    def total(x, *weights):
        return jnp.sum(kernels.mixture(x, choice, shares, *weights) * c.astype(x.dtype))

    slopes = toys.quick(jax.grad(total, (1, 2, 3)))
    for got, want in zip(slopes(*narrow), slopes(*(a.astype(jnp.float32) for a in narrow)), strict=True):
        off = np.abs(np.asarray(got, np.float64) - np.asarray(want)).max()
        assert off < 1e-2 * float(jnp.abs(want).max())


def test_the_work_is_that_of_the_choices():
    """At the most one incomplete block for each expert, of at most a quarter of its mean load."""
    rng = np.random.default_rng(0)
    choice = np.stack([rng.permutation(8)[:2] for _ in range(512)]).astype(np.int32)
    tile = 32  # of 1024 choices for 8 experts
    cut = kernels.blocks(jnp.asarray(choice), 8, tile)
    assert int(cut.count) == sum(-(-int((choice == e).sum()) // tile) for e in range(8)) <= 1024 // tile + 8
    seen = [cut.of(jnp.int32(i)) for i in range(int(cut.count))]
    places = np.concatenate([place for _, _, place in seen])
    assert sorted(places[places < 1024]) == list(range(1024))
    for expert, token, place in seen:
        real = np.asarray(place) < 1024
        assert (choice.reshape(-1)[np.asarray(place)[real]] == int(expert)).all()
        assert (np.asarray(token)[real] == np.asarray(place)[real] // 2).all()
        assert (np.asarray(token)[~real] >= 512).all()
        assert len(set(np.asarray(token).tolist())) == tile
    jaxpr = str(jax.make_jaxpr(kernels.mixture)(*shapes_of(512, 8)))
    assert f"f32[{tile},{F}]" in jaxpr
    assert f"f32[1024,{F}]" not in jaxpr


def shapes_of(tokens, count):
    wide = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((count, D, F), (count, D, F), (count, F, D))]
    pair = (1, tokens, 2)
    x = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
    return x, jax.ShapeDtypeStruct(pair, jnp.int32), jax.ShapeDtypeStruct(pair, jnp.float32), *wide


@pytest.mark.parametrize(
    "fields",
    [{}, {"experts_per_token": 1, "norm_topk": False}, {"capacity": 0.6}, {"capacity": 1.0, "norm_topk": False}],
    ids=str,
)
def test_a_layer_is_the_loop_and_its_gradient_the_difference_quotient(fields):
    rng = np.random.default_rng(2)
    p, x, segments, c = weights_of(), rng.normal(size=(B, L, D)), inside(), rng.normal(size=(B, L, D))
    how = {"taken": fields.get("experts_per_token", 2), "norm": fields.get("norm_topk", True)}
    how["capacity"] = fields.get("capacity")

    def objective(p, x):
        y, told = layer(p, x, segments, **how)
        return (y * c).sum() + 0.3 * told[:, 0].sum() + 0.1 * told[:, 1].sum()

    y, told = applied(p, x, segments, **fields)
    want, parts = layer(p, x, segments, **how)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told.penalty, 0.3 * parts[:, 0].sum() + 0.1 * parts[:, 1].sum(), rtol=1e-5)
    assert float(told.dropped) == parts[:, 2].sum()
    assert (float(told.dropped) > 0) == ("capacity" in fields)

    def ours(p, x):
        y, told = module(**fields).apply({"params": p}, x, segments)
        return jnp.sum(y * c) + told.penalty

    inputs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    slopes = toys.quick(jax.grad(ours, (0, 1)))(*inputs)
    for name in [*p, "x"]:  # along one direction each
        way = rng.normal(size=x.shape if name == "x" else p[name].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = p if name == "x" else p | {name: p[name] + step * way}
            ends.append(objective(moved, x + step * way if name == "x" else x))
        found = slopes[1] if name == "x" else slopes[0][name]
        np.testing.assert_allclose((found * way).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-3, err_msg=name)


def test_tokens_of_few_bits_are_routed_in_float32(monkeypatch):
    """Two experts whose logits differ by less than a bit of bfloat16 in the router."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(2, 64, D)), jnp.bfloat16)
    p = {name: jnp.asarray(a[:, :2] if name == "router" else a[:2], jnp.float32) for name, a in weights_of().items()}
    p["router"] = p["router"].at[:, 1].set(p["router"][:, 0] * (1 + 1e-3 * rng.normal(size=D)))
    monkeypatch.setattr(experts.kernels, "mixture", lambda x, choice, *rest: choice)
    only = module(experts=2, experts_per_token=1, balance=0.0)
    choice, told = only.apply({"params": p}, x, np.ones((2, 64), np.int32))
    logits = np.asarray(x, np.float64) @ np.asarray(p["router"], np.float64)
    np.testing.assert_array_equal(choice[..., 0], logits.argmax(-1))
    np.testing.assert_allclose(told.penalty, 0.1 * (np.log(np.exp(logits).sum(-1)) ** 2).sum(), rtol=1e-5)


def test_of_equal_experts_the_first_are_taken():
    values = jnp.asarray(np.random.default_rng(7).integers(0, 3, (1, 40, E)), jnp.float32).at[0, 0].set(0)
    route = toys.quick(functools.partial(experts.route, transformer.shape(**SHAPE), bounded=False))
    choice = route(values, jnp.ones((1, 40), bool))[0]
    assert choice[0, 0].tolist() == [0, 1]
    np.testing.assert_array_equal(choice, jax.lax.top_k(values, 2)[1])


def test_terms_are_means_over_the_layers():
    told = experts.Told(jnp.array([1.0, 5.0]), jnp.array([2.0, 6.0]), jnp.array([0.0, 3.0]))
    found = experts.terms(transformer.shape(**SHAPE | {"capacity": 0.9}), told, np.int32([[1, 1, 2, 0]]))
    want = {"experts/penalty": (3.0, 3.0), "experts/busiest": (4.0, 3.0), "experts/dropped": (1.5, 6.0)}
    assert {name: (float(total), float(weight)) for name, (total, weight) in found.items()} == want


def test_experts_are_balanced_unless_asked_not_to():
    assert transformer.shape(preset="tiny", experts=4).balance == 0.01
    model = transformer.make(preset="tiny", experts=4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.eval_shape(model.apply, params, rows()).terms.keys() == {"experts/penalty", "experts/busiest"}


def test_flops_count_the_experts_that_a_token_meets(tmp_path):
    settings = small.config(tmp_path, model__experts=4, method="cpt")
    made, step = program.build(**train.split(settings)[1]), abstract.make(settings, jax.devices())
    cost = flops.of_model(step.plan.setting.model.axes, made.abstract.params, 32, active=2 / 4)
    assert made.facts["flops_per_token"] == round(cost)
    assert step.facts()["flops_per_step"] == round(cost * 8 * 32)


def test_enough_capacity_is_none_and_what_is_dropped_passes_by_the_residual():
    rng = np.random.default_rng(3)
    p, x, segments = weights_of(), rng.normal(size=(B, L, D)), inside()
    x[..., 0] = 3.0
    p["router"][0] = [4.0, 3.9, 0.0, 0.0]  # nearly all tokens want the same two
    plain, ample, tight = (applied(p, x, segments, capacity=c)[0] for c in (None, 4.0, 0.5))
    np.testing.assert_array_equal(plain, ample)
    gone = np.abs(tight).max(-1) == 0
    assert gone[segments == 0].all()
    late = (segments > 0) & (np.arange(L)[None] >= L // 2)
    assert gone[late].mean() > 0.5  # first come, first served
    assert not gone[:, 0].any()
    np.testing.assert_array_equal(np.asarray(tight)[:, 0], np.asarray(plain)[:, 0])


@functools.cache
def built(**fields):
    model = transformer.make(**SHAPE | fields)
    return model, toys.quick(model.init)(jax.random.key(1))


def capped(**fields):
    return transformer.make(**SHAPE | {"capacity": 0.9} | fields), built()[1]


def rows(length=L, count=B, seed=0):
    rng = np.random.default_rng(seed)
    segments = inside(length)[:count]
    tokens = rng.integers(0, 40, (count, length)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)).copy()
    weights = rng.random((count, length)).astype(np.float32) * (segments > 0)
    return Batch(tokens, np.roll(tokens, -1, 1), weights, segments, places, np.zeros(count, np.int32))


def padded(batch, more, filler):
    """Returns rows with more padding, and other tokens in it."""

    def leaf(x):
        return np.pad(x, ((0, 0), (0, more))) if x.ndim == 2 else x

    batch = jax.tree.map(leaf, batch)
    tokens = np.where(batch.segments > 0, batch.inputs, filler).astype(np.int32)
    return Batch(tokens, batch.targets, batch.weights, batch.segments, batch.positions, batch.task)


def test_padding_changes_nothing():
    model, params = transformer.make(**SHAPE | {"capacity": 0.7}), built()[1]
    run = toys.quick(model.apply)
    short, long = run(params, padded(rows(), 0, 1)), run(params, padded(rows(), 5, 7))
    real = inside() > 0
    np.testing.assert_allclose(
        np.asarray(short.hidden)[real], np.asarray(long.hidden)[:, :L][real], rtol=1e-4, atol=1e-5
    )
    assert short.terms.keys() == {"experts/penalty", "experts/busiest", "experts/dropped"}
    for name, (total, weight) in short.terms.items():
        np.testing.assert_allclose([total, weight], long.terms[name], rtol=1e-5)
    assert float(short.terms["experts/penalty"][1]) == real.sum()
    assert 0 < float(short.terms["experts/dropped"][0]) < float(short.terms["experts/dropped"][1]) == 2 * real.sum()
    tokens = jax.tree.map(lambda x: x * 0, rows())
    assert all(float(s) == float(w) == 0 for s, w in run(params, tokens).terms.values())


def test_balance_is_k_where_all_experts_are_used_alike_and_pushes_a_skewed_router_there():
    c, rng = transformer.shape(**SHAPE | {"balance": 1.0, "router_z": 0.0}), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 64, D)), jnp.float32).at[..., 0].set(1.0)
    one = jnp.ones((2, 64), bool)
    even = jnp.tile(jnp.eye(E) + jnp.roll(jnp.eye(E), 1, 1), (2, 16, 1))
    assert float(experts.route(c, even, one, bounded=True)[2].penalty) / 128 == pytest.approx(2.0, rel=1e-5)

    def penalty(router):
        told = experts.route(c, x @ router, one, bounded=True)[2]
        return told.penalty / 128, told.busiest / 128

    router = jnp.asarray(0.3 * rng.normal(size=(D, E)), jnp.float32).at[0].set(jnp.array([3.0, 0.0, -1.0, -2.0]))
    before = penalty(router)
    step = jax.jit(lambda _, w: w - 0.3 * jax.grad(penalty, has_aux=True)(w)[0])
    after = penalty(jax.lax.fori_loop(0, 200, step, router))
    assert float(before[1]) > 0.45  # half of the choices is all that one expert can have
    assert float(after[1]) < 0.33
    assert float(after[0]) < 2.1 < float(before[0])


def objective(model):
    def run(params, batch):
        output = model.apply(params, batch)
        return {"loss": losses.cross_entropy(output, batch), **output.terms}

    return run


@functools.cache
def alone():
    model, params = capped()
    run = toys.quick(functools.partial(grad.value_and_grad, objective(model)))
    return jax.device_get(run(params, eight()))


def eight():
    return jax.tree.map(lambda *x: np.concatenate(x), rows(), rows(seed=5))


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(got), want)


def test_microbatches_are_the_whole_batch():
    """Balance, capacity and shares are of rows, so that the sums over microbatches are those of the batch."""
    model, params = capped(remat="full")
    run = toys.quick(functools.partial(grad.value_and_grad, objective(model), microbatches=4))
    close(run(params, eight()), alone())


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "expert": 2}, {"data": 1, "tensor": 2, "expert": 4}], ids=str)
def test_a_mesh_with_experts_is_one_device_and_gathers_no_expert(sizes):
    model, params = capped()
    mesh = meshes.make(**sizes)
    places = meshes.state_shardings(mesh, model.axes, TrainState(jnp.int32(0), params, ())).params
    own = {name: tuple(places["layers"]["experts"][name].spec) for name in ("router", "gate", "up", "down")}
    fsdp, tensor = ("fsdp" if sizes.get("fsdp") else None), ("tensor" if sizes.get("tensor") else None)
    assert own["gate"] == own["up"] == (None, "expert", fsdp, tensor)
    assert own["down"] == (None, "expert", tensor, fsdp)
    assert "expert" not in own["router"]
    run = functools.partial(grad.value_and_grad, objective(model))
    args = jax.device_put(params, places), meshes.place(mesh, eight())
    shards = np.prod([sizes.get(axis, 1) for axis in meshes.BATCH])
    assert {x.data.shape for x in args[1].inputs.addressable_shards} == {(8 // shards, L)}
    step = toys.quick(meshes.on(mesh, run), out_shardings=(meshes.replicated(mesh), places)).lower(*args).compile()
    close(step(*args), alone())
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
    found = [[int(n) for n in text.split(",") if n] for text in gathered]
    here, hidden = E // sizes["expert"], F // sizes.get("tensor", 1)
    weights = [shape for shape in found if hidden in shape or F in shape]
    assert all(np.prod(shape) <= here * D * hidden for shape in weights), weights
    assert bool(weights) == ("fsdp" in sizes)  # a part of each device's own
    assert any(shape[-1] == D for shape in found), "tokens are gathered"
    assert not any(shape[-1] == E and np.prod(shape) >= 8 * L * E for shape in found), "routing is of own tokens"
    assert " reduce-scatter(" in step.as_text()


def test_experts_beside_replicas_and_cut_rows_are_one_device():
    model, params = capped()
    mesh = meshes.make(replica=2, data=1, context=2, expert=2)
    places = meshes.state_shardings(mesh, model.axes, TrainState(jnp.int32(0), params, ())).params
    run = functools.partial(grad.value_and_grad, objective(model))
    step = toys.quick(meshes.on(mesh, run), out_shardings=(meshes.replicated(mesh), places))
    close(step(jax.device_put(params, places), meshes.place(mesh, eight())), alone())


@pytest.mark.parametrize(("sizes", "count"), [({"data": 2, "expert": 2}, 2), ({"expert": 2, "tensor": 4}, 3)], ids=str)
def test_rows_that_the_experts_axis_does_not_divide_are_on_all_its_devices(sizes, count):
    rng, p = np.random.default_rng(4), weights_of()
    choice = np.stack([rng.permutation(E)[:2] for _ in range(count * L)]).reshape(count, L, 2).astype(np.int32)
    x, shares = rng.normal(size=(count, L, D)), rng.random((count, L, 2))
    args = [jnp.asarray(a, jnp.float32) for a in (x, shares, p["gate"], p["up"], p["down"])]

    def run(x, shares, *weights):
        return jnp.sum(kernels.mixture(x, choice, shares, *weights) ** 2)

    mesh = meshes.make(**{"data": 1} | sizes, devices=jax.devices()[: math.prod(sizes.values())])
    both = functools.partial(jax.value_and_grad, argnums=range(5))
    got = toys.quick(meshes.on(mesh, both(run)))(*jax.device_put(args, meshes.replicated(mesh)))
    want = jax.device_get(toys.quick(both(run))(*args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), jax.device_get(got), want)


def setting(model, method_rows):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), method_rows)
    return compose.Setting(model, optax.sgd(0.1), shapes, 2, losses.cross_entropy)


@pytest.mark.parametrize("method", ["cpt", "er(capacity=4) + agem(capacity=4)", "mer(batch=1)"])
def test_methods_train_with_the_terms(method):
    """The objective has them, the reported loss does not; states are closed."""
    batch, moved = jax.tree.map(jnp.asarray, rows(count=2)), {}
    for balance in (0.0, 50.0):
        model = transformer.make(**SHAPE | {"layers": 1, "capacity": 0.6, "balance": balance, "router_z": 0.0})
        params = built(layers=1)[1]
        made = compose.make(method, setting(model, batch))
        step = toys.quick(made.step)
        state = made.init(params)
        after, metrics = step(state, batch, jax.random.key(0))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
        moved[balance] = after.params["layers"]["experts"]["router"], metrics["loss"], params
        told = {name: float(value) for name, value in metrics.items() if name.startswith("experts/")}
        assert told.keys() == {"experts/busiest", "experts/dropped"} | ({"experts/penalty"} if balance else set())
        assert 0 < told["experts/dropped"] < 1
        assert 0.25 <= told["experts/busiest"] <= 0.5
        assert not balance or 25 < told["experts/penalty"] < 400
    assert float(jnp.abs(moved[0.0][0] - moved[50.0][0]).max()) > 1e-3
    if not method.startswith("mer"):  # whose rows of a batch meet the parameters one after the other
        assert float(moved[0.0][1]) == pytest.approx(float(moved[50.0][1]), rel=1e-6)


def test_evaluation_does_not_have_the_terms():
    tables, found = {"d": [jax.tree.map(jnp.asarray, rows())]}, []
    for balance in (0.0, 50.0):
        model, params = transformer.make(**SHAPE | {"layers": 1, "balance": balance}), built(layers=1)[1]
        found.append(scores.make(model, losses.cross_entropy)(params, tables)["d"])
        assert model.apply(params, rows(), cache=L).terms is None
    assert found[0] == found[1]


def test_with_a_cache_nothing_is_dropped():
    model, params = transformer.make(**SHAPE | {"capacity": 0.3}), built()[1]
    plain = built()[0].apply(params, rows())
    cached = toys.quick(functools.partial(model.apply, cache=L))(params, rows())
    np.testing.assert_allclose(cached.hidden, plain.hidden, rtol=1e-4, atol=1e-5)


def test_meshes_and_adapters_and_folders_that_do_not_fit_are_refused():
    model, shape = built()[0], transformer.shape(**SHAPE)
    with pytest.raises(UserError, match=r"mesh.expert=8: does not divide config.model.experts=4; .*mesh.expert=4"):
        plan.check_mesh(meshes.make(expert=8), Network(model, None, shape), None)
    with pytest.raises(UserError, match=r"mesh.expert=2: config.model has no experts; set config.model.experts=2"):
        plan.check_mesh(meshes.make(expert=2), Network(model, None, None), None)
    plan.check_mesh(meshes.make(expert=4), Network(model, None, shape), None)
    with pytest.raises(UserError, match=r"config.adapter.targets: .*mlp.* finds no projection; there are layers/att"):
        lora.make(model)
    assert lora.make(model, targets=["attention/(query|value)$"])
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.mixture(*shapes_of(8, 4)[:-1], shapes_of(8, 4)[-2])
    with pytest.raises(UserError, match=r"config.model.experts=4: .*dense"):
        families.config(shape, {})
    for kind, field in (("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")):
        with pytest.raises(UserError, match=rf"model_type='{kind}'.*{field}=8.*dense"):
            families.fields({"model_type": kind, field: 8}, "config.json")


def test_a_capacity_is_refused_where_answers_are_drawn():
    settings = rl_small.config(model__experts=2, model__capacity=1.0)
    with pytest.raises(UserError, match=r"config\.model\.capacity=1\.0: not where answers are drawn.*leave it out"):
        rl_small.build(settings)
    settings["stream"]["stages"] = settings["stream"]["stages"][:1]  # worked rows alone
    del settings["objective"], settings["rollout"]
    assert rl_small.build(settings).rollouts is None
