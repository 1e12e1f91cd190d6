"""The report of one run."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

import jaxcl
from jaxcl.report import certificates, classified, inference, origin, page, rollouts, words
from jaxcl.report.chart import Line, Span, figure
from jaxcl.report.figures import TOLERANCE, WINDOW, speed
from jaxcl.report.run import Run, readable

SOLVED = ("gamma", "bound")
STANDARD = ("step", "task", "loss", "lr", "grad_norm", "weight")  # columns that every method has
nats = words.nats


def body(run: Run, figures: dict[str, Any]) -> str:
    """Returns the content of the page of one run."""
    sections = [
        header(run, figures),
        classified.section(run, figures["classified"], spans(run), colours_of(run)),
        rollouts.numbers(run, figures) if figures["inference"] else numbers(figures),
        rollouts.section(run, figures, spans(run), colours_of(run)),
        certificates.section(figures),
        learning(run),
        matrix(run, figures),
        gaps(run, figures),
        alignment(run, figures),
        origin.section(run),
        machinery(run),
        particulars(run),
        events(run),
        hours(run),
        appendix(run),
    ]
    return words.units("\n".join(section for section in sections if section), bool(figures["classified"]))


def header(run: Run, figures: dict[str, Any]) -> str:
    """Returns title, state and verdict."""
    going = "in progress" if run.stopped is None else f"stopped at step {run.stopped:,}"
    state = '<span class="pill">complete</span>' if run.complete else f'<span class="pill going">{going}</span>'
    described, branch = readable(run.config), run.about.get("branch")
    facts = [
        *([described] if described != run.label else []),
        " → ".join(run.tasks),
        f"{run.step:,} steps",
        f"seed {run.seed}",
        f"branched off {branch['source']} at step {branch['step']}" if branch else "",
    ]
    sentences = words.verdict(figures, _replay(run))
    return (
        f"<header><h1>{escape(run.label)}{state}</h1>"
        f'<p class="sub">{escape(" · ".join(filter(None, facts)))}</p></header>'
        f'<section class="verdict" aria-label="Verdict">{"".join(f"<p>{s}</p>" for s in sentences)}</section>'
    )


def numbers(figures: dict[str, Any]) -> str:
    """Returns the main figures as tiles."""
    value = figures["figures"]
    return page.tiles(
        [
            ("Learned", nats(value["learned"]), "loss just after each task, mean"),
            ("Retained", nats(value["retained"]), "loss of all tasks at the end, mean"),
            ("Forgetting", nats(value["forgetting"]), "end minus best, earlier tasks; 0 is ideal"),
            ("Backward transfer", nats(value["backward_transfer"], sign=True), "negative: earlier tasks got worse"),
            (
                "Forward transfer",
                nats(value["forward_transfer"], sign=True),
                "positive: earlier tasks helped later ones",
            ),
            ("Worst case", nats(value["worst_case"]), "current task, and the worst moment of the others"),
        ]
    )


def learning(run: Run) -> str:
    """Returns the loss curves of all domains."""
    colours = colours_of(run)
    lines = [Line(d, run.eval_steps, run.losses[d], colours[d], thin=d not in run.own) for d in run.domains]
    caption = (
        "Held-out loss, nats per token. Each shaded stretch is one task; a line that rises there is being forgotten."
    )
    if run.thinking:
        caption = (
            "Of problems: negative log-likelihood of the right answer after the run's own greedy thoughts, nats per "
            "answer token. It can rise while accuracy does not fall: what was forgotten is told in accuracy."
        )
    return "<h2>What was learned and forgotten</h2>" + figure(
        lines, title="Loss of every domain", x="step", y="nats per token", spans=spans(run), caption=caption
    )


def matrix(run: Run, figures: dict[str, Any]) -> str:
    """Returns the evaluation matrix as a heat table, with forgetting as its last row."""
    R, k = run.matrix, figures["finished_tasks"]
    if not np.isfinite(R).any():
        return ""
    low, high = np.nanmin(R), np.nanmax(R)
    rows = []
    for t in range(len(run.tasks) + 1):
        if not np.isfinite(R[t]).any():
            continue
        cells = [_heat(R[t, j], low, high, own=j == t - 1) for j in range(len(run.tasks))]
        rows.append(["before training" if t == 0 else f"after {escape(run.tasks[t - 1])}", *cells])
    if k > 1:
        lost = figures["per_task_forgetting"]
        rows.append(
            ["<strong>forgetting</strong>", *(nats(v) for v in lost[: k - 1]), *["–"] * (len(run.tasks) - k + 1)]
        )
    if (bits := figures["bits_per_byte"]) and k:
        rows.append(["now, bits per byte", *(nats(bits.get(domain)) for domain in run.own)])
    if (right := figures["accuracy"]) and k:
        rows.append(["now, accuracy", *(nats(right.get(domain)) for domain in run.own)])
    heads = [f"{escape(d)}{'' if d == t else f'<br>({escape(t)})'}" for d, t in zip(run.own, run.tasks, strict=True)]
    hint = (
        "Loss in nats per token on each domain (columns) at each boundary (rows). Framed: just learned. "
        "Stronger colour: worse."
    )
    text = page.table("Evaluation matrix", ["", *heads], rows, hint=hint)
    text += rollouts.matrix(figures, heads, [escape(name) for name in run.tasks])
    others = [
        [escape(row["domain"]), nats(row["first"]), nats(row["last"]), nats(row["last"] - row["first"], sign=True)]
        for row in figures["others"]
    ]
    return text + page.table("Domains that no task trains on", ["domain", "first", "last", "change"], others)


def gaps(run: Run, figures: dict[str, Any]) -> str:
    """Returns stability gaps as curves relative to the boundary and as a table."""
    if not figures["gaps"]:
        return ""
    lines, rows = [], []
    for i, gap in enumerate(figures["gaps"]):
        stage, domain = run.tasks[gap["stage"]], gap["domain"]
        start, end = run.boundaries[gap["stage"] - 1], run.boundaries.get(gap["stage"], int(run.eval_steps[-1]))
        inside = (run.eval_steps >= start) & (run.eval_steps <= end)
        curve = run.losses[domain]
        reference = curve[run.eval_steps == start][0]
        lines.append(Line(f"{domain} during {stage}", run.eval_steps[inside] - start, curve[inside] - reference, i))
        back = "not yet" if gap["open"] else "never"
        if gap["recovery"] is not None:
            back = f"{gap['recovery']:,} steps" if gap["recovery"] else "no gap"
        at = "–" if gap["peak"] is None else f"{gap['peak']:,}"
        lasting = (
            f'<span class="{"bad" if gap["lasting"] > TOLERANCE else "good"}">{nats(gap["lasting"], sign=True)}</span>'
        )
        entry = [
            nats(gap["depth"]),
            at,
            back,
            nats(gap["transient"]),
            lasting,
            f"{gap['area']:.1f}",
            str(gap["evaluations"]),
        ]
        rows.append([f"{escape(domain)} during {escape(stage)}", *entry])
    heads = [
        "domain and stage",
        "depth",
        "worst at step",
        "recovered after",
        "came back",
        "left at the end",
        "area",
        "points",
    ]
    value = figures["figures"]
    hint = (
        f"Depth: the worst rise above the loss at the boundary, nats. Recovered: back within {TOLERANCE} of it. "
        f"Area: nats × steps. Largest change within {WINDOW} evaluations, mean over tasks: "
        f"{nats(value['windowed_forgetting'])} worse (WF), "
        f"{nats(value['windowed_plasticity'])} better (WP). Mean loss at any time: {nats(value['average_anytime'])}."
    )
    chart = figure(
        lines,
        title="Change since the boundary",
        x="steps since the stage began",
        y="nats above the boundary",
        zero=True,
    )
    return "<h2>Stability gaps</h2>" + chart + page.table("Gap of each earlier domain", heads, rows, hint=hint)


def alignment(run: Run, figures: dict[str, Any]) -> str:
    """Returns the cosines between the gradients of the domains at each boundary, as small heat tables."""
    tables = []
    for entry in figures["alignment"]:
        k = entry["boundary"]
        rows = [
            [escape(domain), *(_cosine(value, own=i == j) for j, value in enumerate(entry["cosines"][i]))]
            for i, domain in enumerate(run.domains)
        ]
        caption = "Before training" if k < 0 else f"After {escape(run.tasks[k])}"
        caption += f" (mean of the pairs {nats(entry['mean'], 2, sign=True)})"
        tables.append(page.table(caption, ["", *map(escape, run.domains)], rows))
    if not tables:
        return ""
    hint = (
        "Cosines between the gradients of the training loss on held-out rows of each domain. Positive (blue): a small "
        "step on one domain lowers the loss of the other. Negative (orange): it raises it."
    )
    return f'<h2>Do the domains pull together?</h2><p class="hint">{hint}</p>{page.pairs(tables)}'


def machinery(run: Run) -> str:
    """Returns training loss, learning rate, gradient norm and speed."""
    train, shaded = run.train, spans(run)
    if not train:
        return ""

    def one(columns: dict[str, np.ndarray], name: str, title: str, unit: str, colour: int, **more: Any) -> str:
        if name not in columns:
            return ""
        line = Line("", columns["step"], columns[name], colour, thin=True)
        return figure([line], title=title, x="step", y=unit, spans=shaded, half=True, **more)

    rolled, paired = inference.rolled(run), "dpo/accuracy" in train
    objective = "objective" if rolled or paired else "nats per token"
    meant = "Where stages learn by rollouts: the objective, which is no likelihood and need not fall." if rolled else ""
    meant += " Where they learn from pairs: 0.69 before anything is preferred." if paired else ""
    unit = run.about.get("facts", {}).get("unit", "tokens")
    return "<h2>How the training went</h2>" + page.pairs(
        [
            one(train, "loss", "Training loss", objective, 0, caption=meant.strip()),
            one(train, "lr", "Learning rate", "learning rate", 2, zero=True),
            one(train, "grad_norm", "Gradient norm", "norm", 3, zero=True),
            one(
                run.speed,
                "tokens_per_s",
                "Throughput",
                f"{unit} per second",
                5,
                zero=True,
                caption=words.speed(speed(run), unit),
            ),
        ]
    )


def particulars(run: Run) -> str:
    """Returns the metrics that the method itself reports, as small curves if they vary, and what it solved for."""
    known = (*STANDARD, *(rollouts.COLUMNS if inference.rolled(run) else ()))
    columns = {n: c for n, c in run.train.items() if n not in known and not n.startswith("guard/")}
    figures = [
        figure(
            [Line("", run.train["step"], column, i, thin=True)], title=name, x="step", y="", spans=spans(run), half=True
        )
        for i, (name, column) in enumerate(columns.items())
        if np.unique(column[np.isfinite(column)]).size > 1
    ]
    text = (page.pairs(figures) if figures else "") + solves(run)
    return f"<h2>What the method reports</h2>{text}" if text else ""


def solves(run: Run) -> str:
    """Returns how the head was solved for at the end of each task; empty if it was learned by steps."""
    if not run.solves:
        return ""
    rows = [
        [escape(run.tasks[k]), f"{run.boundaries[k]:,}", *(f"{known[n]:.3g}" if n in known else "" for n in SOLVED)]
        for k, known in sorted(run.solves.items())
    ]
    hint = "Bound on the relative error of the weights of the head: from 1 on nothing is known of them."
    return page.table("The head, solved for at the end of each task", ["task", "step", *SOLVED], rows, hint=hint)


def events(run: Run) -> str:
    """Returns what happened besides training."""
    rows = [
        [f"{event['step']:,}", f'<td class="text">{escape(str(event.get("event", "")))}</td>',
         f'<td class="text">{escape(str(event.get("message", "")))}</td>']
        for event in run.events
    ]  # fmt: skip
    return page.table("Events", ["step", *map(page.text_head, ("event", "message"))], rows)


def hours(run: Run) -> str:
    """Returns where the time went."""
    if run.goodput is None or not run.goodput["total_s"]:
        return ""
    total = run.goodput["total_s"]
    rows = [
        [escape(name), f"{value:,.1f}", f"{100 * value / total:.1f}"] for name, value in run.goodput["seconds"].items()
    ]
    count = sum(run.goodput["failures"].values())
    hint = (
        f"Attempts: {run.goodput['attempts']}, failures: {count}, steps taken again: {run.goodput['repeated_steps']}. "
        "Productive are training steps whose progress survived; start includes compiling; down lies between attempts."
    )
    return page.table("Where the time went", ["class", "seconds", "%"], rows, hint=hint)


def appendix(run: Run) -> str:
    """Returns configuration and version."""
    text = escape(json.dumps(run.config, indent=2, sort_keys=True, ensure_ascii=False))
    facts = {k: v for k, v in run.about.get("facts", {}).items() if k not in ("sources", "classes")}  # shown elsewhere
    facts["versions"] = run.about.get("versions")
    rows = [
        [escape(str(name)), f'<td class="text">{escape(_plain(value))}</td>'] for name, value in facts.items() if value
    ]
    return (
        f"{page.table('Size, machine and versions', ['', ''], rows)}"
        f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
        f"<footer>jaxcl {jaxcl.__version__}. Losses are in nats per token unless said otherwise; definitions: "
        "jaxcl/forgetting.py, jaxcl/stability.py.</footer>"
    )


def spans(run: Run) -> list[Span]:
    """Returns the stages as stretches of the step axis."""
    begin, found = run.boundaries.get(-1, 0), []
    for k, name in enumerate(run.tasks):
        if begin >= run.step:
            break
        end = run.boundaries.get(k, run.step)
        found.append(Span(name, begin, end))
        begin = end
    return found


def colours_of(run: Run) -> dict[str, int]:
    """Returns a colour for each domain; those that no task trains on come last in the palette."""
    return {domain: i if domain in run.own else 7 - (i - len(set(run.own))) % 8 for i, domain in enumerate(run.domains)}


def _heat(value: float, low: float, high: float, *, own: bool) -> str:
    if not np.isfinite(value):
        return "<td>–</td>"
    share = 0 if high == low else 60 * (value - low) / (high - low)
    return f'<td class="heat{" own" if own else ""}" style="--share:{share:.0f}%">{nats(value)}</td>'


def _cosine(value: float, *, own: bool) -> str:
    if own or not np.isfinite(value):
        return f'<td class="pm">{"1" if own else "–"}</td>'
    side = " ally" if value > 0 else ""
    return f'<td class="heat{side}" style="--share:{60 * min(abs(value), 1):.0f}%">{nats(value, 2, sign=True)}</td>'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _replay(run: Run) -> dict[str, Any]:
    stream = run.config.get("stream")
    replay = stream.get("replay") if isinstance(stream, dict) else None
    return replay if isinstance(replay, dict) else {}
