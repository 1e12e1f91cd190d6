"""Several runs side by side: groups of seeds, intervals, paired differences and matched controls."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl import seeds
from jaxcl.report import classified, inference, settings
from jaxcl.report.run import Run, parts, readable
from jaxcl.schema import UserError, nearest

FIGURES = (
    "learned",
    "retained",
    "final",
    "forgetting",
    "backward_transfer",
    "gap_depth",
    "gap_transient",
    "worst_case",
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    label: str
    runs: dict[int, Run]  # by seed
    figures: dict[str, dict[int, float]]  # name -> seed -> value
    tokens: dict[str, dict[int, float]]
    right: dict[tuple[str, str, str], dict[int, float]]  # keys of `inference.newest` -> seed -> accuracy
    accuracy: dict[str, dict[int, float]]  # of classifiers: name, as in `classified` -> seed -> value

    @property
    def intervals(self) -> dict[str, seeds.Interval]:
        """Mean and interval of each figure."""
        return {name: seeds.interval(list(values.values())) for name, values in self.figures.items()}

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of any of them."""
        return next(iter(self.runs.values())).config

    @property
    def complete(self) -> bool:
        """Whether all of them have finished."""
        return all(run.complete for run in self.runs.values())


@dataclass(frozen=True)
class Matched:
    """A group with Reptile, and the plain group whose learning rate equals its own after the shrinking."""

    group: Group
    keep: float
    lr: float  # peak learning rate of the group
    control: Group | None  # None if no run has it

    @property
    def wanted_lr(self) -> float:
        """The learning rate that a control must have."""
        return self.keep * self.lr


@dataclass(frozen=True)
class Comparison:
    """Everything the page of several runs is made from."""

    groups: list[Group]
    control: Group
    differences: dict[str, dict[str, seeds.Interval]]  # label -> figure -> group minus control
    matched: list[Matched]

    @property
    def differing(self) -> list[str]:
        """Keys of the config that differ without being what is compared."""
        return settings.differing([g.config for g in self.groups])

    @property
    def same_rows(self) -> bool:
        """Whether all losses are on the same held-out rows."""
        return settings.same_rows(self.differing)


def of(runs: Sequence[Run], figures: Sequence[dict[str, Any]], control: str | None) -> Comparison:
    """Groups the runs and compares each group with the control.

    Raises:
      UserError: one seed of one method twice, or an unknown control.
    """
    groups = group(runs, figures)
    chosen = _control(groups, control)
    differences = {
        g.label: {name: seeds.paired(g.figures[name], chosen.figures[name]) for name in FIGURES}
        for g in groups
        if g is not chosen
    }
    return Comparison(groups, chosen, differences, matched(groups))


def group(runs: Sequence[Run], figures: Sequence[dict[str, Any]]) -> list[Group]:
    """Returns the groups in the order in which they first appear.

    Runs with the same label and different settings are told apart by what their method, replay and learning rate say,
    then by as much of the paths of their folders as tells them apart. A branch has other settings.
    """
    settings = [_setting(run) for run in runs]
    labels = _labels(runs, settings)
    found: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    groups = []
    for label, members in found.items():
        by_seed: dict[int, int] = {}
        for i in members:
            if runs[i].seed in by_seed:
                both = f"{runs[by_seed[runs[i].seed]].place} and {runs[i].place}"
                raise UserError(
                    f"runs: {label!r} with seed {runs[i].seed} was given twice, {both}; leave one of them out"
                )
            by_seed[runs[i].seed] = i
        ordered = dict(sorted(by_seed.items()))
        groups.append(
            Group(
                label,
                {seed: runs[i] for seed, i in ordered.items()},
                {name: {seed: figures[i]["figures"][name] for seed, i in ordered.items()} for name in FIGURES},
                {kind: {s: figures[i]["tokens"][kind] for s, i in ordered.items()} for kind in ("new", "replayed")},
                _right({seed: figures[i]["inference"] for seed, i in ordered.items()}),
                _classified({seed: figures[i]["classified"] for seed, i in ordered.items()}),
            )
        )
    return groups


def matched(groups: Sequence[Group]) -> list[Matched]:
    """Returns every group with Reptile together with its learning-rate-matched control.

    At first order Reptile is the base method at `keep` times the learning rate (see jaxcl/methods/reptile.py), so
    only the difference to a run without it at that rate says what its alignment of gradients is worth.
    """
    found = []
    for g in groups:
        options = dict(parts(g.config)).get("reptile")
        if options is None:
            continue
        keep, lr = float(options.get("keep", 0.5)), _peak(g)
        base = [part for part in parts(g.config) if part[0] != "reptile"]
        control = None
        for other in groups:
            same = _without_method_and_rate(other.config) == _without_method_and_rate(g.config)
            if (
                same
                and _plain(parts(other.config)) == _plain(base)
                and math.isclose(_peak(other), keep * lr, rel_tol=0.02)
                and _proportional(g, other, keep)
            ):
                control = other
        found.append(Matched(g, keep, lr, control))
    return found


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the figures of a comparison as plain values."""
    return {
        "control": comparison.control.label,
        "differing": comparison.differing,
        "same_rows": comparison.same_rows,
        "groups": [
            {
                "label": g.label,
                "seeds": list(g.runs),
                "complete": g.complete,
                "figures": {name: _plain_interval(value) for name, value in g.intervals.items()},
                "tokens": {kind: float(np.mean(list(values.values()))) for kind, values in g.tokens.items()},
                "accuracy": _nested({key: seeds.interval(list(values.values())) for key, values in g.right.items()}),
                "classified": {n: _plain_interval(seeds.interval([*v.values()])) for n, v in g.accuracy.items()},
            }
            for g in comparison.groups
        ],
        "differences": {
            label: {name: _plain_interval(value) for name, value in row.items()}
            for label, row in comparison.differences.items()
        },
        "accuracy_differences": {label: _nested(row) for label, row in paired_accuracies(comparison).items()},
        "learning_rate_matched": [
            {
                "label": m.group.label,
                "keep": m.keep,
                "lr": m.wanted_lr,
                "control": m.control.label if m.control else None,
                "differences": m.control
                and {n: _plain_interval(seeds.paired(m.group.figures[n], m.control.figures[n])) for n in FIGURES},
            }
            for m in comparison.matched
        ],
    }


def paired_accuracies(comparison: Comparison) -> dict[str, dict[tuple[str, str], seeds.Interval]]:
    """Returns label -> (domain, measure) -> group minus control, each with its own mode of inference."""
    control = comparison.control
    return {
        g.label: {
            (domain, measure): seeds.paired(values, control.right[domain, mode, measure])
            for (domain, mode, measure), values in g.right.items()
            if mode == "own" and (domain, mode, measure) in control.right
        }
        for g in comparison.groups
        if g is not control and g.right
    }


def _right(blocks: dict[int, dict[str, Any] | None]) -> dict[tuple[str, str, str], dict[int, float]]:
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for seed, block in blocks.items():
        for key, value in (inference.newest(block) if block else {}).items():
            found.setdefault(key, {})[seed] = value
    return found


def _classified(blocks: dict[int, dict[str, Any] | None]) -> dict[str, dict[int, float]]:
    known = {seed: block["figures"] for seed, block in blocks.items() if block}
    return {name: {seed: figures[name] for seed, figures in known.items()} for name in classified.FIGURES if known}


def _nested(values: Mapping[tuple[str, ...], seeds.Interval]) -> dict[str, Any]:
    """Returns a table by tuples as nested objects; the mean over domains, "", is called "all"."""
    table: dict[str, Any] = {}
    for (domain, *inner, last), value in values.items():
        place = table.setdefault(domain or "all", {})
        for name in inner:
            place = place.setdefault(name, {})
        place[last] = _plain_interval(value)
    return table


def _control(groups: Sequence[Group], label: str | None) -> Group:
    by_label = {g.label: g for g in groups}
    if label is not None:
        if label not in by_label:
            raise UserError(f"--control={label}: no such method among the runs{nearest(label, list(by_label))}")
        return by_label[label]
    bare = [g for g in groups if not _plain(parts(g.config)) and not sum(g.tokens["replayed"].values())]
    return bare[0] if bare else groups[0]


def _labels(runs: Sequence[Run], settings: Sequence[str]) -> list[str]:
    """Returns one label per run, different for different settings."""
    labels = [run.label for run in runs]
    for refine in (lambda run: readable(run.config), None):
        for label in set(labels):
            kinds = list(dict.fromkeys(s for own, s in zip(labels, settings, strict=True) if own == label))
            if len(kinds) < 2:
                continue
            known = list(zip(labels, settings, strict=True))
            names = _names([[run for run, own in zip(runs, known, strict=True) if own == (label, s)] for s in kinds])
            for i, run in enumerate(runs):
                if labels[i] == label and run.label == label and refine:
                    labels[i] = f"{label} ({refine(run)})"
                elif labels[i] == label and not refine:
                    labels[i] = f"{label} {names[kinds.index(settings[i])]}"
    return labels


def _names(kinds: Sequence[Sequence[Run]]) -> list[str]:
    """Returns a name for each kind of setting: as much of the end of its folder as tells it from the others.

    That is the folder that its runs have in common; that of its first run where others have the same.
    """
    places = [Path(os.path.commonpath([run.place for run in own])) for own in kinds]
    if len(set(places)) < len(places):
        places = [own[0].place for own in kinds]
    names, depth = [place.name for place in places], 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return [f"[{name}]" for name in names]


def _setting(run: Run) -> str:
    config = {k: v for k, v in run.config.items() if k not in ("seed", "label")}
    return json.dumps([config, run.about.get("branch", {}).get("step")], sort_keys=True)


def _plain(methods: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the parts that do something: plain training has many names."""
    return [part for part in methods if part[0] not in ("cpt", "plain", "none")]


def _without_method_and_rate(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in ("seed", "label", "method")}
    if isinstance(schedule := config.get("schedule"), dict):
        rest["schedule"] = {key: value for key, value in schedule.items() if key not in ("peak", "constant", "end")}
    return json.dumps(rest, sort_keys=True)


def _peak(g: Group) -> float:
    """Returns the largest learning rate that was used, else the one that was configured."""
    run = next(iter(g.runs.values()))
    rates = run.train.get("lr", np.array([]))
    if np.isfinite(rates).any():
        return float(np.nanmax(rates))
    return float((run.config.get("schedule") or {}).get("peak", math.nan))


def _proportional(g: Group, other: Group, keep: float) -> bool:
    """Returns whether `other` used `keep` times the learning rate of `g` at every step that both recorded."""
    a, b = (next(iter(group.runs.values())).train for group in (g, other))
    if "lr" not in a or "lr" not in b:
        return True
    common, i, j = np.intersect1d(a["step"], b["step"], return_indices=True)
    return bool(len(common) and np.allclose(keep * a["lr"][i], b["lr"][j], rtol=0.02, equal_nan=True))


def _plain_interval(value: seeds.Interval) -> dict[str, float]:
    return {"mean": value.mean, "half_width": value.half_width, "n": value.n}
