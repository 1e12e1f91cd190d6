"""What the comparison shows: python -m experiments.soft_rl.claims RUNS [--out=FILE]

Reads the folders of configs/soft_rl_compare.py, prints the tables of the README (percent; 95 % intervals over seeds)
and what holds of the claims, and writes the raw figures as JSON.
"""

import argparse
import json
import platform
from pathlib import Path

import jax

from jaxcl.seeds import interval

ARMS = {"soft": "soft", "mts": "mts", "hard": "hard", "discrete_SFT": "hard"}  # folder -> own mode
SEEDS = (2, 3, 4)
FIGURES = ("greedy", "1", "16")


def read(folder: Path) -> dict:
    """Returns boundary -> inference, entropy, drift; and the seconds that steps and evaluations took."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("inference", "entropy", "drift")
    found = {
        str(r["boundary"]): {name: r[name]["mnns"] for name in kept}
        for r in records
        if r["kind"] == "eval" and r["boundary"] is not None
    }
    steps = [r["time"]["step_s"] for r in records if r["kind"] == "train"]
    return {"boundaries": found, "median_step_s": sorted(steps)[len(steps) // 2]}


def value(run: dict, boundary: str, mode: str, figure: str) -> float:
    """Returns a figure in percent."""
    one = run["boundaries"][boundary]["inference"][mode]
    return 100 * (one["greedy"] if figure == "greedy" else one["sample"][figure])


def text(values: list[float], sign: bool = False) -> str:
    found = interval(values)
    return f"{found.mean:+.1f} ± {found.half_width:.1f}" if sign else f"{found.mean:.1f} ± {found.half_width:.1f}"


def tables(runs: dict) -> None:
    """Prints both tables."""

    def every(arm: str, boundary: str, mode: str, figure: str) -> list[float]:
        return [value(runs[arm][str(seed)], boundary, mode, figure) for seed in SEEDS]

    for arm, mode in ARMS.items():
        last = max(runs[arm]["2"]["boundaries"])
        cells = [(mode, figure) for figure in FIGURES] + [("hard", "greedy")]
        if last == "0":
            print(f"| {arm} |", " | ".join(f"– → {text(every(arm, last, *cell))}" for cell in cells), "|")
            continue
        print(
            f"| {arm} |", " | ".join(f"{text(every(arm, '0', *c))} → {text(every(arm, last, *c))}" for c in cells), "|"
        )
    rows = {f"{arm}: end − start": ((arm, "1"), (arm, "0")) for arm in ("soft", "mts", "hard")}
    rows |= {f"{arm} − hard": ((arm, "1"), ("hard", "1")) for arm in ("soft", "mts")}
    for name, ((a, end), (b, start)) in rows.items():
        cells = [("own", "1"), ("hard", "greedy"), ("hard", "16")]
        shown = []
        for mode, figure in cells:
            modes = [ARMS[arm] if mode == "own" else mode for arm in (a, b)]
            pairs = zip(every(a, end, modes[0], figure), every(b, start, modes[1], figure), strict=True)
            shown.append(text([x - y for x, y in pairs], sign=True))
        print(f"| {name} |", " | ".join(shown), "|")
    supervised = zip(every("soft", "0", "soft", "greedy"), every("discrete_SFT", "0", "hard", "greedy"), strict=True)
    print("CSFT with soft thoughts − discrete SFT, greedy:", text([x - y for x, y in supervised], sign=True))


def claims(runs: dict) -> dict[str, list[float]]:
    """Returns for every claim its margin over the bar for each seed, in points: positive = it holds."""

    def gain(arm: str, mode: str, figure: str, bar: float) -> list[float]:
        return [
            value(runs[arm][str(s)], "1", mode, figure) - value(runs[arm][str(s)], "0", mode, figure) - bar
            for s in SEEDS
        ]

    diverse = [
        value(runs["soft"][str(s)], "1", "hard", "16") - value(runs["hard"][str(s)], "1", "hard", "16") for s in SEEDS
    ]
    csft = [
        value(runs["soft"][str(s)], "0", "soft", "greedy") - value(runs["discrete_SFT"][str(s)], "0", "hard", "greedy")
        for s in SEEDS
    ]
    return {
        "soft: own pass@1 + 2": gain("soft", "soft", "1", 2),
        "mts: own pass@1 + 6": gain("mts", "mts", "1", 6),
        "soft: hard greedy + 7": gain("soft", "hard", "greedy", 7),
        "mts: hard greedy + 12": gain("mts", "hard", "greedy", 12),
        "hard pass@16: soft 5 above hard": [x - 5 for x in diverse],
        "CSFT soft greedy 3 above discrete SFT": [x - 3 for x in csft],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = {arm: {str(seed): read(options.runs / f"{arm}-seed{seed}") for seed in SEEDS} for arm in ARMS}
    tables(runs)
    found = claims(runs)
    for name, margins in found.items():
        print(f"{'holds' if min(margins) > 0 else 'not for every seed':>18}  {name}: {[round(x, 1) for x in margins]}")
    if options.out:
        about = {"python": platform.python_version(), "jax": jax.__version__, "machine": platform.machine()}
        about["command"] = "python -m jaxcl.main --config=configs/soft_rl_compare.py --workdir=runs/soft_rl_compare"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, "runs": runs, "claims": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
