"""How far each arithmetic certifies: python -m experiments.hyperinterval.tightness RUN [--times=1,2,4] [--out=FILE]

Certifies the hypernetwork of a finished run around the embeddings of its tasks, with radii a multiple of those that it
was trained for, and prints the share of held-out rows, in percent: by interval arithmetic, by affine forms through the
hypernetwork, and by affine forms through both networks.
"""

import argparse
import json
import time
from pathlib import Path

import jax

from jaxcl import folder, program, saved, train

KINDS = ("interval", "affine", "joint")


def measure(path: Path, times: float) -> dict:
    """Returns domain -> what is certified with radii `times` as large."""
    _, pieces = train.split(folder.about(path)["config"])
    adapter = pieces["adapter"]
    pieces["adapter"] = {**adapter, "gamma": times * adapter.get("gamma", 1.0)}
    pieces["mesh"] = {"devices": jax.devices()[:1]}  # whatever it was trained on
    made = program.build(**pieces)
    _, params = saved.params(path / "checkpoints")
    assert made.compare
    return made.compare(params)["certificate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", default="1,2,4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {}
    for times in map(float, options.times.split(",")):
        begin = time.process_time()
        found[f"{times:g}"] = figures = measure(options.run, times)
        print(f"radii x {times:g}, {time.process_time() - begin:.0f} s")
        for domain, one in figures.items():
            if one["joint"] is None:
                continue
            shares = ", ".join(f"{kind} {100 * one[kind]:.1f}" for kind in KINDS)
            ratio = one["affine_radius"] / one["radius"]
            print(f"  {domain}: right {100 * one['deployed']:.1f}, {shares}; radius affine / interval {ratio:.3f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"run": options.run.name, "times": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
