"""What a run that thinks before it answers got right, by mode of inference, before and after it learned by rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.report.run import Run, named


def of(run: Run) -> dict[str, Any] | None:
    """Returns the accuracies by mode of inference; None of a run that recorded none.

    "before" is the last measurement before the first stage that learns by rollouts, or before training where no stage
    does; "after" is the newest one since then, and NaN as long as there is none.
    """
    if not run.thinking:
        return None
    stage, begin = _begin(run)
    tables = {name: {step: record[name] for step, record in run.thinking.items()} for name in ("inference", "drift")}
    domains = [d for d in run.domains if any(d in table for table in tables["inference"].values())]
    own = own_mode(run)
    facts = run.about.get("facts", {})
    entropy: dict[str, dict[str, list[float]]] = {}
    for record in run.thinking.values():
        for domain, profiles in record["entropy"].items():
            entropy.setdefault(domain, {}).update({mode: _numbers(line) for mode, line in profiles.items()})
    return {
        "mode": own,
        "since": "training" if stage == 0 else run.tasks[stage],
        "begin": int(begin) if math.isfinite(begin) else None,
        "learned_by_rollouts": rolled(run),
        "step": max(run.thinking),
        "problems": {d: n for d in domains if (n := _problems(run, d)) is not None},
        "guessing": {d: {k: _number(v) for k, v in (facts.get("baselines") or {}).get(d, {}).items()} for d in domains},
        "domains": {
            d: {mode: _measured(tables["inference"], d, mode, begin) for mode in modes(run, d, own)} for d in domains
        },
        "entropy": entropy,
        "drift": {
            d: {mode: _both(tables["drift"], (d, mode), begin) for mode in modes(run, d, own)}
            for d in domains
            if any(d in table for table in tables["drift"].values())
        },
    }


def rolled(run: Run) -> bool:
    """Returns whether a step of the run has learned by rollouts."""
    return bool(np.isfinite(run.train.get("reward", np.array([]))).any())


def own_mode(run: Run) -> str:
    """Returns the mode that the run learns with: its policy, else the only one that is measured between boundaries."""
    if policy := named(run.config, "policy"):
        return policy
    for record in run.thinking.values():
        found = {mode for table in record["inference"].values() for mode in table}
        if len(found) == 1:
            return found.pop()
    return ""


def modes(run: Run, domain: str, own: str) -> list[str]:
    """Returns the modes that a domain was measured with: that of the run first, then in the order of the records."""
    found = dict.fromkeys(mode for record in run.thinking.values() for mode in record["inference"].get(domain, {}))
    return [mode for mode in (own, *(m for m in found if m != own)) if mode in found]


def best_guess(guessing: Mapping[str, float]) -> tuple[str, float] | None:
    """Returns the guesser that is right most often, and how often."""
    known = {name: value for name, value in guessing.items() if math.isfinite(value)}
    return max(known.items(), key=lambda item: item[1]) if known else None


def now(pair: Mapping[str, float]) -> float:
    """Returns the newest of a figure before and after."""
    return pair["before"] if math.isnan(pair["after"]) else pair["after"]


def counts(block: Mapping[str, Any]) -> list[str]:
    """Returns the k of pass@k that were measured, in order."""
    found = {k for table in block["domains"].values() for entry in table.values() for k in entry["sample"]}
    return sorted(found, key=int)


def mean(block: Mapping[str, Any], measure: str, when: str) -> float:
    """Returns the mean over domains of a measure with the run's own mode; NaN if one domain lacks it.

    Args:
      block: what `of` returns.
      measure: "greedy" or the k of pass@k.
      when: "before", "after" or "now".
    """
    values = []
    for table in block["domains"].values():
        entry = table.get(block["mode"])
        pair = None if entry is None else entry["greedy"] if measure == "greedy" else entry["sample"].get(measure)
        values.append(float("nan") if pair is None else now(pair) if when == "now" else pair[when])
    return float(np.mean(values)) if values else float("nan")


def forgotten(figures: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Returns domain -> (accuracy now, what it lost of its best), of earlier domains that no later task learns again.

    Args:
      figures: of the run, see `jaxcl.report.figures`; its finished tasks count.
    """
    right = figures["accuracy_matrix"]
    lost, own = right["per_task_forgetting"] if right else [], figures["judged_by"]
    earlier = [j for j in range(len(lost) - 1) if own[j] not in own[j + 1 : len(lost)]]
    return {own[j]: (right["matrix"][len(lost)][j], lost[j]) for j in earlier}


def newest(block: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """Returns (domain, mode, measure) -> value at the newest evaluation, of the modes that it measured.

    The run's own mode is there as "own" too, and the mean over domains with it as the domain "".
    """
    found = {("", "own", "greedy"): mean(block, "greedy", "now")}
    found |= {("", "own", f"pass@{k}"): mean(block, k, "now") for k in counts(block)}
    for domain, table in block["domains"].items():
        for mode, entry in table.items():
            if entry["step"] != block["step"]:
                continue
            for name in (mode, "own") if mode == block["mode"] else (mode,):
                found[domain, name, "greedy"] = now(entry["greedy"])
                found |= {(domain, name, f"pass@{k}"): now(pair) for k, pair in entry["sample"].items()}
    return found


def _begin(run: Run) -> tuple[int, float]:
    """Returns the stage since which changes are told, and the last step before it: inf if it has not begun yet."""
    stages = (run.config.get("stream") or {}).get("stages") or []
    if rolled(run):
        first = int(np.flatnonzero(np.isfinite(run.train["reward"]))[0])
        stage, fallback = int(run.train.get("task", np.zeros(first + 1))[first]), float(run.train["step"][first] - 1)
    else:  # not yet, or never: then since before training
        planned = [k for k, entry in enumerate(stages) if entry.get("learn", "rl") == "rl"]
        stage, fallback = (planned[0], math.inf) if planned else (0, -1.0)
    return stage, float(run.boundaries.get(stage - 1, fallback))


def _problems(run: Run, domain: str) -> int | None:
    """Returns how many problems an accuracy is of; None if that was not recorded."""
    told = (run.about.get("facts", {}).get("problems") or {}).get(domain)
    return told if told is not None else (run.config.get("evaluation") or {}).get("rows")


def _measured(tables: Mapping[int, Any], domain: str, mode: str, begin: float) -> dict[str, Any]:
    """Returns step, greedy accuracy and pass@k of a mode."""
    records = [table.get(domain, {}).get(mode) or {} for table in tables.values()]
    ks = sorted({k for record in records for k in record.get("sample") or {}}, key=int)
    return {
        "step": max((step for step, record in zip(tables, records, strict=True) if record), default=0),
        "greedy": _both(tables, (domain, mode, "greedy"), begin),
        "sample": {k: _both(tables, (domain, mode, "sample", k), begin) for k in ks},
    }


def _both(tables: Mapping[int, Any], path: Sequence[str], begin: float) -> dict[str, float]:
    """Returns the newest value under `path` up to step `begin` and after it; NaN where none was measured."""
    found = {"before": float("nan"), "after": float("nan")}
    for step in sorted(tables):
        value = tables[step]
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            found["before" if step <= begin else "after"] = _number(value)
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values or []]
