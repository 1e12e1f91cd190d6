r"""The comparisons of configs/hyperinterval_compare.py one after the other, resumable; reads MNIST from --mnist.

python experiments/hyperinterval/launch.py --mnist=FOLDER --workdir=runs/hyperinterval --parts=task,universal

Overrides such as --config.stream.batch=32 apply to all runs.
"""

import os
import re
from pathlib import Path

from absl import flags

from jaxcl import main, sweep
from jaxcl.schema import UserError

PARTS = flags.DEFINE_list(
    "parts", ["task", "universal", "published", "long", "three", "select"], "Comparisons to make."
)
MNIST = flags.DEFINE_string("mnist", None, "Folder with the four files of MNIST.")
USAGE = "usage: python experiments/hyperinterval/launch.py --mnist=FOLDER --workdir=FOLDER"
CONFIG = Path(__file__).parents[2] / "configs" / "hyperinterval_compare.py"


def launch(argv):
    """Makes the comparisons that the command line asks for and returns the exit status of the last."""
    if any(re.match(r"--?config(=|$)", arg) for arg in argv):
        raise UserError("--config: is configs/hyperinterval_compare.py; choose its --parts")
    main.parse(argv, USAGE)
    if MNIST.value:
        os.environ["JAXCL_MNIST"] = MNIST.value
    status = 0
    for part in PARTS.value:
        config, workdir = main.read([*argv, f"--config={CONFIG}:{part}"])
        status = sweep.run(config, f"{workdir}/{part}") or status
    return status


if __name__ == "__main__":
    main.cli(launch)
