"""The figures of one run, as plain numbers: what report.json holds and what the page is drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcl import forgetting, stability
from jaxcl.report import certificates, classified, inference
from jaxcl.report.run import Run

WINDOW = 10  # evaluations, the shorter of the two windows of De Lange et al. 2023
TOLERANCE = 0.02  # nats above the loss at the boundary that count as recovered: about the noise of an evaluation


def of(run: Run) -> dict[str, Any]:
    """Returns every figure of a run; what could not be measured is NaN (null in the file).

    A run that has not finished is judged by the tasks it has finished.
    """
    R = run.matrix
    done = forgetting.finished(R)
    gaps = stability_gaps(run)
    return {
        "label": run.label,
        "seed": run.seed,
        "complete": run.complete,
        "stopped": run.stopped,
        "step": run.step,
        "steps": run.steps,
        "tasks": run.tasks,
        "domains": run.domains,
        "judged_by": run.own,
        "finished_tasks": done.shape[1],
        "matrix": R.tolist(),
        "per_task_forgetting": forgetting.per_task_forgetting(done).tolist() if done.shape[1] else [],
        "figures": forgetting.summary(done) | {"final": _final(run)} | _anytime(run) | _worst_gap(gaps),
        "gaps": gaps,
        "alignment": alignment(run),
        "others": _others(run),
        "bits_per_byte": {domain: _last(values) for domain, values in run.bits_per_byte.items()},
        "accuracy": {domain: _last(values) for domain, values in run.accuracy.items()},
        "accuracy_matrix": _right(run),
        "classified": classified.of(run),
        "inference": inference.of(run),
        "certificates": certificates.of(run),
        "tokens": tokens(run),
        "sources": run.ledger,
        "peak_lr": peak_lr(run),
    }


def stability_gaps(run: Run) -> list[dict[str, Any]]:
    """Returns one entry per stage k >= 1 and earlier task j: the gap that opened when stage k began."""
    rows = []
    for k in range(1, len(run.tasks)):
        start = run.boundaries.get(k - 1)
        if start is None:
            continue
        end = run.boundaries.get(k, int(run.eval_steps[-1]))
        for domain in dict.fromkeys(d for d in run.own[:k] if d in run.losses and d != run.own[k]):
            known = np.isfinite(run.losses[domain])
            steps, values = run.eval_steps[known], run.losses[domain][known]
            if start not in steps or not (steps > start).any():
                continue
            gap = stability.gap(steps, values, start, end, tolerance=TOLERANCE)
            points = int(((steps > start) & (steps <= end)).sum())
            rows.append(
                {"stage": k, "domain": domain, "open": k not in run.boundaries, "evaluations": points, **gap._asdict()}
            )
    return rows


def alignment(run: Run) -> list[dict[str, Any]]:
    """Returns one entry per boundary at which gradients were compared, in their order.

    `cosines` [D, D] are those of `domains`; `mean` is that of the pairs of different domains.
    """
    rows = []
    for boundary, table in sorted(run.alignment.items()):
        pairs = table[np.triu_indices(len(table), 1)]
        mean = float(np.mean(pairs)) if pairs.size else float("nan")
        entry = {"boundary": boundary, "step": run.boundaries[boundary], "mean": mean, "cosines": table.tolist()}
        rows.append(entry)
    return rows


def tokens(run: Run) -> dict[str, int]:
    """Returns new and replayed tokens over all sources."""
    return {kind: sum(int(row.get(f"{kind}_tokens", 0)) for row in run.ledger.values()) for kind in ("new", "replayed")}


def speed(run: Run) -> dict[str, float]:
    """Returns what a typical step reached, the median of each: `tokens_per_s` (targets trained on, replayed ones too),
    `model_flops_per_s` (their FLOPs by `jaxcl.flops`, forward and backward) and `mfu` (share of the devices' peak); and
    `train_s`, the seconds of all steps; of several processes `skew`, the median of their greatest over their median own
    time, and `slowest`, which process it was most often (see `jaxcl.watch.skew`). NaN where not known.
    """
    hosts = run.hosts.get("slowest", np.array([]))
    hosts = hosts[(hosts >= 0) & (hosts < 2**20)].astype(np.int64)
    tokens_per_s = _median(run.speed.get("tokens_per_s", np.array([])))
    cost = run.about.get("facts", {}).get("flops_per_token")
    seconds = run.speed.get("step_s", np.array([]))
    return {
        "tokens_per_s": tokens_per_s,
        "model_flops_per_s": tokens_per_s * cost if cost else float("nan"),
        "mfu": _median(run.speed.get("mfu", np.array([]))),
        "train_s": float(np.nansum(seconds)) if seconds.size else float("nan"),
        "skew": _median(run.hosts.get("skew", np.array([]))),
        "slowest": float(np.bincount(hosts).argmax()) if hosts.size else float("nan"),
    }


def peak_lr(run: Run) -> float:
    """Returns the largest learning rate that was used; NaN if none was recorded."""
    rates = run.train.get("lr", np.array([]))
    return float(np.nanmax(rates)) if np.isfinite(rates).any() else float("nan")


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else float("nan")


def _final(run: Run) -> float:
    """Returns the mean over all domains of the last loss: also for joint training, which is a single task."""
    return float(np.mean([_last(values) for values in run.losses.values()]))


def _right(run: Run) -> dict[str, Any] | None:
    """Returns the evaluation matrix of accuracies and what follows from it; None of runs without accuracies.

    Forgetting is positive where a task got worse, as it is for losses.
    """
    if not run.accuracy:
        return None
    R = run.at_boundaries(run.accuracy)
    done = forgetting.finished(R)
    lost = forgetting.per_task_forgetting(done, higher_is_better=True).tolist() if done.shape[1] else []
    return {
        "matrix": R.tolist(),
        "per_task_forgetting": lost,
        "figures": forgetting.summary(done, higher_is_better=True),
    }


def _anytime(run: Run) -> dict[str, float]:
    """Returns the figures of the dense curve, over the evaluations at which every task was measured."""
    names = ("average_anytime", "worst", "worst_case", "windowed_forgetting", "windowed_plasticity")
    nothing: dict[str, float] = dict.fromkeys(names, np.nan)
    if not run.tasks or any(domain not in run.losses for domain in run.own):
        return nothing
    values = np.stack([run.losses[domain] for domain in run.own], axis=1)  # [N, T]
    full = np.isfinite(values).all(axis=1)
    if not full.any():
        return nothing
    steps, values = run.eval_steps[full], values[full]
    ends = _ends(run)
    worst, case = stability.worst_case(steps, values, ends)
    return {
        "average_anytime": stability.average_anytime(steps, values, ends),
        "worst": worst,
        "worst_case": case,
        "windowed_forgetting": stability.windowed_forgetting(values, WINDOW),
        "windowed_plasticity": stability.windowed_plasticity(values, WINDOW),
    }


def _ends(run: Run) -> list[int]:
    """Returns the last step of each task; tasks that have not ended yet end beyond the last evaluation."""
    later = int(run.eval_steps[-1])
    return [run.boundaries.get(k, later + k) for k in range(len(run.tasks))]


def _worst_gap(gaps: list[dict[str, Any]]) -> dict[str, float]:
    if not gaps:
        return {"gap_depth": float("nan"), "gap_transient": float("nan")}
    return {
        "gap_depth": max(gap["depth"] for gap in gaps),
        "gap_transient": max(gap["transient"] for gap in gaps),
    }


def _others(run: Run) -> list[dict[str, Any]]:
    """Returns first and last loss of the domains that no task is judged by."""
    rows = []
    for domain in run.domains:
        values = run.losses[domain][np.isfinite(run.losses[domain])]
        if domain not in run.own and values.size:
            rows.append({"domain": domain, "first": float(values[0]), "last": float(values[-1])})
    return rows
