"""All seeds of a method in one process, each program compiled once: a method closes over its configuration alone.

`run(config, programs)` makes the same model, method, batches and draws of the same config as `jaxcl.main`, and the same
evaluations, without folder, checkpoints and report. Runs that differ in seed and rows share `programs`.
"""

import json
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl import domains, online, practice, program, schema, scores, train
from jaxcl import mesh as meshes
from jaxcl import plan as plans
from jaxcl.data import rows as tables
from jaxcl.random import named

SIZE = 800  # rows that are evaluated at a time


class Programs(NamedTuple):
    """What is compiled."""

    init: Any  # (key of the run) -> state
    step: Any  # (state, batch, key of the run) -> state
    end_task: Any
    right: Any  # (params, held-out rows) -> domain -> rows right and rows, by class


def planned(config):
    """Returns the plan of a config, its rows by domain, and when it evaluates."""
    pieces = train.split(config)[1]
    stream, seed = pieces["stream"], pieces["seed"]
    given = domains.Sections(
        pieces["sources"], {}, None, pieces["model"], pieces.get("adapter"), stream["stages"], practice.Options()
    )
    made = domains.make(given)
    learning = {key: pieces[key] for key in ("optim", "schedule", "method", "guard") if key in pieces}
    devices = schema.call(meshes.make, pieces.get("mesh") or {}, field="mesh")
    corpora = made.pack()
    plan = plans.make(devices, made.network, stream=stream, seed=seed, **learning)(
        {name: corpus.train for name, corpus in corpora.items()}
    )
    return plan, corpora, schema.call(program.Evaluation, pieces.get("evaluation") or {}, field="evaluation")


def shared(config, plan, programs):
    """Returns the programs of a config out of those that there are, or new ones."""
    told = {key: config.get(key) for key in ("model", "adapter", "method", "optim", "schedule", "guard")}
    told |= {"batch": plan.flow.width, "tasks": len(plan.flow.stages), "chosen": dict(plan.told)}
    key = json.dumps(told, sort_keys=True)
    if key not in programs:
        learner, model = plan.learner, plan.network.model

        def step(state, batch, run):
            return learner.step(state, batch, jax.random.fold_in(named(run, "step"), state.step))[0]

        def end_task(state, batch, run):
            return learner.end_task(state, batch, jax.random.fold_in(named(run, "end_task"), state.step))

        programs[key] = Programs(
            jax.jit(lambda run: learner.init(model.init(jax.random.fold_in(named(run, "init"), 0)))),
            jax.jit(step, donate_argnums=0),
            jax.jit(end_task, donate_argnums=0),
            scores.by_class(model),
        )
    return programs[key]


def run(config, programs):
    """Returns the figures of `jaxcl.online` of a run with its curves, and the parameters at the end.

    Args:
      config: of one run, as plain dicts.
      programs: of earlier runs; new ones are added.
    """
    began = time.process_time()
    plan, corpora, chosen = planned(config)
    own, pieces, flow = shared(config, plan, programs), program.compiled(plan), plan.flow
    held = {
        name: list(tables.batches(one.held_out, size=SIZE, task=program.task_of(flow, name), limit=chosen.rows))
        for name, one in corpora.items()
    }
    rows = scores.put(held)
    key = jax.random.key(plan.seed)
    state = pieces["create"]() if plan.network.load else own.init(key)
    steps, tallies = [], []
    for number in range(flow.boundaries[-1]):
        state = own.step(state, pieces["place"](number), key)
        done = number + 1
        if over := done in flow.boundaries:
            state = own.end_task(state, pieces["place_task"](flow.boundaries.index(done)), key)
        if over or done % chosen.every == 0:
            steps.append(done)
            tallies.append(own.right(state.params, rows))
    labels = {name: np.asarray(one.held_out.labels)[: chosen.rows] for name, one in corpora.items()}
    found = told(steps, tallies, program.classes_of(flow, labels), list(flow.boundaries))
    return found | {"cpu_s": round(time.process_time() - began, 2)}, state.params


def told(steps, tallies, classes, ends):
    """Returns the figures of evaluations.

    Args:
      steps: of the evaluations.
      tallies: what `Programs.right` returned at each.
      classes: see `jaxcl.program.classes_of`.
      ends: last steps of the tasks.
    """
    cells = [(domain, label) for domain, table in classes.items() for label in table]
    right = np.array([[one[d][0][int(c)] / one[d][1][int(c)] for d, c in cells] for one in tallies])  # [N, cells]
    entries = [classes[d][c] for d, c in cells]
    rows, since = (np.array([one.get(name, np.inf) for one in entries], np.float64) for name in ("rows", "come"))
    figures = online.summary(np.array(steps), right, rows, since, ends)
    curves = {"seen": online.seen_accuracy, "mean_class": online.class_accuracy}
    tasks = {d: [float(one[d][0].sum() / one[d][1].sum()) for one in tallies] for d in classes}
    at = [steps.index(end) for end in ends]
    figures["learned"] = float(np.mean([line[k] for line, k in zip(tasks.values(), at, strict=True)]))
    course = {name: f(np.array(steps), right, rows, since).round(4).tolist() for name, f in curves.items()}
    return {"figures": {k: round(v, 5) for k, v in figures.items()}, "steps": steps, "ends": ends, **course}
