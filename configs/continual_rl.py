"""Three reasoning tasks in sequence: does learning by rollouts forget less than supervision, and do soft thoughts?

Tasks:    minimum non-negative sums, then reachability in graphs, then sums modulo 10; two thoughts and an answer each.
Claim:    accuracy on earlier tasks after each stage: supervision beside RLOO with hard and soft thoughts, and with CPO.
Command:  python -m jaxcl.main --config=configs/continual_rl.py --workdir=runs/continual_rl
Expected: report.html in the workdir with accuracy and forgetting of every task. Not measured.

All variants share their first stage, a short supervision on the mixture of all three, after which the model is right
more often than a guesser, but far from always. Equal names are one token: the digits of sums are the nodes of graphs.
LoRA is not among them: an adapter is trained from the first step on, so that its start would not be that of the others.
"""

from ml_collections import ConfigDict

TASKS = ("sums", "reach", "modular")
START, STEPS = 600, 80  # of the mixture, and of each task


def stages(learn):
    first = {"name": "start", "steps": START, "mixture": dict.fromkeys(TASKS, 1 / 3), "learn": "sft"}
    return (first, *({"name": t, "steps": STEPS, "mixture": {t: 1.0}, "learn": learn} for t in TASKS))


def variant(label, policy="hard", *, learn="rl", method="cpt"):
    pairs = (("policy", policy), ("stream.stages", stages(learn)), ("method", method))
    return ConfigDict({"label": label, "set": pairs})


def get_config():
    config = ConfigDict()
    shape = {"layers": 2, "embed": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "mlp": 256, "max_length": 32}
    config.model = ConfigDict({"name": "transformer", "preset": "tiny", "tied": False, **shape})
    config.sources = ConfigDict(
        {
            "sums": {"name": "mnns", "count": 3, "low": 1, "high": 12},
            "reach": {"name": "reach", "nodes": 8, "steps": 3, "problems": 3000},
            "modular": {"name": "modular", "count": 3, "modulus": 10},
        }
    )
    config.stream = ConfigDict({"batch": 16, "stages": stages("rl")})

    config.policy = "hard"
    config.objective = "rloo"
    config.rollout = ConfigDict({"group": 8, "samples": 8, "modes": ("hard",)})

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})
    config.schedule = ConfigDict({"name": "rewarm_cosine", "peak": (2e-3, 2e-4, 2e-4, 2e-4), "warmup": 10, "end": 5e-5})
    config.guard = ConfigDict({"spike": float("inf")})  # skips what is not finite; spikes are part of the result
    config.evaluation = ConfigDict({"every": 40, "rows": 128})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": None, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    config.seeds = (0, 1, 2)
    config.control = "SFT"
    config.variants = (
        variant("SFT", learn="sft"),
        variant("RLOO"),
        variant("soft RLOO", "soft(temperature=1.0)"),
        variant("RLOO + CPO", method="cpo"),
    )
    return config
