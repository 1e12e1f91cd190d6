"""Reinforcement learning of a Hugging Face checkpoint on questions with checkable answers (GSM8K and its like).

Claim:    the loop, policies and objectives of soft_rl.py on a released Llama or Qwen, with math-verify as the judge.
Command:  python -m jaxcl.main --config=configs/gsm8k_rl.py --config.model.checkpoint=/path/to/hf_model
          --config.sources.gsm8k.path=/path/to/train.jsonl --workdir=runs/gsm8k
Needs:    pip install 'jaxcl[hf,rl]'; JSON lines with `question` and `answer`, a solution that ends in "#### 42".
Expected: report.html in the workdir with reward and hard, soft, fuzzy x greedy, sampled, pass@k. Not measured.

The defaults are those of "Soft Tokens, Hard Truths" (2509.19170): thoughts until "The final answer is: " or 128 of
them, then \\boxed{ is written for the model and 32 tokens of answer are drawn; RLOO, no KL; 2 problems x 32 rollouts.
SVAMP: --config.sources.gsm8k.form=plain, question="['Body','Question']", answer=Answer. Multiple choice: form=choice.
An adapter alone: --config.adapter=lora. Plain GRPO: --config.policy=hard --config.objective=grpo.
"""

from ml_collections import ConfigDict

TEMPLATE = (
    "A conversation between User and Assistant. The Assistant reasons, then ends with "
    "'The final answer is: \\boxed{answer}.'\nUser: {question}\nAssistant:"
)
PHRASE = "The final answer is: "


def get_config():
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict({"checkpoint": "", "compute_dtype": "bfloat16", "remat": "full"})
    config.sources = ConfigDict(
        {"gsm8k": {"name": "questions", "path": "", "form": "marked", "template": TEMPLATE, "held_out": 0.05}}
    )
    config.sources.gsm8k.verifier = ConfigDict({"name": "math"})
    config.stream = ConfigDict({"batch": 2, "steps": 4000})
    config.stream.stages = ({"name": "rl", "mixture": {"gsm8k": 1.0}},)

    config.policy = "soft"  # temperature 0.5, gamma 0.33
    config.objective = "rloo"
    config.rollout = ConfigDict({"group": 32, "thoughts": 128, "answer": 32, "stop": (PHRASE,), "samples": 16})
    config.rollout.update({"forced": "\\boxed{", "late": PHRASE + "\\boxed{", "workers": 2, "timeout": 5.0})

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "clip": 1.0})
    config.schedule = ConfigDict({"name": "cosine", "peak": 6e-6, "warmup": 20})
    config.guard = ConfigDict({"spike": float("inf")})
    config.evaluation = ConfigDict({"every": 100, "rows": 64})
    config.checkpoint = ConfigDict({"every_steps": 100, "every_minutes": 10.0, "keep": 2})
    return config
