"""What classifiers get right: accuracy over the classes that have come, of one run and of several side by side."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from jaxcl import forgetting, online, seeds
from jaxcl.report import certificates, page, words
from jaxcl.report.chart import Line, Span, figure
from jaxcl.report.run import Run

# Name of a figure -> its heading and whether larger is better.
TASKS = {
    "final": ("final", True),
    "learned": ("learned", True),
    "forgetting": ("forgetting", False),
    "average_incremental": ("average", True),
    "promised": ("promised", True),
    "certified": ("certified", True),
}
STREAM = {
    "a_auc": ("any time", True),
    "a_avg": ("mean of ends", True),
    "a_last": ("last", True),
    "class_forgetting": ("forgetting", False),
    "mean_class": ("mean class,<br>last", True),
    "mean_class_avg": ("mean class,<br>mean of ends", True),
}
FIGURES = TASKS | STREAM
HINTS = (
    "Share of held-out rows right, task by task. Final: mean over all domains at the end. Learned: just after each "
    "task. Forgetting: best minus end of the earlier tasks, points. Average: over the ends of tasks, mean of the tasks "
    "so far. Promised: certified when a task was learned, mean over tasks. Certified: at the end.",
    "Over the held-out rows of all classes that have come by then. Any time: mean of all evaluations (A_AUC). Mean of "
    "ends: of the ends of tasks (A_avg). Last: A_last. Forgetting: best earlier end minus last, mean over classes, "
    "points. Mean class: every class counts the same, however many rows it has.",
)


def of(run: Run) -> dict[str, Any] | None:
    """Returns the accuracies of a classifier; None of runs that are none or think before they answer.

    `figures` has those of FIGURES, NaN where not measured; `steps`, `seen` and `mean_class` are curves over the
    evaluations at which a class had come, and `classes` has what is known of each class at the newest one.
    """
    if not run.accuracy or run.thinking:
        return None
    done = forgetting.finished(run.at_boundaries(run.accuracy))
    known = forgetting.summary(done, higher_is_better=True)
    figures = {name: known[name] for name in ("learned", "forgetting", "average_incremental", "backward_transfer")}
    figures["final"] = float(np.mean([_last(values) for values in run.accuracy.values()]))
    block = certificates.of(run) or {"promised": None, "tasks": []}
    kept = [one["now"] for one in block["tasks"]]
    figures["promised"] = math.nan if block["promised"] is None else block["promised"]
    figures["certified"] = float(np.mean(kept)) if kept and None not in kept else math.nan
    facts = run.about.get("facts", {}).get("classes") or {}
    cells = [(domain, label) for domain, table in facts.items() for label in table if (domain, label) in run.classes]
    if not cells:
        return {"figures": figures | dict.fromkeys(STREAM, math.nan), "steps": [], "classes": []}
    right = np.stack([run.classes[cell] for cell in cells], axis=1)  # [N, C]
    entries = [facts[domain][label] for domain, label in cells]
    rows, since = (np.array([entry.get(k, math.inf) for entry in entries], np.float64) for k in ("rows", "come"))
    ends = [run.boundaries[k] for k in range(done.shape[1])]
    found = online.summary(run.eval_steps, right, rows, since, ends)
    found["class_forgetting"] = found.pop("forgetting")
    whole, balanced = (f(run.eval_steps, right, rows, since) for f in (online.seen_accuracy, online.class_accuracy))
    here = run.eval_steps >= since.min()
    return {
        "figures": figures | found,
        "steps": run.eval_steps[here].tolist(),
        "seen": whole[here].tolist(),
        "mean_class": balanced[here].tolist(),
        "classes": [
            {"domain": domain, "label": label, "come": entry.get("come"), "accuracy": _last(values)}
            for (domain, label), entry, values in zip(cells, entries, right.T, strict=True)
        ],
    }


def section(run: Run, block: dict[str, Any] | None, spans: list[Span], colours: dict[str, int]) -> str:
    """Returns the accuracies of one run; empty if it is no classifier."""
    if block is None:
        return ""
    value = block["figures"]
    points = words.nats(100 * value["forgetting"], 1)
    entries = [
        ("Right at the end", words.share(value["final"]), "held-out rows, mean over domains"),
        ("Learned", words.share(value["learned"]), "just after each task, mean"),
        ("Forgetting", points, "points, best minus end of earlier tasks; 0 is ideal"),
    ]
    if block["steps"]:
        entries += [
            (
                "Classes seen",
                words.share(value["a_last"]),
                f"at the last end; mean of all ends {words.share(value['a_avg'])}",
            ),
            ("Any time", words.share(value["a_auc"]), "the same at every evaluation, mean (A_AUC)"),
            ("Mean class", words.share(value["mean_class"]), "every class that has come counts the same"),
        ]
    lines = [Line(d, run.eval_steps, run.accuracy[d], colours[d], thin=True) for d in run.domains if d in run.accuracy]
    if block["steps"]:
        lines.append(Line("all classes seen", np.array(block["steps"]), np.array(block["seen"]), 15))
    chart = figure(lines, title="Accuracy", x="step", y="share right", spans=spans, zero=True, caption=_caption(block))
    return f"<h2>What is right</h2>{page.tiles(entries)}{chart}"


def comparison(groups: list[Any], control: Any, same_rows: bool) -> str:
    """Returns the accuracies of several runs; empty if none is a classifier.

    Args:
      groups: `jaxcl.report.compare.Group` each, with `accuracy`, name -> seed -> value.
      control: that of them that differences are taken to.
      same_rows: whether all were evaluated on the same held-out rows.
    """
    known = [g for g in groups if g.accuracy]
    if not known:
        return ""
    text, compared = "", same_rows and len(known) > 1
    for caption, figures, hint in zip(("Tasks", "Classes that have come"), (TASKS, STREAM), HINTS, strict=True):
        names = [name for name in figures if any(_finite(g, name) for g in known)]
        if not names:
            continue
        best = {name: _best(known, name) for name in names} if compared else {}
        rows = []
        for g in known:
            cells = []
            for name in names:
                cell = _cell(_interval(g, name), name, change=False)
                cells.append(f'<span class="good">{cell}</span>' if best.get(name) is g else cell)
            label = f'<span class="key c{groups.index(g) % 8}" aria-hidden="true"></span>{escape(g.label)}'
            rows.append([label, *cells, str(len(g.runs))])
        told = f"{hint} ± is the 95 % interval over seeds.{' Green: the best mean.' if compared else ''}"
        text += page.table(caption, ["method", *(figures[name][0] for name in names), "seeds"], rows, hint=told)
        if compared and control in known:
            text += _differences([g for g in known if g is not control], control, names, caption.lower())
    return f"<h2>What is right</h2>{text}"


def verdict(groups: list[Any], control: Any, same_rows: bool) -> list[str]:
    """Returns what the accuracies of several runs show, in sentences; none if they are no classifiers."""
    ranked = sorted((g for g in groups if _finite(g, "final")), key=lambda g: -_interval(g, "final").mean)
    if not ranked:
        return []
    if len(ranked) == 1 or not same_rows:
        each = (f"{escape(g.label)} {words.share_interval(_interval(g, 'final'))}" for g in ranked)
        return [f"{'; '.join(each)} of held-out rows right at the end, mean over domains."]
    best = ranked[0]
    gaps = [(g, seeds.paired(best.accuracy["final"], g.accuracy["final"])) for g in ranked[1:]]
    tied = words.join([escape(g.label) for g, gap in gaps if gap.n > 1 and not gap.excludes_zero])
    also = f" {tied} cannot be told apart from it." if tied else ""
    lost = _interval(best, "forgetting").mean
    forgot = "" if math.isnan(lost) else f", with {words.nats(100 * lost, 1)} points forgotten"
    sentences = [
        f"Most right at the end is <strong>{escape(best.label)}</strong>: "
        f"{words.share_interval(_interval(best, 'final'))} of held-out rows, mean over domains{forgot}.{also}"
    ]
    if best is not control and _finite(control, "final"):
        gap = seeds.paired(best.accuracy["final"], control.accuracy["final"])
        if gap.n:
            told = words.share_interval(gap, change=True)
            sentences.append(f"Against {escape(control.label)} that is {told} points, paired by seed.")
    return sentences


def _differences(others: list[Any], control: Any, names: list[str], what: str) -> str:
    rows = []
    for g in others:
        paired = {name: seeds.paired(g.accuracy[name], control.accuracy[name]) for name in names}
        cells = []
        for name, value in paired.items():
            text = _cell(value, name, change=True)
            better = (value.mean > 0) == FIGURES[name][1]
            cells.append(f'<span class="{"good" if better else "bad"}">{text}</span>' if value.excludes_zero else text)
        rows.append([escape(g.label), *cells, str(paired[names[0]].n)])
    hint = (
        "In percentage points, seed by seed, over the seeds that both have; coloured where the 95 % interval excludes "
        "zero: green is better than the control, red is worse."
    )
    heads = ["method", *(FIGURES[name][0] for name in names), "seeds"]
    caption = f"Paired differences in accuracy ({what}), method minus {escape(control.label)}"
    return page.table(caption, heads, rows, hint=hint)


def _caption(block: dict[str, Any]) -> str:
    text = "Share of held-out rows right."
    never = [one for one in block["classes"] if one["come"] is None]
    if block["steps"]:
        text += " All classes seen: over the rows of the classes that have come by then."
    return text + (f" {len(never)} classes never come and count nowhere." if never else "")


def _interval(g: Any, name: str) -> seeds.Interval:
    return seeds.interval(list(g.accuracy.get(name, {}).values()))


def _finite(g: Any, name: str) -> bool:
    return bool(g.accuracy) and math.isfinite(_interval(g, name).mean)


def _best(groups: list[Any], name: str) -> Any:
    known = [g for g in groups if _finite(g, name)]
    sign = 1 if FIGURES[name][1] else -1
    return max(known, key=lambda g: sign * _interval(g, name).mean) if len(known) > 1 else None


def _cell(value: seeds.Interval, name: str, *, change: bool) -> str:
    """Returns a figure in percent; changes and what is forgotten in points."""
    if FIGURES[name][1] or change or math.isnan(value.mean):
        return words.share_interval(value, change=change)
    return words.share_interval(value).replace(" %", "")


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else float("nan")
