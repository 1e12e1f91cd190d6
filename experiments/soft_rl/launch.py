r"""The comparison of configs/soft_rl_compare.py, or the pilot that chooses the length of its start; resumable.

python experiments/soft_rl/launch.py --workdir=runs/soft_rl --starts=1000,1400,2000
python experiments/soft_rl/launch.py --workdir=runs/soft_rl

The pilot trains the soft and the hard arm from starts of these lengths, on seeds that the comparison does not use.
Overrides such as --config.rollout.group=8 apply to all runs.
"""

import re
from pathlib import Path

from absl import flags

from jaxcl import main, sweep
from jaxcl.schema import UserError

STARTS = flags.DEFINE_list("starts", None, "Steps of supervision to try, instead of the comparison.")
PILOT_SEEDS = [0, 1]
ARMS = ("soft", "hard")
CONFIG = Path(__file__).parents[2] / "configs" / "soft_rl_compare.py"


def pilot(config, starts):
    """Returns the config of the pilot: two arms, each from starts of all these lengths."""
    policies = {one["label"]: dict(one["set"])["policy"] for one in config["variants"]}
    tried = [
        {"label": f"{arm}, start {steps}", "set": [("policy", policies[arm]), ("stream.stages[0].steps", steps)]}
        for arm in ARMS
        for steps in starts
    ]
    return {**config, "variants": tried, "seeds": PILOT_SEEDS, "control": None}


def launch(argv):
    """Runs what the command line asks for and returns the exit status."""
    given = any(re.match(r"--?config(=|$)", arg) for arg in argv)
    config, workdir = main.read(argv if given else [*argv, f"--config={CONFIG}"])
    if STARTS.value is None:
        return sweep.run(config, f"{workdir}/sweep")
    if not all(re.fullmatch("[1-9][0-9]*", steps) for steps in STARTS.value):
        raise UserError(f"--starts={','.join(STARTS.value)}: write numbers of steps, e.g. 1000,1400,2000")
    return sweep.run(pilot(config, [int(steps) for steps in STARTS.value]), f"{workdir}/pilot")


if __name__ == "__main__":
    main.cli(launch)
