"""Results of an evaluation on the terminal, and of a sweep over checkpoints as a page of charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.report import page, single
from jaxcl.report import run as runs
from jaxcl.report.chart import Line, Span, figure
from jaxcl.schema import UserError

UNITS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, per byte",
    "exact_match": "exact match",
    "log_probability": "log-probability of the answer, nats",
    "rank_1": "share of facts at rank 1",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity of a token",
}


def tables(results: dict[str, Any]) -> list[Any]:
    """Returns one table per task for the terminal, with a row for every group and step."""
    from rich.table import Table  # noqa: PLC0415  only commands that print pay for it

    made = []
    several = len(results["steps"]) > 1
    for name, task in results["tasks"].items():
        groups = task["figures"][0]
        metrics = list(next(iter(groups.values())))
        head = [*(["step"] if several else []), *metrics]
        table = Table(name, *(text.replace("_", " ") for text in head), box=None, padding=(0, 2, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for group in groups:
            for step, figures in zip(results["steps"], task["figures"], strict=True):
                cells = [shown(metric, figures[group][metric]) for metric in metrics]
                table.add_row(group, *([f"{step:,}"] if several else []), *cells)
        made.append(table)
    return made


def shown(metric: str, value: float) -> str:
    """Returns a figure as text."""
    return f"{value:,}" if metric == "records" else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"


def html(results: dict[str, Any], spans: Sequence[Span]) -> str:
    """Returns the page of a sweep: every metric of every task over the steps, and the figures as tables."""
    steps, parts = np.array(results["steps"], float), []
    for name, task in results["tasks"].items():
        figures = task["figures"]
        metrics = [metric for metric in next(iter(figures[0].values())) if metric != "records"]
        charts = []
        for metric in metrics:
            lines = [
                Line(group, steps, np.array([at[group][metric] for at in figures], float), colour)
                for colour, group in enumerate(figures[0])
            ]
            lines = [line._replace(name="") for line in lines] if len(lines) == 1 else lines
            charts.append(figure(lines, title=UNITS[metric], x="step", y="", spans=spans, half=len(metrics) > 1))
        parts.append(f"<h2>{escape(name)}</h2>{page.pairs(charts) if len(charts) > 1 else ''.join(charts)}")
        rows = [
            [escape(group), f"{step:,}", *(shown(metric, at[group][metric]) for metric in metrics)]
            for group in figures[0]
            for step, at in zip(results["steps"], figures, strict=True)
        ]
        head = [f"{figures[0][next(iter(figures[0]))]['records']:,} records each" if len(figures[0]) == 1 else "group"]
        parts.append(page.table("Figures", [*head, "step", *(UNITS[metric] for metric in metrics)], rows))
    title = f"Evaluation of {results['name']}"
    lead = f'<h1>{escape(title)}</h1><p class="sub">{len(steps)} checkpoints, steps {steps[0]:,.0f} to {steps[-1]:,.0f}'
    return page.html(title, f"{lead}; dotted lines: a new stage began</p>{''.join(parts)}")


def spans_of(path: Path) -> list[Span]:
    """Returns the stages of a run as stretches of the step axis; none if it has no records of them."""
    try:
        return single.spans(runs.load(path))
    except UserError:
        return []
