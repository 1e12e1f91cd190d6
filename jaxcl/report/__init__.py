"""Reports: report.html and report.json from one run directory, or from many runs side by side."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxcl
from jaxcl import metrics
from jaxcl.report import compare, figures, many, page, single
from jaxcl.report.run import Run, load
from jaxcl.schema import UserError

# What records of another form than ours lead to: they may come from anywhere, and every figure has its own needs.
_UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError)


def write(
    paths: Sequence[str | os.PathLike[str]], *, out: str | os.PathLike[str] | None = None, control: str | None = None
) -> dict[str, Any]:
    """Writes the report of one run, or the comparison of several, as HTML with JSON beside it.

    Args:
      paths: run directories; a folder that holds run directories stands for all of them.
      out: the HTML file; by default report.html in the run, or in the folder that the runs have in common.
      control: label of the runs that the others are compared with; by default those without method and replay.

    Returns:
      What report.json holds: equal for equal inputs, except under "time".

    Raises:
      UserError: not a run directory, no metrics or no evaluation yet, an unknown control, or an existing file that
        is not a report.
    """
    target = Path(out) if out is not None else default_target(paths)
    _check_target(target)
    text, results = build(paths, control=control)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, text)
    _replace(target.with_suffix(".json"), json.dumps(metrics.plain(results), indent=1, allow_nan=False) + "\n")
    return results


def build(paths: Sequence[str | os.PathLike[str]], *, control: str | None = None) -> tuple[str, dict[str, Any]]:
    """Returns the HTML of a report and what report.json holds; arguments and errors as for `write`."""
    folders = expand([Path(path) for path in paths])
    try:
        return _build([load(folder) for folder in folders], control)
    except _UNFIT as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"{folders[0] if len(folders) == 1 else 'one of these runs'}: metrics.jsonl, config.json or run.json holds "
            f"what no run writes ({text}); restore it from a copy"
        ) from error


def _build(runs: Sequence[Run], control: str | None) -> tuple[str, dict[str, Any]]:
    """Returns the HTML of a report and what report.json holds."""
    if len(runs) == 1:
        if control is not None:
            raise UserError(f"--control={control}: there is only one run to report on; give at least two")
        results = figures.of(runs[0])
        content, title = single.body(runs[0], results), runs[0].label
        results = {"jaxcl": jaxcl.__version__, "kind": "run", **results, "time": _time(runs[0])}
    else:
        all_figures = [figures.of(run) for run in runs]
        comparison = compare.of(runs, all_figures, control)
        content, title = many.body(comparison), f"{len(comparison.groups)} methods, {len(runs)} runs"
        results = {"jaxcl": jaxcl.__version__, "kind": "comparison", **compare.to_json(comparison), "runs": all_figures}
        results["time"] = [_time(run) for run in runs]
    return page.html(f"{title} · jaxcl report", content), results


def expand(paths: Sequence[Path]) -> list[Path]:
    """Returns run directories, with a folder of runs replaced by the runs in it, in order of their names."""
    found: list[Path] = []
    for path in paths:
        inside = []
        if path.is_dir() and not (path / "metrics.jsonl").exists():
            inside = sorted(child for child in path.iterdir() if (child / "metrics.jsonl").exists())
        found += inside or [path]
    unique = {path.resolve(): path for path in found}
    return list(unique.values())


def default_target(paths: Sequence[str | os.PathLike[str]]) -> Path:
    """Returns report.html in the run, or in the deepest folder that holds all runs."""
    folders = expand([Path(path) for path in paths])
    return Path(os.path.commonpath([str(folder.resolve()) for folder in folders])) / "report.html"


def _check_target(target: Path) -> None:
    if target.suffix != ".html":
        raise UserError(f"--out={target}: must end in .html; report.json is written beside it")
    for file, mark in ((target, f'content="{page.GENERATOR}"'), (target.with_suffix(".json"), '"jaxcl"')):
        if file.exists():
            with file.open(encoding="utf-8", errors="replace") as stream:
                if mark not in stream.read(1000):
                    raise UserError(f"{file}: exists and is not a report of jaxcl; choose another --out")


def _replace(target: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=target.name + ".", delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)


def _time(run: Run) -> dict[str, Any]:
    """Returns what depends on the clock and on interruptions."""
    return {**figures.speed(run), "events": run.events, "goodput": run.goodput}
