r"""Streams of MNIST and Omniglot: images, networks and features, then every method on every seed; resumable.

python experiments/analytic/launch.py --mnist=FOLDER --omniglot=FOLDER --workdir=runs/analytic --parts=imbalanced,blurry

What the folders hold is described in prepare.py; a part that needs one of them alone runs without the other. Overrides
such as --config.stream.batch=32 apply to all runs. Every run leaves its figures in WORKDIR/PART/LABEL-seedN.json;
`python -m experiments.analytic.claims runs/analytic` makes tables of them.
"""

import json
import os
import re
from pathlib import Path

import jax
import passes
import prepare
from absl import flags

from jaxcl import distributed, main, schema, sweep
from jaxcl.schema import UserError

PARTS = flags.DEFINE_list(
    "parts", ["imbalanced", "blurry", "omniglot", "trained", "random", "pixels"], "Comparisons to make."
)
ARMS = flags.DEFINE_list("arms", None, "Labels of the methods to run; all unless given.")
CONFIGS = Path(__file__).parents[2] / "configs"
USAGE = "usage: python experiments/analytic/launch.py --mnist=FOLDER --omniglot=FOLDER --workdir=FOLDER"


def read(argv, name, part, seed):
    """Returns the config of a part."""
    return main.read([*argv, f"--config={CONFIGS / name}.py:{part},{seed}"], USAGE)[0]


def feed(argv, data, part, seed, programs):
    """Makes the images and the features that a part reads, unless they are there."""
    kind = "omniglot" if part == "omniglot" else "mnist"
    images = getattr(prepare, kind)((prepare.OMNIGLOT if kind == "omniglot" else prepare.MNIST).value, data, seed)
    drawn = part not in ("trained", "omniglot")
    bank = Path(data, f"{kind}-{'random' if drawn else 'trained'}-{seed}.npz")
    if part == "pixels" or bank.exists():
        return
    config = read(argv, "analytic_streams", f"backbone_{kind}", seed)
    if drawn:
        params = schema.make("jaxcl.models", config["model"], field="model").init(jax.random.key(seed))
    else:
        found, params = passes.run(config, programs)
        print(f"{part}, seed {seed}, network: {found['figures']['a_last']:.3f} {found['cpu_s']:.1f} CPU-s", flush=True)
    prepare.features(images, bank, config["model"], params)


def launch(argv):
    """Makes the comparisons that the command line asks for and returns the exit status."""
    if any(re.match(r"--?config(=|$)", arg) for arg in argv):
        raise UserError("--config: is configs/analytic_compare.py; choose its --parts")
    flags.FLAGS([arg for arg in argv if not arg.startswith("--config.")])
    workdir = main.WORKDIR.value or "runs/analytic"
    os.environ["JAXCL_ANALYTIC"] = f"{workdir}/data"  # where the configs look
    distributed.cache_compilations()
    programs = {}
    for part in PARTS.value:
        for seed in map(int, prepare.SEEDS.value):
            feed(argv, f"{workdir}/data", part, seed, programs)
            for config in sweep.expand(read(argv, "analytic_compare", part, seed)):
                path = Path(workdir, part, sweep.name_of(config["label"], seed) + ".json")
                if path.exists() or (ARMS.value and config["label"] not in ARMS.value):
                    continue
                found = {"label": config["label"], "seed": seed} | passes.run(config, programs)[0]
                path.parent.mkdir(parents=True, exist_ok=True)
                begun = path.with_suffix(".part")
                begun.write_text(json.dumps(found) + "\n")
                begun.replace(path)
                figures = "  ".join(f"{name} {value:.3f}" for name, value in found["figures"].items())
                print(f"{part}, seed {seed}, {config['label']}: {figures}  {found['cpu_s']:.1f} CPU-s", flush=True)
    return 0


if __name__ == "__main__":
    main.cli(launch)
