"""Soft-token reinforcement learning on minimum non-negative sums, from a start with continuous thoughts (CSFT).

Task:     digits d1 d2 d3 from 1 to 20; the smallest sum +-d1 +-d2 +-d3 that is not negative. Guessing by parity: 26 %.
Claim:    RLOO with soft thoughts raises what sampled soft thoughts solve, and more so what HARD thoughts solve.
Command:  python -m jaxcl.main --config=configs/soft_rl.py --workdir=runs/soft_rl
          --config.policy=hard|"soft(temperature=1.0)"|fuzzy|"mts(count=3)"|dirichlet|gumbel|hrpo
          --config.objective=rloo|grpo|dr_grpo|dapo|gspo|cispo|remax
Expected: report.html in the workdir; numbers, seeds and time in experiments/soft_rl/README.md.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0

    shape = {"layers": 2, "embed": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "mlp": 256, "max_length": 16}
    config.model = ConfigDict({"name": "transformer", "preset": "tiny", **shape})
    config.sources = ConfigDict({"mnns": {"name": "mnns", "count": 3, "low": 1, "high": 20, "problems": 8000}})
    config.stream = ConfigDict({"batch": 32})
    config.stream.stages = (
        {"name": "csft", "steps": 3500, "mixture": {"mnns": 1.0}, "learn": "csft"},
        {"name": "rl", "steps": 500, "mixture": {"mnns": 1.0}, "learn": "rl"},
    )

    config.policy = "soft(temperature=1.0)"  # that of the supervision
    config.objective = "rloo"
    config.rollout = ConfigDict({"group": 16, "samples": 16})
    config.rollout.modes = ("hard", "soft(temperature=1.0)", "fuzzy")

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})
    config.schedule = ConfigDict({"name": "rewarm_cosine", "peak": (1e-3, 5e-5), "warmup": 20, "end": 5e-5})
    config.evaluation = ConfigDict({"every": 100, "rows": 512})
    config.checkpoint = ConfigDict({"every_steps": 1000, "every_minutes": 1.0, "keep": 2})
    config.mesh = ConfigDict({"data": 1})
    return config
