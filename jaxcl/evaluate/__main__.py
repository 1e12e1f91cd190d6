"""Command line of evaluation: python -m jaxcl.evaluate RUN --tasks=facts.jsonl,held_out [--steps=all].

RUN is the folder of a run, or of a Hugging Face checkpoint. The figures are shown and, for a run, written to
RUN/evaluations/NAME.json; with more than one step also as charts, NAME.html beside it. See `tasks` for the files.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl import console, folder
from jaxcl.evaluate import measure, page, subject, tasks
from jaxcl.evaluate.engine import Tell
from jaxcl.progress import duration
from jaxcl.schema import UserError

QUIET_S = 5.0  # seconds between lines of progress


def target_of(options: argparse.Namespace, asked: Sequence[tasks.Task]) -> Path | None:
    """Returns the JSON file to write: for a Hugging Face folder none unless it is named.

    Raises:
      UserError: it exists.
    """
    if options.out is None and not (options.run / "run.json").exists():
        return None
    name = "+".join(task.name for task in asked) + (f"@{options.steps}" if options.steps else "")
    path = options.out or options.run / "evaluations" / f"{name}.json"
    if path.suffix != ".json":
        raise UserError(f"--out={path}: must end in .json; the charts of a sweep are written beside it")
    if not options.force:
        for file in (path, path.with_suffix(".html")):
            if file.exists():
                raise UserError(f"{file}: exists; write to another --out, or replace it with --force")
    return path


def evaluate(asked: Sequence[tasks.Task], made: subject.Subject, options: measure.Options) -> dict[str, Any]:
    """Returns the figures of every task at every step, as JSON. Everything is checked before the first is measured."""
    engine = subject.engine_of(made)
    if made.run:
        stages = [stage["name"] for stage in made.found.about["config"]["stream"]["stages"]]
        for task in asked:
            tasks.check_stages(task, stages)
    ready = [
        subject.held_out(made) if task.kind == tasks.HELD_OUT else measure.prepare(task, engine, options)
        for task in asked
    ]
    results: dict[str, Any] = {
        task.name: {
            "kind": task.kind,
            "figures": [],
            **({"file": f"{task.records[0].place.rsplit(':', 1)[0]}"} if task.records else {}),
        }
        for task in asked
    }
    for step in made.steps:
        params = made.params(step)
        for task, measured in zip(asked, ready, strict=True):
            results[task.name]["figures"].append(measured(params, teller(f"step {step:,}, {task.name}")))
        del params  # before those of the next step are loaded
    about = made.found.about
    return {"name": made.path.resolve().name, "id": about["id"], "steps": made.steps, "tasks": results}


def teller(what: str) -> Tell:
    """Returns a function that shows progress on standard error, every few seconds."""
    began = time.monotonic()
    last = began

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET_S and 0 < done < total:
            left = duration((now - began) / done * (total - done))
            print(f"{what}: {done:,} of {total:,}  {left} left", file=sys.stderr, flush=True)
            last = now

    return tell


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = console.Parser(prog="python -m jaxcl.evaluate", description="Scores checkpoints on tasks in files.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of a Hugging Face checkpoint")
    parser.add_argument("--tasks", required=True, help="JSONL files and held_out, separated by commas")
    parser.add_argument("--steps", help="of checkpoints: all, or numbers separated by commas; the newest by default")
    parser.add_argument("--shots", type=int, default=0, help="first records of a file that are shown as examples")
    parser.add_argument("--max_tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--stop", action="append", default=[], help="text that ends a generation; may be repeated")
    parser.add_argument("--extract", help="regular expression that finds the answer in a generated text")
    parser.add_argument("--window", type=int, help="tokens per row of perplexity; those of training by default")
    parser.add_argument("--out", type=Path, help="JSON file; RUN/evaluations/TASKS.json by default")
    parser.add_argument("--force", action="store_true", help="replace files of an earlier evaluation")
    options = parser.parse_args(argv)
    if options.max_tokens < 1:
        raise UserError(f"--max_tokens={options.max_tokens}: must be at least 1")
    if options.extract:
        tasks.pattern(options.extract, "--extract")
    return options


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = parse(argv)
    if options.shots < 0:
        raise UserError(f"--shots={options.shots}: must be at least 0")
    if not all(options.tasks.split(",")):
        raise UserError(f"--tasks={options.tasks!r}: empty, or a comma too many; give files, or held_out")
    asked = tasks.read_all(options.tasks.split(","), shots=options.shots)
    target = target_of(options, asked)
    made = subject.load(options.run, steps=options.steps, window=options.window)
    settings = measure.Options(options.max_tokens, tuple(options.stop), options.extract)
    results = evaluate(asked, made, settings)
    results["options"] = settings._asdict() | {"shots": options.shots, "window": made.window}
    for task in results["tasks"].values():
        if "file" in task:
            task["sha256"] = hashlib.sha256(Path(task["file"]).read_bytes()).hexdigest()
    from rich.console import Console  # noqa: PLC0415  only commands that print pay for it

    screen = Console()
    for table in page.tables(results):
        screen.print(table, "")
    if target is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.write(target, results)
    written = [str(target)]
    if len(made.steps) > 1:
        chart = target.with_suffix(".html")
        chart.write_text(page.html(results, page.spans_of(options.run)), encoding="utf-8")
        written.append(chart.name)
    screen.print(f"Wrote {' and '.join(written)}.", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    console.cli(main)
