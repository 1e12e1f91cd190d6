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

KNOWN = ["imbalanced", "blurry", "omniglot", "trained", "random", "pixels"]
PARTS = flags.DEFINE_list("parts", KNOWN, "Comparisons to make.")
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
    drawn = part != "trained"
    bank = Path(data, f"{kind}-{'random' if drawn else 'trained'}-{seed}.npz")
    if part == "pixels" or bank.exists():
        return
    config = read(argv, "analytic_streams", "backbone", seed)
    if drawn:
        params = schema.make("jaxcl.models", config["model"], field="model").init(jax.random.key(seed))
    else:
        found, params = passes.run(config, programs)
        print(f"network, seed {seed}: {found['figures']['a_last']:.3f} right  {found['cpu_s']:.1f} CPU-s", flush=True)
    prepare.features(images, bank, config["model"], params)


def check(argv):
    """Refuses parts, arms and seeds that there are not, before anything is made."""
    refuse("parts", PARTS.value, KNOWN)
    if not prepare.SEEDS.value or not all(seed.isdecimal() for seed in prepare.SEEDS.value):
        raise UserError(f"--seeds={','.join(prepare.SEEDS.value)}: give whole numbers, as in 0,1,2")
    if ARMS.value is not None:
        runs = [run for part in PARTS.value for run in sweep.expand(read(argv, "analytic_compare", part, 0))]
        refuse("arms", ARMS.value, list(dict.fromkeys(run["label"] for run in runs)))


def refuse(name, values, known):
    """Raises UserError for values of a flag that are not known, or for none."""
    bad = [value for value in values if value not in known]
    if bad or not values:
        raise UserError(f"--{name}={','.join(bad)}: choose from {', '.join(known)}")


def same(path, given):
    """Refuses a result that was made with other overrides."""
    known = json.loads(path.read_text()).get("overrides", given)
    if known != given:
        raise UserError(f"{path}: was made with {known}, not {given}; choose another --workdir")


def launch(argv):
    """Makes the comparisons that the command line asks for and returns the exit status."""
    if any(re.match(r"--?config(=|$)", arg) for arg in argv):
        raise UserError("--config: is configs/analytic_compare.py; choose its --parts")
    main.parse(argv, USAGE)
    check(argv)
    workdir = main.WORKDIR.value or "runs/analytic"
    os.environ["JAXCL_ANALYTIC"] = f"{workdir}/data"  # where the configs look
    distributed.cache_compilations()
    programs, given = {}, sorted(arg for arg in argv if arg.startswith("--config."))
    for part in PARTS.value:
        for seed in map(int, prepare.SEEDS.value):
            feed(argv, f"{workdir}/data", part, seed, programs)
            for config in sweep.expand(read(argv, "analytic_compare", part, seed)):
                path = Path(workdir, part, sweep.name_of(config["label"], seed) + ".json")
                if ARMS.value and config["label"] not in ARMS.value:
                    continue
                if path.exists():
                    same(path, given)
                    continue
                found = {"label": config["label"], "seed": seed, "overrides": given} | passes.run(config, programs)[0]
                path.parent.mkdir(parents=True, exist_ok=True)
                begun = path.with_suffix(".part")
                begun.write_text(json.dumps(found) + "\n")
                begun.replace(path)
                figures = "  ".join(f"{name} {value:.3f}" for name, value in found["figures"].items())
                print(f"{part}, seed {seed}, {config['label']}: {figures}  {found['cpu_s']:.1f} CPU-s", flush=True)
    return 0


if __name__ == "__main__":
    main.cli(launch)
