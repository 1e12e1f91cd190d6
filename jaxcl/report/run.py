"""A run directory as arrays: what was configured, measured and recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl import forgetting, goodput, metrics, ridge
from jaxcl.schema import UserError

SCORES = ("bits_per_byte", "accuracy")  # of an evaluation, besides the loss: domain -> value
CLASSES = ("classes",)  # accuracies of a classifier: domain -> label -> value
MOST = 10_000  # tasks of a stream
THINKING = ("inference", "entropy", "drift")  # the same by mode of inference: domain -> mode -> values


@dataclass(frozen=True)
class Run:
    """Everything a report says of one run is computed from this."""

    config: dict[str, Any]
    label: str
    seed: int
    tasks: list[str]  # names of the stages
    own: list[str]  # the domain that each task is judged by
    domains: list[str]  # all evaluated domains, those of the tasks first
    eval_steps: np.ndarray  # int [N], increasing
    losses: dict[str, np.ndarray]  # domain -> float [N], NaN where not measured
    bits_per_byte: dict[str, np.ndarray]  # the same in bits per byte; empty if not recorded
    accuracy: dict[str, np.ndarray]  # of classifiers and of problems with one right answer; else empty
    classes: dict[tuple[str, str], np.ndarray]  # (domain, label) -> accuracy of a classifier; else empty
    thinking: dict[int, dict[str, Any]]  # step -> what was measured by mode of inference; empty if nothing was
    boundaries: dict[int, int]  # k -> step of the evaluation after task k; -1 = before training
    alignment: dict[int, np.ndarray]  # k -> cosines [D, D] of the gradients of `domains`; empty if not recorded
    certificates: dict[int, dict[str, Any]]  # boundary -> domain -> what was certified; empty if nothing was
    solves: dict[int, dict[str, float]]  # boundary -> `bound` and `gamma` of the head; empty if none was solved for
    train: dict[str, np.ndarray]  # column -> float [M], with "step" and "task"
    speed: dict[str, np.ndarray]  # columns of "time"
    hosts: dict[str, np.ndarray]  # of several processes, at evaluations: see `jaxcl.watch.skew`; else empty
    ledger: dict[str, dict[str, int]]  # source -> counts at the end
    events: list[dict[str, Any]]
    steps: int | None  # planned steps, None if the config does not say
    about: dict[str, Any]  # what run.json says of it: facts, versions and branch
    place: Path  # its directory
    goodput: dict[str, Any] | None = None  # see `jaxcl.goodput.summary`; None if no time was recorded

    @property
    def step(self) -> int:
        """Last recorded step."""
        return int(max(self.eval_steps[-1], self.train["step"][-1] if self.train else 0))

    @property
    def complete(self) -> bool:
        """Whether the evaluation after the last task is there."""
        return len(self.tasks) - 1 in self.boundaries

    @property
    def stopped(self) -> int | None:
        """The step that a signal ended the run at, unless it has gone on or finished since."""
        last = self.events[-1] if self.events else {}
        return int(last["step"]) if last.get("event") == "stopped" and not self.complete else None

    @property
    def matrix(self) -> forgetting.Matrix:
        """The evaluation matrix [T + 1, T]; NaN for boundaries that were not reached or not measured."""
        return self.at_boundaries(self.losses)

    def at_boundaries(self, values: Mapping[str, np.ndarray]) -> forgetting.Matrix:
        """Returns the matrix [T + 1, T] of values that were recorded at `eval_steps`, by domain."""
        at = {int(step): i for i, step in enumerate(self.eval_steps)}
        rows = {
            k: {domain: float(column[at[step]]) for domain, column in values.items()}
            for k, step in self.boundaries.items()
        }
        return forgetting.matrix(rows, self.own)


def load(path: Path) -> Run:
    """Reads a run directory.

    Raises:
      UserError: it is not one, or nothing was evaluated yet.
    """
    if not path.is_dir() or not (path / "metrics.jsonl").exists():
        raise UserError(f"{path}: not a run directory (no metrics.jsonl); give the --workdir of a training run")
    records = metrics.read(path / "metrics.jsonl")
    if not records:
        raise UserError(f"{path}: metrics.jsonl is empty; wait until the run has evaluated once")
    evals = [record for record in records if record["kind"] == "eval" and record.get("loss")]
    if not evals:
        raise UserError(f"{path}: no evaluation recorded yet; wait for the first, or set config.evaluation.every")
    _check(path, records)
    run = _assemble(_json(path / "config.json"), _json(path / "run.json"), records, evals, path.resolve())
    return replace(run, goodput=goodput.summary(path) if (path / goodput.FILE).exists() else None)


def _check(path: Path, records: list[dict[str, Any]]) -> None:
    """Raises UserError for records of another form than those that a run writes."""
    tables = ("loss", *SCORES, *CLASSES, *THINKING, "alignment", "certificate", "sources", "time")
    for record in records:
        named = [name for name in tables if not isinstance(record.get(name) or {}, dict)]
        if record["kind"] in ("eval", "ledger") and named:
            raise UserError(f"{path}: metrics.jsonl: {named[0]} at step {record['step']} is no object; remove the line")
        if any(not -1 <= record[name] < MOST for name in ("task", "boundary") if isinstance(record.get(name), int)):
            raise UserError(f"{path}: metrics.jsonl: a task at step {record['step']} beyond {MOST:,}; remove the line")


def _json(path: Path) -> dict[str, Any]:
    """Returns the object in a file; a run without it can still be reported on.

    Raises:
      UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON; remove it to report on the run without it") from error
    return value if isinstance(value, dict) else {}


def _assemble(
    config: dict[str, Any],
    about: dict[str, Any],
    records: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    place: Path,
) -> Run:
    train = [record for record in records if record["kind"] == "train"]
    stages = _section(config, "stream").get("stages") or []
    names = {int(r["task"]): str(r["stage"]) for r in train if "task" in r and r.get("stage")}
    count = max(
        [len(stages), *(k + 1 for k in names), *(r["boundary"] + 1 for r in evals if _is_boundary(r))], default=0
    )
    tasks = [_stage_name(stages, k) or names.get(k, f"task {k + 1}") for k in range(count)]
    domains = list(dict.fromkeys(domain for record in evals for domain in record["loss"]))
    own = [_own_domain(stages[k] if k < len(stages) else {}, tasks[k], k, domains) for k in range(count)]
    domains = [*dict.fromkeys(d for d in own if d in domains), *(d for d in domains if d not in own)]
    by_step: dict[int, dict[str, Any]] = {}
    for record in evals:  # several records of one step are one evaluation
        merged = by_step.setdefault(record["step"], {name: {} for name in ("loss", *SCORES, *CLASSES, *THINKING)})
        for name in merged:
            merged[name].update(record.get(name) or {})
    ordered = [by_step[step] for step in sorted(by_step)]
    ledgers = [record for record in records if record["kind"] == "ledger"]
    return Run(
        config=config,
        label=str(config.get("label") or readable(config)),
        seed=int(config.get("seed") or 0),
        tasks=tasks,
        own=own,
        domains=domains,
        eval_steps=np.array(sorted(by_step)),
        losses={domain: _column([r["loss"] for r in ordered], domain) for domain in domains},
        bits_per_byte={
            d: _column([r["bits_per_byte"] for r in ordered], d) for d in domains if ordered[0]["bits_per_byte"]
        },
        accuracy={
            d: _column([r["accuracy"] for r in ordered], d) for d in domains if any(r["accuracy"] for r in ordered)
        },
        classes=_by_class([r["classes"] for r in ordered]),
        thinking={
            step: {name: r[name] for name in THINKING}
            for step, r in zip(sorted(by_step), ordered, strict=True)
            if r["inference"]
        },
        boundaries={record["boundary"]: record["step"] for record in evals if _is_boundary(record)},
        alignment={
            r["boundary"]: _square(r["alignment"], domains) for r in evals if _is_boundary(r) and r.get("alignment")
        },
        certificates={r["boundary"]: r["certificate"] for r in evals if _is_boundary(r) and r.get("certificate")},
        solves={r["boundary"]: r["solve"] for r in evals if _is_boundary(r) and r.get("solve")},
        train=_columns(train),
        speed=_columns([{"step": r["step"], **r.get("time", {})} for r in train]),
        hosts=_columns([{"step": r["step"], **r["time"]} for r in evals if "skew" in (r.get("time") or {})]),
        ledger=ledgers[-1].get("sources", {}) if ledgers else {},
        events=[record for record in records if record["kind"] == "event"],
        steps=_planned(stages, _section(config, "stream")),
        about={key: about[key] for key in ("facts", "versions", "branch") if isinstance(about.get(key), dict)},
        place=place,
    )


def readable(config: Mapping[str, Any]) -> str:
    """Returns a label for a run without one: policy, objective, method, replay and, if it takes steps, peak rate."""
    learning = [name for key in ("policy", "objective") if (name := named(config, key))]
    methods = " + ".join(name for name, _ in parts(config))
    words = [*learning, *([methods] if methods else [])] or ["plain"]
    replay = _section(config, "stream").get("replay") or config.get("replay") or {}
    if isinstance(replay, Mapping) and replay.get("fraction"):
        words.append(f"{100 * float(replay['fraction']):g} % replay")
    stepless = any(name in ridge.METHODS for name, _ in parts(config))
    if (peak := _section(config, "schedule").get("peak")) is not None and not stepless:
        words.append("lr " + " / ".join(f"{one:g}" for one in (peak if isinstance(peak, list) else [peak])))
    return ", ".join(words)


def named(config: Mapping[str, Any], key: str) -> str:
    """Returns the name of a part, written as 'name', 'name(option=1)' or a dict; empty if there is none."""
    value = config.get(key)
    text = str((value.get("name") if isinstance(value, Mapping) else value) or "")
    return text.partition("(")[0].strip()


def parts(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the parts of `config.method` as (name, options), however they are written.

    A method is text such as "er(capacity=8) + reptile(every=10)", a dict with a name, or a list of these.
    """
    method = config.get("method") or []
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in method if isinstance(method, (list, tuple)) else [method]:
        if isinstance(entry, Mapping):
            found.append((str(entry.get("name")), {key: value for key, value in entry.items() if key != "name"}))
            continue
        for name, arguments in re.findall(r"([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?", str(entry)):
            pairs = re.findall(r"(\w+)\s*=\s*([^,]+)", arguments)
            found.append((name, {key: _literal(value.strip()) for key, value in pairs}))
    return found


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("'\"")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _stage_name(stages: Any, k: int) -> str | None:
    return str(stages[k]["name"]) if k < len(stages) and "name" in stages[k] else None


def _own_domain(stage: Mapping[str, Any], name: str, k: int, domains: list[str]) -> str:
    """Returns the domain a task is judged by: its main source, else its name, else its place in the order."""
    mixture = stage.get("mixture") or {}
    known = [source for source in mixture if source in domains]
    if known:
        return max(known, key=lambda source: mixture[source])
    if name in domains:
        return name
    return domains[k] if k < len(domains) else name


def _is_boundary(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("boundary"), int)


def _planned(stages: Any, stream: Mapping[str, Any]) -> int | None:
    each = [stage.get("steps", stream.get("steps")) for stage in stages]
    return sum(each) if each and all(isinstance(n, int) for n in each) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([_number(row.get(name)) for row in rows])


def _by_class(tables: list[dict[str, dict[str, Any]]]) -> dict[tuple[str, str], np.ndarray]:
    """Returns the columns of domain -> label -> value."""
    cells = dict.fromkeys((domain, label) for table in tables for domain, row in table.items() for label in row)
    return {(d, label): _column([table.get(d, {}) for table in tables], label) for d, label in cells}


def _square(table: dict[str, dict[str, Any]], names: list[str]) -> np.ndarray:
    """Returns a table by names, row -> column -> value, as an array [D, D]."""
    return np.stack([_column([table.get(row, {}) for row in names], name) for name in names], axis=1)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float)))
    return {name: _column(rows, name) for name in names} if rows else {}
