"""No noise: the mean embedding itself, which a policy gradient learns nothing from but through the answer.

    thought = softmax(logits / temperature) table;   log_prob = 0

Sources: Soft Thinking, 2505.15778, without its truncation; base CoT2, Gozeten et al., 2505.23648.
"""

from __future__ import annotations

from jaxcl.rl.thoughts import Policy, soft


def make(*, temperature: float = 1.0) -> Policy:
    """Returns the policy; `temperature` and errors are those of `soft`."""
    return soft.gaussian("none", temperature, 0.0, "coordinate")
