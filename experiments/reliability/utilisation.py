"""A run that is killed every so many steps, and what share of its time was productive in the end.

python experiments/reliability/faults.py --workdir=runs/faults [--every=200] [--out=FILE]

The model of the quickstart on longer steps is killed (SIGKILL) whenever it has taken `every` steps more, and started
again at once by this script, which is the launcher. Then the same run without kills must have the same losses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks import train_step
from jaxcl import goodput, metrics

STEPS, BATCH, SAVE = 240, 96, 10  # steps of each of three stages, rows of a step, steps between checkpoints
OPTIONS = {"stream.steps": STEPS, "stream.batch": BATCH, "evaluation.every": 120, "checkpoint.every_steps": SAVE}


def reached(workdir):
    """Returns the last step that the run has written."""
    path = workdir / "metrics.jsonl"
    steps = [r["step"] for r in metrics.read(path) if r["kind"] == "train"] if path.exists() else []
    return max(steps, default=0)


def start(workdir):
    """Returns the run as a process."""
    options = [f"--config.{key}={value}" for key, value in OPTIONS.items()]
    command = [sys.executable, "-m", "jaxcl.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def faulty(workdir, every):
    """Runs to the end through kills; returns at which steps they came."""
    kills = []
    while True:
        process, goal = start(workdir), every * (len(kills) + 1)
        while process.poll() is None and (reached(workdir) < goal or goal >= 3 * STEPS):
            time.sleep(0.2)
        if process.poll() is not None:
            if process.returncode:
                raise RuntimeError(f"the run ended with status {process.returncode}")
            return kills
        process.kill()
        process.wait()
        kills.append(reached(workdir))


def main():
    """Prints where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/faults")
    parser.add_argument("--every", type=int, default=200, help="steps between kills")
    parser.add_argument("--compare", action="store_true", help="run without kills as well")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "faults.json"))
    options = parser.parse_args()
    workdir = Path(options.workdir)
    os.environ |= train_step.ENVIRONMENT
    kills = faulty(workdir / "killed", options.every)
    found = goodput.summary(workdir / "killed")
    print("\n".join(goodput.lines(found)))
    record = {
        "command": f"python experiments/reliability/faults.py --every={options.every}",
        "date": datetime.date.today().isoformat(),
        "machine": train_step.machine(),
        "options": OPTIONS,
        "kills": kills,
        "goodput": found,
    }
    if options.compare:
        start(workdir / "straight").wait()
        losses = [
            [(r["step"], r["loss"]) for r in metrics.read(workdir / name / "metrics.jsonl") if r["kind"] == "train"]
            for name in ("killed", "straight")
        ]
        record["losses_equal"] = losses[0] == losses[1] and len(losses[0]) == 3 * STEPS
        print(f"losses of {len(losses[0])} steps are those of a run without kills: {record['losses_equal']}")
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
