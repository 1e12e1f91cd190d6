"""Command line that branches a run off another: python -m jaxcl.branch RUN NEW [--step=N].

With an infinite schedule the run itself stays at its constant rate and goes on with every new task. A branch off the
constant phase anneals to a model for release and is not trained further (Ibrahim et al. 2403.08763, section 6):

  python -m jaxcl.branch runs/main runs/release --step=300
  python -m jaxcl.main --config=configs/quickstart.py --workdir=runs/release \\
      --config.schedule.anneal_from=300 --config.schedule.anneal=60 --config.schedule.end=1e-4
"""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxcl import checkpoint, console, folder, metrics
from jaxcl.schema import UserError


def make(source: Path, target: Path, *, step: int | None = None) -> int:
    """Makes `target` the folder of a new run that goes on from a checkpoint of the run in `source`; returns its step.

    The checkpoint and the records up to it are copied; `source` is not touched. The new run may have another config:
    what must agree (the leaves of the state, the rows before the step) is checked when it starts. A branch that was
    cut short is made anew.

    Args:
      source: folder of a run.
      target: absent or empty.
      step: of a checkpoint; None = the newest.

    Raises:
      UserError: no such checkpoint or a damaged one; or `target` holds something.
    """
    folder.about(source)
    if folder.branched(target) is False:
        shutil.rmtree(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; branch into a new folder")
    target.mkdir(parents=True, exist_ok=True)
    folder.write(target / folder.BRANCH, {"source": str(source), "step": step, "whole": False})
    try:
        step = checkpoint.copy(source / "checkpoints", target / "checkpoints", step=step)
    except UserError:
        shutil.rmtree(target)
        raise
    shutil.copyfile(source / "metrics.jsonl", target / "metrics.jsonl")
    if (source / "reservoir").exists():  # rewound when the branch starts
        shutil.copytree(source / "reservoir", target / "reservoir")
    metrics.truncate(target / "metrics.jsonl", step)
    folder.write(target / folder.BRANCH, {"source": str(source), "step": step, "whole": True})
    return step


def main(argv: list[str]) -> None:
    """Makes the branch and says how to go on."""
    parser = console.Parser(prog="python -m jaxcl.branch", description="Starts a new run from a checkpoint of another.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run to branch off")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the new run: absent or empty")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest by default")
    options = parser.parse_args(argv)
    step = make(options.run, options.new, step=options.step)
    print(f"{options.new}: branched off {options.run} at step {step}; continue it with")
    print(f"  python -m jaxcl.main --config=FILE --workdir={options.new} [--config.KEY=VALUE ...]")


if __name__ == "__main__":
    console.cli(main)
