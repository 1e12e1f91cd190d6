"""The figures of a report in plain sentences and in cells of tables."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from jaxcl.report import inference
from jaxcl.report.figures import TOLERANCE
from jaxcl.seeds import Interval

NOTHING = "No task has been finished and measured yet, so nothing can be said about forgetting."


def nats(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Returns a figure with three decimals; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    shown = round(value, digits) or 0.0  # no minus before zero
    return f"{shown:{'+' if sign and shown else ''}.{digits}f}".replace("-", "−")


def interval(value: Interval, *, sign: bool = False) -> str:
    """Returns `mean ± half-width`, or the mean alone where one seed allows no interval."""
    if math.isnan(value.mean):
        return "–"
    half = "" if math.isnan(value.half_width) else f' <span class="pm">± {value.half_width:.3f}</span>'
    return nats(value.mean, sign=sign) + half


def count(value: float) -> str:
    """Returns a number of tokens: 850, 12.3 k, 4.10 M, 512 M."""
    return _scaled(value, ((1e9, " B"), (1e6, " M"), (1e3, " k")))


def measure(value: float, unit: str) -> str:
    """Returns a figure with its unit: 850 B, 1.23 MB, 310 GFLOP/s."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    return (
        _scaled(value, tuple((limit, f" {letter}{unit}") for limit, letter in prefixes)) if value >= 1 else f"0 {unit}"
    )


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for limit, unit in units:
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{0 if limit == 1 or scaled >= 100 else 1 if scaled >= 10 else 2}f}{unit}"
    return f"{value:,.0f}"


def speed(figures: dict[str, float], unit: str = "tokens") -> str:
    """Returns the speed of a typical step: tokens or rows, model arithmetic and its share of the peak, if known.

    Of several processes also how much longer the slowest is busy than the median one, and which that is.
    """
    tokens, arithmetic, share = (figures[name] for name in ("tokens_per_s", "model_flops_per_s", "mfu"))
    if math.isnan(tokens):
        return ""
    text = f"Median {count(tokens)} {unit} per second, counting targets trained on, replayed ones too."
    if not math.isnan(arithmetic):
        text += f" That is {measure(arithmetic, 'FLOP/s')} of model arithmetic"
        text += "." if math.isnan(share) else f", {percent(share, 1)} of the bfloat16 peak (MFU)."
    if math.isnan(skew := figures.get("skew", math.nan)):
        return text
    worst = f", most often process {figures['slowest']:.0f}" if skew > 1 else ""
    return f"{text} The slowest process was busy {skew:.2f} times as long as the median one{worst}."


def percent(part: float, whole: float) -> str:
    """Returns a share such as 25 %, 0.41 % or 130 %; a dash of nothing."""
    if not whole:
        return "–"
    value = 100 * part / whole
    return f"{value:,.0f} %" if value >= 99.5 else f"{value:.2g} %"


def share(value: float | None, digits: int = 1) -> str:
    """Returns an accuracy in percent, with one decimal; a dash for what was not measured."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def change(pair: dict[str, float], digits: int = 1) -> str:
    """Returns an accuracy before and after, `62 % → 71 %`, or the one of them that was measured."""
    known = [value for value in (pair["before"], pair["after"]) if not math.isnan(value)]
    return " → ".join(share(value, digits) for value in known) or "–"


def points(value: float | None, digits: int = 1) -> str:
    """Returns a difference of accuracies in percentage points, with its sign."""
    return nats(None if value is None else 100 * value, digits, sign=True)


def share_interval(value: Interval, *, change: bool = False) -> str:
    """Returns the mean of accuracies, or of changes of them in points, with its half-width where there is one."""
    half = "" if math.isnan(value.half_width) else f' <span class="pm">± {100 * value.half_width:.1f}</span>'
    return (points(value.mean) if change else share(value.mean)) + half


def thoughts(mode: str) -> str:
    """Returns what a mode of inference is called."""
    if not mode:
        return "mode not recorded"
    return "no thoughts" if mode == "none" else f"{mode} thoughts"


def guessing(table: dict[str, float]) -> str:
    """Returns what guessing is worth: `guessing by parity: 26 %`; empty if nobody guessed."""
    best = inference.best_guess(table)
    return f"guessing by {escape(best[0])}: {share(best[1], 0)}" if best else ""


def join(names: list[str]) -> str:
    """Returns `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def verdict(figures: dict[str, Any], replay: dict[str, Any]) -> list[str]:
    """Returns what happened in a run: what was learned, what was forgotten, what the boundaries did, what replay cost.

    Args:
      figures: of the run, see `jaxcl.report.figures`.
      replay: `config.stream.replay`, possibly empty.
    """
    if figures["inference"]:  # nats of an answer after the run's own thoughts would say little of what was forgotten
        begun = figures["complete"] or figures["inference"]["learned_by_rollouts"]
        waiting = "" if begun else "No step has learned by rollouts yet."
        sentences = [_progress(figures), *_answered(figures["inference"]), _unlearned(figures), waiting]
    elif figures["classified"] and figures["classified"]["steps"]:
        sentences = [_progress(figures), _classified(figures), _replay(figures, replay)]
    else:
        sentences = [_progress(figures), _forgotten(figures), _boundaries(figures), _replay(figures, replay)]
    return [sentence for sentence in sentences if sentence]


def _progress(figures: dict[str, Any]) -> str:
    if figures["complete"]:
        return ""
    of = f" of {figures['steps']:,}" if figures["steps"] else ""
    done, total = figures["finished_tasks"], len(figures["tasks"])
    state = "is still in progress" if figures["stopped"] is None else "was stopped by a signal"
    return (
        f"<strong>This run {state}</strong>: step {figures['step']:,}{of}, {done} of {total} "
        f"task{'s' if total != 1 else ''} finished. What follows is judged by the finished tasks."
    )


def units(text: str, rows: bool) -> str:
    """Returns a page as it is, or with rows in place of tokens: a classifier has no others."""
    return text.replace("nats per token", "nats per row").replace("Token ledger", "Row ledger") if rows else text


def _forgotten(figures: dict[str, Any]) -> str:
    k, values = figures["finished_tasks"], figures["figures"]
    if k == 0:
        return NOTHING
    names = [escape(name) for name in figures["judged_by"][:k]]
    if k == 1:
        loss = nats(values["learned"])
        return (
            f"After {names[0]} the loss is <strong>{loss}</strong> nats per token; "
            "with one task there is nothing to forget."
        )
    if math.isnan(values["forgetting"]):
        transfer = nats(values["backward_transfer"], sign=True)
        return (
            f"After {join(names)}, backward transfer is <strong>{transfer}</strong> "
            "nats per token; forgetting needs the evaluation before training, which was not measured."
        )
    lost = figures["per_task_forgetting"][: k - 1]
    worst = max(range(k - 1), key=lambda j: lost[j])
    after = figures["matrix"][k][worst]
    if values["forgetting"] < 0.005:
        return (
            f"After {join(names)}, <strong>nothing was forgotten</strong>: no earlier task is worse than at its best."
        )
    text = f"After {join(names)}, the model <strong>forgot {nats(values['forgetting'])} nats per token</strong> "
    text += "of what it had known at its best" if k == 2 else "on average of what it had known at its best"
    if k == 2:
        return f"{text}: {names[0]} went from {nats(after - lost[0])} to {nats(after)}."
    return f"{text}; {names[worst]} lost most, from {nats(after - lost[worst])} to {nats(after)}."


def _classified(figures: dict[str, Any]) -> str:
    """Returns what a classifier gets right of the classes that have come, and what it forgot of earlier tasks."""
    k, value = figures["finished_tasks"], figures["classified"]["figures"]
    if k == 0:
        return NOTHING
    text = (
        f"After {join([escape(name) for name in figures['judged_by'][:k]])}, <strong>{share(value['a_last'])}</strong> "
        f"of held-out rows of the classes that have come are right, mean over classes {share(value['mean_class'])}"
    )
    lost = figures["accuracy_matrix"]["per_task_forgetting"][: k - 1]
    if not lost or any(math.isnan(one) for one in lost):
        return f"{text}."
    worst = max(range(k - 1), key=lambda j: lost[j])
    if lost[worst] <= 0:
        return f"{text}; <strong>nothing was forgotten</strong>: no earlier task is worse than at its best."
    after = figures["accuracy_matrix"]["matrix"][k][worst]
    return (
        f"{text}. <strong>{100 * sum(lost) / len(lost):.1f} points were forgotten</strong>, mean over earlier tasks; "
        f"{escape(figures['judged_by'][worst])} lost most, from {share(after + lost[worst])} to {share(after)}."
    )


def _boundaries(figures: dict[str, Any]) -> str:
    gaps = [gap for gap in figures["gaps"] if gap["depth"] > TOLERANCE]
    if not figures["gaps"]:
        return ""
    if not gaps:
        return "No boundary opened a stability gap."
    gap = max(gaps, key=lambda g: g["depth"])
    stage, domain = escape(figures["tasks"][gap["stage"]]), escape(gap["domain"])
    text = (
        f"The deepest stability gap opened when {stage} began: {domain} became worse by "
        f"<strong>{nats(gap['depth'])}</strong> nats within {gap['peak']:,} steps"
    )
    if gap["recovery"] is not None:
        return f"{text} and was back after {gap['recovery']:,}."
    back = gap["transient"] / gap["depth"]
    until = "so far" if gap["open"] else "before the stage ended"
    return f"{text}; {percent(back, 1) if back >= 0.005 else 'nothing'} of that came back {until}."


def _replay(figures: dict[str, Any], replay: dict[str, Any]) -> str:
    kind, other = ("rows", "rows") if figures["classified"] else ("tokens", "text")
    new, old = figures["tokens"]["new"], figures["tokens"]["replayed"]
    if not new and not old:
        return ""
    if not old:
        return f"Nothing was replayed: all {count(new)} {kind} were new."
    share = f"Replay took {percent(old, new + old)} of training, {count(old)} of {count(new + old)} {kind}"
    if replay.get("mode") == "extend":
        return f"{share}: on top of the new ones, so {percent(old, new)} more compute for the same new {kind}."
    less = f"{percent(old, new + old)} less new {other}"
    return f"{share}: in place of new ones, so for the same compute the model saw {less}."


def _answered(block: dict[str, Any]) -> list[str]:
    """Returns what a run gets right now and what it got right before, for each domain in turn."""
    sentences, several = [], len(block["domains"]) > 1
    for domain, table in block["domains"].items():
        if (entry := table.get(block["mode"])) is None:
            continue
        pair, hints = entry["greedy"], [guessing(block["guessing"][domain])]
        text = f"{escape(domain)}, {escape(thoughts(block['mode']))}" if several else escape(thoughts(block["mode"]))
        text = f"{text[:1].upper()}{text[1:]}: " if not several else f"{text}: "
        if (n := block["problems"].get(domain)) is not None:
            hints.insert(0, f"{n:,} problems")
        told = f" ({'; '.join(filter(None, hints))})" if any(hints) else ""
        text += f"<strong>{change(pair, 0)}</strong> of held-out problems right{told}"
        guess = inference.best_guess(block["guessing"][domain])
        if guess and inference.now(pair) <= guess[1]:
            text += ", which is no better than guessing"
        sentences.append(f"{text}.{_sampled(entry['sample'])}")
    return sentences


def _sampled(sample: dict[str, dict[str, float]]) -> str:
    """Returns what sampling instead of the likeliest tokens gives: at the first try, and within the most."""
    parts = []
    for k in sorted(sample, key=int):
        if k == "1":
            parts.append(f"{change(sample[k], 0)} at the first try")
        elif k == max(sample, key=int):
            parts.append(f"{change(sample[k], 0)} within {k} tries")
    return f" Sampled: {', '.join(parts)}." if parts else ""


def _unlearned(figures: dict[str, Any]) -> str:
    """Returns what was forgotten in accuracy, over earlier domains that no later stage learns again."""
    lost = inference.forgotten(figures)
    if not lost or any(math.isnan(value) for _, value in lost.values()):
        return ""
    domain, (after, worst) = max(lost.items(), key=lambda item: item[1][1])
    if worst <= 0:
        return "<strong>Nothing was forgotten</strong>: no earlier domain is answered worse than at its best."
    most = " lost most:" if len(lost) > 1 else " went"
    return (
        f"Of what was known at its best, {escape(domain)}{most} from {share(after + worst, 0)} to {share(after, 0)} "
        f"of problems right: <strong>{100 * worst:.1f} points forgotten</strong>."
    )
