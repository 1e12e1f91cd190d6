"""What the streams show: python -m experiments.analytic.claims WORKDIR [--out=FOLDER]

Reads what launch.py left in WORKDIR, prints the tables of the README (percent, 95 % intervals over seeds; differences
are paired by seed) and the orders that are claimed, and writes the raw figures and a page of curves to FOLDER.
"""

import argparse
import json
import platform
from pathlib import Path

import jax
import numpy as np

from jaxcl.report import chart, page
from jaxcl.schema import UserError
from jaxcl.seeds import interval, paired

NAMES = {
    "pixels": "MNIST, pixels",
    "random": "MNIST, network not trained",
    "trained": "MNIST, network trained on two digits",
    "omniglot": "Omniglot, 242 characters",
    "imbalanced": "MNIST, 1:100",
    "blurry": "Si-Blurry MNIST",
}
FIGURES = ("a_auc", "a_avg", "a_last", "mean_class", "forgetting", "learned")
# Figure -> better and worse arm: each is to hold by the mean over the seeds, on every stream that has both.
ORDERS = (("acil", "nmc"), ("nmc", "naive"), ("acil", "naive"))
GAIN = ("imbalanced", "mean_class", ("aef_ocl", "air"), "acil")


def read(workdir: Path) -> dict[str, dict[str, dict[int, dict]]]:
    """Returns part -> label -> seed -> what a run left."""
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for part in NAMES:
        for path in sorted((workdir / part).glob("*-seed*.json")):
            one = json.loads(path.read_text())
            found.setdefault(part, {}).setdefault(one["label"], {})[one["seed"]] = one
    if not found:
        raise UserError(f"{workdir}: holds no runs; make them with experiments/analytic/launch.py --workdir={workdir}")
    return found


def values(runs: dict[int, dict], figure: str) -> dict[int, float]:
    """Returns seed -> percent."""
    return {seed: 100 * one["figures"][figure] for seed, one in runs.items()}


def text(one) -> str:
    """Returns a mean and its interval."""
    return f"{one.mean:.1f}" + (f" ± {one.half_width:.1f}" if np.isfinite(one.half_width) else "")


def table(arms: dict[str, dict[int, dict]]) -> None:
    """Prints the figures of a part."""
    print(f"| | {' | '.join(FIGURES)} | seeds | CPU-s |\n|---|{'---|' * (len(FIGURES) + 2)}")
    for label, runs in arms.items():
        cells = [text(interval(list(values(runs, figure).values()))) for figure in FIGURES]
        seconds = np.median([one["cpu_s"] for one in runs.values()])
        print(f"| {label} | {' | '.join(cells)} | {len(runs)} | {seconds:.1f} |")


def orders(found: dict[str, dict[str, dict[int, dict]]]) -> dict[str, dict[str, float]]:
    """Returns what is claimed -> mean and half-width of the paired difference in points."""
    told = {}
    for part, arms in found.items():
        pairs = [("mean_class" if part == "imbalanced" else "a_last", *pair) for pair in ORDERS]
        if part == GAIN[0]:
            pairs += [(GAIN[1], better, worse) for better in GAIN[2] for worse in (GAIN[3], "nmc")]
        for figure, better, worse in pairs:
            if better in arms and worse in arms:
                gap = paired(values(arms[better], figure), values(arms[worse], figure))
                told[f"{part}: {better} - {worse}, {figure}"] = {"mean": gap.mean, "half_width": gap.half_width}
    return told


def curves(found: dict[str, dict[str, dict[int, dict]]]) -> str:
    """Returns a page: accuracy over the classes that have come, mean over seeds, at the ends of tasks or any time."""
    drawn = []
    for part, arms in found.items():
        name, lines = "mean_class" if part == "imbalanced" else "seen", []
        for k, (label, runs) in enumerate(arms.items()):
            blurred = part == "blurry"  # tasks are of other lengths with every seed: by the share of the stream
            x = np.linspace(0.05, 1, 20) if blurred else np.arange(1.0, 1 + len(next(iter(runs.values()))["ends"]))
            each = [
                np.interp(x * one["ends"][-1], one["steps"], one[name])
                if blurred
                else np.array([one[name][one["steps"].index(end)] for end in one["ends"]])
                for one in runs.values()
            ]
            lines.append(chart.Line(label, x, np.mean(each, axis=0), k))
        drawn.append(
            chart.figure(
                lines,
                title=NAMES[part],
                x="share of the stream" if part == "blurry" else "tasks learned",
                y="mean class" if name == "mean_class" else "share right of the classes seen",
                zero=True,
                half=True,
            )
        )
    return page.html("Analytic learning", f"<h1>Analytic learning</h1>{page.pairs(drawn)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = read(options.workdir)
    for part, arms in found.items():
        print(f"\n{NAMES[part]}")
        table(arms)
    told = orders(found)
    print()
    for name, gap in told.items():
        print(f"{name}: {gap['mean']:+.1f} ± {gap['half_width']:.1f}")
    if options.out:
        about = {"python": platform.python_version(), "jax": jax.__version__, "machine": platform.machine()}
        about["command"] = "python experiments/analytic/launch.py --mnist=FOLDER --omniglot=FOLDER --workdir=WORKDIR"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "streams.json").write_text(json.dumps({"about": about, "orders": told, "runs": found}) + "\n")
        (options.out / "curves.html").write_text(curves(found))


if __name__ == "__main__":
    main()
