"""Checks the claims of the MER paper (2508.01908) on the report of the comparison, and prints README tables.

python experiments/multilingual/claims.py runs/multilingual/sweep/report.json

Differences are paired by seed, with 95 % intervals (Student t), without correction for their number. A claim holds
where the interval lies on its side of zero, is contradicted where it lies on the other, and is not shown where it has
zero in it.
"""

import json
from pathlib import Path

import numpy as np

from jaxcl import console, seeds
from jaxcl.schema import UserError, nearest

SHOWN = ("learned", "final", "forgetting", "gap_depth")
NAIVE, LITTLE, REPLAY = "naive", "replay 5 %", "replay 25 %"
MER, INFINITE = "MER", "naive, infinite"
# claim, figure, sign that it predicts, and arms with their weights: the figure is their sum
CLAIMS = (
    ("replay 5 % forgets less than none", "forgetting", -1, {LITTLE: 1, NAIVE: -1}),
    ("replay 25 % forgets less than 5 %", "forgetting", -1, {REPLAY: 1, LITTLE: -1}),
    ("Reptile adds to replay, at the matched rate: final loss", "final", -1, {MER: 1, REPLAY: -1}),
    ("Reptile adds to replay, at the matched rate: forgetting", "forgetting", -1, {MER: 1, REPLAY: -1}),
    ("Reptile adds to replay, at the matched rate: gap depth", "gap_depth", -1, {MER: 1, REPLAY: -1}),
    ("Reptile adds to replay, at the matched rate: learned", "learned", -1, {MER: 1, REPLAY: -1}),
    ("replay 25 % learns as much: learned, beside none", "learned", -1, {REPLAY: 1, NAIVE: -1}),
    (
        "a point of replay is worth more from 0 to 5 % than from 5 to 25 %: forgetting per point",
        "forgetting",
        -1,
        {LITTLE: 1 / 5 + 1 / 20, NAIVE: -1 / 5, REPLAY: -1 / 20},
    ),
    ("infinite schedule beside the re-warmed cosine, no replay: final loss", "final", -1, {INFINITE: 1, NAIVE: -1}),
    ("infinite schedule, no replay: gap depth", "gap_depth", -1, {INFINITE: 1, NAIVE: -1}),
)


def load(path):
    """Returns arm -> seed -> run of a comparison."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        runs = report["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no report.json of a comparison; run the comparison first") from error
    found = {}
    for run in runs:
        if run["complete"]:
            found.setdefault(run["label"], {})[run["seed"]] = run
    wanted = {label for *_, arms in CLAIMS for label in arms}
    for label in sorted(wanted - set(found)):
        raise UserError(f"{path}: no finished run of {label!r}{nearest(label, list(found))}")
    return found


def combined(arms, figure, weights):
    """Returns the interval of a weighted sum of arms, seed by seed."""
    common = set.intersection(*(set(arms[label]) for label in weights))
    values = [sum(w * arms[label][seed]["figures"][figure] for label, w in weights.items()) for seed in sorted(common)]
    return seeds.interval(values)


def verdict(value, sign):
    """Returns what an interval says of a claim."""
    if not value.excludes_zero:
        return "not shown"
    return "holds" if sign * value.mean > 0 else "contradicted"


def text(value, plus=""):
    """Returns mean and half-width; `plus` = "+" marks a difference."""
    return f"{value.mean:{plus}.3f} ± {value.half_width:.3f}" if np.isfinite(value.mean) else "–"


def table(header, rows):
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(arms):
    """Returns the table of all arms."""
    rows = []
    for label, runs in arms.items():
        single = len(next(iter(runs.values()))["tasks"]) == 1
        shown = [f for f in SHOWN if f == "final"] if single else SHOWN
        cells = [text(combined(arms, f, {label: 1})) if f in shown else "–" for f in SHOWN]
        rows.append([label, *cells, str(len(runs))])
    return table(["arm", "learned", "final", "forgetting", "gap depth", "seeds"], rows)


def forgetting(arms):
    """Returns the rise of each language's loss since it was learned, after each later stage; mean of the seeds."""
    rows = []
    for label, runs in arms.items():
        mean = np.mean([run["matrix"] for run in runs.values()], axis=0)  # [T + 1, T], row 0 before training
        tasks = next(iter(runs.values()))["tasks"]
        for after in range(1, len(tasks)):
            rises = [f"{mean[after + 1, j] - mean[j + 1, j]:+.3f}" if j < after else "" for j in range(len(tasks) - 1)]
            rows.append([label, tasks[after], *rises])
    first = next(iter(next(iter(arms.values())).values()))
    return table(["arm", "after", *first["tasks"][:-1]], rows)


def judged(arms):
    """Returns the table of the claims."""
    rows = []
    for claim, figure, sign, weights in CLAIMS:
        value = combined(arms, figure, weights)
        rows.append([claim, f"{value.mean:+.4f} ± {value.half_width:.4f}", verdict(value, sign)])
    return table(["claim", "measured difference, nats per token", "verdict"], rows)


def main(argv):
    """Prints the three tables."""
    parser = console.Parser(prog="claims.py", description="Tables of the multilingual comparison.")
    parser.add_argument("report", help="report.json of the comparison")
    arms = load(parser.parse_args(argv).report)
    print("\n\n".join([results(arms), forgetting(arms), judged(arms)]))


if __name__ == "__main__":
    console.cli(main)
