r"""The comparisons of configs/hyperinterval_compare.py one after the other, resumable; reads MNIST from --mnist.

python experiments/hyperinterval/launch.py --mnist=FOLDER --workdir=runs/hyperinterval --parts=task,universal

Overrides such as --config.stream.batch=32 apply to all runs.
"""

import os
import re
from pathlib import Path

from absl import flags

from jaxcl import main, sweep
from jaxcl.data import image_files
from jaxcl.schema import UserError

KNOWN = ["task", "universal", "published", "long", "three", "select"]
PARTS = flags.DEFINE_list("parts", KNOWN, "Comparisons to make.")
MNIST = flags.DEFINE_string("mnist", os.environ.get("JAXCL_MNIST"), "Folder with the four files of MNIST.")
USAGE = "usage: python experiments/hyperinterval/launch.py --mnist=FOLDER --workdir=FOLDER"
CONFIG = Path(__file__).parents[2] / "configs" / "hyperinterval_compare.py"


def check_parts():
    """Refuses parts that there are not."""
    bad = [part for part in PARTS.value if part not in KNOWN]
    if bad or not PARTS.value:
        raise UserError(f"--parts={','.join(bad)}: choose from {', '.join(KNOWN)}")


def check_mnist(config):
    """Refuses a folder without MNIST, if a config reads it; what is read here is not read again."""
    folder = MNIST.value or ("mnist" if os.path.isdir("mnist") else None)
    if any(source.get("path") == (folder or "mnist") for source in config["sources"].values()):
        image_files.of_flag("--mnist", folder)


def launch(argv):
    """Makes the comparisons that the command line asks for and returns the exit status of the last."""
    if any(re.match(r"--?config(=|$)", arg) for arg in argv):
        raise UserError("--config: is configs/hyperinterval_compare.py; choose its --parts")
    main.parse(argv, USAGE)
    check_parts()
    if MNIST.value:
        os.environ["JAXCL_MNIST"] = MNIST.value
    runs, status = {part: main.read([*argv, f"--config={CONFIG}:{part}"], USAGE) for part in PARTS.value}, 0
    for config, _ in runs.values():
        check_mnist(config)
    for part, (config, workdir) in runs.items():
        status = sweep.run(config, f"{workdir}/{part}") or status
    return status


if __name__ == "__main__":
    main.cli(launch)
