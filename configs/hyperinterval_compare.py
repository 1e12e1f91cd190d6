"""HyperInterval on split MNIST, five tasks of two digits, three seeds: with the ledger, as published, without boxes.

Parts:    task       networks for every task: with the ledger; as published (soft penalty, no ledger)
          three      the same on the first three tasks, two seeds
          universal  one network on fixed detectors: four weights of what wide boxes earn, InterContiNet twice, plain
          published  one network at the published sizes: with the ledger; as published
          long       one network, two tasks of 1,000 steps
          select     drawn digits, three tasks, two seeds: the last generator of a task, or that which certified most
Command:  JAXCL_MNIST=mnist python -m jaxcl.main --config=configs/hyperinterval_compare.py:task --workdir=runs/hi_task
Expected: experiments/hyperinterval/README.md, with the time of each part.

The first three tasks of a run are the run of three tasks: evaluations at every boundary are kept.
"""

from ml_collections import ConfigDict

from configs import hyperinterval

ROOM = (1.0, 3.0, 10.0, 30.0)
# What the published code does; a ramp to half of the task, kappa jumps, R is divided twice, no ledger.
PUBLISHED = {"schedule": "published", "average": "twice", "project": False, "point": "middle"}
TUNED = (("method", {"name": "intercontinet", "contraction": 0.5}), ("schedule.peak", 0.05))


def method(**options):
    return {"name": "hyperinterval", **options}


def variant(label, *changes):
    return ConfigDict({"label": label, "set": changes})


def variants(part):
    boxes = {"name": "weight_boxes", "fixed": ("^filters$",), "radius": 1.0}
    plain = (("adapter", None), ("method", {"name": "cpt"}), ("optim.frozen", ("^filters$",)))
    begun = {"name": "hypernetwork", "start": "published"}
    if part in ("task", "three"):
        published = begun | {"embedding": 72, "hidden": (75, 75)}
        return [
            variant("ledger"),
            variant("published", ("adapter", published), ("method", method(beta=0.01, **PUBLISHED))),
        ]
    if part == "universal":
        rooms = [variant(f"room {one:g}", ("method.spread", one)) for one in ROOM]
        return [
            *rooms,
            variant("intercontinet", ("adapter", boxes), ("method", {"name": "intercontinet"})),
            variant("intercontinet tuned", ("adapter", boxes | {"radius": 0.1}), *TUNED),
            variant("plain", *plain),
        ]
    if part == "select":
        model, boxed, options, _, _, peak = hyperinterval.PARTS["universal"]
        wide = (("model", model), ("adapter", {"name": "hypernetwork", **boxed}), ("schedule.peak", peak))
        return [
            variant("last"),
            variant("select", ("method.select", 10)),
            variant("universal last", *wide, ("method", method(**options))),
            variant("universal select", *wide, ("method", method(**options, select=10))),
        ]
    published = ("adapter", begun | hyperinterval.BOXES), ("method", method(beta=0.001, **PUBLISHED))
    return [variant("ledger"), variant("published", *published)]


def get_config(part="universal"):
    if part not in ("task", "three", "universal", "published", "long", "select"):
        raise ValueError(f"--config=configs/hyperinterval_compare.py:{part}: no such part; see its first lines")
    bases = {"task": "mnist", "three": "mnist", "published": "mnist_published", "select": "task"}
    config = hyperinterval.get_config(bases.get(part, "mnist_universal"))
    config.seeds = (0, 1, 2)
    if part in ("three", "select"):
        config.seeds, config.stream.stages = (0, 1), config.stream.stages[:3]
        config.sources = {name: config.sources[name] for name in [*config.sources][:3]}
    if part == "long":
        config.stream.stages = tuple({**stage, "steps": 1000} for stage in config.stream.stages[:2])
        config.variants = tuple(variant(f"room {one:g}", ("method.spread", one)) for one in ROOM)
    else:
        config.variants = tuple(variants(part))
    config.control = config.variants[0].label
    return config
