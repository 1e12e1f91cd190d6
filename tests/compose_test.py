"""Parts join into one method: what goes together, what does not and with which remedy, and the plain step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcl import compose, grad, tree
from jaxcl.compose import Part, Wrapper
from jaxcl.methods import reference
from jaxcl.rl import objectives
from jaxcl.schema import UserError

PARAMS = toys.linear(3).init(jax.random.key(0))
RNG = np.random.default_rng(0)


def batch(seed, rows=4, task=0):
    rng = np.random.default_rng(seed)
    return toys.points(rng.normal(size=(rows, 3)).astype("f"), rng.normal(size=rows).astype("f"), task)


def setting(tx=None, microbatches=1):
    return toys.setting(
        model=toys.linear(3), tx=tx or optax.sgd(0.1), example=batch(0), loss=toys.squared, microbatches=microbatches
    )


def key(i):
    return jax.random.key(i)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "config.method: empty list; name at least one method"),
        (7, "config.method=7: write it as in 'er"),
        (["er"], r"config.method\[0\]: expected a dict with a 'name', got 'er'"),
        ({"name": "ewk"}, "config.method.name='ewk': no such module in jaxcl.methods; did you mean 'ewc'"),
        ([{"name": "er", "size": 3}], r"config.method\[0\].size: unknown key"),
        ([{"name": "cpt"}, {"name": "er", "fraction": "much"}], r"config.method\[1\].fraction='much': expected float"),
        ("er(mode='swap')", r"config.method\[0\].mode='swap': expected 'replace' or 'extend'"),
        ("er + er(rows=2)", "config.method: 'er' is listed twice; list every part once"),
        ("mer + er + ewc", "config.method: 'mer' is a complete method of its own; remove er, ewc"),
        ("er(fraction=1.0)", r"er.fraction=1.0: must lie in \[0, 1\)"),
        ("er(rows=9)", r"er.rows=9: must lie in \[0, 4\]"),
        ("er(capacity=0)", "er.capacity=0: must be at least 1"),
        ("reptile(keep=1.5)", r"reptile.keep=1.5: must lie in \[0, 1\]"),
        ("reptile(every=0)", "reptile.every=0: must be at least 1"),
        ("ema(decay=2.0)", "ema.decay=2.0"),
        ("ewc(strength=-1.0)", "ewc.strength=-1.0"),
        ("ewc(decay=-1.0)", "ewc.decay=-1.0"),
        ("ewc(chunk=3)", "ewc.chunk=3: must be a divisor of the batch of 4 rows"),
        ("l2(strength=-1.0)", "l2.strength=-1.0"),
        ("lwf(strength=-1.0)", "lwf.strength=-1.0"),
        ("lwf(temperature=0.0)", "lwf.temperature=0.0"),
        ("si(strength=-1.0)", "si.strength=-1.0"),
        ("si(damping=0.0)", "si.damping=0.0"),
        ("cpo(strength=-1.0)", "cpo.strength=-1.0: must not be negative"),
        ("cpo(share=0.0)", r"cpo.share=0.0: must lie in \(0, 1\]"),
        ("cpo(share=1.5)", r"cpo.share=1.5: must lie in \(0, 1\]"),
        ("chord(mu=1.5)", r"chord.mu=1.5: must lie in \[0, 1\]"),
        ("chord(end=-0.5)", r"chord.end=-0.5: must lie in \[0, 1\]"),
        ("chord(steps=-1)", "chord.steps=-1: must not be negative"),
        ("chord(phi='q')", r"config.method\[0\].phi='q': expected 'none' or 'p' or 'p\(1-p\)'"),
        ("reference", "config.method reference: only for runs with config.objective; leave it out"),
        ("agem(capacity=0)", "agem.capacity=0"),
        ("agem(rows=0)", "agem.rows=0"),
        ("mer(algorithm=6, beta=0.5)", "mer.beta=0.5: algorithm 6 has no beta; leave it out"),
        ("mer(algorithm=7, steps=2)", "mer.steps=2: algorithm 7 has no steps"),
        ("mer(s=2.0)", "mer.s=2.0: algorithm 1 has no s"),
        ("mer(gamma=2.0)", r"mer.gamma=2.0: must lie in \[0, 1\]"),
        ("mer(batch=-1)", "mer.batch=-1: must be at least 0"),
        ("mer(lr=0.0)", "mer.lr=0.0: must be positive"),
    ],
)
def test_mistakes_are_named_with_their_remedy(options, message):
    with pytest.raises(UserError, match=message):
        compose.make(options, setting())


def test_one_gradient_rule():
    rule = Part(project=lambda memory, grads, batch, gradient, key: grads)
    with pytest.raises(UserError, match="agem and gem both change the gradient; keep one of them"):
        compose.compose([("agem", rule), ("gem", rule)], setting())


def test_microbatches_must_divide_the_rows_trained_on():
    compose.make("er(rows=2, mode='extend')", setting(microbatches=3))
    with pytest.raises(UserError, match="microbatches=4: does not divide the 6 rows of a step"):
        compose.make("er(rows=2, mode='extend')", setting(microbatches=4))
    with pytest.raises(UserError, match="microbatches=2: 'mer' makes its own passes; set it to 1"):
        compose.make("mer", setting(microbatches=2))


def test_plain_training_is_the_optimiser():
    tx = optax.adamw(0.05)
    method = compose.make({"name": "cpt"}, setting(tx))
    state, step = method.init(PARAMS), toys.quick(method.step)
    params, opt_state = PARAMS, tx.init(PARAMS)

    @toys.quick
    def by_hand(params, opt_state, rows):
        def loss(p):
            return jnp.mean(0.5 * jnp.square(rows.inputs @ p["w"] - rows.targets))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, jnp.linalg.norm(grads["w"])

    for i in range(4):
        state, metrics = step(state, batch(i), key(i))
        params, opt_state, value, norm = by_hand(params, opt_state, batch(i))
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        assert float(metrics["weight"]) == 4.0
    np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-6)
    assert int(state.step) == 4


def test_microbatches_do_not_change_a_composed_method():
    methods = [compose.make("er(rows=2, capacity=8) + l2(strength=0.5)", setting(microbatches=n)) for n in (1, 2)]
    states = [method.init(PARAMS) for method in methods]
    steps = [toys.quick(method.step) for method in methods]
    for i in range(3):
        told = []
        for j in (0, 1):
            states[j], metrics = steps[j](states[j], batch(i), key(i))
            told.append(metrics)
        for name, value in told[0].items():
            np.testing.assert_allclose(told[1][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(states[0].params["w"], states[1].params["w"], rtol=1e-6)


def test_wrappers_apply_in_the_order_given():
    method = compose.make("ema(decay=0.0) + cpt + reptile(every=1, keep=0.5)", setting())
    state = method.init(PARAMS)
    assert set(state.memory) == {"anchor", "inner"}  # the last one is outermost
    assert set(state.memory["inner"]) == {"average", "inner"}


def test_a_part_sees_the_step_it_settles():
    """`settle` gets the rows trained on, the rows that came in, both sets of parameters and the gradient."""

    def settle(memory, taken):
        rate = jax.tree.map(lambda a, b, g: (a - b) / g, taken.before, taken.after, taken.grads)
        return {
            "rate": rate,
            "came": taken.batch.task.shape[0] + jnp.zeros_like(memory["came"]),
            "rows": taken.rows.task,
        }

    doubled = Part(
        init=lambda params: {
            "rate": jax.tree.map(jnp.zeros_like, params),
            "came": jnp.zeros((), jnp.int32),
            "rows": jnp.zeros(8, jnp.int32),
        },
        recall=lambda memory, rows, key: jax.tree.map(lambda x: jnp.concatenate([x, x]), rows),
        settle=settle,
        metrics=lambda memory, rows: {"rows": jnp.float32(rows.task.shape[0])},
    )
    method = compose.compose([("doubled", doubled)], setting(optax.sgd(0.25)))
    state, metrics = toys.quick(method.step)(method.init(PARAMS), batch(0, task=2), key(0))
    assert float(metrics["doubled/rows"]) == 8.0
    memory = state.memory["doubled"]
    assert int(memory["came"]) == 4
    np.testing.assert_array_equal(memory["rows"], np.full(8, 2))
    np.testing.assert_allclose(memory["rate"]["w"], 0.25, rtol=1e-5)


def penalised():
    """Returns a setting whose loss has a divergence from the reference, rows of it, and parameters of a model."""
    objective = objectives.make("grpo", kl=0.5)

    def loss(output, rows):
        return objective.surrogate(toys.score(output, rows), rows)

    def drawn(seed):
        rows = toys.rollouts(seed)
        return dataclasses.replace(rows, extra=rows.extra | {"behaviour": -2.0 + 0 * rows.weights})

    model = toys.language_model()
    made = toys.setting(model=model, example=drawn(0), loss=loss, score=toys.score, tx=optax.sgd(0.1))
    return made, toys.stack([drawn(1), drawn(2)]), [model.init(key(i)) for i in (1, 2)]


def with_reference(made, rows, params):
    """Returns rows [K, B, ...] with the column of `reference`, in one pass over all of them."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    column = toys.score(made.model.apply(params, flat), flat)
    return dataclasses.replace(flat, extra=flat.extra | {"reference": column})


@pytest.mark.parametrize("order", ["ewc(chunk=2) + reference(at='task')", "reference(at='task') + ewc(chunk=2)"])
def test_the_fisher_of_an_objective_with_a_divergence(order):
    """The loss that is squared at the end of a task is that of a step, with the reference of the task before."""
    made, rows, (first, last) = penalised()
    method = compose.make(order, made)
    state = dataclasses.replace(method.init(first), params=last)
    ended = toys.quick(method.end_task)(state, rows, key(0))
    flat = with_reference(made, rows, first)

    def squares(rows):
        one = jax.tree.map(lambda x: x[None], rows)
        slope = jax.grad(lambda params: made.loss(made.model.apply(params, one), one)[0])(last)
        return jax.tree.map(jnp.square, slope)

    each = toys.quick(jax.vmap(squares))(flat)
    count = float(flat.extra["share"].sum())
    fisher = dict(tree.named_leaves(ended.memory["ewc"]["fisher"]))
    for name, leaf in tree.named_leaves(each):
        want = np.sum(np.asarray(leaf, np.float64), axis=0) / count
        np.testing.assert_allclose(fisher[name], want, rtol=1e-4, atol=1e-6 * want.max(), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, ended.memory["reference"]["reference"], last)


def test_every_part_ends_a_task_with_the_rows_of_a_step():
    """Whatever differentiates the training loss then: here its mean gradient, kept."""
    made, rows, (first, last) = penalised()

    def end_task(memory, params, batch, key):
        assert set(batch.extra) == {*rows.extra, "reference", "mark"}
        del memory, key
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        return jax.grad(lambda params: grad.mean(*made.loss(made.model.apply(params, flat), flat)))(params)

    def mark(memory, rows):
        return dataclasses.replace(rows, extra=rows.extra | {"mark": rows.task})

    keeper = Part(init=lambda params: jax.tree.map(jnp.zeros_like, params), annotate=mark, end_task=end_task)
    method = compose.compose([("keeper", keeper), ("reference", reference.make(made))], made)
    state = dataclasses.replace(method.init(first), params=last)
    ended = toys.quick(method.end_task)(state, rows, key(0))
    flat = with_reference(made, rows, first)
    want = jax.grad(lambda params: grad.mean(*made.loss(made.model.apply(params, flat), flat)))(last)
    for a, b in zip(jax.tree.leaves(ended.memory["keeper"]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(want))


def test_inner_and_outer_undo_each_other():
    state = compose.make("cpt", setting()).init(PARAMS)
    again = compose.inner(compose.outer(state, extra=jnp.ones(2)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert isinstance(compose.make("reptile", setting()), compose.Method)
    assert not isinstance(Part(), Wrapper)
    assert [name for name, _ in tree.named_leaves(state.memory)] == []
