r"""The whole recipe in one command: corpora and tokenizer, then the pilot or the comparison; resumable.

python experiments/multilingual/launch.py --data=FOLDER --workdir=runs/multilingual --pilot=0.5,1,2
python experiments/multilingual/launch.py --data=FOLDER --workdir=runs/multilingual

FOLDER is described in prepare.py. The pilot trains replay 25 % at these multiples of the config's peak learning rate,
on a seed that the comparison does not use. Overrides such as --config.stream.batch=4 apply to all runs.
"""

import copy

import prepare
from absl import flags

from jaxcl import main, sweep

PILOT = flags.DEFINE_list("pilot", None, "Multiples of the peak learning rate to try, instead of the comparison.")
PILOT_SEED = 90
CONFIG = "configs/multilingual.py"


def pilot(config, factors):
    """Returns the config of the pilot: replay 25 %, once for each factor of the learning rate."""
    (base,) = (v for v in config["variants"] if v["label"] == config["control"])
    tried = []
    for factor in factors:
        one = copy.deepcopy(base)
        rate = dict(one["set"])["schedule"]
        rate |= {key: rate[key] * factor for key in ("peak", "end")}
        one["label"] = f"peak {rate['peak']:.2g}"
        tried.append(one)
    return {**config, "variants": tried, "seeds": [PILOT_SEED], "control": None}


def launch(argv):
    """Prepares what is missing, runs, and returns the exit status."""
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    flags.FLAGS([arg for arg in argv if arg not in overrides])
    workdir = main.WORKDIR.value or "runs/multilingual"
    data = prepare.prepare(prepare.DATA.value, f"{workdir}/data")
    config, _ = main.read([argv[0], f"--config={CONFIG}:{data}"])
    for arg in overrides:
        main.override(config, arg)
    if PILOT.value:
        return sweep.run(pilot(config, [float(factor) for factor in PILOT.value]), f"{workdir}/pilot")
    return sweep.run(config, f"{workdir}/sweep")


if __name__ == "__main__":
    main.cli(launch)
