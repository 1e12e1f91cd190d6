"""Continual pre-training on three real domains with 25 % replay and Reptile meta-updates (MER).

Claim:    a byte-level Llama of 1.1 M parameters learns Python's prose, then its library code, then C headers,
          and keeps most of what it knew.
Command:  python -m jaxcl.main --config=configs/quickstart.py --workdir=runs/quickstart
Expected: report.html in the workdir; time and numbers in experiments/quickstart/README.md.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.label = "quickstart"
    config.seed = 0

    config.model = ConfigDict(dict(name="transformer", preset="tiny", vocab=320))
    config.tokenizer = ConfigDict(dict(name="byte"))
    config.sources = ConfigDict()
    for domain in ("prose", "code", "headers"):
        config.sources[domain] = ConfigDict(dict(name="embedded", domain=domain, max_bytes=2_000_000))

    config.stream = ConfigDict(dict(length=256, batch=16, steps=250))
    config.stream.stages = tuple(
        dict(name=domain, mixture={domain: 1.0}) for domain in ("prose", "code", "headers")
    )
    config.stream.replay = ConfigDict(dict(fraction=0.25, mode="replace", over="earlier"))

    config.method = "reptile(every=10, keep=0.5)"
    config.optim = ConfigDict(dict(name="adamw", b2=0.95, weight_decay=0.1, clip=1.0))
    config.schedule = ConfigDict(dict(name="infinite", peak=3e-3))
    config.guard = ConfigDict(dict(spike=10.0, warmup=20))
    config.loss = ConfigDict(dict(z_loss=0.0))
    config.evaluation = ConfigDict(dict(every=10, rows=16))
    config.checkpoint = ConfigDict(dict(every_steps=100, every_minutes=1.0, keep=2))
    config.mesh = ConfigDict(dict(data=1))
    return config
