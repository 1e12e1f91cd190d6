"""lm-evaluation-harness and jaxcl.evaluate on the same records of the same run: are the accuracies equal?

  python -m experiments.evaluation.harness --workdir=FOLDER --output=experiments/evaluation/results/harness.json

Trains a tiny run on three small word domains, writes 60 multiple-choice records about the words of the last one, and
scores them with both. Needs `pip install 'jaxcl[eval]'`; no network.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = 60
WORDS = ("wind", "river", "stone", "lamp", "harbour", "letter", "garden", "winter", "market", "bridge", "cloud", "road")
YAML = """task: words
dataset_path: json
dataset_kwargs:
  data_files: {path}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def config(place: Path) -> dict[str, Any]:
    """Writes three domains and returns the config of a run on them."""
    place.mkdir(parents=True, exist_ok=True)
    sources = {}
    for i in range(3):
        rng = np.random.default_rng(i)
        path = place / f"d{i}.txt"
        path.write_text("\n\n".join(" ".join(rng.choice(WORDS[i : i + 9], 40)) for _ in range(70)))
        sources[f"d{i}"] = {"name": "text", "path": str(path), "split": "paragraph"}
    return {
        "model": {"name": "transformer", "preset": "tiny", "layers": 1, "embed": 32, "mlp": 64},
        "sources": sources,
        "packing": {"length": 64, "directory": str(place / "cache")},
        "stream": {"batch": 16, "steps": 60, "stages": [{"name": n, "mixture": {n: 1.0}} for n in sources]},
        "optim": {"name": "adamw"},
        "schedule": {"name": "constant", "peak": 1e-2},
        "checkpoint": {"every_steps": 60, "keep": 3},
        "tensorboard": False,
    }


def records() -> list[dict[str, Any]]:
    """Returns records with choices of unequal length: the right one is of the last domain, the others are not, or are.

    Those of the first half can be told apart by the domain, those of the second half cannot.
    """
    rng, made = np.random.default_rng(9), []
    for i in range(RECORDS):
        answer = int(rng.integers(4))
        others = (WORDS[0], WORDS[1], WORDS[11]) if 2 * i < RECORDS else WORDS[2:11]
        choices = [" ".join(rng.choice(others, int(rng.integers(1, 4)))) for _ in range(4)]
        choices[answer] = " ".join(rng.choice(WORDS[2:11], int(rng.integers(1, 4))))
        made.append({"prompt": " ".join(rng.choice(WORDS[2:11], 4)), "choices": choices, "answer": answer})
    return made


def call(*words: str) -> None:
    """Runs a command of jaxcl."""
    subprocess.run([sys.executable, "-m", *words], check=True)


def main() -> None:
    """Trains, scores twice, compares and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from jaxcl import train

    place = options.workdir.resolve()
    run, tasks = place / "run", place / "tasks"
    train.run(config(place), str(run))
    tasks.mkdir(exist_ok=True)
    (tasks / "words.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    (tasks / "words.yaml").write_text(YAML.format(path=tasks / "words.jsonl"))
    own, theirs = place / "own.json", place / "theirs.json"
    for old in (own, theirs):
        old.unlink(missing_ok=True)
    began = time.monotonic()
    call("jaxcl.evaluate", str(run), f"--tasks={tasks / 'words.jsonl'}", f"--out={own}", "--force")
    middle = time.monotonic()
    call("jaxcl.evaluate.harness", str(run), "--tasks=words", f"--include_path={tasks}", f"--out={theirs}")
    found = json.loads(own.read_text())["tasks"]["words"]["figures"][0]["all"]
    table = json.loads(theirs.read_text())["results"]["words"]
    result = {
        "command": "python -m experiments.evaluation.harness",
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("jax", "lm_eval")},
        "records": RECORDS,
        "jaxcl.evaluate": {key: found[key] for key in ("acc", "acc_norm")} | {"seconds": round(middle - began, 1)},
        "lm_eval": {key: table[f"{key},none"] for key in ("acc", "acc_norm")}
        | {"seconds": round(time.monotonic() - middle, 1)},
    }
    result["equal"] = all(result["lm_eval"][key] == found[key] for key in ("acc", "acc_norm"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
