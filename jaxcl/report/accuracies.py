"""Accuracies of several runs side by side: every mode of inference, mean over seeds, and differences by seed."""

from __future__ import annotations

import math
from html import escape

from jaxcl import seeds
from jaxcl.report import inference, page, words
from jaxcl.report.compare import Comparison, Group, paired_accuracies

OVERALL = ("", "own", "greedy")  # what runs are ranked by: their own mode, mean over domains


def section(comparison: Comparison) -> str:
    """Returns the tables of accuracies; empty if no run has modes of inference."""
    domains = list(dict.fromkeys(key[0] for g in comparison.groups for key in g.right if key[0]))
    if not domains:
        return ""
    tables = "".join(results(comparison, domain, one=len(domains) == 1) for domain in domains)
    return f"<h2>Accuracy</h2>{tables}{differences(comparison) if comparison.same_rows else ''}"


def results(comparison: Comparison, domain: str, *, one: bool) -> str:
    """Returns the table of a domain: every mode of every group, greedy and sampled; with `one` it is the only one."""
    measures = list(dict.fromkeys(key[2] for g in comparison.groups for key in g.right if key[0] == domain))
    rows = []
    for i, g in enumerate(comparison.groups):
        own = inference.own_mode(next(iter(g.runs.values())))
        for mode in dict.fromkeys(key[1] for key in g.right if key[0] == domain and key[1] != "own"):
            intervals = [_interval(g, (domain, mode, measure)) for measure in measures]
            name = words.thoughts(mode)
            name = f"<strong>{escape(name)}</strong>" if mode == own else escape(name)
            label = f'<span class="key c{i % 8}" aria-hidden="true"></span>{escape(g.label)}'
            cells = [words.share_interval(value) for value in intervals]
            rows.append([label, f'<td class="text">{name}</td>', *cells, str(intervals[0].n)])
    hint = (
        "Share of held-out problems right at the newest evaluation, mean over seeds; ± is the 95 % interval. Greedy: "
        "the likeliest tokens. pass@k: at least one of k sampled chains ends in the right answer. Bold: the mode that "
        "the run learns with."
    )
    guesses = [
        f"{escape(name)} {words.share(value)}"
        for run in list(comparison.groups[0].runs.values())[:1]
        for name, value in ((run.about.get("facts", {}).get("baselines") or {}).get(domain) or {}).items()
    ]
    hint += f" Guessing: {words.join(guesses)}." if guesses else " What guessing is worth was not recorded."
    caption = "Accuracy by mode of inference" + ("" if one else f": {escape(domain)}")
    return page.table(caption, ["method", page.text_head("mode"), *measures, "seeds"], rows, hint=hint)


def differences(comparison: Comparison) -> str:
    """Returns paired differences of every group and the control, each with its own mode of inference."""
    table = paired_accuracies(comparison)
    measures = list(dict.fromkeys(measure for row in table.values() for _, measure in row))
    none = seeds.interval([])
    rows = []
    for label, row in table.items():
        for domain in dict.fromkeys(domain for domain, _ in row if domain):
            values = [row.get((domain, measure), none) for measure in measures]
            cells = [f'<td class="text">{escape(domain)}</td>', *map(_verdict_cell, values)]
            rows.append([escape(label), *cells, str(values[0].n)])
    caption = f"Paired differences in accuracy, method minus {escape(comparison.control.label)}"
    hint = (
        "In percentage points, seed by seed, over the seeds that both have, each with its own mode of inference; "
        "coloured where the 95 % interval excludes zero: green is better than the control, red is worse."
    )
    return page.table(caption, ["method", page.text_head("domain"), *measures, "seeds"], rows, hint=hint)


def verdict(comparison: Comparison) -> list[str]:
    """Returns what the accuracies show, in sentences; none if no run has them, or they are of other problems."""
    known = [g for g in comparison.groups if math.isfinite(_interval(g, OVERALL).mean)]
    if not known:
        return []
    ranked = sorted(known, key=lambda g: -_interval(g, OVERALL).mean)
    best, text = (
        ranked[0],
        "; ".join(f"{escape(g.label)} {words.share_interval(_interval(g, OVERALL))}" for g in ranked),
    )
    over = "held-out problems right, greedy, each run with its own mode of inference"
    if len(ranked) == 1 or not comparison.same_rows:
        return [f"{text} of {over}."]
    gaps = [(g, seeds.paired(best.right[OVERALL], g.right[OVERALL])) for g in ranked[1:]]
    tied = words.join([escape(g.label) for g, gap in gaps if gap.n > 1 and not gap.excludes_zero])
    also = f" {tied} cannot be told apart from it." if tied else ""
    sentences = [
        f"Most right is <strong>{escape(best.label)}</strong>: "
        f"{words.share_interval(_interval(best, OVERALL))} of {over}.{also}"
    ]
    control = comparison.control
    if best is not control and OVERALL in control.right:
        gap = seeds.paired(best.right[OVERALL], control.right[OVERALL])
        if gap.n:
            told = words.share_interval(gap, change=True)
            sentences.append(f"Against {escape(control.label)} that is {told} points, paired by seed.")
    return sentences


def _interval(g: Group, key: tuple[str, str, str]) -> seeds.Interval:
    return seeds.interval(list(g.right.get(key, {}).values()))


def _verdict_cell(value: seeds.Interval) -> str:
    text = words.share_interval(value, change=True)
    return f'<span class="{"good" if value.mean > 0 else "bad"}">{text}</span>' if value.excludes_zero else text
