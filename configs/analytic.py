"""Analytic learning: ten digits, two at a time, on one head of ten outputs; it is solved for and forgets nothing.

Task:     which of all ten digits is it? 0 and 1 are learned first, then 2 and 3, ... (class-incremental). The digits
          are drawn by jaxcl, without a download.
Claim:    on frozen features a head in closed form is that of all rows at once; training forgets all but the last.
Command:  python -m jaxcl.main --config=configs/analytic.py --workdir=runs/analytic
          python -m jaxcl.main --config=configs/analytic.py:compare --workdir=runs/analytic_compare
Parts:    acil (the default), ranpac, nmc, slda, fecam; naive trains a perceptron; backbone trains one on the first task
          compare    all but the last, three seeds
Expected: report.html in the workdir, with the accuracy of every task. Mean accuracy at the end, three seeds: naive
          0.20, nmc 0.78, fecam, ranpac and acil 0.93, slda 0.94; pretrained, one seed, 0.81: two digits teach a
          perceptron little of the others. Real images: experiments/analytic. A run takes 10 CPU-seconds.

Features of your own: --config.model.start=RUN, a run of the same model, which :backbone makes of the first two digits:
          python -m jaxcl.main --config=configs/analytic.py:backbone --workdir=runs/backbone
          python -m jaxcl.main --config=configs/analytic.py:pretrained --workdir=runs/pretrained \
              --config.model.start=runs/backbone
"""

from ml_collections import ConfigDict

from jaxcl.data import scenarios

SOURCE = {"name": "digits", "count": 1000, "held_out": 400}
STEPS = 64  # of each task, of 32 rows: twice every row
PIXELS = {"name": "mlp", "inputs": 28 * 28, "hidden": (), "classes": 10}  # below the last layer are the pixels
TRAINED = PIXELS | {"hidden": (128, 64)}
PLAIN = {"name": "analytic", "expansion": "none"}
# part -> method, model, adapter
PARTS = {
    "acil": ("acil(gamma=1.0)", PIXELS, {"name": "analytic", "expansion": "relu", "width": 512}),
    "ranpac": ("ranpac", PIXELS, {"name": "analytic", "expansion": "relu", "width": 512, "scale": "normal"}),
    "nmc": ("nmc", PIXELS, PLAIN | {"normalise": True}),
    "slda": ("slda(epsilon=0.01)", PIXELS, PLAIN),
    "fecam": ("fecam", PIXELS, PLAIN | {"head": "mahalanobis", "power": 0.5, "shared": True}),
    "naive": ("cpt", TRAINED, None),
    "backbone": ("cpt", TRAINED, None),
    "pretrained": ("acil(gamma=1.0)", TRAINED, {"name": "analytic", "expansion": "relu", "width": 512}),
}
COMPARED = ("naive", "nmc", "acil", "ranpac", "slda", "fecam")


def get_config(part="acil"):
    if part not in (*PARTS, "compare"):
        raise ValueError(f"--config=configs/analytic.py:{part}: no such part; see its first lines")
    method, model, adapter = PARTS["acil" if part == "compare" else part]
    sources, stages = scenarios.split(SOURCE, classes=10, groups=5, steps=STEPS, relabel=False)
    config = ConfigDict({"seed": 0, "method": method, "model": ConfigDict(model)})
    config.adapter = ConfigDict(adapter) if adapter else None
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": 32, "stages": stages[:1] if part == "backbone" else stages})
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})  # of the parts that train
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite
    config.evaluation = ConfigDict({"every": 32, "rows": 400})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": 1.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    if part == "compare":
        config.seeds = (0, 1, 2)
        config.control = "naive"
        keys = ("method", "model", "adapter")
        sets = {name: tuple(zip(keys, PARTS[name], strict=True)) for name in COMPARED}
        config.variants = tuple(ConfigDict({"label": name, "set": pairs}) for name, pairs in sets.items())
    return config
