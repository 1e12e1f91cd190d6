"""Naive, replay, MER, learning-rate-matched control and joint training side by side, five seeds each.

Claim:    replay lowers forgetting in the order of its dose; Reptile adds what the control beside it does not explain.
Command:  python -m jaxcl.main --config=configs/compare.py --workdir=runs/compare
Expected: report.html in the workdir; numbers and time in experiments/quickstart/README.md.

Reptile with `keep` moves the parameters, to first order, like a plain run at `keep` times the learning rate. So each
MER run has its control: MER at 3e-3 beside replay at 1.5e-3, and MER at 6e-3 beside replay at 3e-3.
"""

from ml_collections import ConfigDict

from configs import quickstart

PEAK = 3e-3


def variant(label, fraction=0.25, method="cpt", peak=PEAK, more=()):
    schedule = (("schedule.peak", peak), ("schedule.constant", 2 / 3 * peak))
    values = (("stream.replay.fraction", fraction), ("method", method), *schedule, *more)
    return ConfigDict({"label": label, "set": values})


def get_config():
    config = quickstart.get_config()
    config.model = ConfigDict({"name": "transformer", "preset": "small", "layers": 2, "embed": 96, "mlp": 256})
    config.model.update({"heads": 3, "kv_heads": 3})
    config.packing.length = 128
    config.stream.update({"batch": 16, "steps": 150})
    config.evaluation.update({"every": 10, "rows": 32})
    config.checkpoint.every_minutes = None

    mixed = dict.fromkeys(quickstart.DOMAINS, 1.0)
    joint = ({"name": "all", "mixture": mixed, "steps": 3 * config.stream.steps},)
    mer = "reptile(every=10, keep=0.5)"
    config.seeds = (0, 1, 2, 3, 4)
    config.control = "replay 25 %"
    config.variants = (
        variant("naive", 0.0),
        variant("replay 5 %", 0.05),
        variant("replay 25 %"),
        variant("replay 50 %", 0.5),
        variant("MER", method=mer),
        variant("replay 25 %, half the rate", peak=PEAK / 2),
        variant("MER, twice the rate", method=mer, peak=2 * PEAK),
        variant("joint", 0.0, more=(("stream.stages", joint),)),
    )
    return config
