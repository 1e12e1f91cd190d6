"""What the comparisons show: python -m experiments.hyperinterval.claims RUNS ... [--out=FILE]

Reads folders of configs/hyperinterval_compare.py and hyperinterval_protocols.py, prints the tables of the README
(percent; 95 % intervals over seeds)
after three tasks and at the end, and writes the raw figures as JSON.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import jax

from jaxcl.report import certificates, run
from jaxcl.seeds import interval

# Of each task: promised, and left of it now; what boxes and networks of the generator certified then, and now.
CERTIFIED = ("promised", "now", "interval", "affine", "joint", "interval_now", "affine_now", "joint_now")


def read(folder: Path) -> dict:
    """Returns boundary -> accuracies of all tasks and the figures of the certificates of those that are over."""
    told = run.load(folder)
    found = {}
    for boundary, step in told.boundaries.items():
        if boundary < 0:
            continue
        at = int((told.eval_steps == step).argmax())
        accuracy = [float(told.accuracy[domain][at]) for domain in told.own]
        past = {k: record for k, record in told.certificates.items() if k <= boundary}
        block = certificates.compared(told.tasks, told.own, past) if past else None
        shown = boundary < 5 or boundary == max(told.boundaries)  # of thirty tasks it would be a megabyte
        found[str(boundary)] = {"accuracy": accuracy, "certificates": block if shown else None}
    seconds = sorted(told.speed["step_s"].tolist()) if "step_s" in told.speed else [math.nan]
    return {"boundaries": found, "median_step_s": seconds[len(seconds) // 2]}


def arms(folder: Path) -> dict[str, dict[str, dict]]:
    """Returns label -> seed -> what was read."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*-seed*")):
        label, _, seed = path.name.rpartition("-seed")
        found.setdefault(label, {})[seed] = read(path)
    return found


def summary(boundaries: dict[str, dict]) -> dict[str, float | None]:
    """Returns means over the tasks of a whole run: accuracies, what was lost and promised, and without being told."""
    last = boundaries[str(max(map(int, boundaries)))]
    course = [[boundaries[str(b)]["accuracy"][k] for b in range(k, len(boundaries))] for k in range(len(boundaries))]
    earlier = course[:-1] or course
    found = {
        "learned": sum(one[0] for one in course) / len(course),
        "final": sum(one[-1] for one in course) / len(course),
        "transfer": sum(one[-1] - one[0] for one in earlier) / len(earlier),
        "forgetting": sum(max(one) - one[-1] for one in earlier) / len(earlier),
    }
    block = last["certificates"] or {"tasks": [], "promised": None, "guessed": None}
    now = [one["now"] for one in block["tasks"]]
    left = sum(now) / len(now) if now and None not in now else None
    return found | {"promised": block["promised"], "now": left, "guessed": block["guessed"]}


def text(values: list[float]) -> str:
    """Returns a mean and its interval, in percent."""
    if any(value is None or math.isnan(value) for value in values):
        return "–"
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    one = interval([100 * value for value in values])
    return f"{one.mean:.1f} ± {one.half_width:.1f}"


def table(runs: dict[str, dict[str, dict]], boundary: str) -> None:
    """Prints accuracy and promises after a task."""
    for label, seeds in runs.items():
        rows = [one["boundaries"][boundary] for one in seeds.values() if boundary in one["boundaries"]]
        if not rows:
            continue
        over = int(boundary) + 1
        mean = [sum(row["accuracy"][:over]) / over for row in rows]
        each = [text([row["accuracy"][k] for row in rows]) for k in range(over)]
        blocks = [row["certificates"] for row in rows]
        cells = [text(mean), ", ".join(each)]
        if all(blocks):
            tasks = [[block["tasks"][k] for block in blocks] for k in range(over)]
            for key in CERTIFIED:
                cells.append(", ".join(text([one[key] for one in task]) for task in tasks))
            cells.append(", ".join(f"{one['affine_radius'] / one['radius']:.2f}" for one in blocks[0]["tasks"]))
            cells.append(text([block["guessed"] for block in blocks]))
            cells.append(str([block["kept"] for block in blocks]))
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {path.name: arms(path) for path in options.runs}
    for name, runs in found.items():
        last = max((b for arm in runs.values() for one in arm.values() for b in one["boundaries"]), key=int)
        for boundary in dict.fromkeys(("2" if int(last) > 2 else last, last)):
            print(f"\n{name}, after task {int(boundary) + 1}")
            print(f"| | mean | accuracy | {' | '.join(CERTIFIED)} | radius | guessed | kept |")
            table(runs, boundary)
        print("| | learned | final | backward transfer | forgetting | promised | now | guessed |")
        for label, seeds in runs.items():
            every = [summary(one["boundaries"]) for one in seeds.values() if last in one["boundaries"]]
            if every:
                print(f"| {label} | {' | '.join(text([one[key] for one in every]) for key in every[0])} |")
    if options.out:
        about = {"python": platform.python_version(), "jax": jax.__version__, "machine": platform.machine()}
        files = "configs/hyperinterval_{compare,protocols}.py:PART"
        about["command"] = f"python -m jaxcl.main --config={files} --workdir=runs/PART"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
