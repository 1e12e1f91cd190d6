"""LoRA and frozen parameters: what they compute, what they cost, and that the base keeps its bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose, flops, frozen, tree
from jaxcl import guard as guards
from jaxcl.models import layers, lora, transformer
from jaxcl.schema import UserError

ALPHA = 6.0
SHAPE = {
    "vocab": toys.V,
    "layers": 2,
    "embed": 8,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 12,
    "qk_norm": True,
    "qkv_bias": True,
}


@functools.cache
def base(**options):
    return transformer.make(**(SHAPE | options))


@functools.cache
def model(dropout=0.0, **options):
    return lora.make(base(**options), rank=3, alpha=ALPHA, dropout=dropout)


def moved(params, std=0.1):
    """Returns parameters whose B is not 0 any more."""
    leaves, treedef = jax.tree.flatten(params["lora"])
    drawn = [x + std * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    return {"base": params["base"], "lora": jax.tree.unflatten(treedef, drawn)}


def logits(of, params, batch, **more):
    return toys.quick(lambda p, b: of.apply(p, b, **more).logits)(params, batch)


# What it computes


def test_it_starts_at_the_logits_of_the_base():
    params, batch = model().init(jax.random.key(0)), toys.text(0)
    jax.tree.map(np.testing.assert_array_equal, params["base"], base().init(jax.random.key(0)))
    np.testing.assert_allclose(logits(model(), params, batch), logits(base(), params["base"], batch), atol=1e-6)
    assert not np.allclose(logits(model(), moved(params), batch), logits(base(), params["base"], batch), atol=1e-3)


def test_the_table_and_the_columns_of_a_batch_pass_through_it():
    """Mixtures of tokens at some places; in a step with a frozen base too."""
    params, batch = moved(model().init(jax.random.key(0))), toys.text(0)
    shape, none = batch.inputs.shape, jnp.zeros(batch.inputs.shape, bool)
    support = jnp.stack([batch.inputs, batch.targets], axis=-1)
    shares = jnp.broadcast_to(jnp.array([0.25, 0.75]), (*shape, 2))
    mixed = dataclasses.replace(batch, extra={"soft": batch.targets > 3, "support": support, "shares": shares})
    apply = toys.quick(model().apply)
    found, tokens = apply(params, mixed), apply(params, dataclasses.replace(mixed, extra=mixed.extra | {"soft": none}))
    want = toys.quick(base().apply)(lora.merge(params, ALPHA), mixed)
    np.testing.assert_allclose(found.hidden, want.hidden, atol=1e-5)
    np.testing.assert_array_equal(found.embedding, params["base"]["embedding"])
    assert np.abs(found.hidden - tokens.hidden).max() > 1e-2
    seen = []

    def loss(output, rows):
        seen.append((set(rows.extra), output.embedding.shape))
        return toys.cross_entropy(output, rows)

    setting = toys.setting(model=model(), tx=optax.sgd(0.1))._replace(loss=loss, example=toys.shapes(mixed))
    method = frozen.frozen(lambda m: compose.make("cpt", setting._replace(model=m)), model(), lora.FROZEN)
    jax.eval_shape(method.step, jax.eval_shape(method.init, params), mixed, jax.random.key(0))
    assert seen[-1] == ({"soft", "support", "shares"}, (toys.V, 8))


def test_a_is_drawn_as_in_peft_and_b_is_zero():
    params = lora.make(base(embed=64, mlp=512), rank=64).init(jax.random.key(0))["lora"]["layers"]
    for pair, inputs in ((params["attention"]["query"], 64), (params["mlp"]["down"], 512)):
        bound = 1 / np.sqrt(inputs)
        assert np.abs(pair["a"]).max() <= bound
        assert np.std(pair["a"]) == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert not np.any(pair["b"])
    assert params["attention"]["out"]["a"].shape == (2, 4, 16, 64)  # heads and head are both contracted
    assert params["attention"]["out"]["b"].shape == (2, 64, 64)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_merged_weights_give_the_same_logits_and_gradients(remat):
    of, params, batch = model(remat=remat), moved(model().init(jax.random.key(0))), toys.text(0)
    merged = lora.merge(params, ALPHA)
    np.testing.assert_allclose(logits(of, params, batch), logits(base(), merged, batch), atol=1e-5)

    def loss(adapter, through):
        total, weight = toys.cross_entropy(through({"base": params["base"], "lora": adapter}), batch)
        return total / weight

    own = toys.quick(jax.grad(lambda p: loss(p, lambda q: of.apply(q, batch))))(params["lora"])
    other = toys.quick(jax.grad(lambda p: loss(p, lambda q: base().apply(lora.merge(q, ALPHA), batch))))(params["lora"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), own, other)


def test_unmerging_returns_the_base_and_the_dtype_of_the_base_is_kept():
    params = moved(model().init(jax.random.key(0)))
    back = lora.unmerge(lora.merge(params, ALPHA), params["lora"], ALPHA)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)
    assert np.abs(lora.merge(params, ALPHA)["layers"]["mlp"]["up"] - params["base"]["layers"]["mlp"]["up"]).max() > 0.01
    half = {"base": tree.cast(params["base"], jnp.bfloat16), "lora": params["lora"]}
    assert {x.dtype for x in jax.tree.leaves(lora.merge(half, ALPHA))} == {jnp.dtype(jnp.bfloat16)}


def test_one_layer_against_the_formula():
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=s) for s in ((2, 3, 4, 5), (4, 5, 6), (4, 5, 2), (2, 6)))
    kernel = layers.LowRank(*(jnp.asarray(v, jnp.float32) for v in (w, a, b)), None, 0.25, 0.0)
    want = x.reshape(2, 3, 20) @ (w.reshape(20, 6) + 0.25 * a.reshape(20, 2) @ b)
    np.testing.assert_allclose(layers.linear(jnp.asarray(x, jnp.float32), kernel, 2), want, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_keeps_the_mean():
    params, batch = moved(model().init(jax.random.key(0))), toys.text(0)
    plain = logits(model(), params, batch)
    np.testing.assert_array_equal(logits(model(0.5), params, batch), plain)
    one, same, other = (logits(model(0.5), params, batch, key=jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain).max() > 1e-3 < np.abs(one - other).max()
    ones = jnp.ones((1, 4000, 8))
    kernel = layers.LowRank(jnp.zeros((8, 3)), jnp.ones((8, 1)), jnp.ones((1, 3)), jax.random.key(0), 1.0, 0.25)
    y = layers.linear(ones, kernel)
    assert np.mean(y) == pytest.approx(8, rel=0.02)
    assert np.var(y[..., 0]) == pytest.approx(8 * 0.25 / 0.75, rel=0.1)  # of 8 independent inputs


def test_layers_drop_different_inputs():
    """Every projection of every layer has a key of its own; the scan over layers takes one row of each."""
    seen = []
    plain = base()

    def spy(params, batch, cache=None):
        nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, layers.LowRank))
        seen.extend(jax.random.key_data(n.key).tolist() for n in nodes if isinstance(n, layers.LowRank))
        return plain.apply(params, batch, cache)

    dropping = lora.make(plain._replace(apply=spy), rank=2, alpha=ALPHA, dropout=0.5)
    dropping.apply(dropping.init(jax.random.key(0)), toys.text(0), key=jax.random.key(0))
    keys = [tuple(key) for node in seen for key in node]
    assert len(set(keys)) == len(keys) == 14


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["embedding"]}, "'embedding' finds embedding, which is no projection; there are layers/attention"),
        ({"targets": ["head$"]}, "'head\\$' finds head, which is no projection"),
        ({"targets": ["query", "norm"]}, "'norm' finds final_norm, which is no projection"),
        ({"targets": ["querry"]}, "'querry' finds no projection; there are layers/attention/key, "),
        ({"targets": ["("]}, "no regular expression"),
        ({"targets": []}, "targets: empty"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(UserError, match=rf"^config\.adapter\..*{words}"):
        lora.make(base(), **options)


def test_targets_are_searched_for():
    found = lora.make(base(), targets=["query", "mlp/(up|down)"]).axes["lora"]["layers"]
    assert {kind: sorted(names) for kind, names in found.items()} == {"attention": ["query"], "mlp": ["down", "up"]}
    with pytest.raises(UserError, match="no transformer"):
        lora.make(toys.language_model())


# Frozen parameters


def learner(parts="cpt", *, of=None, guard=False, microbatches=1, tx=None):
    of = of or model(0.25)
    setting = toys.setting(model=of, microbatches=microbatches, tx=tx or optax.adam(1e-2))

    def build(inner):
        made = compose.make(parts, setting._replace(model=inner))
        return guards.guard(made, warmup=1, window=4) if guard else made

    return frozen.frozen(build, of, lora.FROZEN, keyed=True)


def params():
    return model().init(jax.random.key(7))


def walk(method, state, begin=0, end=4, count=None):
    told = []
    step, end_task = toys.quick(method.step, donate_argnums=0), toys.quick(method.end_task, donate_argnums=0)
    for i in range(begin, end):
        state, metrics = step(state, toys.text(i, task=i // 2), jax.random.fold_in(jax.random.key(3), i))
        told.append(jax.device_get(metrics))
        if i % 2:
            ended = toys.stack([toys.text(i + 10 * j, task=i // 2) for j in (1, 2)])
            state = end_task(state, ended, jax.random.key(100 + i))
    if count is not None:
        count += [step._cache_size(), end_task._cache_size()]
    return state, told


PARTS = [
    "er(capacity=8) + reptile(every=2, keep=0.5)",
    "ewc(strength=10.0)",
    "si",
    "lwf",
    "l2 + ema",
    "agem(capacity=8)",
    "mer",
]


@pytest.mark.parametrize("parts", PARTS)
def test_laws_with_an_adapter(parts):
    """Closed, one trace, exact resume; the base keeps its bits, what is trained moves."""
    method, count = learner(parts, guard=True), []
    state = jax.eval_shape(method.init, params())
    after, _ = jax.eval_shape(method.step, state, toys.shapes(toys.text(0)), jax.eval_shape(lambda: jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    init = toys.quick(method.init)
    final, told = walk(method, init(params()), count=count)
    assert count == [1, 1]
    saved = jax.device_get(walk(method, init(params()), 0, 2)[0])
    resumed, rest = walk(method, jax.tree.map(jnp.asarray, saved), 2, 4)
    assert rest == told[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed, final)
    jax.tree.map(np.testing.assert_array_equal, frozen.whole(final)["base"], params()["base"])
    assert all(
        np.any(x != y) for x, y in zip(jax.tree.leaves(final.params), jax.tree.leaves(params()["lora"]), strict=True)
    )
    sizes = {x.shape for x in jax.tree.leaves(params()["base"]) if x.ndim > 2}
    rest = (final.params, final.opt_state, final.memory["inner"])
    assert not sizes & {x.shape for x in jax.tree.leaves(rest)}, "something as large as the base is kept twice"


def test_the_optimiser_knows_the_trained_leaves_alone():
    state = jax.eval_shape(learner().init, params())
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == len(jax.tree.leaves(state.params)) == 14
    assert {name.split("/")[0] for name, _ in tree.named_leaves(state.params)} == {"lora"}
    assert {name.split("/")[2] for name, _ in tree.named_leaves(state) if name.startswith("memory/frozen")} == {"base"}


def test_dropout_differs_between_steps_and_microbatches_and_is_off_at_the_end_of_a_task():
    keys = []
    of = model(0.5)

    def apply(p, batch, cache=None, key=None):
        if key is not None:
            jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return of.apply(p, batch, cache, key)

    method = learner("ewc", of=of._replace(apply=apply), microbatches=2, tx=optax.sgd(0.1))
    state, batch = toys.quick(method.init)(params()), toys.text(0)
    for i in (0, 1):
        state, _ = toys.quick(method.step)(state, batch, jax.random.key(i))
        jax.effects_barrier()
        assert len(set(keys)) == 2 * (i + 1)
    toys.quick(method.end_task)(state, toys.stack([batch]), jax.random.key(5))
    jax.effects_barrier()
    assert len(set(keys)) == 4


def test_frozen_patterns_are_checked_and_split():
    of = base()
    for patterns, words in ((["nowhere"], "matches no parameter"), (["("], "expression"), (["."], "every parameter")):
        with pytest.raises(UserError, match=words):
            frozen.frozen(lambda m: None, of, patterns)
    values = of.init(jax.random.key(0))
    trained, kept = frozen.split(values, ["^embedding", "norm"])
    assert set(kept) == {"embedding", "layers", "final_norm"}
    assert set(kept["layers"]) == {"attention", "attention_norm", "mlp_norm"}
    jax.tree.map(np.testing.assert_array_equal, frozen.join(trained, kept), values)
    assert frozen.split(values, []) == (values, {})


# What it costs


def count_of(of, patterns, keyed=False, trained=None):
    """Returns the compiled step of SGD on a batch, without loops over layers."""
    setting = toys.setting(model=of, tx=optax.sgd(0.1))
    build = lambda m: compose.make("cpt", setting._replace(model=m))  # noqa: E731
    method = frozen.frozen(build, of, patterns) if patterns else build(of)
    state = jax.eval_shape(method.init, jax.eval_shape(of.init, jax.random.key(0)))
    return jax.jit(method.step, donate_argnums=0).lower(state, setting.example, jax.random.key(0)).compile()


WIDE = {"embed": 64, "mlp": 192, "heads": 2, "kv_heads": 2, "layers": 3, "unroll": 3, "vocab": 128, "head_dim": 16}


def test_frozen_weights_cost_no_backward_work_of_their_own():
    """Counted by the compiler: exactly the gradients of the frozen matrices are missing, and A and B are there."""
    shape = {"embed": 128, "mlp": 256, "heads": 2, "kv_heads": 2, "head_dim": 32, "layers": 3, "unroll": 3}
    of, plain, tokens = model(**shape), base(**shape), toys.B * toys.L
    full, low = (count_of(m, p).cost_analysis()["flops"] for m, p in ((plain, ()), (of, lora.FROZEN)))
    shapes = jax.eval_shape(of.init, jax.random.key(0))
    leaves, adapter = dict(tree.named_leaves(shapes["base"])), lora.pairs_of(shapes["lora"])
    frozen_weights = leaves["head"].size + sum(leaves[path].size for path in lora.PROJECTIONS)
    first = [f"layers/attention/{name}" for name in ("query", "key", "value")]  # nothing to learn lies behind layer 0
    behind = sum((leaves[path].size + adapter[path]["a"].size) / 3 for path in first)
    expected = tokens * (6 * tree.size(shapes["lora"]) - 2 * frozen_weights - 2 * behind)
    assert low - full == pytest.approx(expected, rel=0.03)  # one projection with a gradient would be 7 % or more
    learned = {"base": jax.tree.map(lambda x: False, plain.axes, is_leaf=lambda x: isinstance(x, tuple))}
    learned["lora"] = jax.tree.map(lambda x: True, shapes["lora"])
    told = flops.of_model(of.axes, shapes, toys.L, learned) - flops.of_model(plain.axes, shapes["base"], toys.L)
    assert told == 6 * tree.size(shapes["lora"]) - 2 * frozen_weights
    assert 0.66 < low / full < 0.72


def test_frozen_weights_take_no_memory_but_their_own():
    shape = {"embed": 128, "mlp": 256, "layers": 4, "head_dim": 16}
    of, plain = model(**shape), base(**shape)
    full, low = (count_of(m, p).memory_analysis() for m, p in ((plain, ()), (of, lora.FROZEN)))
    sizes = jax.eval_shape(of.init, jax.random.key(0))
    frozen_bytes, trained = (4 * tree.size(sizes[part]) for part in ("base", "lora"))
    assert low.argument_size_in_bytes == pytest.approx(frozen_bytes + trained, rel=0.01)
    assert low.alias_size_in_bytes > frozen_bytes  # given to the next step, not copied
    assert full.temp_size_in_bytes - low.temp_size_in_bytes > 0.6 * frozen_bytes  # the gradients


def test_nothing_is_kept_for_a_kernel_that_is_frozen():
    w, x = jnp.ones((4, 5)), jnp.ones((2, 3, 4))
    loss = lambda w, x: layers.linear(x, w).sum()  # noqa: E731
    products = [str(jax.make_jaxpr(jax.grad(loss, argnums))(w, x)).count("dot_general") for argnums in (0, 1, (0, 1))]
    assert products == [3, 2, 3]
    _, back = jax.vjp(lambda x: loss(w, x), x)
    assert {leaf.shape for leaf in jax.tree.leaves(back)} <= {(4, 5), ()}, "the input is a residual"
