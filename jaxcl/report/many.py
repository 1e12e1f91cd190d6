"""The report of several runs side by side."""

from __future__ import annotations

import math
from html import escape

import numpy as np

import jaxcl
from jaxcl import seeds
from jaxcl.report import accuracies, classified, page, settings, words
from jaxcl.report.chart import Line, figure
from jaxcl.report.compare import Comparison, Group, Matched
from jaxcl.report.run import Run
from jaxcl.report.single import spans

LOWER_IS_BETTER = ("learned", "retained", "final", "forgetting", "gap_depth", "gap_transient", "worst_case")
NAMES = {
    "learned": "learned",
    "retained": "retained",
    "final": "final",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "gap_depth": "gap depth",
    "gap_transient": "gap that came back",
    "worst_case": "worst case",
}


def body(comparison: Comparison) -> str:
    """Returns the content of the page of several runs."""
    sections = [
        header(comparison),
        accuracies.section(comparison),
        classified.comparison(comparison.groups, comparison.control, comparison.same_rows),
        results(comparison),
        controls(comparison),
        differences(comparison) if comparison.same_rows else "",
        curves(comparison),
        f"<footer>jaxcl {jaxcl.__version__}. Losses are in nats per token; ± is a 95 % confidence interval over seeds "
        "(Student t); definitions: jaxcl/forgetting.py, jaxcl/stability.py, jaxcl/seeds.py.</footer>",
    ]
    text = "\n".join(section for section in sections if section)
    return words.units(text, any(group.accuracy for group in comparison.groups))


def header(comparison: Comparison) -> str:
    """Returns title and verdict."""
    groups = comparison.groups
    counts = sorted({len(g.runs) for g in groups})
    seeds_text = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    tasks = next(iter(groups[0].runs.values())).tasks
    plural = "s" if counts != [1] else ""
    facts = f"{' → '.join(tasks)} · {seeds_text} seed{plural} each · control: {comparison.control.label}"
    title = (
        f"{len(groups)} methods side by side" if len(groups) > 1 else f"{groups[0].label}, {len(groups[0].runs)} seeds"
    )
    text = "".join(f"<p>{sentence}</p>" for sentence in verdict(comparison))
    return (
        f'<header><h1>{escape(title)}</h1><p class="sub">{escape(facts)}</p></header>'
        f'<section class="verdict" aria-label="Verdict">{text}</section>'
    )


def verdict(comparison: Comparison) -> list[str]:
    """Returns what the comparison shows, in sentences."""
    groups, sentences = comparison.groups, [settings.warning(comparison.differing)]
    going = [g.label for g in groups if not g.complete]
    if going:
        names = words.join([escape(label) for label in going])
        sentences.append(
            f"<strong>Some runs have not finished</strong> ({names}); they are judged by their finished tasks."
        )
    told = accuracies.verdict(comparison)
    told = told or classified.verdict(comparison.groups, comparison.control, comparison.same_rows)
    sentences += told
    known = [] if told else [g for g in groups if math.isfinite(g.intervals["final"].mean)]  # in nats
    together = _joint(known)
    ranked = sorted((g for g in known if g not in together), key=lambda g: g.intervals["final"].mean)
    if len(ranked) > 1 and comparison.same_rows:
        best, value = ranked[0], ranked[0].intervals
        tied = words.join([escape(label) for label in _tied(best, ranked[1:])])
        also = f" {tied} cannot be told apart from it." if tied else ""
        sentences.append(
            f"Best at the end is <strong>{escape(best.label)}</strong>: {words.nats(value['final'].mean)} nats per "
            f"token over all domains, with {words.nats(value['forgetting'].mean)} forgotten.{also}"
        )
        sentences.append(_against_control(comparison, best))
    for g in together:
        final = words.nats(g.intervals["final"].mean)
        sentences.append(f"{escape(g.label)}, which has everything as one task, ends at {final} nats.")
    for m in comparison.matched:
        sentences.append(_matched_sentence(m))
    if min(len(g.runs) for g in groups) == 1:
        sentences.append("Where there is a single seed there is no interval: differences may be chance.")
    return [sentence for sentence in sentences if sentence]


def _joint(groups: list[Group]) -> list[Group]:
    """Returns the groups with a single task, if others have several: neither learning nor forgetting compares."""
    lone = [g for g in groups if all(len(run.tasks) == 1 for run in g.runs.values())]
    return lone if len(lone) < len(groups) else []


def _against_control(comparison: Comparison, best: Group) -> str:
    control = escape(comparison.control.label)
    if best is comparison.control:
        return "No other method did better than the control."
    kept, cost = (comparison.differences[best.label][name] for name in ("forgetting", "learned"))
    if kept.n == 0:
        return f"It shares no seed with {control}, so no paired difference can be given."
    return (
        f"Against {control} it forgets {_change(kept, 'less', 'more')}, and its loss on newly learned tasks is "
        f"{_change(cost, 'lower', 'higher')}."
    )


def _change(value: seeds.Interval, below: str, above: str) -> str:
    half = "" if math.isnan(value.half_width) else f" ± {value.half_width:.3f}"
    return f"{abs(value.mean):.3f}{half} nats {above if value.mean > 0 else below}"


def _tied(best: Group, others: list[Group]) -> list[str]:
    """Returns the labels of the groups whose final loss cannot be told from that of the best one."""
    tied = []
    for g in others:
        value = seeds.paired(g.figures["final"], best.figures["final"])
        if value.n > 1 and not value.excludes_zero:
            tied.append(g.label)
    return tied


def _matched_sentence(m: Matched) -> str:
    label, rate = escape(m.group.label), f"{m.wanted_lr:.3g}"
    if m.control is None:
        return (
            f"<strong>{label} has no learning-rate-matched control.</strong> Reptile with keep={m.keep:g} is, at first "
            f"order, the same method at learning rate {rate}; run that without Reptile before crediting it."
        )
    told = []
    for name in ("final", "forgetting", "gap_depth"):
        value = seeds.paired(m.group.figures[name], m.control.figures[name])
        if value.excludes_zero:
            told.append(f"{NAMES[name]} {_change(value, 'lower', 'higher')}")
    if not told:
        return f"{label} and its control at the matched learning rate {rate} cannot be told apart."
    return f"{label} beside its control at the matched learning rate {rate}: {words.join(told)}; else no difference."


def results(comparison: Comparison) -> str:
    """Returns the table of means and intervals."""
    best, together = {}, _joint(comparison.groups)
    for name in ("learned", "final", "forgetting"):
        groups = [g for g in comparison.groups if g not in together and math.isfinite(g.intervals[name].mean)]
        means = {g.label: g.intervals[name].mean for g in groups}
        best[name] = min(means, key=lambda label: means[label]) if len(means) > 1 else None
    rows = []
    for i, g in enumerate(comparison.groups):
        value, cells = g.intervals, []
        for name in ("learned", "final", "forgetting", "gap_depth"):
            text = words.interval(value[name]) if name == "final" or g not in together else "–"
            cells.append(f'<span class="good">{text}</span>' if best.get(name) == g.label else text)
        total = [float(np.mean(list(g.tokens[kind].values()))) for kind in ("new", "replayed")]
        cells += [f'{words.count(total[0])}<br><span class="pm">+ {words.count(total[1])}</span>', str(len(g.runs))]
        rows.append([f'<span class="key c{i % 8}" aria-hidden="true"></span>{escape(g.label)}', *cells])
    heads = ["method", "learned", "final", "forgetting", "gap<br>depth"]
    hint = (
        "Learned: loss just after each task. Final: mean loss of all domains at the end. Forgetting: end minus best of "
        "the earlier tasks. Gap depth: the worst rise of an earlier task within a later stage. Green: lowest mean, "
        "without training on everything at once."
    )
    if any(g.right for g in comparison.groups):
        hint = f"Negative log-likelihood of right answers after each run's own thoughts, no accuracy. {hint}"
    return page.table("Results", [*heads, "tokens, new<br>+ replayed", "seeds"], rows, hint=hint)


def controls(comparison: Comparison) -> str:
    """Returns each Reptile group beside its learning-rate-matched control."""
    rows = []
    names = ("learned", "final", "forgetting", "gap_depth")
    for m in comparison.matched:
        rows.append([escape(m.group.label), f"{m.lr:.3g}", *(words.interval(m.group.intervals[n]) for n in names)])
        if m.control is None:
            missing = '<td class="text" colspan="4">not among these runs</td>'
            rows.append([f"control: without Reptile, lr × {m.keep:g}", f"{m.wanted_lr:.3g}", missing])
            continue
        values = m.control.intervals
        rows.append(
            [f"control: {escape(m.control.label)}", f"{m.wanted_lr:.3g}", *(words.interval(values[n]) for n in names)]
        )
        paired = [seeds.paired(m.group.figures[n], m.control.figures[n]) for n in names]
        rows.append(
            [
                "<strong>difference, paired by seed</strong>",
                "",
                *(_verdict_cell(v, n) for v, n in zip(paired, names, strict=True)),
            ]
        )
    heads = ["method", "learning<br>rate", *(NAMES[name] for name in names)]
    hint = (
        "At first order Reptile only multiplies the learning rate by keep. The control takes that rate without Reptile,"
        " so the difference is what the alignment of gradients is worth."
    )
    return page.table("Learning-rate-matched controls", heads, rows, hint=hint)


def differences(comparison: Comparison) -> str:
    """Returns paired differences of every group and the control."""
    names = ("learned", "final", "forgetting", "gap_depth", "worst_case")
    rows = [
        [escape(label), *(_verdict_cell(row[name], name) for name in names), str(row["final"].n)]
        for label, row in comparison.differences.items()
    ]
    caption = f"Paired differences, method minus {escape(comparison.control.label)}"
    hint = (
        "Seed by seed, over the seeds that both have; coloured where the 95 % interval excludes zero: green is better"
        " than the control, red is worse."
    )
    return page.table(caption, ["method", *(NAMES[name] for name in names), "seeds"], rows, hint=hint)


def curves(comparison: Comparison) -> str:
    """Returns mean loss curves with their intervals, one chart per domain."""
    first = next(iter(comparison.groups[0].runs.values()))
    charts, right = [], any(g.accuracy for g in comparison.groups)
    title, unit = ("Accuracy", "share right") if right else ("Loss", "nats per token")
    for domain in first.domains:
        lines = [line for i, g in enumerate(comparison.groups) if (line := _mean_line(g, domain, i, right)) is not None]
        if lines:
            chart = figure(lines, title=f"{title} on {domain}", x="step", y=unit, spans=spans(first), half=True)
            charts.append(chart)
    note = '<p class="hint">Mean over seeds; the band is the 95 % confidence interval at each evaluation.</p>'
    return "<h2>Curves</h2>" + note + page.pairs(charts) if charts else ""


def _mean_line(g: Group, domain: str, colour: int, right: bool) -> Line | None:
    """Returns the mean curve of accuracy or loss over the steps at which every seed was evaluated."""
    members = [(run, curves[domain]) for run in g.runs.values() if domain in (curves := _curves(run, right))]
    if not members:
        return None
    steps = members[0][0].eval_steps
    for run, _ in members[1:]:
        steps = np.intersect1d(steps, run.eval_steps)
    if not steps.size:
        return None
    values = np.stack([curve[np.isin(run.eval_steps, steps)] for run, curve in members])  # [seeds, N]
    spread = [seeds.interval(column) for column in values.T]
    band = None
    if len(members) > 1:
        band = (np.array([s.low for s in spread]), np.array([s.high for s in spread]))
    return Line(g.label, steps, np.array([s.mean for s in spread]), colour, band)


def _curves(run: Run, right: bool) -> dict[str, np.ndarray]:
    return run.accuracy if right else run.losses


def _verdict_cell(value: seeds.Interval, name: str) -> str:
    text = words.interval(value, sign=True)
    if not value.excludes_zero:
        return text
    better = (value.mean < 0) == (name in LOWER_IS_BETTER)
    return f'<span class="{"good" if better else "bad"}">{text}</span>'
