"""From a config to the pieces of a run: everything is built and checked here, before any compute is spent."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import alignment, certify, compose, domains, feed, flops, frozen, practice, schema, scores, tree
from jaxcl import mesh as meshes
from jaxcl import optim as optimisers
from jaxcl import plan as plans
from jaxcl.data import prepare, provenance
from jaxcl.data import rows as tables
from jaxcl.data import stream as streams
from jaxcl.models import boxed as boxes
from jaxcl.random import key_for
from jaxcl.rl import inference
from jaxcl.schema import UserError
from jaxcl.types import Batch, Metrics, Model, Params, TrainState

TASK_BATCHES = 4  # batches of a task that `end_task` sees when the task is over


class Program(NamedTuple):
    """The pieces of one run. `step` and `end_task` are compiled at their first call and donate the state."""

    stream: streams.Stream
    abstract: TrainState  # shapes, dtypes and shardings of the state
    create: Callable[[], TrainState]
    imported: bool  # whether `create` reads a checkpoint folder
    base: Callable[[Any], Params] | None  # reads the base below an adapter again, see `jaxcl.saved.arrays`
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    end_task: Callable[[TrainState, Batch], TrainState]
    evaluate: Callable[[Params], dict[str, Any]]  # domain's loss (nats per token), bits_per_byte, accuracy, classes
    evaluate_every: int  # steps
    compare: Callable[[Params], dict[str, Any]] | None  # at boundaries besides: `alignment`, `inference`
    utilisation: Callable[[float], float | None]  # tokens per second -> share of the devices' peak, None if unknown
    place: Callable[..., Batch]  # step[, recall of the reservoir] -> the global batch on the devices
    place_task: Callable[[int], Batch]  # stage -> its last batches without replayed rows, stacked [K, B, ...]
    facts: dict[str, Any]  # for the report: parameters, devices, sources
    held_out: dict[str, str]  # domain -> fingerprint of its held-out rows
    rollouts: feed.Rollouts | None = None  # of stages that learn from them


class Evaluation(NamedTuple):
    """When and on what to evaluate."""

    every: int = 50  # steps
    rows: int = 64  # held-out rows (or problems) per domain, at the most
    alignment: bool = False  # compare the gradients of the domains, before training and after every task


def build(
    *,
    model: dict[str, Any],
    adapter: str | dict[str, Any] | None = None,
    sources: dict[str, Any],
    stream: dict[str, Any],
    optim: dict[str, Any],
    schedule: dict[str, Any],
    method: Any = "cpt",
    tokenizer: dict[str, Any] | None = None,
    packing: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    guard: dict[str, Any] | None = None,
    mesh: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    microbatches: int = 1,
    seed: int = 0,
    policy: Any = None,
    objective: Any = None,
    rollout: dict[str, Any] | None = None,
) -> Program:
    """Builds a run. The parameters are the keys of a config file; each section is checked against its own function.

    Args:
      model: `name` of a module of jaxcl.models, and the options of its `make`. `vocab` defaults to the tokenizer's.
      adapter: a name or a dict with a `name` and options, see `jaxcl.network.make`; of a classifier `jaxcl.adapters`.
      sources: domain -> `name` of a source of documents, its options, and `clean`: options of `jaxcl.data.clean.make`;
        or `name` of a task of jaxcl.rl.tasks and its options.
      stream: see `jaxcl.plan.stream_of`.
      optim: see `jaxcl.optim.make`; the learning rate is the schedule's. `frozen` parameters cost no gradient.
      schedule: see `jaxcl.schedules.make`.
      method: an expression such as "er(capacity=256) + reptile(every=10, keep=0.5)", or a dict, or a list of dicts.
      tokenizer: see `jaxcl.data.tokenizer.make`; of text alone.
      packing: see `jaxcl.domains.Packing`; of text alone, which needs it.
      loss: options of `jaxcl.losses.cross_entropy`.
      guard: options of `jaxcl.guard.guard`; None = no step is ever skipped.
      mesh: sizes of the mesh axes, see `jaxcl.mesh.make`.
      evaluation: see `Evaluation`.
      microbatches: passes per step; divides the batch.
      seed: of everything that is random.
      policy: of problems: how thoughts are drawn, such as "soft(temperature=1.0)"; see `jaxcl.rl.thoughts`.
      objective: of problems: how rollouts and pairs are valued, "rloo", "dpo(beta=5.0)", "grpo + dpo"; see `jaxcl.rl`.
      rollout: of problems, see `jaxcl.rl.explore.Rollout`.

    Raises:
      UserError: whatever is wrong, with the field and the remedy.
    """
    devices = schema.call(meshes.make, mesh or {}, field="mesh")
    chosen = schema.call(Evaluation, evaluation or {}, field="evaluation")
    check_options(schedule, optim, chosen, len(sources))
    own = practice.Options(policy, objective, rollout)
    made = domains.make(domains.Sections(sources, packing or {}, tokenizer, model, adapter, stages_of(stream), own))
    practice.check(made.practice, own, method, chosen.alignment, model)
    learning = {"optim": optim, "schedule": schedule, "method": method, "loss": loss, "guard": guard}
    learning |= {"microbatches": microbatches, "seed": seed, "practice": made.practice}
    ready = plans.make(devices, made.network, stream=stream, **learning)
    corpora = made.pack()
    plan = ready({name: corpus.train for name, corpus in corpora.items()})
    pieces = compiled(plan, made.practice)
    return Program(stream=plan.flow, **pieces, **measures(plan, pieces["abstract"], corpora, chosen, made.practice))


def stages_of(stream: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the entries of the stage table; what is wrong with it is said elsewhere."""
    stages = stream.get("stages")
    return (
        [stage if isinstance(stage, Mapping) else {} for stage in stages] if isinstance(stages, (list, tuple)) else []
    )


def check_options(schedule: Mapping[str, Any], optim: Mapping[str, Any], evaluation: Evaluation, domains: int) -> None:
    """Raises UserError for what the signatures of these sections cannot say."""
    for key, value in (("every", evaluation.every), ("rows", evaluation.rows)):
        if value < 1:
            raise UserError(f"config.evaluation.{key}={value}: must be at least 1")
    if evaluation.alignment and domains == 1:
        raise UserError(
            "config.evaluation.alignment=True: compares the gradients of domains, and config.sources names one alone; "
            "name another, or set it to False"
        )
    if not isinstance(schedule.get("name"), str):
        raise UserError("config.schedule.name: missing; choose from constant, cosine, rewarm_cosine, wsd, infinite")
    for key in ("lr", "field"):
        if key in optim:
            raise UserError(f"config.optim.{key}: unknown key; the learning rate is config.schedule.peak")


def compiled(plan: plans.Plan, own: practice.Practice | None = None) -> dict[str, Any]:
    """Returns the compiled functions of a Program, with the state sharded like its parameters."""
    mesh, network, learner, flow, seed = plan.mesh, plan.network, plan.learner, plan.flow, plan.seed

    def initial() -> TrainState:
        return learner.init(network.model.init(key_for(seed, "init")))

    shapes = jax.eval_shape(initial)
    params = jax.eval_shape(network.model.init, jax.eval_shape(lambda: jax.random.key(0)))
    cut = functools.partial(meshes.state_shardings, mesh, network.model.axes, params=params)
    shardings = cut(shapes)
    abstract = meshes.with_shardings(shapes, shardings)

    def imported() -> TrainState:
        assert network.load
        found = network.load(key_for(seed, "init"), meshes.with_shardings(params, cut(params)))
        return jax.jit(learner.init, out_shardings=shardings, donate_argnums=0)(found)

    copied = meshes.replicated(mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics = learner.step(state, batch, key_for(seed, "step", state.step))
        moves = {"lr": optimisers.rate(plan.rate, state.opt_state)} if jax.tree.leaves(state.opt_state) else {}
        return new, moves | metrics

    def end_task(state: TrainState, batch: Batch) -> TrainState:
        return learner.end_task(state, batch, key_for(seed, "end_task", state.step))

    read = practice.stripped(flow, own)
    put = practice.place(mesh, flow, read)

    def place(number: int, recall: streams.Recall | None = None) -> Batch:
        return put(flow.index(number), flow.stage_of(number), recall)

    def place_task(stage: int) -> Batch:
        batches = [read(flow.index(number), stage, recall=lambda _: {}) for number in last_steps(flow, stage)]
        new = [dataclasses.replace(b, weights=np.where(b.extra["replayed"], 0, b.weights.T).T) for b in batches]
        return meshes.place(mesh, jax.tree.map(lambda *x: np.stack(x), *new), axis=1)

    return {
        "abstract": abstract,
        "imported": network.load is not None,
        "base": network.base_of(key_for(seed, "init")),
        "create": imported if network.load else jax.jit(initial, out_shardings=shardings),
        "step": jax.jit(meshes.on(mesh, step), out_shardings=(shardings, copied), donate_argnums=0),
        "end_task": jax.jit(meshes.on(mesh, end_task), out_shardings=shardings, donate_argnums=0),
        "place": place,
        "place_task": place_task,
        "rollouts": rollouts_of(plan, own, put) if own and plan.explorer else None,
    }


def rollouts_of(plan: plans.Plan, own: practice.Practice, put: Callable[..., Batch]) -> feed.Rollouts:
    """Returns what makes batches of prompts."""
    assert plan.explorer
    cut = meshes.batch_sharding(plan.mesh)
    example = meshes.with_shardings(plan.setting.example, jax.tree.map(lambda _: cut, plan.setting.example))
    return feed.Rollouts(plan.explorer, own, plan.flow, put, plan.seed, example)


def last_steps(flow: streams.Stream, stage: int) -> range:
    """Returns the steps whose batches `end_task` sees."""
    end = flow.boundaries[stage]
    return range(max(end - TASK_BATCHES, end - flow.stages[stage].steps), end)


def measures(
    plan: plans.Plan,
    abstract: TrainState,
    corpora: Mapping[str, prepare.Corpus],
    chosen: Evaluation,
    own: practice.Practice | None = None,
) -> dict[str, Any]:
    """Returns what a Program measures with. The held-out rows are put on the devices here, in batches of B."""
    mesh, patterns, model = plan.mesh, plan.patterns, plan.setting.model
    setting = plan.setting._replace(model=model._replace(apply=meshes.on(mesh, model.apply)))
    known = facts(mesh, setting, abstract, corpora, patterns, getattr(plan.network.shape, "active", 1.0))
    cost, peak = known["flops_per_token"], known["peak_flops_per_device"]
    found = {
        "evaluate_every": chosen.every,
        "compare": None,
        "utilisation": lambda speed: flops.utilisation(speed, cost, mesh.size, peak),
        "facts": known,
        "held_out": {name: corpus.held_out.fingerprint for name, corpus in corpora.items()},
    }
    known |= plan.told
    if own:
        known["problems"] = {
            n: min(chosen.rows, len(one.held_out.prompts)) for n, one in own.problems.items() if one.held_out
        }
        known["row_length"] = own.length
        known["baselines"] = {name: one.held_out.baselines for name, one in own.problems.items() if one.held_out}
        explorer = plan.explorer or own.explorer(mesh, model, plan.seed)
        held = {name: one.held_out for name, one in own.problems.items() if one.held_out}
        bench = inference.make(mesh, model, explorer, own.policies, held, own.words, rows=chosen.rows)
        return found | {"evaluate": bench.evaluate, "compare": bench.compare, "utilisation": lambda speed: None}
    size = setting.example.task.shape[0]
    batches = {
        name: list(tables.batches(c.held_out, size=size, task=task_of(plan.flow, name), limit=chosen.rows))
        for name, c in corpora.items()
    }
    rows = scores.put(batches, functools.partial(meshes.place, mesh))
    found["evaluate"] = evaluator(
        setting.model, corpora, rows, meshes.replicated(mesh), deployed(mesh, plan.network.boxed)
    )
    if all(corpus.held_out.labels is not None for corpus in corpora.values()):
        labels = {name: np.asarray(corpus.held_out.labels)[: chosen.rows] for name, corpus in corpora.items()}
        known["classes"] = classes_of(plan.flow, labels)
    if boxed := plan.network.boxed:
        known["generator_parameters"] = tree.size(abstract.params["generator"])
        known["parameters"] = boxed.size
        found["compare"] = certify.make(boxed, rows, meshes.fetch)
        return found
    if chosen.alignment:
        align = aligner(mesh, setting, rows, patterns)
        found["compare"] = lambda params: {"alignment": align(params)}
    return found


def task_of(flow: streams.Stream, domain: str) -> int:
    """Returns the first stage that a domain is new in, 0 if there is none."""
    return next((i for i, stage in enumerate(flow.stages) if stage.mixture.get(domain)), 0)


def evaluator(
    network: Model, corpora: Mapping[str, prepare.Corpus], rows: scores.Rows, everywhere: Any = None, made: Any = None
) -> Callable[[Params], dict[str, Any]]:
    """Returns the evaluation of every domain on its held-out rows; the arguments are those of `scores.domains`."""
    texts = any(c.manifest["tokenizer"] for c in corpora.values())
    ratio = {name: 1 / (c.held_out.bytes_per_token or 1.0) for name, c in corpora.items()} if texts else None
    return scores.domains(network, rows, ratio, everywhere, made)


def deployed(
    mesh: jax.sharding.Mesh, boxed: boxes.Boxed | None
) -> tuple[Model, Callable[[Params, Batch], Params]] | None:
    """Returns what `scores.domains` is told of a model of boxes; None of any other."""
    if boxed is None:
        return None
    make = jax.jit(meshes.on(mesh, lambda params, batch: boxes.deployed(boxed, params, batch.task[0])))
    return boxed.target._replace(apply=meshes.on(mesh, boxed.target.apply)), make


def classes_of(flow: streams.Stream, held: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns domain -> label -> how many `rows` it is evaluated on, and after how many steps it has `come`, if ever.

    A label that one domain alone is evaluated on has come with the first row that any source has of it. Where several
    domains have it, as in tasks on shared outputs, it stands for another class in each of them.

    Args:
      flow: the stream.
      held: domain -> labels of the held-out rows.
    """
    arrivals = flow.arrivals()
    counted = {domain: Counter(labels.tolist()) for domain, labels in held.items()}
    shared = Counter(label for counts in counted.values() for label in counts)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for domain, counts in counted.items():
        found[domain] = {}
        for label, count in sorted(counts.items()):
            sources = [domain] if shared[label] > 1 else arrivals
            steps = [arrivals[source][label] for source in sources if label in arrivals.get(source, {})]
            found[domain][str(label)] = {"rows": count} | ({"come": min(steps)} if steps else {})
    return found


def aligner(
    mesh: jax.sharding.Mesh, setting: compose.Setting, rows: scores.Rows, patterns: Sequence[str]
) -> Callable[[Params], dict[str, dict[str, float]]]:
    """Returns the comparison of the domains: the cosines of their gradients of the training loss.

    Each gradient is that of the first held-out batch of a domain, so a comparison costs as much as one training step
    for each domain, and one gradient of memory for each.
    """
    first = [batches[0] for batches in rows.values()]

    @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
    def compare(params: Params, batches: list[Batch]) -> jax.Array:
        trained, kept = frozen.split(params, patterns)
        products = alignment.gram(setting._replace(model=frozen.bind(setting.model, kept, patterns)))
        return alignment.cosines(products(trained, jax.tree.map(lambda *x: jnp.stack(x), *batches)))  # [T, T]

    def run(params: Params) -> dict[str, dict[str, float]]:
        table = meshes.fetch(compare(params, first)).tolist()
        return {name: dict(zip(rows, line, strict=True)) for name, line in zip(rows, table, strict=True)}

    return run


def facts(
    mesh: jax.sharding.Mesh,
    setting: compose.Setting,
    abstract: TrainState,
    corpora: Mapping[str, prepare.Corpus],
    patterns: Sequence[str],
    active: float = 1.0,
) -> dict[str, Any]:
    """Returns what the report says of the run besides its metrics; `active` is the share of experts of a token."""
    device, length = mesh.devices.flat[0], math.prod(setting.example.targets.shape[1:])
    params, trained = frozen.whole(abstract), dict(tree.named_leaves(abstract.params))
    learning = tree.map_named(lambda name, _: name in trained, params)
    less = {"trained_parameters": tree.size(abstract.params)} if patterns else {}
    cost = flops.of_model(setting.model.axes, params, length, learning, active=active)  # forward and backward
    return {
        "parameters": tree.size(params),
        **less,
        "flops_per_token": round(cost),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)),
        "row": {"shape": list(setting.example.inputs.shape[1:]), "dtype": setting.example.inputs.dtype.name},
        "unit": "tokens" if setting.example.targets.ndim > 1 else "rows",  # of what is counted
        "devices": f"{mesh.devices.size} x {device.device_kind}",
        "peak_flops_per_device": flops.peak(device),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "sources": provenance.table(corpora),
    }
