"""Long tail: ten digits, two at a time, each rarer than the one before; and the same digits without task boundaries.

Task:     which of all ten digits is it? 0 and 1 come first, with 500 and 324 rows, then 2 and 3, ...; of the last, 9,
          there are 10 (1:50). One pass over whole batches. The digits are drawn by jaxcl, without a download.
Claim:    a ridge head gives rare classes away to frequent ones; balanced ones do not, and keep no row either.
Command:  python -m jaxcl.main --config=configs/long_tail.py --workdir=runs/long_tail
          python -m jaxcl.main --config=configs/long_tail.py:compare --workdir=runs/long_tail_compare
Parts:    air (the default), aef_ocl, expect (AEF-OCL without draws), acil, ds_al, gkeal
          blurry     AIR on a Si-Blurry stream: half of the digits in one task each, 10 % of the rest in any task
          compare    acil, air and aef_ocl, three seeds
Expected: report.html in the workdir; "mean class" is the accuracy in which every digit counts the same. At the end,
          three seeds: gkeal 0.42 ± 0.02, acil 0.60 ± 0.02, ds_al 0.64 ± 0.02, expect (the kernel of gkeal) 0.70 ± 0.02,
          aef_ocl 0.73 ± 0.04, air 0.78 ± 0.02; blurry, where all digits are as many, 0.86 ± 0.02. Real images and
          five seeds: experiments/analytic. A run takes 20 CPU-seconds, most of them to compile.
"""

from ml_collections import ConfigDict

from jaxcl.data import scenarios

BATCH, RATIO, MOST = 8, 50.0, 500
COUNTS = [round(MOST * RATIO ** (-digit / 9)) for digit in range(10)]
SOURCE = {"name": "digits", "count": 2 * MOST, "held_out": 400, "imbalance": RATIO}
RELU = {"name": "analytic", "expansion": "relu", "width": 256}
GAUSSIAN = RELU | {"expansion": "gaussian", "sigma": 10.0}
# part -> method, adapter
PARTS = {
    "air": ("air(gamma=1.0, slots=2, every=10)", RELU),
    "aef_ocl": ("aef_ocl(gamma=1.0, every=10)", RELU),
    "expect": ("aef_ocl(gamma=1.0, how='expect')", GAUSSIAN),
    "acil": ("acil(gamma=1.0)", RELU),
    "ds_al": ("ds_al(gamma=1.0, gamma_comp=1.0)", RELU | {"expansion": "dual"}),
    "gkeal": ("gkeal(gamma=1.0)", GAUSSIAN),
    "blurry": ("air(gamma=1.0, every=10)", RELU),
}
COMPARED = ("acil", "air", "aef_ocl")


def get_config(part="air"):
    if part not in (*PARTS, "compare"):
        raise ValueError(f"--config=configs/long_tail.py:{part}: no such part; choose from {', '.join(PARTS)}, compare")
    method, adapter = PARTS["air" if part == "compare" else part]
    if part == "blurry":
        even = {"name": "digits", "count": 2000, "held_out": 800}
        sources, stages = scenarios.si_blurry(even, [200] * 10, 5, batch=BATCH, disjoint=50, blurry=10, seed=8)
    else:
        sources, stages = scenarios.class_incremental(SOURCE, 10, 5)
        rows = [sum(COUNTS[2 * t : 2 * t + 2]) for t in range(5)]
        stages = tuple(stage | {"steps": n // BATCH} for stage, n in zip(stages, rows, strict=True))
    config = ConfigDict({"seed": 0, "method": method, "adapter": ConfigDict(adapter)})
    config.model = ConfigDict({"name": "mlp", "inputs": 28 * 28, "hidden": (), "classes": 10})  # features are pixels
    config.sources = ConfigDict(sources)
    config.stream = ConfigDict({"batch": BATCH, "stages": stages})
    config.optim = ConfigDict({"name": "adamw"})  # of no use to a head in closed form
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.evaluation = ConfigDict({"every": 10, "rows": 400})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": 1.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    if part == "compare":
        config.seeds = (0, 1, 2)
        config.control = "acil"
        pairs = {name: tuple(zip(("method", "adapter"), PARTS[name], strict=True)) for name in COMPARED}
        config.variants = tuple(ConfigDict({"label": name, "set": one}) for name, one in pairs.items())
    return config
