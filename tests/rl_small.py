"""A run on problems of seconds: modular sums by supervision and then by rollouts, with every kind of memory."""

import contextlib

import jax
import numpy as np
import small

from jaxcl import grad, practice, program, train
from jaxcl import mesh as meshes
from jaxcl.data.rows import batch_of
from jaxcl.models import transformer
from jaxcl.rl import tasks


def config(**overrides):
    """Returns a config for `train.run`; overrides replace sections, or single keys of them as `section__key`."""
    made = {
        "label": "rl small",
        "seed": 5,
        "model": {"name": "transformer", "preset": "tiny", "layers": 1, "embed": 16, "mlp": 32, "heads": 2}
        | {"kv_heads": 1, "max_length": 16},
        "sources": {
            "three": {"name": "modular", "count": 2, "modulus": 3, "held_out": 0.3},
            "four": {"name": "modular", "count": 2, "modulus": 4, "held_out": 0.3},
        },
        "stream": {
            "batch": 4,
            "stages": [
                {"name": "worked", "steps": 3, "mixture": {"three": 1.0}, "learn": "sft"},
                {"name": "three", "steps": 4, "mixture": {"three": 1.0}},
                {"name": "four", "steps": 5, "mixture": {"four": 0.7, "three": 0.3}},
            ],
        },
        "policy": "soft(temperature=1.0)",
        "objective": "rloo",
        "rollout": {"group": 4, "samples": 4, "modes": ["hard"]},
        "method": "l2(strength=0.1) + reptile(every=4, keep=0.5)",
        "optim": {"name": "adamw", "clip": 1.0},
        "schedule": {"name": "constant", "peak": 1e-2},
        "guard": {"spike": 50.0, "warmup": 4, "window": 8},
        "evaluation": {"every": 4, "rows": 4},
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep": 3},
        "tensorboard": False,
    }
    return small.overridden(made, overrides)


TOTAL = 12
environment, outcome, records, write, events = (
    small.environment,
    small.outcome,
    small.records,
    small.write,
    small.events,
)


def build(settings, devices=1, **mesh):
    """Returns the program of a config on some devices of this process."""
    pieces = train.split(settings)[1]
    jax.config.update("jax_disable_most_optimizations", True)  # what is tested is the run: the compiler need not try
    return program.build(**{**pieces, "mesh": {"devices": jax.devices()[:devices], **mesh}})


def run(settings, place):
    """Trains a config in this process on one device."""
    with contextlib.closing(train.Session(build(settings), train.split(settings)[0], place, settings)) as session:
        session.train(lambda step: None)


class Parts:
    """A small model, modular sums, and what draws and values its answers."""

    def __init__(self, objective="rloo", policy="hard", group=8, **rollout):
        self.problems = tasks.make({"name": "modular", "count": 2, "modulus": 3, "held_out": 0.2})
        options = practice.Options(policy, objective, {"group": group, **rollout})
        self.own = practice.make({"sums": self.problems}, None, [{}], options)
        shape = {"layers": 1, "embed": 24, "heads": 2, "kv_heads": 2, "mlp": 48, "max_length": 32}
        self.model = transformer.make(preset="tiny", vocab=self.problems.vocab, **shape)
        self.explorer = self.own.explorer(meshes.make(devices=jax.devices()[:1]), self.model, 0)
        self.loss, _ = self.own.loss({})
        self.rows = self.own.corpora()["sums"].train

    def prompts(self, numbers):
        batch = batch_of(self.rows.fetch(np.asarray(numbers)), np.zeros(len(numbers), np.int32))
        return self.explorer.place(self.own.trim(batch, 0))

    def draw(self, params, numbers, step):
        prompts = self.prompts(numbers)
        return self.explorer.judge(self.explorer.roll(params, prompts, step), prompts, np.asarray(numbers))

    def gradient(self):
        """Returns the function (params, rows) -> gradient of the training loss."""

        def losses(params, rows):
            return {"loss": self.loss(self.model.apply(params, rows), rows)}

        return jax.jit(lambda params, rows: grad.value_and_grad(losses, params, rows)[1])
