"""A run that is killed every so many steps, and what share of its time was productive in the end.

python -m experiments.reliability.utilisation --workdir=runs/utilisation [--every=200] [--compare] [--out=FILE]

The model of the quickstart on longer steps is killed (SIGKILL) whenever it has taken `every` steps more and half of a
period between checkpoints, and started again at once by this script, which is the launcher. Its programs are compiled
before, by a start of which nothing else is kept. With --compare the same run without kills must have the same losses.
--steps makes a shorter run; its `parts` say what a start costs and what a step, and what that would be with a fault
every 200 steps.
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

STAGES, BATCH, SAVE = 3, 32, 10  # stages, rows of a step, steps between checkpoints


def reached(workdir):
    """Returns the last step that the run has written."""
    path = workdir / "metrics.jsonl"
    steps = [r["step"] for r in metrics.read(path) if r["kind"] == "train"] if path.exists() else []
    return max(steps, default=0)


def options_of(steps):
    """Returns the config as options; `steps` are those of a stage. Evaluations are at the ends of stages alone."""
    return {
        "stream.steps": steps,
        "stream.batch": BATCH,
        "evaluation.every": 10**6,
        "checkpoint.every_steps": SAVE,
    }


def start(workdir, steps):
    """Returns the run as a process."""
    options = [f"--config.{key}={value}" for key, value in options_of(steps).items()]
    command = [sys.executable, "-m", "jaxcl.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compile_first(workdir, steps):
    """Starts the run and ends it after two steps."""
    process = start(workdir, steps)
    while process.poll() is None and reached(workdir) < 2:
        time.sleep(0.5)
    process.kill()
    process.wait()


def faulty(workdir, every, steps):
    """Runs to the end through kills; returns at which steps they came."""
    kills = []
    while True:
        process, goal = start(workdir, steps), every * (len(kills) + 1) + SAVE // 2
        while process.poll() is None and (reached(workdir) < goal or goal >= STAGES * steps):
            time.sleep(0.5)
        if process.poll() is not None:
            if process.returncode:
                raise RuntimeError(f"the run ended with status {process.returncode}")
            return kills
        process.kill()
        process.wait()
        kills.append(reached(workdir))


def parts(found, steps):
    """Returns seconds of a start and of a step, and the utilisation that they give with a fault every 200 steps."""
    seconds, count = found["seconds"], steps * STAGES + found["repeated_steps"]
    start_s = seconds["start"] / found["attempts"]
    step_s = (seconds["productive"] + seconds["repeated"]) / count
    save_s = seconds["save"] / (count / SAVE)
    lost = start_s + SAVE / 2 * step_s + 200 / SAVE * save_s
    share = 200 * step_s / (200 * step_s + lost)
    return {"start_s": start_s, "step_s": step_s, "save_s": save_s, "computed_for_200_steps": share}


def main():
    """Prints where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/utilisation")
    parser.add_argument("--every", type=int, default=200, help="steps between kills")
    parser.add_argument("--steps", type=int, default=200, help="steps of each of three stages")
    parser.add_argument("--compare", action="store_true", help="run without kills as well")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "utilisation.json"))
    options = parser.parse_args()
    workdir = Path(options.workdir)
    os.environ |= train_step.ENVIRONMENT
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(workdir.absolute() / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    compile_first(workdir / "first", options.steps)
    kills = faulty(workdir / "killed", options.every, options.steps)
    found = goodput.summary(workdir / "killed")
    print("\n".join([*goodput.lines(found), str(parts(found, options.steps))]))
    command = f"python -m experiments.reliability.utilisation --every={options.every} --steps={options.steps}"
    record = {
        "command": command + options.compare * " --compare",
        "date": datetime.date.today().isoformat(),
        "machine": train_step.machine(),
        "options": options_of(options.steps),
        "kills": kills,
        "goodput": found,
        "parts": parts(found, options.steps),
    }
    if options.compare:
        start(workdir / "straight", options.steps).wait()
        losses = [
            [(r["step"], r["loss"]) for r in metrics.read(workdir / name / "metrics.jsonl") if r["kind"] == "train"]
            for name in ("killed", "straight")
        ]
        record["losses_equal"] = losses[0] == losses[1] and len(losses[0]) == STAGES * options.steps
        print(f"losses of {len(losses[0])} steps are those of a run without kills: {record['losses_equal']}")
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
