r"""A grid over config keys and seeds, resumable, one combined report.

python experiments/quickstart/launch.py --config=configs/quickstart.py --workdir=runs/grid \
    --grid=stream.replay.fraction=0,0.25 --grid=schedule.peak=2e-3,3e-3 --seeds=0,1,2

Every point of the grid is one run in its own folder below --workdir. Started again, finished runs are kept and the one
that was cut off continues. Overrides such as --config.stream.steps=50 apply to all of them.
"""

import ast

from absl import flags

from jaxcl import main, sweep
from jaxcl.schema import UserError

GRID = flags.DEFINE_multi_string("grid", [], "KEY=VALUE,VALUE,...: a config key, dotted, and its values.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every point.")
CONTROL = flags.DEFINE_string("control", None, "Label of the runs that the report compares the others with.")


def literal(text):
    """Reads a number, a quoted text, True, None; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def axes(entries):
    """Reads the grid: dotted key -> values."""
    found = {}
    for entry in entries:
        key, _, values = entry.partition("=")
        if not key or not values:
            raise UserError(f"--grid={entry}: write it as KEY=VALUE,VALUE, e.g. schedule.peak=2e-3,3e-3")
        found[key] = [literal(value) for value in values.split(",")]
    return found


def launch(argv):
    """Runs the grid and returns the exit status."""
    config, workdir = main.read(argv)
    seeds = [literal(seed) for seed in SEEDS.value]
    if not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: write whole numbers, e.g. 0,1,2")
    variants = sweep.grid(axes(GRID.value))
    return sweep.run({**config, "variants": variants, "seeds": seeds, "control": CONTROL.value}, workdir)


if __name__ == "__main__":
    main.cli(launch)
