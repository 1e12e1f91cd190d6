"""Soft, multi-token and hard thoughts learned by rollouts from one start, and discrete supervision, three seeds each.

Task:     as in configs/soft_rl.py: the smallest sum +-d1 +-d2 +-d3 that is not negative.
Claim:    rollouts of every kind improve on the start; each kind of thoughts, and what it costs to answer with another.
Command:  python -m jaxcl.main --config=configs/soft_rl_compare.py --workdir=runs/soft_rl_compare
Expected: report.html in the workdir; numbers and time in experiments/soft_rl/README.md.

The arms of rollouts share their first stage (CSFT), bit for bit with the same seed: the rows, their order and the
parameters do not depend on the policy. Discrete SFT sees worked chains of tokens for as many steps as the others
take in both stages, at the rate of the first.
"""

from ml_collections import ConfigDict

from configs import soft_rl

SOFT, MTS = "soft(temperature=1.0)", "mts(count=3)"


def variant(label, policy, *more):
    return ConfigDict({"label": label, "set": (("policy", policy), *more)})


def get_config():
    config = soft_rl.get_config()
    config.rollout.modes = ("hard", SOFT, MTS)
    steps = sum(stage["steps"] for stage in config.stream.stages)
    worked = ({"name": "sft", "steps": steps, "mixture": {"mnns": 1.0}, "learn": "sft"},)
    one_rate = ("schedule.peak", config.schedule.peak[0])

    config.seeds = (2, 3, 4)  # the pilot, which chose the start, had seed 0
    config.control = "soft"
    config.variants = (
        variant("soft", SOFT),
        variant("mts", MTS),
        variant("hard", "hard"),
        variant("discrete SFT", "hard", ("objective", None), ("stream.stages", worked), one_rate),
    )
    return config
