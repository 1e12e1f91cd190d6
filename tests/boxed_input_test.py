"""Bad input about boxes of weights: one line that names the field and the remedy, before anything is computed."""

import jax
import jax.numpy as jnp
import pytest
import toys

from jaxcl import certify, compose, domains, network, program
from jaxcl.methods import hyperinterval
from jaxcl.models import boxed as boxes
from jaxcl.models import hypernetwork, mlp, weight_boxes
from jaxcl.schema import UserError
from jaxcl.types import Model, Output

SOURCE = {"name": "digits", "count": 20, "held_out": 10, "size": 8}
STAGES = [{"name": f"t{t}", "steps": 2, "mixture": {f"t{t}": 1.0}} for t in range(2)]


def config(**overrides):
    """Returns the sections of a run of two tasks on drawn digits; overrides replace them."""
    return {
        "model": {"name": "mlp", "inputs": 64, "hidden": (4,), "classes": 2},
        "adapter": {"name": "hypernetwork", "embedding": 2, "hidden": (3,)},
        "sources": {f"t{t}": {**SOURCE, "classes": [2 * t, 2 * t + 1]} for t in range(2)},
        "stream": {"batch": 4, "stages": STAGES},
        "method": {"name": "hyperinterval", "steps": 2},
        "optim": {"name": "adam"},
        "schedule": {"name": "constant", "peak": 1e-3},
        "mesh": {"devices": jax.devices()[:1]},
    } | overrides


def adapter(**options):
    return {"adapter": {"name": "hypernetwork", "embedding": 2, "hidden": (3,)} | options}


def replayed(**where):
    stages = [STAGES[0], {**STAGES[1], **where}]
    return {"stream": {"batch": 4, "stages": stages}}


REPLAY = {"fraction": 0.25, "mode": "replace", "over": "earlier"}
# name -> (sections, words the line must hold)
BAD = {
    "one class": (
        {"model": {"name": "mlp", "inputs": 64, "hidden": (4,), "classes": 1}},
        ["config.model.classes=1", "labels up to 1", "set it to 2"],
    ),
    "a task with a class of its own": (
        {"sources": {f"t{t}": {**SOURCE, "classes": list(range(2 * t, 2 * t + 2 + t))} for t in range(2)}},
        ["config.model.classes=2", "labels up to 2", "set it to 3"],
    ),
    "rows of another shape": (
        {"model": {"name": "mlp", "inputs": 49, "hidden": (4,), "classes": 2}},
        ["config.model", "rows of config.sources have the shape (8, 8, 1)"],
    ),
    "images of another side": (
        {"model": {"name": "cnn", "inputs": (7, 8, 1), "channels": [2], "hidden": (), "classes": 2}},
        ["config.model", "rows of config.sources have the shape (8, 8, 1)"],
    ),
    "negative gamma": (adapter(gamma=-1.0), ["config.adapter.gamma=-1.0", "must not be negative"]),
    "infinite gamma": (adapter(gamma=float("inf")), ["config.adapter.gamma=inf", "finite"]),
    "gamma that is no number": (adapter(gamma=float("nan")), ["config.adapter.gamma=nan", "finite"]),
    "gamma of a command line": (adapter(gamma="nan"), ["config.adapter.gamma=nan: must be a finite number"]),
    "no embedding": (adapter(embedding=0), ["config.adapter.embedding=0", "at least 1"]),
    "no hidden layer": (adapter(hidden=[]), ["config.adapter.hidden=[]", "at least one"]),
    "hidden layer of nothing": (adapter(hidden=[0]), ["config.adapter.hidden=0", "at least 1"]),
    "misspelt option": (adapter(gama=1.0), ["config.adapter.gama", "did you mean 'gamma'"]),
    "too few tasks": (adapter(tasks=1), ["config.adapter.tasks=1", "leave it out"]),
    "no task": (adapter(tasks=0), ["config.adapter.tasks=0", "leave it out"]),
    "radius of weights": (
        {"adapter": {"name": "weight_boxes", "radius": 0.0}, "method": "intercontinet"},
        ["config.adapter.radius=0.0", "above 0"],
    ),
    "infinite radius of weights": (
        {"adapter": {"name": "weight_boxes", "radius": float("inf")}, "method": "intercontinet"},
        ["config.adapter.radius=inf", "above 0, and finite"],
    ),
    "adapter of language models": ({"adapter": "lora"}, ["config.adapter.name='lora'", "hypernetwork"]),
    "method of weights": ({"method": "cpt"}, ["config.method='cpt'", "hyperinterval", "leave the adapter out"]),
    "methods of weights": (
        {"method": "ewc + reptile(every=2)"},
        ["config.method='ewc'", "hyperinterval", "leave the adapter out"],
    ),
    "no adapter": ({"adapter": None}, ["config.method='hyperinterval'", "config.adapter='hypernetwork'"]),
    "no boxes of weights": (
        {"method": "intercontinet"},
        ["config.method='intercontinet'", "config.adapter='weight_boxes'"],
    ),
    "boxes of weights of their own": (
        {"adapter": "weight_boxes"},
        ["config.method='hyperinterval'", "config.adapter='weight_boxes'", "set config.method='intercontinet'"],
    ),
    "frozen parameters": (
        {"optim": {"name": "adam", "frozen": ["^layer_0"]}},
        ["config.optim.frozen", "leave it out"],
    ),
    "replay of the stream": (
        {"stream": {"batch": 4, "stages": STAGES, "replay": REPLAY}},
        ["config.stream", "replay", "one task", "leave it out"],
    ),
    "replay of a stage": (replayed(replay=REPLAY), ["config.stream", "replay", "one task", "leave it out"]),
    "a task again": (
        {"stream": {"batch": 4, "stages": [*STAGES, {**STAGES[0], "name": "again"}]}},
        ["config.stream.stages[2] 'again'", "'t0'", "would never be", "new source"],
    ),
    "half of an earlier task": (
        replayed(mixture={"t0": 0.5, "t1": 0.5}),
        ["config.stream.stages[1] 't1'", "most rows of 't0'", "new source"],
    ),
    "two stages of one name": (replayed(name="t0"), ["config.stream.stages[1].name='t0'", "earlier stage"]),
    "microbatches": ({"microbatches": 2}, ["config.microbatches=2", "set it to 1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_names_field_and_remedy(name):
    sections, words = BAD[name]
    with pytest.raises(UserError) as error:
        program.build(**config(**sections))
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_few_rows_of_an_earlier_task_leave_a_task_its_own():
    made = program.build(**config(**replayed(mixture={"t0": 0.25, "t1": 0.75})))
    assert made.stream.total_steps == 4


def test_replay_of_nothing_is_no_replay():
    made = program.build(**config(**replayed(replay={**REPLAY, "fraction": 0.0})))
    assert made.stream.total_steps == 4


METHOD = {
    "beta=-1.0": ["beta=-1.0", "must not be negative"],
    "kappa=2.0": ["kappa=2.0", "[0, 1]"],
    "ramp=-0.5": ["ramp=-0.5", "[0, 1]"],
    "steps=3": ["steps=3", "a stage of config.stream has 2", "leave it out"],
    "spread=1e999": ["spread=inf", "finite"],
    "beta=nan": ["beta=nan: must be a finite number"],
    "beta=-inf": ["beta=-inf: must be a finite number"],
    "steps=0": ["steps=0", "at least 1"],
    "select=-1": ["select=-1: must be a number of steps, or 0"],
    "select=2, aside=0.0": ["aside=0.0: must lie between 0 and 1"],
    "sample=0": ["sample=0", "at least 1"],
    "spread=-1.0": ["spread=-1.0", "must not be negative"],
    "schedule='linear'": ["schedule='linear'", "'smooth' or 'published'"],
    "bta=1.0": ["bta", "did you mean 'beta'"],
}


@pytest.mark.parametrize("option", ["schedule", "average", "point"])
def test_words_are_checked_where_no_config_is(option):
    with pytest.raises(UserError, match=rf"hyperinterval\.{option}='cosine': must be one of"):
        hyperinterval.make(toys.boxed(), **{option: "cosine"})


@pytest.mark.parametrize("option", METHOD)
def test_options_of_hyperinterval(option):
    with pytest.raises(UserError) as error:
        compose.make(f"hyperinterval({option})", toys.boxed()._replace(steps=2))
    for word in ["config.method", *METHOD[option]]:
        assert word in str(error.value)


@pytest.mark.parametrize("option", ["steps=0", "contraction=1.5", "threshold=-0.1"])
def test_options_of_intercontinet(option):
    with pytest.raises(UserError, match=rf"config\.method intercontinet\.{option}: must"):
        compose.make(f"intercontinet({option})", toys.boxed("weight_boxes"))


def test_methods_of_boxes_need_their_own():
    for name, kind in (
        ("hyperinterval", None),
        ("hyperinterval", "weight_boxes"),
        ("intercontinet", None),
        ("intercontinet", "hypernetwork"),
    ):
        with pytest.raises(UserError, match=f"config.method='{name}'.*(set|or) config.adapter="):
            compose.make(name, toys.boxed(kind) if kind else toys.setting())
    with pytest.raises(UserError, match=r"'hyperinterval' is a complete method of its own; remove ewc"):
        compose.make("hyperinterval + ewc", toys.boxed())


def of(apply):
    """A classifier with one matrix."""
    return network.Network(
        Model(lambda key: {"w": jax.random.normal(key, (4, 4))}, apply, {"w": ("embed", None)}), None, None
    )


def mixing(params, batch, cache=None):
    """Normalises with the statistics of the batch."""
    x = batch.inputs @ params["w"]
    return Output((x - x.mean(0, keepdims=True)) / (1e-3 + x.std(0, keepdims=True)))


def test_models_without_sound_bounds_are_refused():
    rows = toys.classes(0, rows=1)

    def unknown(params, batch, cache=None):
        return Output(jnp.sin(batch.inputs @ params["w"]))

    for apply, words in ((mixing, "mixes the rows of a batch.*LayerNorm"), (unknown, "'sin'")):
        for name in network.BOXES:
            with pytest.raises(UserError, match=words):
                network.with_boxes(of(apply), name, rows, 2)


@pytest.mark.parametrize(("kind", "method"), [("hypernetwork", "hyperinterval"), ("weight_boxes", "intercontinet")])
def test_networks_that_mix_rows_are_refused_without_a_config(kind, method):
    """By whatever sees rows first: the method, a certificate, bounds of logits outside of jit."""
    rows = toys.classes(0, rows=2)

    def uses(target):
        made = network.BOXES[kind](target, tasks=2)
        params = made.model.init(jax.random.key(0))
        setting = toys.setting(model=made.model, example=rows, tasks=2)._replace(boxed=made)
        yield lambda: compose.make(method, setting)
        yield lambda: certify.make(made, {"task": [rows]})
        yield lambda: boxes.logits(made, params, boxes.box(made, params, 0), rows)

    for use in uses(mlp.make(inputs=4, hidden=(3,), classes=4)):
        use()
    for use in uses(of(mixing).model):
        with pytest.raises(UserError, match=r"mixes the rows of a batch.*LayerNorm"):
            use()


def test_weights_that_are_not_float32_are_refused():
    half = mlp.make(inputs=4, hidden=(3,), classes=4)
    half = half._replace(
        init=lambda key: jax.tree.map(
            lambda x: x.astype(jnp.bfloat16), mlp.make(inputs=4, hidden=(3,), classes=4).init(key)
        )
    )
    for make in (hypernetwork.make, weight_boxes.make):
        with pytest.raises(UserError, match=r"config\.model: has parameters of bfloat16"):
            make(half, tasks=2)


def test_boxes_are_of_classifiers():
    with pytest.raises(UserError, match=r"config\.adapter\.name='hypernetwork'"):
        domains.make(
            domains.Sections(
                {"d": {"name": "embedded", "domain": "prose", "max_bytes": 1000}},
                {"length": 16},
                None,
                {"name": "transformer", "preset": "tiny", "layers": 1, "embed": 16, "mlp": 32},
                "hypernetwork",
            )
        )


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize("task", [-1, toys.T])
def test_a_task_that_is_not_there_is_refused(task, universal):
    made = toys.boxed(universal=universal).boxed
    params = made.model.init(jax.random.key(0))
    for number in (task, jnp.int32(task)):
        for call in (
            lambda number: boxes.box(made, params, number),
            lambda number: boxes.close(made, params, number),
            lambda number: boxes.over(params, number),
            lambda number: boxes.zonotope(made, params, number),
        ):
            with pytest.raises(UserError, match=rf"^task={task}: there is no such task; give one of 0 \.\. 2$"):
                call(number)
    boxes.over(params, jnp.int32(toys.T - 1))


def test_the_start_is_checked_where_no_config_is():
    with pytest.raises(UserError, match=r"^config\.adapter\.start='foo': must be one of fan, published$"):
        hypernetwork.make(mlp.make(inputs=4, hidden=(3,), classes=4), tasks=2, start="foo")


@pytest.mark.parametrize("kind", network.BOXES)
@pytest.mark.parametrize("other", [{"width": 9}, {"tasks": toys.T + 1}])
def test_parameters_of_another_model_are_refused(kind, other):
    """Under jit too: shapes tell."""
    own, setting = toys.boxed(kind).boxed, toys.boxed(kind, **other)
    params, made, rows = own.model.init(jax.random.key(0)), setting.boxed, toys.classes(0)
    for call in (
        lambda params: boxes.box(made, params, jnp.int32(0)),
        lambda params: boxes.close(made, params, jnp.int32(0)),
        lambda params: made.model.apply(params, rows),
        lambda params: boxes.zonotope(made, params, jnp.int32(0)),
        certify.make(made, {"task": [rows]}),
    ):
        with pytest.raises(UserError, match=r"^params: the ledger is of another .* has the shape .*; make the model"):
            call(params)
    with pytest.raises(UserError, match=r"^params: the ledger is of another"):
        jax.eval_shape(made.model.apply, params, rows)
