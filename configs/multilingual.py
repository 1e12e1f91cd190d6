r"""Continual pre-training on English, French, Japanese: replay, MER and schedules side by side, three seeds each.

Claim:    the MER paper's claims (2508.01908) one by one, each with its control: experiments/multilingual/README.md.
Command:  python experiments/multilingual/prepare.py --data=FOLDER --out=runs/multilingual/data
          python -m jaxcl.main --config=configs/multilingual.py:runs/multilingual/data --workdir=runs/multilingual/sweep
Expected: report.html in the workdir; numbers and time in the README above.

What follows the colon is the folder that the first command made; without it, that of the first line is meant.
"""

import os

from ml_collections import ConfigDict

from jaxcl.schema import UserError

LANGUAGES = ("english", "french", "japanese")
STEPS = {"english": 320, "french": 160, "japanese": 160}  # half an epoch or less of each
PEAK = 1.5e-3  # the best of four in the pilot
REPTILE = "reptile(every=10, keep=0.5)"


def rewarmed(times=1.0):
    return {"name": "rewarm_cosine", "peak": times * PEAK, "warmup": 0.05, "end": times * PEAK / 10}


def infinite():
    """The last tenth anneals to where the cosine ends."""
    steps = sum(STEPS.values())
    rate = {"name": "infinite", "peak": PEAK, "constant": 0.55 * PEAK, "warmup": 16, "cooldown": 140}
    return rate | {"end": PEAK / 10, "anneal": steps // 10, "anneal_from": steps - steps // 10}


def variant(label, fraction, method="cpt", schedule=None):
    pairs = (("stream.replay.fraction", fraction), ("method", method), ("schedule", schedule or rewarmed()))
    return ConfigDict({"label": label, "set": pairs})


def get_config(data="runs/multilingual/data"):
    if not os.path.exists(f"{data}/tokenizer/tokenizer.json"):
        raise UserError(f"{data}: no corpora there; make them with experiments/multilingual/prepare.py")
    config = ConfigDict()
    config.model = ConfigDict({"name": "transformer", "preset": "small", "vocab": 4096, "layers": 2, "embed": 128})
    config.model.update({"heads": 4, "kv_heads": 4, "mlp": 512})
    config.tokenizer = ConfigDict({"name": "hf", "path": f"{data}/tokenizer"})
    config.sources = ConfigDict({name: {"name": "jsonl", "path": f"{data}/{name}.jsonl"} for name in LANGUAGES})
    config.packing = ConfigDict({"length": 128, "directory": f"{data}/rows"})
    config.stream = ConfigDict({"batch": 8})
    config.stream.stages = tuple({"name": n, "mixture": {n: 1.0}, "steps": STEPS[n]} for n in LANGUAGES)
    config.stream.replay = ConfigDict({"fraction": 0.0, "mode": "replace", "over": "earlier"})
    config.schedule = ConfigDict(rewarmed())
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite; spikes are part of the result
    config.evaluation = ConfigDict({"every": 40, "rows": 48})
    config.checkpoint = ConfigDict({"every_steps": 320, "every_minutes": None, "keep": 1, "keep_every": None})
    config.mesh = ConfigDict({"data": 1})
    config.seeds = (20, 21, 22)
    config.control = "replay 25 %"
    config.variants = (
        variant("naive", 0.0),
        variant("replay 5 %", 0.05),
        variant("replay 25 %", 0.25),
        # Reptile keeps half of the way, so that to first order this is replay 25 %: its control.
        variant("MER", 0.25, REPTILE, schedule=rewarmed(2.0)),
        variant("naive, infinite", 0.0, schedule=infinite()),
    )
    return config
