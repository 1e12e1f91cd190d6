"""The laws every method keeps. Modules of jaxcl.methods, their options and their combinations are found, not listed."""

import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import jaxcl.methods
from jaxcl import compose, tree
from jaxcl import mesh as meshes
from jaxcl.guard import guard
from jaxcl.schema import UserError

# Sizes at which an option does something within a few steps of the toy, by the name of the option.
SMALL = {"every": 2, "slots": 2, "capacity": 8, "batch": 2, "chunk": 4, "steps": 2}
NAMES = sorted(module.name for module in pkgutil.iter_modules(jaxcl.methods.__path__))
MAKE = {name: importlib.import_module(f"jaxcl.methods.{name}").make for name in NAMES}


class Toy(typing.NamedTuple):
    """A setting that methods are tried in, and its rows."""

    setting: Callable[..., compose.Setting]  # (**options of `toys.setting`)
    rows: Callable[..., toys.Batch]  # (seed, task=0)


def setting(**options):
    """Returns a setting with all that a method may ask for: the columns of rollouts and their score."""
    return toys.setting(example=toys.rollouts(0), score=toys.score, **options)


TOYS = (
    Toy(setting, toys.rollouts),
    *(Toy(functools.partial(toys.boxed, kind), toys.classes) for kind in toys.BOXES),
    Toy(toys.solved, toys.classes),
    Toy(functools.partial(toys.solved, **toys.DISTANCES), toys.classes),
    *(Toy(functools.partial(toys.solved, expansion=kind), toys.classes) for kind in ("dual", "gaussian")),
)


@functools.cache
def toy(case):
    """Returns the first toy that a method accepts."""
    return toy_for({"name": case}) if case in MAKE else TOYS[0]


def toy_for(entry):
    """Returns the first toy that a method accepts with these options."""
    options = {key: value for key, value in entry.items() if key != "name"}
    for one in TOYS:
        try:
            MAKE[entry["name"]](one.setting(), **options)
        except UserError:
            continue
        return one
    raise AssertionError(f"{entry} accepts no toy")


def options_of(name):
    """Returns the small defaults of a method."""
    return {"name": name, **{k: v for k, v in SMALL.items() if k in inspect.signature(MAKE[name]).parameters}}


def variants():
    """Yields every method with each choice of each option that is a choice."""
    for name in NAMES:
        for key, hint in typing.get_type_hints(MAKE[name]).items():
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            for choice in (False, True) if hint is bool else choices:
                entry = options_of(name) | {key: choice}
                if choice == inspect.signature(MAKE[name]).parameters[key].default:
                    continue  # that is the case `name`
                entry |= {"steps": 1} if entry.get("algorithm") == 7 else {}
                yield pytest.param(entry, id=f"{name}-{key}-{choice}")


def made_of(name):
    """Returns what the module of a method makes, with small defaults."""
    return MAKE[name](toy(name).setting(), **{k: v for k, v in options_of(name).items() if k != "name"})


def everything():
    """Returns all terms, the first gradient rule and all wrappers at once."""
    made = {name: made_of(name) for name in NAMES}
    parts = [name for name in NAMES if isinstance(made[name], compose.Part)]
    rules = [name for name in parts if made[name].project]
    wrappers = [name for name in NAMES if isinstance(made[name], compose.Wrapper)]
    return [options_of(name) for name in parts + wrappers if name not in rules[1:]]


CASES = [*NAMES, "everything", "guard"]
WRAPPERS = [name for name in NAMES if isinstance(made_of(name), compose.Wrapper)]
BOXED = [name for name in NAMES if toy(name).setting().boxed is not None]
SOLVED = [name for name in NAMES if toy(name).setting().analytic is not None]
APART = [name for name in NAMES if name not in {entry["name"] for entry in everything()}]


@functools.cache
def built(case):
    """Returns the method of a case, its jitted functions (donating the state) and how often they were traced."""
    options = {"everything": everything, "guard": lambda: everything()[-1]}.get(case, lambda: options_of(case))()
    method = compose.make(options, toy(case).setting(tx=optax.sgd(0.1, momentum=0.9)))
    method = guard(method, warmup=1, window=4) if case in ("everything", "guard") else method
    traces = {"step": 0, "end_task": 0}

    def counted(name):
        def function(*args):
            traces[name] += 1
            return getattr(method, name)(*args)

        return toys.quick(function, donate_argnums=0)

    return method, toys.quick(method.init), counted("step"), counted("end_task"), traces


def params(case):
    return toy(case).setting().model.init(jax.random.key(7))


def closing(case, i):
    """Returns the batches that `end_task` sees after step i."""
    return toys.stack([toy(case).rows(i + 10 * j, task=i // 2) for j in (1, 2)])


def key(step):
    return jax.random.fold_in(jax.random.key(3), step)


def walk(case, state, begin=0, end=6, put=lambda x: x):
    """Takes steps of a stream of three tasks, two steps each; returns the state and all metrics."""
    _, _, step, end_task, _ = built(case)
    told = []
    for i in range(begin, end):
        state, metrics = step(state, put(toy(case).rows(i, task=i // 2)), key(i))
        told.append(jax.device_get(metrics))
        if i % 2:
            state = end_task(state, closing(case, i), key(100 + i))
    return state, told


@functools.cache
def finished(case):
    """Returns the final state, as numpy arrays, and the metrics of a whole run."""
    state, told = walk(case, built(case)[1](params(case)))
    return jax.device_get(state), told


def avals(tree_):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), getattr(x, "weak_type", False)), tree_)


def assert_closed(method, one):
    state = jax.eval_shape(method.init, one.setting().model.init(jax.random.key(7)))
    batch, k = toys.shapes(one.rows(0)), jax.eval_shape(lambda: jax.random.key(0))
    after, metrics = jax.eval_shape(method.step, state, batch, k)
    assert avals(after) == avals(state)
    assert {"loss", "grad_norm", "weight"} <= set(metrics)
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), batch)
    assert avals(jax.eval_shape(method.end_task, state, stacked, k)) == avals(state)


@pytest.mark.parametrize("case", CASES)
def test_state_is_closed(case):
    assert_closed(built(case)[0], toy(case))


@pytest.mark.parametrize("case", CASES)
def test_no_buffer_is_held_twice(case):
    """Two leaves that share a buffer cannot both be donated."""
    state = built(case)[0].init(params(case))
    leaves = jax.tree.leaves(state)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("entry", list(variants()))
def test_every_choice_of_an_option_is_closed(entry):
    one = toy_for(entry)
    assert_closed(compose.make([entry], one.setting()), one)


@pytest.mark.parametrize("case", CASES)
def test_one_trace_over_a_stream_of_tasks(case):
    _, told = finished(case)
    assert built(case)[4] == {"step": 1, "end_task": 1}
    assert all(np.isfinite(list(metrics.values())).all() for metrics in told)


@pytest.mark.parametrize("case", CASES)
def test_randomness_is_derived(case):
    state, told = finished(case)
    for name, leaf in tree.named_leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), name
        assert leaf.dtype != np.uint32, f"{name} looks like the data of a key"
    again, told_again = walk(case, built(case)[1](params(case)))
    assert told == told_again
    assert_equal(again, state)


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case):
    """The state survives a trip through numpy after any step: nothing is remembered outside it."""
    state, told = finished(case)
    saved = jax.device_get(walk(case, built(case)[1](params(case)), 0, 3)[0])
    resumed, rest = walk(case, jax.tree.map(jnp.asarray, saved), 3, 6)
    assert rest == told[3:]
    assert_equal(resumed, state)


@pytest.mark.parametrize("case", SOLVED)
def test_rows_that_would_spoil_the_sums_are_left_out_and_counted(case):
    """Not finite, too long to be squared, or of a class that there is not: all else is as if they had no weight."""
    good, bad = toys.classes(0), jax.device_get(toys.classes(1))
    inputs, targets, weights = bad.inputs.copy(), bad.targets.copy(), bad.weights.copy()
    inputs[0], inputs[3], inputs[4], targets[1], targets[2] = np.nan, np.inf, 1e18, 4, -1  # 1e36 is finite
    weights[3] = 0
    dirty = dataclasses.replace(bad, inputs=inputs, targets=targets, weights=weights)
    clean = dataclasses.replace(bad, weights=np.float32(np.arange(8) > 4))
    _, init, step, end_task, _ = built(case)
    found = []
    for rows in (dirty, clean):
        state, _ = step(init(params(case)), good, key(0))
        state, told = step(state, rows, key(1))
        found.append(jax.device_get((end_task(state, toys.stack([good, rows]), key(2)), told)))
    (state, told), (wanted, others) = found
    assert told == others | {"left_out": 4}
    assert others["left_out"] == 0
    assert told["rows"] == told["weight"] + 8 == 11
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((wanted, others)))
    assert_equal(state, wanted)


@pytest.mark.parametrize("name", [*WRAPPERS, "guard"])
def test_a_wrapper_lets_the_method_close_its_task(name):
    plain = compose.make([options_of("ewc")], setting())
    wrapped = guard(plain) if name == "guard" else compose.make([options_of("ewc"), options_of(name)], setting())
    states = []
    for method in (plain, wrapped):
        state, _ = toys.quick(method.step)(toys.quick(method.init)(params("ewc")), toys.rollouts(0), key(0))
        states.append(toys.quick(method.end_task)(state, toys.stack([toys.rollouts(1), toys.rollouts(2)]), key(1)))
    assert_equal(compose.inner(states[1]).memory, states[0].memory)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(states[0].memory["ewc"]["fisher"]))


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_captured(case):
    method = built(case)[0]
    state, batch = jax.eval_shape(method.init, params(case)), toys.shapes(toy(case).rows(0))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), batch)
    k = jax.eval_shape(lambda: jax.random.key(0))
    for function, rows in ((method.step, batch), (method.end_task, stacked)):
        size = sum(np.asarray(c).nbytes for c in constants(jax.make_jaxpr(function)(state, rows, k)))
        assert size <= 4096, f"{size} bytes of constants"


def constants(jaxpr):
    """Yields the constants of a closed jaxpr and of all inside it."""
    if hasattr(jaxpr, "consts"):
        yield from jaxpr.consts
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from constants(inner)


@pytest.mark.parametrize("big", [jnp.ones(2048), np.ones(2048, "f")], ids=["jax", "numpy"])
def test_a_captured_array_would_be_found(big):
    def method(x):
        return jax.lax.scan(lambda c, _: (jax.lax.cond(c > 0, lambda: c + jnp.sum(big), lambda: c), None), x, None, 2)[
            0
        ]

    assert sum(np.asarray(c).nbytes for c in constants(jax.make_jaxpr(jax.jit(method))(0.0))) > 4096


MESHES = {
    "8 data": {"data": 8},
    "2 fsdp x 4 tensor": {"fsdp": 2, "tensor": 4, "data": 1},
    "2 data x 2 fsdp x 2 context": {"data": 2, "fsdp": 2, "context": 2},  # of text
}
SPREAD = [
    ("everything", "8 data"),
    ("everything", "2 data x 2 fsdp x 2 context"),
    *[(case, "2 fsdp x 4 tensor") for case in ["everything", "cpt", *APART] if case not in BOXED],
]


@pytest.mark.parametrize(("case", "sizes"), SPREAD)
def test_topology_does_not_matter(case, sizes):
    """The same losses on one device and with rows, their length, parameters and what is like them spread over eight."""
    mesh = meshes.make(**MESHES[sizes])
    method, init = built(case)[:2]
    state = init(params(case))
    specs = meshes.state_shardings(mesh, toy(case).setting().model.axes, state)
    split = [name for name, spec in tree.named_leaves(specs) if any(spec.spec)]
    assert any("/rows/" in name for name in split) or not any("/rows/" in n for n, _ in tree.named_leaves(state))
    state = jax.device_put(state, specs)
    step = toys.quick(method.step, out_shardings=(specs, meshes.replicated(mesh)))
    losses = []
    for i in range(3):
        batch = meshes.place(mesh, jax.device_get(toy(case).rows(i, task=i // 2)))
        state, metrics = step(state, batch, key(i))
        losses.append(float(metrics["loss"]))
    assert mesh.shape["context"] == 1 or "context" in batch.inputs.sharding.spec
    wanted = np.array(reference_losses(case))
    # A loss may be nearly 0. A head in closed form passes on what its features round to, and its loss on logits of
    # hundreds: the bound is what ten units in the last place of the inputs do to it on one device.
    allowed = np.maximum(1e-5 * wanted + 1e-6, 10 * rounding(case) if case in SOLVED else 0)
    assert (np.abs(losses - wanted) <= allowed).all(), f"{losses} for {wanted}: off by more than {allowed}"


@pytest.mark.parametrize("case", ["everything", *BOXED, "acil", "aef_ocl", "fecam"])
def test_closing_a_task_does_not_depend_on_the_topology(case):
    """Fisher, path integral, teacher, anchors and ledger are used on rows, parameters and axes that are all cut."""
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    method, init = built(case)[:2]
    specs = meshes.state_shardings(mesh, toy(case).setting().model.axes, init(params(case)))
    assert any(any(spec.spec) for _, spec in tree.named_leaves(specs))
    step = toys.quick(method.step, out_shardings=(specs, meshes.replicated(mesh)))
    end_task = toys.quick(method.end_task, out_shardings=specs)
    state, reference, pairs = jax.device_put(init(params(case)), specs), init(params(case)), []
    for i in range(4):
        batch, stacked = toy(case).rows(i, task=i // 2), closing(case, i)
        state, metrics = step(state, meshes.place(mesh, jax.device_get(batch)), key(i))
        reference, expected = built(case)[2](reference, batch, key(i))
        pairs.append(jax.device_get((metrics, expected)))
        if i % 2:
            state = end_task(state, meshes.place(mesh, jax.device_get(stacked), axis=1), key(i))
            reference = built(case)[3](reference, stacked, key(i))
    terms = ("ewc", "si", "lwf", "l2", "cpo", "chord") if case == "everything" else {"drift"} & set(pairs[0][0])
    for cut, alone in pairs:
        # Logits of a head in closed form reach 100 and a loss may be nearly 0: its parameters are what must agree.
        rtol, atol = (1e-4, 1e-4) if case in SOLVED else (1e-5, 0)
        np.testing.assert_allclose(cut["loss"], alone["loss"], rtol=rtol, atol=atol)
        for name in terms:  # squares of small differences, so fewer digits agree
            np.testing.assert_allclose(cut[name], alone[name], rtol=1e-3, atol=1e-9, err_msg=name)
            assert alone is not pairs[-1][1] or alone[name] > 1e-6
    for name in ("head", "seen", "precision"):
        if case in SOLVED and name in state.params:
            cut, alone = (np.asarray(one.params[name], np.float64) for one in (state, reference))
            assert np.linalg.norm(cut - alone) <= 1e-5 * np.linalg.norm(alone), name
            assert np.any(alone)


@functools.cache
def reference_losses(case):
    """Losses on one device of three steps without a task end."""
    return steps_alone(case, lambda rows: rows)


def steps_alone(case, change):
    _, init, step, _, _ = built(case)
    state, losses = init(params(case)), []
    for i in range(3):
        state, metrics = step(state, change(toy(case).rows(i, task=i // 2)), key(i))
        losses.append(float(metrics["loss"]))
    return losses


@functools.cache
def rounding(case):
    """Returns how far the losses move if inputs move by a unit in their last place, the most of four draws."""
    rng = np.random.default_rng(0)

    def moved(rows):
        up = np.where(rng.integers(0, 2, rows.inputs.shape), np.inf, -np.inf)
        return dataclasses.replace(rows, inputs=jnp.nextafter(rows.inputs, up.astype("f")))

    return np.max([np.abs(np.subtract(steps_alone(case, moved), reference_losses(case))) for _ in range(4)], axis=0)


def assert_equal(a, b):
    for (name, x), y in zip(tree.named_leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def test_discovery_found_the_methods():
    assert {"cpt", "er", "reptile", "ewc", "mer", "cpo", "chord", "reference"} <= set(NAMES)
    assert {"reptile", "ema"} <= set(WRAPPERS)
    assert {"hyperinterval", "intercontinet"} == set(BOXED)
    assert {"acil", "aef_ocl", "air", "ds_al", "fecam", "gkeal", "nmc", "ranpac", "slda"} <= set(SOLVED)
    assert len({entry["name"] for entry in everything()}) >= 8
    assert len(list(itertools.islice(variants(), 9))) == 9
