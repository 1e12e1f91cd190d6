"""Continual pre-training on three real domains with 25 % replay and Reptile meta-updates (MER).

Claim:    a byte-level Llama of 1.3 M parameters learns Python's prose, then library code, then C headers,
          and keeps most of what it knew.
Command:  python -m jaxcl.main --config=configs/quickstart.py --workdir=runs/quickstart
Expected: report.html in the workdir; numbers and time in experiments/quickstart/README.md.

--config.evaluation.alignment=true adds the cosines of the domains' gradients at every boundary (about 5 % more time).
"""

from ml_collections import ConfigDict

DOMAINS = ("prose", "code", "headers")


def get_config():
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict({"name": "transformer", "preset": "small"})
    config.tokenizer = ConfigDict({"name": "byte"})
    config.sources = ConfigDict({d: {"name": "embedded", "domain": d, "max_bytes": 3_000_000} for d in DOMAINS})
    config.packing = ConfigDict({"length": 256})

    config.stream = ConfigDict({"batch": 16, "steps": 120})
    config.stream.stages = tuple({"name": d, "mixture": {d: 1.0}} for d in DOMAINS)
    config.stream.replay = ConfigDict({"fraction": 0.25, "mode": "replace", "over": "earlier"})

    config.method = "reptile(every=10, keep=0.5)"
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    config.schedule = ConfigDict({"name": "infinite", "peak": 3e-3, "constant": 2e-3, "warmup": 20, "cooldown": 80})
    config.loss = ConfigDict({"z_loss": 0.0})
    config.guard = ConfigDict({"spike": 20.0})
    config.microbatches = 1

    config.evaluation = ConfigDict({"every": 10, "rows": 16})
    config.checkpoint = ConfigDict({"every_steps": 100, "every_minutes": 1.0, "keep": 2, "keep_every": 100})
    config.mesh = ConfigDict({"data": 1})
    return config
