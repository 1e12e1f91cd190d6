"""Three reasoning tasks in sequence: does learning by rollouts forget less than supervision, and do soft thoughts?

Tasks:    minimum non-negative sums, then reachability in graphs, then sums modulo 10; two thoughts and an answer each.
Claim:    accuracy on earlier tasks after each: supervision of all parameters or of LoRA, RLOO with hard or soft
          thoughts, and with CPO.
Command:  python -m jaxcl.main --config=configs/continual_rl.py:start --workdir=runs/continual_rl/start
          python -m jaxcl.main --config=configs/continual_rl.py --workdir=runs/continual_rl/sweep
Expected: report.html in the second workdir; numbers and time in experiments/continual_rl/README.md.

The first command supervises a start on the mixture of all three, which should be right more often than a guesser but
far from always: --config.stream.stages[0].steps=N. All variants and seeds go on from it (model.start), so that the
intervals are those of what comes after, not of other starts. Equal names are one token: the digits of the sums modulo
10 are the nodes of the graphs.
"""

from ml_collections import ConfigDict

TASKS = ("sums", "reach", "modular")
START, STEPS = 3000, 250  # of the mixture, and of each task


def stages(learn):
    return tuple({"name": task, "steps": STEPS, "mixture": {task: 1.0}, "learn": learn} for task in TASKS)


def variant(label, policy="hard", *more, learn="rl"):
    more = more if learn == "rl" else (("objective", None), *more)
    return ConfigDict({"label": label, "set": (("policy", policy), ("stream.stages", stages(learn)), *more)})


def get_config(part="sweep"):
    if part not in ("start", "sweep"):
        raise ValueError(f"--config=configs/continual_rl.py:{part}: no such part; write :start, or nothing")
    config = ConfigDict()
    shape = {"layers": 2, "embed": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "mlp": 256, "max_length": 32}
    config.model = ConfigDict({"name": "transformer", "preset": "tiny", **shape})
    config.sources = ConfigDict(
        {
            "sums": {"name": "mnns", "count": 3, "low": 1, "high": 12},
            "reach": {"name": "reach", "nodes": 8, "steps": 3, "problems": 3000},
            "modular": {"name": "modular", "count": 3, "modulus": 10},
        }
    )
    config.stream = ConfigDict({"batch": 16, "stages": stages("rl")})
    config.policy = "hard"
    config.rollout = ConfigDict({"group": 8, "samples": 8, "modes": ("hard",)})
    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})
    config.schedule = ConfigDict({"name": "rewarm_cosine", "peak": 5e-4, "warmup": 10, "end": 1e-4})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite; spikes are part of the result
    config.evaluation = ConfigDict({"every": 40, "rows": 128})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": 1.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    if part == "start":
        mixture = dict.fromkeys(TASKS, 1 / 3)
        config.stream = ConfigDict({"batch": 32})
        config.stream.stages = ({"name": "start", "steps": START, "mixture": mixture, "learn": "sft"},)
        config.schedule.peak, config.evaluation.every = 3e-3, 200
        return config

    config.model.start = "runs/continual_rl/start"
    config.objective = "rloo"
    config.seeds = (0, 1, 2)
    config.control = "SFT"
    config.variants = (
        variant("SFT", learn="sft"),
        variant("LoRA-SFT", "hard", ("adapter", "lora"), ("schedule.peak", 3e-3), learn="sft"),
        variant("RLOO"),
        variant("soft RLOO", "soft(temperature=1.0)"),
        variant("RLOO + CPO", "hard", ("method", "cpo")),
    )
    return config
