"""Section of the report of a run that learns by rollouts: rewards, accuracies, modes of inference, entropy of thoughts.

Every number is an accuracy or is said to be none; what guessing is worth stands beside what was learned.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from jaxcl.report import inference, page, words
from jaxcl.report.chart import Line, Span, figure
from jaxcl.report.run import Run

COLUMNS = ("reward", "solved", "signal", "thoughts", "stopped", "ended", "busy", "failed", "length", "entropy")
RECENT = 10  # steps with rollouts over which a recent mean is taken


def section(run: Run, figures: dict[str, Any], spans: list[Span], colours: dict[str, int]) -> str:
    """Returns the whole section; empty for runs without rollouts and without modes of inference."""
    block = figures["inference"]
    parts = [rewards(run, spans)]
    if block:
        parts += [
            accuracy(run, block, spans, colours),
            *(modes(run, block, domain) for domain in block["domains"]),
            profiles(block),
            drift(block),
        ]
    parts.append(sampling(run, spans))
    text = "".join(parts)
    return f"<h2>Rollouts</h2>{text}" if text else ""


def numbers(run: Run, figures: dict[str, Any]) -> str:
    """Returns the main figures as tiles: accuracies, mean over domains, with the run's own mode of inference."""
    block, lost = figures["inference"], inference.forgotten(figures)
    own, ks = escape(words.thoughts(block["mode"])), inference.counts(block)
    entries = [("Right", _tile(block, "greedy"), f"greedy, {own}{_earlier(block, 'greedy')}")]
    for k in dict.fromkeys([*ks[:1], *ks[-1:]]):
        entries.append((f"pass@{k}", _tile(block, k), f"sampled{_earlier(block, k)}"))
    guesses = [best for table in block["guessing"].values() if (best := inference.best_guess(table))]
    if guesses and len(guesses) == len(block["domains"]):
        names = words.join(list(dict.fromkeys(escape(name) for name, _ in guesses)))
        entries.append(("Guessing", words.share(float(np.mean([v for _, v in guesses]))), f"by {names}"))
    if lost:
        average = float(np.mean([value for _, value in lost.values()]))
        hint = "points of accuracy, best minus end, earlier domains; 0 is ideal"
        entries.append(("Forgetting", words.nats(100 * average, 1), hint))
    if np.isfinite(signal := recent(run, "signal")):
        entries.append(("Signal", words.share(signal, 0), f"groups that teach something, last {RECENT} steps"))
    return page.tiles(entries)


def recent(run: Run, column: str) -> float:
    """Returns the mean of a column over the newest steps that have it; NaN if none has."""
    values = run.train.get(column, np.array([]))
    values = values[np.isfinite(values)][-RECENT:]
    return float(values.mean()) if values.size else float("nan")


def rewards(run: Run, spans: list[Span]) -> str:
    """Returns the curves of reward, solved and signal."""
    caption = (
        "Of the rollouts of each step, on training problems. Reward: mean. Solved: problems with a right answer. "
        "Signal: groups in which some answer is worth more or less than expected; the others teach nothing."
    )
    failed = run.train.get("failed", np.array([]))
    if count := int(np.nansum(failed)):
        caption += f" {count:,} answer{'s' if count != 1 else ''} could not be verified and got no reward."
    return figure(
        _lines(run.train, {"reward": "reward", "solved": "solved", "signal": "signal"}),
        title="Rewards",
        x="step",
        y="mean reward; share",
        spans=spans,
        zero=True,
        caption=caption,
    )


def accuracy(run: Run, block: dict[str, Any], spans: list[Span], colours: dict[str, int]) -> str:
    """Returns the accuracy of every domain over the steps, with guessers as dashed lines."""
    domains = [d for d in block["domains"] if d in run.accuracy]
    lines = [Line(d, run.eval_steps, run.accuracy[d], colours[d]) for d in domains]
    ends = run.eval_steps[[0, -1]].astype(float)
    for domain in domains:
        for name, value in block["guessing"][domain].items():
            label = f"{domain}: {name}" if len(domains) > 1 else name
            lines.append(Line(label, ends, np.full(2, value), colours[domain] % 8 + 8, thin=True))
    own = escape(words.thoughts(block["mode"]))
    caption = f"Share of held-out problems right, greedy, {own}. {_size(block, domains)}"
    if len(lines) > len(domains):
        caption += " Dashed: guessers that do not reason; only what is above them was learned."
    return figure(lines, title="Accuracy", x="step", y="share right", spans=spans, zero=True, caption=caption.strip())


def modes(run: Run, block: dict[str, Any], domain: str) -> str:
    """Returns the table of a domain: every mode of inference, greedy and sampled, with the change."""
    table = block["domains"][domain]
    ks = sorted({k for entry in table.values() for k in entry["sample"]}, key=int)
    nothing = {"before": float("nan"), "after": float("nan")}
    rows = []
    for mode, entry in table.items():
        name = escape(words.thoughts(mode))
        name = f"<strong>{name}</strong>" if mode == block["mode"] else name
        if entry["step"] != block["step"]:
            name += f'<br><span class="pm">at step {entry["step"]:,}</span>'
        rows.append([name, _pair(entry["greedy"]), *(_pair(entry["sample"].get(k, nothing)) for k in ks)])
    guesses = [
        f"{escape(name)} {words.share(value)}"
        for name, value in block["guessing"][domain].items()
        if np.isfinite(value)
    ]
    hint = (
        "Share of held-out problems right. Greedy: the likeliest tokens. pass@k: at least one of k sampled chains "
        f"ends in the right answer. Small: change since before {escape(block['since'])}, in percentage points"
    )
    hint += "." if any(_known(entry["greedy"]) for entry in table.values()) else "; there is none yet."
    hint += f" Bold: the mode that the run learns with. {_size(block, [domain])}"
    hint += f" Guessing: {words.join(guesses)}." if guesses else " What guessing is worth was not recorded."
    caption = "Inference" if len(block["domains"]) == 1 else f"Inference: {escape(domain)}"
    return page.table(caption, ["mode", "greedy", *(f"pass@{k}" for k in ks)], rows, hint=hint)


def profiles(block: dict[str, Any]) -> str:
    """Returns the entropy along sampled chains, one chart per domain, if chains have more than one thought."""
    charts = []
    for domain, table in block["entropy"].items():
        lines = [
            Line(mode, np.arange(1, len(line) + 1), np.array(line), i)
            for i, (mode, line) in enumerate(table.items())
            if len(line) > 1
        ]
        title = "Entropy of the next token" if len(block["entropy"]) == 1 else f"Entropy of the next token: {domain}"
        charts.append(figure(lines, title=title, x="thought", y="nats", zero=True, half=True))
    if not any(charts):
        return ""
    hint = (
        "Mean entropy of the distribution that each thought was sampled from, newest evaluation at a boundary. Near 0 "
        "nothing is left to choose, and every sample thinks the same."
    )
    return f'{page.pairs(list(filter(None, charts)))}<p class="hint">{hint}</p>'


def drift(block: dict[str, Any]) -> str:
    """Returns the likelihood of right answers under every mode."""
    found = block["drift"]
    names = dict.fromkeys(mode for table in found.values() for mode, pair in table.items() if _any(pair))
    nothing = {"before": float("nan"), "after": float("nan")}
    rows = [
        [escape(words.thoughts(mode)), *(_nats_pair(table.get(mode, nothing)) for table in found.values())]
        for mode in names
    ]
    hint = (
        "Negative log-likelihood of the right answers after greedy thoughts of each mode, nats per answer token; lower "
        f"is likelier. Small: change since before {escape(block['since'])}. It can rise while accuracy does not fall."
    )
    return page.table("Drift of right answers", ["mode", *map(escape, found)], rows, hint=hint)


def sampling(run: Run, spans: list[Span]) -> str:
    """Returns small charts of the chains that were drawn and of the time they took."""
    train, clock = run.train, run.speed
    busy = recent(run, "busy")
    idle = f"Slots in use: {words.share(busy, 0)} of the last {RECENT} steps." if np.isfinite(busy) else ""
    specs = [
        (train, {"length": "", "thoughts": "thoughts"}, "Length of the rollouts", "mean number", ""),
        (train, {"entropy": ""}, "Entropy of the rollouts", "nats per token", "Estimated from log-probabilities."),
        (train, {"stopped": "stopped", "ended": "ended", "busy": "busy"}, "Ends of the rollouts", "share", idle),
        (clock, {"sample_s": "sampling", "verify_s": "verifying"}, "Time for rollouts", "seconds per step", ""),
    ]
    charts = []
    for columns, names, title, unit, caption in specs:
        shown = {key: name or ("tokens" if key == "length" else "") for key, name in names.items()}
        lines = _lines(columns, shown)
        charts.append(figure(lines, title=title, x="step", y=unit, spans=spans, zero=True, half=True, caption=caption))
    return page.pairs(list(filter(None, charts))) if any(charts) else ""


def matrix(figures: dict[str, Any], heads: list[str], names: list[str]) -> str:
    """Returns accuracies at the boundaries with forgetting as the last row, of runs with several tasks.

    Args:
      figures: of the run.
      heads: the tasks' domains, as HTML.
      names: the tasks, as HTML.
    """
    right = figures["accuracy_matrix"]
    if not right or len(names) < 2:
        return ""
    rows = []
    for t, row in enumerate(right["matrix"]):
        if np.isfinite(row).any():
            rows.append([f"after {names[t - 1]}" if t else "before training", *(words.share(v) for v in row)])
    lost = right["per_task_forgetting"]
    if len(lost) > 1:
        cells = [words.nats(100 * value, 1) for value in lost[:-1]]
        rows.append(["<strong>forgetting, points</strong>", *cells, *["–"] * (len(names) - len(cells))])
    hint = "Share right on each domain (columns) at each boundary (rows). Forgetting: best minus end."
    return page.table("Accuracy at the boundaries", ["", *heads], rows, hint=hint)


def _lines(columns: dict[str, np.ndarray], names: dict[str, str]) -> list[Line]:
    present = [(key, name) for key, name in names.items() if key in columns]
    return [Line(name, columns["step"], columns[key], i, thin=True) for i, (key, name) in enumerate(present)]


def _size(block: dict[str, Any], domains: list[str]) -> str:
    """Returns how many problems an accuracy is of, and how far chance alone moves one."""
    known = {d: block["problems"][d] for d in domains if block["problems"].get(d)}
    if not known:
        return "How many problems there are was not recorded."
    least = min(known.values())
    told = words.join([f"{n:,} problems" + (f" of {escape(d)}" if len(known) > 1 else "") for d, n in known.items()])
    error = 1.96 * 0.5 / least**0.5  # of a binomial share at its widest
    return f"{told}: a share near 50 % is known to ± {100 * error:.1f} points (95 %)."


def _known(pair: dict[str, float]) -> bool:
    return bool(np.isfinite([pair["before"], pair["after"]]).all())


def _any(pair: dict[str, float]) -> bool:
    return bool(np.isfinite([pair["before"], pair["after"]]).any())


def _pair(pair: dict[str, float]) -> str:
    if not _known(pair):
        return words.share(inference.now(pair))
    change = pair["after"] - pair["before"]
    return f'{words.share(pair["after"])}<br><span class="pm">{words.points(change)}</span>'


def _nats_pair(pair: dict[str, float]) -> str:
    if not _known(pair):
        return words.nats(inference.now(pair))
    change = words.nats(pair["after"] - pair["before"], sign=True)
    return f'{words.nats(pair["after"])}<br><span class="pm">{change}</span>'


def _tile(block: dict[str, Any], measure: str) -> str:
    return words.share(inference.mean(block, measure, "now"))


def _earlier(block: dict[str, Any], measure: str) -> str:
    before, after = (inference.mean(block, measure, when) for when in ("before", "after"))
    return f"; {words.share(before)} before {escape(block['since'])}" if np.isfinite([before, after]).all() else ""
