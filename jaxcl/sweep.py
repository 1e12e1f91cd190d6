"""Several runs of one base config: variants x seeds, resumable, one report over all."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl import domains, folder, plan, program, report, schedules, schema, train
from jaxcl import optim as optimisers
from jaxcl.report import terminal
from jaxcl.schema import UserError, assign, nearest


def expand(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one config per variant and seed.

    `variants` is a list of dicts with a `label` and `set`, a list of (dotted key, value) pairs; `seeds` a list of ints.

    Raises:
      UserError: nothing to run, a malformed variant, a key without a section, or a label used twice.
    """
    for key, example in (("variants", "({'label': 'a', 'set': ()},)"), ("seeds", "(0,)")):
        if not config.get(key, True):
            raise UserError(f"config.{key}={config[key]!r}: nothing to run; name one at least, as in {example}")
    base = {key: value for key, value in config.items() if key not in ("variants", "seeds", "control")}
    labels = [variant.get("label") for variant in config["variants"]]
    runs = []
    for variant, seed in itertools.product(config["variants"], config.get("seeds", [base.get("seed", 0)])):
        label = variant.get("label")
        if not isinstance(label, str) or labels.count(label) != 1:
            raise UserError(f"config.variants: label {label!r} is missing or used twice; give each variant its own")
        if unknown := set(variant) - {"label", "set"}:
            raise UserError(f"config.variants[{label}].{unknown.pop()}: unknown key; choose from label, set")
        one = copy.deepcopy(base) | {"label": label, "seed": seed}
        for key, value in variant.get("set", ()):
            assign(one, key, value)
        if second := (one.get("checkpoint") or {}).get("second"):  # every run has a place of its own there
            one["checkpoint"] = {**one["checkpoint"], "second": f"{second}/{name_of(label, seed)}"}
        runs.append(one)
    return runs


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns variants for the cross product of `axes` (dotted key -> values), labelled `key=value, ...`."""

    def label(pairs: Iterable[tuple[str, Any]]) -> str:
        return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in pairs) or "base"

    products = [list(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{"label": label(pairs), "set": pairs} for pairs in products]


def name_of(label: str, seed: int) -> str:
    """Returns the name of a run's folder, safe on every file system."""
    return "".join(c if c.isalnum() or c in "=.+-" else "_" for c in label) + f"-seed{seed}"


def check(config: Mapping[str, Any], place: Path) -> None:
    """Raises UserError for what is wrong with a run, as far as that shows without its corpus and its model."""
    folder.finished(place, config)
    _, pieces = train.split(config)
    schedule, optim, stream = pieces["schedule"], pieces["optim"], pieces["stream"]
    evaluation = schema.call(program.Evaluation, pieces.get("evaluation") or {}, field="evaluation")
    program.check_options(schedule, optim, evaluation, len(pieces["sources"]))
    if pieces.get("packing"):
        schema.check(domains.Packing, pieces["packing"], field="packing")
    schema.check(plan.stream_of, stream, field="stream", positional=3)
    stages = [stage if isinstance(stage, Mapping) else {} for stage in stream["stages"]]
    steps = [stage.get("steps", stream.get("steps")) for stage in stages]
    rate: Any = 1.0
    if steps and all(isinstance(number, int) and number > 0 for number in steps):
        rate = schedules.make(ends=list(itertools.accumulate(steps)), **schedule)
    optimisers.make(lr=rate, **optim)
    plan.loss_of(pieces.get("loss") or {})
    method = pieces.get("method", "cpt")
    if isinstance(method, str):
        schema.parse(method, field="method")


def check_all(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> None:
    """Checks every run before the first is trained.

    Raises:
      UserError: that of the first run with something wrong, and which it is.
    """
    for one, place in zip(runs, folders, strict=True):
        try:
            check(one, place)
        except UserError as error:
            raise UserError(f"config.variants[{one['label']}], seed {one['seed']}: {error}") from error


def run(config: Mapping[str, Any], workdir: str) -> int:
    """Runs every variant under `workdir`, one after the other, then writes the combined report.

    Runs that are complete are kept, the one that was cut off continues. Returns the exit status.

    Raises:
      UserError: something is wrong with any of the runs, before the first is trained where `check` can see it, or a
        control that is no variant.
    """
    runs, control = expand(config), config.get("control")
    if control is not None and control not in (labels := list(dict.fromkeys(one["label"] for one in runs))):
        raise UserError(
            f"config.control={control!r}: none of config.variants has this label{nearest(str(control), labels)}"
        )
    control = control if len(runs) > 1 else None  # the report of one run has none
    folders = [Path(workdir) / name_of(one["label"], one["seed"]) for one in runs]
    check_all(runs, folders)
    for i, (one, place) in enumerate(zip(runs, folders, strict=True)):
        print(f"[{i + 1}/{len(runs)}] {one['label']}, seed {one['seed']}: {place}", flush=True)
        status = train.run(one, str(place), final=False)
        if status or not folder.about(place)["finished"]:
            return status
    target = Path(workdir) / "report.html"
    terminal.show(report.write([str(place) for place in folders], out=target, control=control), target)
    return 0
