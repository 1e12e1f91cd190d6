"""Naive, replay, MER, learning-rate-matched controls and joint training side by side, five seeds each.

Claim:    replay lowers forgetting in the order of its dose; Reptile adds what the control beside it does not explain.
Command:  python -m jaxcl.main --config=configs/compare.py --workdir=runs/compare
Expected: report.html in the workdir; numbers and time in experiments/quickstart/README.md.

Reptile with `keep` moves the parameters, to first order, like a plain run at `keep` times the learning rate. So each
MER run has its control: MER at 1, 2 and 4 times the rate beside replay at 1/2, 1 and 2 times. The learning rate is
re-warmed and decays again in every stage, so that a boundary is measured without the noise of a high rate. How stream
and rate were chosen is told in experiments/quickstart/README.md.
"""

from ml_collections import ConfigDict

from configs import quickstart

PEAK = 3e-3
STEPS = {"prose": 900, "code": 450, "headers": 450}  # the first is trained until it improves slowly
MER = "reptile(every=10, keep=0.5)"


def variant(label, fraction=0.25, method="cpt", times=1.0, more=()):
    rate = (("schedule.peak", times * PEAK), ("schedule.end", times * PEAK / 10))
    return ConfigDict({"label": label, "set": (("stream.replay.fraction", fraction), ("method", method), *rate, *more)})


def get_config():
    config = quickstart.get_config()
    config.model = ConfigDict({"name": "transformer", "preset": "small", "layers": 2, "embed": 64, "mlp": 192})
    config.model.update({"heads": 2, "kv_heads": 2})
    config.packing.length = 64
    del config.stream.steps  # every stage has its own
    config.stream.stages = tuple({"name": d, "mixture": {d: 1.0}, "steps": n} for d, n in STEPS.items())
    config.schedule = ConfigDict({"name": "rewarm_cosine", "peak": PEAK, "warmup": 0.05, "end": PEAK / 10})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite; spikes are part of the result
    config.evaluation.update({"every": 50, "rows": 128})
    config.checkpoint.update({"every_steps": 900, "every_minutes": None, "keep_every": None})

    joint = ({"name": "all", "mixture": {d: float(n) for d, n in STEPS.items()}, "steps": sum(STEPS.values())},)
    config.seeds = (10, 11, 12, 13, 14)
    config.control = "replay 25 %"
    config.variants = (
        variant("naive", 0.0),
        variant("replay 5 %", 0.05),
        variant("replay 25 %"),
        variant("replay 50 %", 0.5),
        variant("MER", method=MER),
        variant("replay 25 %, half the rate", times=0.5),
        variant("MER, twice the rate", method=MER, times=2.0),
        variant("MER, four times the rate", method=MER, times=4.0),
        variant("replay 25 %, twice the rate", times=2.0),
        variant("joint", 0.0, more=(("stream.stages", joint),)),
    )
    return config
