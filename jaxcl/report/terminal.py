"""The main figures of a report on the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxcl.report import inference, words


def show(results: dict[str, Any], target: Path) -> None:
    """Prints the main figures of `report.write` and where the page is."""
    console = Console()
    console.print(summary(results))
    if not results.get("complete", True):
        step = results.get("stopped")
        state = "is still in progress" if step is None else f"was stopped at step {step:,}"
        console.print(f"The run {state}: the report is partial.", style="yellow")
    console.print(f"Wrote {target} and {target.with_suffix('.json').name}.", highlight=False, soft_wrap=True)


def summary(results: dict[str, Any]) -> Table:
    """Returns the main figures as a table for the terminal: accuracies where runs have modes of inference."""
    if results["kind"] == "run" and results["inference"]:
        return _answers(results)
    if results["kind"] == "run" and results["certificates"]:
        return promises(results["certificates"])
    if results["kind"] == "comparison" and any(group["accuracy"] for group in results["groups"]):
        return _accuracies(results["groups"])
    if results["kind"] == "run" and results["classified"]:
        return _classified({results["label"]: results["classified"]["figures"]})
    if results["kind"] == "comparison" and any(group["classified"] for group in results["groups"]):
        return _classified({group["label"]: group["classified"] for group in results["groups"]})
    names = ("learned", "final", "forgetting", "gap_depth")
    table = _table("method", *(name.replace("_", " ") for name in names))
    if results["kind"] == "run":
        values = results["figures"]
        table.add_row(results["label"], *(words.nats(values[name], sign=name == "backward_transfer") for name in names))
        return table
    for group in results["groups"]:
        cells = []
        for name in names:
            value = group["figures"][name]
            half = "" if math.isnan(value["half_width"]) else f" ± {value['half_width']:.3f}"
            cells.append(words.nats(value["mean"], sign=name == "backward_transfer") + half)
        table.add_row(group["label"], *cells)
    return table


def _table(*names: str) -> Table:
    table = Table(*names, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def promises(block: dict[str, Any]) -> Table:
    """Returns what was promised for each task and what is kept."""
    table = _table("task", "promised", "accuracy now", "kept")
    for one in block["tasks"]:
        promised = "–" if one["promised"] is None else words.share(one["promised"])
        kept = {None: "–", True: "yes", False: "NO"}[one["kept"]]
        table.add_row(one["task"], promised, words.share(one["deployed"]), kept)
    return table


def _answers(results: dict[str, Any]) -> Table:
    """Returns what a run gets right in each domain, before and after, and what guessing is worth."""
    block = results["inference"]
    ks = list(dict.fromkeys([*inference.counts(block)[:1], *inference.counts(block)[-1:]]))
    table = _table(words.thoughts(block["mode"]), "greedy", *(f"pass@{k}" for k in ks), "guessing")
    nothing = {"before": float("nan"), "after": float("nan")}
    for domain, modes in block["domains"].items():
        entry = modes.get(block["mode"], {"greedy": nothing, "sample": {}})
        pairs = [entry["greedy"], *(entry["sample"].get(k, nothing) for k in ks)]
        guess = inference.best_guess(block["guessing"][domain])
        table.add_row(domain, *map(words.change, pairs), words.share(guess[1]) if guess else "–")
    return table


def _accuracies(groups: list[dict[str, Any]]) -> Table:
    """Returns the accuracies of groups with their own mode, mean over domains."""
    rows = {group["label"]: group["accuracy"].get("all", {}).get("own", {}) for group in groups}
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    table = _table("method", *measures)
    for label, row in rows.items():
        cells = []
        for measure in measures:
            value = row.get(measure, {"mean": math.nan, "half_width": math.nan})
            half = "" if math.isnan(value["half_width"]) else f" ± {100 * value['half_width']:.1f}"
            cells.append(words.share(value["mean"]) + half)
        table.add_row(label, *cells)
    return table


def _mean_of(value: Any) -> float:
    return value["mean"] if isinstance(value, dict) else value


def _classified(rows: dict[str, dict[str, Any]]) -> Table:
    """Returns the main accuracies of classifiers, given figures or their intervals; forgetting is in points."""
    names = {"learned": "learned", "final": "final", "forgetting": "forgetting", "mean_class": "mean class"}
    if any(math.isfinite(_mean_of(row.get("promised", math.nan))) for row in rows.values()):
        names["promised"] = "promised"
    table = _table("method", *names.values())
    for label, row in rows.items():
        cells = []
        for name in names:
            value = row.get(name, math.nan)
            mean, half = (value["mean"], value["half_width"]) if isinstance(value, dict) else (value, math.nan)
            told = words.nats(100 * mean, 1) if name == "forgetting" else words.share(mean)
            cells.append(told + ("" if math.isnan(half) else f" ± {100 * half:.1f}"))
        table.add_row(label, *cells)
    return table
