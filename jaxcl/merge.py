"""Command line that adds analytic runs: python -m jaxcl.merge RUN RUN ... NEW [--gamma=X] [--evaluate].

A head in closed form follows from sums over rows, and the sums of all rows are those of the parts. So runs on different
rows, on different machines, add up to the run on all of them: the same weights, to rounding. No row is read.

  python -m jaxcl.merge runs/hospital_a runs/hospital_b runs/all --evaluate

The runs must have finished and must share the feature map to the last bit: `config.model`, `config.adapter`,
`config.seed`. NEW is a finished run of one stage. A branch of it goes on: python -m jaxcl.branch NEW OTHER, with that
stage as the first. --gamma is the regularisation of NEW, where those of the runs differ, or were chosen by rows, which
a merge has none of. --evaluate needs the sources of all runs.

Zhuang et al. 2025 (AFL, "Analytic federated learning") add inverses, so that k runs bring k gammas, and take k - 1 out
again. Here gamma is no part of the sums and enters once, in the solve.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import (
    adapters,
    checkpoint,
    compose,
    console,
    folder,
    losses,
    manifests,
    metrics,
    network,
    plan,
    program,
    report,
    saved,
    schema,
    train,
)
from jaxcl.models.analytic import Analytic
from jaxcl.random import key_for
from jaxcl.ridge import learner as heads
from jaxcl.schema import UserError
from jaxcl.tree import map_named
from jaxcl.types import Batch, Memory, Method, Params, TrainState

Add = Callable[[Memory, Memory], Memory]
STAGE = "merged"  # the name of the only stage of a new run
FIXED = ("params/base/", "params/expansion/")  # what makes features out of rows
SHARED = ("expansion", "head", "power", "shared", "sigma", "bias", "normalise", "classes")  # of `Analytic`, to be alike


class Run(NamedTuple):
    """A run that takes part."""

    place: Path
    about: dict[str, Any]  # run.json
    made: Analytic


class Sums(NamedTuple):
    """What was added up so far."""

    params: dict[str, jax.Array]  # base and expansion, by the names that they have in a checkpoint
    memory: Memory | None  # entries of the method's memory that are sums over rows; of the first run alone, all
    steps: int
    ledger: dict[str, dict[str, int]]  # source of the new run -> counts


def make(runs: Sequence[Path], target: Path, *, gamma: float | str | None = None, evaluate: bool = False) -> int:
    """Makes `target` the folder of a finished run that has seen the rows of all `runs`; returns its number of steps.

    Args:
      runs: folders of finished runs, two or more; they are not touched.
      target: absent or empty.
      gamma: the regularisation of the new run, a number or "gcv"; None = that of the runs, if they agree.
      evaluate: whether it is evaluated on the held-out rows of all sources that the runs were trained on.

    Raises:
      UserError: runs that do not add up; or `target` holds something; or a source cannot be read. Nothing is written.
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run: name two or more to merge, and the new folder after them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; merge into a new folder")
    opened = [_opened(place) for place in runs]
    _check_alike(opened)
    config = opened[0].about["config"] | {"method": _method_of(opened, gamma)}
    names = _sources_of(opened)
    setting = _setting(opened[0], config)
    found = _added(opened, names, setting, compose.make(config["method"], setting), compose.merger(config["method"]))
    config = _joined(config, opened, names, found)
    made = _built(config) if evaluate else None
    setting = setting._replace(steps=found.steps)
    learner = plan.learner_of(config["method"], setting, config.get("guard"))
    state = _settled(learner, setting, config, found)
    part = target.with_name(f".{target.name}.part")  # renamed once it is whole
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(part, config, opened, found, state, made)
        target.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if evaluate:
        report.write([target])
    return found.steps


def _opened(place: Path) -> Run:
    """Returns a run that could be merged with others.

    Raises:
      UserError: it is none.
    """
    about = folder.about(place)
    config = about["config"]
    if not about["finished"]:
        raise UserError(f"{place}: has not finished; the command that trains it goes on, merge it then")
    name = adapters.named_options(config["adapter"])[0] if config.get("adapter") else None
    if name != adapters.ANALYTIC:
        raise UserError(
            f"{place}: config.adapter={name!r}: its weights were trained and are no sum over rows; merge runs with "
            "config.adapter='analytic'"
        )
    if "row" not in about["facts"]:
        raise UserError(f"{place}: run.json does not tell the shape of a row; train it again with this version")
    model = {key: value for key, value in config["model"].items() if key != "start"}
    row = _rows(about, 1)
    base = network.classifier(model, row, classes=2)
    made = adapters.make(base, model, config["adapter"], row, tasks=1).analytic
    assert made
    return Run(place, about, made)


def _rows(about: Mapping[str, Any], count: int) -> Batch:
    """Returns rows of the shape that a run was trained on, without weight."""
    row, whole = about["facts"]["row"], jnp.zeros(count, jnp.int32)
    inputs = jnp.zeros((count, *row["shape"]), row["dtype"])
    return Batch(inputs, whole, jnp.zeros(count), whole, whole, whole)


def _check_alike(runs: Sequence[Run]) -> None:
    """Raises UserError unless the models compute alike; their arrays are compared when they are read."""
    first = runs[0]
    for run in runs[1:]:
        pairs = {f"adapter.{name}": (getattr(first.made, name), getattr(run.made, name)) for name in SHARED}
        pairs["adapter.width"] = first.made.width, run.made.width
        models = [dict(folder.flat(one.about["config"]["model"])) for one in (first, run)]
        for key in sorted({*models[0], *models[1]} - {"start"}):
            here, there = (one.get(key, "the default") for one in models)
            pairs[f"model.{key}"] = here, there
        pairs["rows"] = first.about["facts"]["row"]["shape"], run.about["facts"]["row"]["shape"]
        for key, (here, there) in pairs.items():
            if here != there:
                raise UserError(
                    f"{run.place}: config.{key}={there!r}, but {here!r} in {first.place}: other features or another "
                    "head, whose sums do not add; merge runs of one model"
                )


def _method_of(runs: Sequence[Run], gamma: float | str | None) -> list[dict[str, Any]]:
    """Returns the method of the new run.

    Raises:
      UserError: the runs do not agree.
    """
    first, *others = [_parsed(run.about["config"].get("method", "cpt")) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        here, there = (dict(folder.flat(entries)) for entries in (first, other))
        for key in sorted({*here, *there}):
            values = [one.get(key, "the default") for one in (there, here)]
            if values[0] == values[1] or (gamma is not None and key.endswith("].gamma")):
                continue
            remedy = "say which one counts with --gamma" if key.endswith("].gamma") else "merge runs of one method"
            raise UserError(
                f"{run.place}: config.method{key}={values[0]!r}, but {values[1]!r} in {runs[0].place}; {remedy}"
            )
    return first if gamma is None else [{**entry, "gamma": gamma} for entry in first]


def _parsed(method: Any) -> list[dict[str, Any]]:
    entries = schema.parse(method, field="method") if isinstance(method, str) else method
    return [dict(entry) for entry in ([entries] if isinstance(entries, Mapping) else entries)]


def _sources_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns for every run the sources that it was trained on -> their names in the new run.

    Raises:
      UserError: two runs were trained on the same source.
    """
    taken: set[str] = set()
    seen: list[tuple[Any, Any, Path]] = []
    found = []
    for run in runs:
        config, own = run.about["config"], {}
        for name, options in config["sources"].items():
            if not any(stage["mixture"].get(name) for stage in config["stream"]["stages"]):
                continue
            rows = _fingerprint(run, name)
            if twin := next(
                (place for other, same, place in seen if other == options or (rows and rows == same)), None
            ):
                raise UserError(
                    f"{run.place}: was trained on the source {name!r}, and so was {twin}: its rows would count twice; "
                    "merge runs on different rows"
                )
            free = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
            own[name] = next(new for new in free if new not in taken)
            taken.add(own[name])
        seen += [(config["sources"][name], _fingerprint(run, name), run.place) for name in own]
        found.append(own)
    return found


def _fingerprint(run: Run, source: str) -> str | None:
    """Returns that of the rows of a source, which are the same wherever their file lies; None if it is not known."""
    return run.about["facts"].get("sources", {}).get(source, {}).get("train", {}).get("fingerprint")


def _setting(run: Run, config: Mapping[str, Any]) -> compose.Setting:
    """Returns what the method may know of the new run."""
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _rows(run.about, config["stream"]["batch"])
    )
    made = run.made
    return compose.Setting(made.model, optax.identity(), example, 1, losses.cross_entropy, analytic=made)


def _added(
    runs: Sequence[Run], names: Sequence[Mapping[str, str]], setting: compose.Setting, learner: Method, add: Add
) -> Sums:
    """Reads the runs one after the other and adds what they keep.

    Raises:
      UserError: a damaged checkpoint, or arrays that are not those of the first run.
    """
    plain = jax.eval_shape(lambda: learner.init(setting.model.init(jax.random.key(0)))).memory
    total, add = Sums({}, None, 0, {}), jax.jit(add)
    for run, own in zip(runs, names, strict=True):
        step, leaves, host = saved.read(run.place / "checkpoints", wanted=(*FIXED, "memory/"))
        fixed = {name: x for name, x in leaves.items() if name.startswith(FIXED)}
        _check_fixed(fixed, total.params or fixed, runs[0], run)
        memory = _memory(plain, leaves)
        ledger = {new: host["ledger"][name] for name, new in own.items()}
        both = memory if total.memory is None else add(total.memory, memory)
        total = Sums(total.params or fixed, both, total.steps + step, total.ledger | ledger)
    return total


def _check_fixed(found: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array], first: Run, run: Run) -> None:
    """Raises UserError unless the arrays that make features of rows are the same to the last bit."""
    for name, x in found.items():
        if np.asarray(x).tobytes() != np.asarray(wanted[name]).tobytes():
            seeds = [one.about["config"].get("seed", 0) for one in (first, run)]
            remedy = (
                f"train all runs with the same config.seed (here {seeds[0]} and {seeds[1]})"
                if seeds[0] != seeds[1]
                else "give all runs the same config.model.start, or, of a Gaussian expansion, the same first source"
            )
            raise UserError(f"{run.place}: {name} is not that of {first.place}: another feature map; {remedy}")


def _memory(plain: Memory, leaves: Mapping[str, jax.Array]) -> Memory:
    """Returns the memory of a checkpoint in the structure of `plain`, with zeros for what only one of them has.

    How weights are come by depends on the length of a run, and so does what is kept beside the sums.
    """
    within = "memory/inner/" if any(name.startswith("memory/inner/") for name in leaves) else "memory/"

    def leaf(name: str, like: Any) -> jax.Array:
        found = leaves.get(within + name)
        return jnp.zeros(like.shape, like.dtype) if found is None else found

    return map_named(leaf, plain)


def _joined(
    config: Mapping[str, Any], runs: Sequence[Run], names: Sequence[Mapping[str, str]], found: Sums
) -> dict[str, Any]:
    """Returns the config of the new run: one stage with the rows of all."""
    sources = {
        new: run.about["config"]["sources"][old]
        for run, own in zip(runs, names, strict=True)
        for old, new in own.items()
    }
    mixture = {name: float(counts["new_rows"]) for name, counts in found.ledger.items() if counts["new_rows"]}
    stage = {"name": STAGE, "steps": found.steps, "mixture": mixture}
    model = {key: value for key, value in config["model"].items() if key != "start"}  # it is in the checkpoint
    stream = {"batch": config["stream"]["batch"], "stages": [stage]}
    return {**config, "model": model, "sources": sources, "stream": stream}


def _built(config: Mapping[str, Any]) -> program.Program:
    """Returns the pieces of the new run, on one device.

    Raises:
      UserError: a source cannot be read.
    """
    pieces = train.split({**config, "mesh": {"devices": jax.devices()[:1]}})[1]
    return program.build(**pieces)


def _settled(learner: Method, setting: compose.Setting, config: Mapping[str, Any], found: Sums) -> TrainState:
    """Returns the state of the new run, with weights."""
    nested = manifests.nest(found.params)["params"]

    def solve(fixed: Params, sums: Memory) -> TrainState:
        key = key_for(config.get("seed", 0), "end_task", jnp.int32(found.steps))
        state = learner.init({**setting.model.init(key), **fixed})
        memory = {**state.memory.get("inner", state.memory), **sums}
        memory = {**state.memory, "inner": memory} if "inner" in state.memory else memory
        rows = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), setting.example)
        return learner.end_task(TrainState(jnp.int32(found.steps), state.params, state.opt_state, memory), rows, key)

    return jax.jit(solve)(nested, found.memory)


def _write(
    place: Path, config: Mapping[str, Any], runs: Sequence[Run], found: Sums, state: TrainState, made: Any
) -> None:
    """Writes the folder of the new run."""
    place.mkdir(parents=True)
    facts = made.facts if made else {**runs[0].about["facts"], "sources": {}}
    facts = {**facts, "merged": [{"run": str(run.place), "id": run.about["id"]} for run in runs]}
    folder.claim(place, config, facts)
    records, path = [], place / "metrics.jsonl"
    if made:
        began = time.perf_counter()
        scores = made.evaluate(state.params)
        about = {"step": found.steps, "task": 0, "boundary": 0} | heads.solved(state.memory)
        records.append({"kind": "eval", **about, **scores, "time": {"seconds": time.perf_counter() - began}})
        records.append({"kind": "ledger", "step": found.steps, "sources": found.ledger})
        if text := heads.inexact(about):
            records.append({"kind": "event", "step": found.steps, "event": "inexact", "message": text})
    path.touch()
    with contextlib.closing(metrics.Jsonl(path)) as out:
        for record in records:
            out.write(record)
    host = {"ledger": found.ledger, "stream": None, "held_out": None, "records": len(records)}
    with checkpoint.Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(found.steps, state, host)
    folder.finish(place)


def _number(text: str) -> float | str:
    return text if text == "gcv" else float(text)


def main(argv: list[str]) -> None:
    """Merges the runs and says how to go on."""
    parser = console.Parser(prog="python -m jaxcl.merge", description="Adds analytic runs up to one of all their rows.")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the new run: absent or empty")
    parser.add_argument("--gamma", type=_number, metavar="X", help="of the new run, or gcv; by default theirs")
    parser.add_argument("--evaluate", action="store_true", help="on the held-out rows of all sources")
    options = parser.parse_args(argv)
    step = make(options.runs, options.new, gamma=options.gamma, evaluate=options.evaluate)
    print(f"{options.new}: the rows of {len(options.runs)} runs, {step:,} steps; its checkpoint has the weights")
    if options.evaluate:
        print(f"  {options.new / 'report.html'}")


if __name__ == "__main__":
    console.cli(main)
