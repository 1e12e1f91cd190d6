"""Section of the report of a run with boxes of weights: what was promised for every task, and whether it was kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from jaxcl.report import page, words
from jaxcl.report.run import Run


def of(run: Run) -> dict[str, Any] | None:
    """Returns `compared` of a run; None of one without boxes."""
    return compared(run.tasks, run.own, run.certificates) if run.certificates else None


def compared(tasks: Sequence[str], own: Sequence[str], records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what was certified of each task when it was learned, and what is now.

    For every task that is over: `promised` is the certified accuracy of its box when it was learned, `just_after` the
    accuracy of the deployed network then and `deployed` now, `now` the certified accuracy of what the ledger has left
    of the box, `kept` whether deployed >= promised; None of what was not measured, or promised. `kept` of the whole is
    None unless every task that is over was promised something.

    Args:
      tasks: names.
      own: the domain of each.
      records: boundary -> domain -> see `jaxcl.certify.make`; the last is now.
    """
    last = records[max(records)]
    found = []
    for name, domain in zip(tasks, own, strict=True):
        entry = last.get(domain)
        if not entry or not entry["over"]:
            continue
        first = next((one[domain] for _, one in sorted(records.items()) if one.get(domain, {}).get("over")), entry)
        told = {"task": name, "domain": domain, "promised": first["promised"], "just_after": first["deployed"]}
        told |= {"deployed": entry["deployed"], "now": entry["promised"]}
        told["kept"] = None if told["promised"] is None else told["deployed"] >= told["promised"]
        told |= {key: first.get(key) for key in ("interval", "affine", "joint")}
        told |= {f"{key}_now": entry.get(key) for key in ("interval", "affine", "joint")}
        told |= {key: first[key] for key in ("radius", "affine_radius", "kept_radius")}
        told |= {key: entry.get(key) for key in ("clipped", "guessed", "guessed_interval")}
        found.append(told)
    whole = bool(found) and all(one["promised"] is not None for one in found)
    return {
        "tasks": found,
        "kept": all(one["kept"] for one in found) if whole else None,
        "deployed": _mean(one["deployed"] for one in found),
        "promised": _mean(one["promised"] for one in found) if whole else None,
        "guessed": _mean(one["guessed"] for one in found if one["guessed"] is not None),
    }


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def section(figures: Mapping[str, Any]) -> str:
    """Returns the section; empty of a run without boxes or without a task that is over."""
    block = figures["certificates"]
    if not block or not block["tasks"]:
        return ""
    rows = []
    for one in block["tasks"]:
        kept = "–" if one["kept"] is None else mark(one["kept"])
        shares = (one["promised"], one["deployed"], one["now"], one["interval"], one["affine"], one["joint"])
        radius, tight = (float("nan") if one[key] is None else one[key] for key in ("radius", "affine_radius"))
        ratio = tight / radius if radius else float("nan")
        rows.append([escape(one["task"]), *(_share(x) for x in shares[:3]), kept, *(_share(x) for x in shares[3:])])
        rows[-1] += [f"{tight:.3g}", f"{ratio:.2f}", _share(one["clipped"])]
    heads = ["task", "promised", "accuracy now", "certified now", "kept", "by intervals", "by affine forms", "jointly"]
    heads += ["radius", "of that by intervals", "clipped"]
    hint = (
        "Promised: share of held-out rows that every network in the box of the task gets right, when the task was "
        "learned; the deployed network never leaves that box. Certified now: of what the ledger has left of it. By "
        "intervals, by affine forms, radius (of a weight, mean): of the box that the generator made at that time, "
        "before the ledger cut it. Jointly: of its networks, whose weights depend on each other. Clipped: weights that "
        "the ledger keeps from moving now."
    )
    return f"<h2>What was promised, and kept</h2>{verdict(block)}" + page.table("Certificates", heads, rows, hint=hint)


def verdict(block: Mapping[str, Any]) -> str:
    """Returns one sentence on the promises, and one on guessing the task."""
    if block["kept"] is None:
        text = "Nothing is guaranteed: the run keeps no ledger, or one that is not finite."
    elif block["kept"]:
        text = "Every promise is kept: no task is solved worse than was certified when it was learned."
        if none := [one["task"] for one in block["tasks"] if not one["promised"]]:
            text += f" But nothing could be promised of {words.join(none)}: no row was certified."
    else:
        text = "A promise is broken, which must not happen: see the table."
    told = "" if block["guessed"] is None else f" Without being told the task: {_share(block['guessed'])} right."
    return f"<p>{text}{told}</p>"


def mark(kept: bool) -> str:
    """Returns a mark for a promise."""
    return f'<span class="{"good" if kept else "bad"}">{"yes" if kept else "no"}</span>'


def _share(value: float | None) -> str:
    return "–" if value is None else words.share(value)
