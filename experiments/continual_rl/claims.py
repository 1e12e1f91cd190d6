"""What three tasks in sequence do to each other: python -m experiments.continual_rl.claims RUNS [--out=FILE]

Reads the folders of configs/continual_rl.py and prints the table of the README: percent of held-out problems solved
with greedy thoughts of the run's own kind, mean and 95 % interval over seeds, and paired differences to supervision.

  start       mean over tasks before the sequence
  learned     mean over tasks of the accuracy right after each
  final       mean over tasks at the end
  forgetting  mean over the earlier tasks of the accuracy right after each, less that at the end
"""

import argparse
import json
import platform
from pathlib import Path

import jax

from jaxcl.seeds import interval, paired

TASKS = ("sums", "reach", "modular")
CONTROL = "SFT"


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Returns boundary -> task -> accuracy, and pass@4 of the end under `sampled`."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [r for r in records if r["kind"] == "eval" and r["boundary"] is not None]
    mode = next(iter(evals[-1]["inference"][TASKS[0]]))
    found = {str(r["boundary"]): r["accuracy"] for r in evals}
    return found | {"sampled": {task: evals[-1]["inference"][task][mode]["sample"].get("4") for task in TASKS}}


def figures(run: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the figures of a run in percent."""
    after = [run[str(k)][task] for k, task in enumerate(TASKS)]
    end = [run[str(len(TASKS) - 1)][task] for task in TASKS]
    lost = [a - b for a, b in zip(after[:-1], end[:-1], strict=True)]
    found = {
        "start": sum(run["-1"][task] for task in TASKS) / 3,
        "learned": sum(after) / 3,
        "final": sum(end) / 3,
        "forgetting": sum(lost) / 2,
        "pass@4": sum(run["sampled"].values()) / 3,
    }
    return {name: 100 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arms: dict[str, dict[int, dict]] = {}
    for folder in sorted(options.runs.glob("*-seed*")):
        about = json.loads((folder / "run.json").read_text())
        if about["finished"]:
            arms.setdefault(about["config"]["label"], {})[about["config"]["seed"]] = read(folder)
    table = {label: {seed: figures(run) for seed, run in runs.items()} for label, runs in arms.items()}
    names = list(next(iter(next(iter(table.values())).values())))
    print("| arm |", " | ".join(names), "| final − SFT | forgetting − SFT |")
    print("|---" * (len(names) + 3) + "|")
    for label, runs in table.items():
        cells = [interval([one[name] for one in runs.values()]) for name in names]
        cells += [
            paired({s: one[name] for s, one in runs.items()}, {s: one[name] for s, one in table[CONTROL].items()})
            for name in ("final", "forgetting")
        ]
        print(f"| {label} |", " | ".join(f"{c.mean:.1f} ± {c.half_width:.1f}" for c in cells), "|")
    if options.out:
        about = {"python": platform.python_version(), "jax": jax.__version__, "machine": platform.machine()}
        about["command"] = "python -m jaxcl.main --config=configs/continual_rl.py --workdir=runs/continual_rl/sweep"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, "runs": arms, "figures": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
