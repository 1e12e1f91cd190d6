"""What leaving out unsolved problems saves: python -m experiments.soft_rl.rif RUNS [--out=FILE]

Reads the folders of the command in the README, with and without `rollout.filter`, and prints after how many rollouts,
those of the filter included, which share of the held-out problems is solved: percent, mean and 95 % interval over
seeds, and paired differences to the end of the runs without a filter.
"""

import argparse
import json
import platform
from pathlib import Path

import jax

from jaxcl.seeds import interval, paired

DOMAIN, MODE = "more", "hard"
FIGURES = ("greedy", "pass@1", "pass@4")


def read(folder: Path) -> tuple[int, int, dict]:
    """Returns filter, seed, and what was measured: share kept, rollouts of the filter, and points along the stage."""
    about = json.loads((folder / "run.json").read_text())
    config, facts = about["config"], about["facts"]
    start, rollout = config["stream"]["stages"][0]["steps"], config["rollout"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["kind"] == "train" and r["step"] > start]
    spent = facts["sources"][DOMAIN]["train"]["rows"] * rollout["filter"]
    each = config["stream"]["batch"] * rollout["group"]
    points = {}
    for record in records:
        if record["kind"] != "eval" or record["step"] < start:
            continue
        steps, found = record["step"] - start, record["inference"][DOMAIN][MODE]
        points[str(steps)] = {
            "rollouts": steps * each + (spent if steps else 0),
            "greedy": found["greedy"],
            "pass@1": found["sample"]["1"],
            "pass@4": found["sample"]["4"],
        }
    signal = sum(r["signal"] for r in trained) / len(trained)
    run = {"kept": trained[0].get("kept", 1.0), "filter_rollouts": spent, "signal": signal, "points": points}
    return rollout["filter"], config["seed"], run


def table(arms: dict[int, dict[int, dict]]) -> None:
    """Prints one line for each arm and point."""
    last = max(map(int, next(iter(arms[0].values()))["points"]))
    print(
        "| filter | steps | rollouts |", " | ".join(FIGURES), "|", " | ".join(f"{name} − end" for name in FIGURES), "|"
    )
    print("|---" * (3 + 2 * len(FIGURES)) + "|")
    for count, runs in sorted(arms.items()):
        for steps in next(iter(runs.values()))["points"]:
            values = {name: {s: 100 * run["points"][steps][name] for s, run in runs.items()} for name in FIGURES}
            ends = {name: {s: 100 * run["points"][str(last)][name] for s, run in arms[0].items()} for name in FIGURES}
            cells = [interval(list(values[name].values())) for name in FIGURES]
            cells += [paired(values[name], ends[name]) for name in FIGURES] if steps != "0" else []
            rollouts = {run["points"][steps]["rollouts"] for run in runs.values()}
            told = " | ".join(f"{c.mean:.1f} ± {c.half_width:.1f}" for c in cells)
            print(f"| {count} | {steps} | {'/'.join(f'{n:,}' for n in sorted(rollouts))} | {told} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arms: dict[int, dict[int, dict]] = {}
    for folder in sorted(options.runs.glob("*-seed*")):
        count, seed, run = read(folder)
        arms.setdefault(count, {})[seed] = run
    table(arms)
    for count, runs in sorted(arms.items()):
        for seed, run in sorted(runs.items()):
            print(f"filter={count} seed {seed}: kept {run['kept']:.3f}, groups with a signal {run['signal']:.3f}")
    if options.out:
        about = {"python": platform.python_version(), "jax": jax.__version__, "machine": platform.machine()}
        about["command"] = "see experiments/soft_rl/README.md, 'Leaving out what no rollout solves'"
        options.out.write_text(json.dumps({"about": about, "runs": arms}, indent=1) + "\n")


if __name__ == "__main__":
    main()
