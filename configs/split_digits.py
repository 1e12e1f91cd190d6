"""Split digits: five tasks of two digits each, on shared outputs, beside methods that should not forget.

Task:     is it the first or the second of two digits: 0 or 1, then 2 or 3, ... (domain-incremental). The digits are
          drawn by jaxcl, without a download.
Claim:    a perceptron that only goes on forgets earlier digits; replay keeps most of what it knew.
Command:  python -m jaxcl.main --config=configs/split_digits.py --workdir=runs/split_digits
          python -m jaxcl.main --config=configs/split_digits.py:compare --workdir=runs/split_digits_compare
Expected: report.html in the workdir, with the accuracy of every task. Mean accuracy at the end: cpt 0.87, agem
          0.94, er 0.97 (three seeds), ewc as cpt (two seeds); si, lwf not measured. A run takes 13 CPU-seconds.

One run with --config.method='ewc(strength=100)' or any other. Own images: a folder of the four files of MNIST, with
SOURCE = {"name": "images", "path": "mnist"}; other protocols are in jaxcl/data/scenarios.py.
"""

from ml_collections import ConfigDict

from jaxcl.data import scenarios

SOURCE = {"name": "digits", "count": 1000, "held_out": 400}
STEPS = 150  # of each task
METHODS = {
    "cpt": "cpt",
    "er": "er(capacity=500, fraction=0.5)",
    "agem": "agem(capacity=500)",
    "ewc": "ewc(strength=100)",
    "si": "si",
    "lwf": "lwf",
}


def get_config(part="one"):
    if part not in ("one", "compare"):
        raise ValueError(f"--config=configs/split_digits.py:{part}: no such part; write :compare, or nothing")
    sources, stages = scenarios.split(SOURCE, classes=10, groups=5, steps=STEPS)
    config = ConfigDict({"seed": 0, "method": METHODS["er"]})
    config.model = ConfigDict({"name": "mlp", "inputs": 28 * 28, "hidden": (64, 64), "classes": 2})
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": 32, "stages": stages})
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite; spikes are part of the result
    config.evaluation = ConfigDict({"every": 50, "rows": 400})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": 1.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    if part == "compare":
        config.seeds = (0, 1, 2)
        config.control = "cpt"
        config.variants = tuple(ConfigDict({"label": k, "set": (("method", v),)}) for k, v in METHODS.items())
    return config
