"""Fuzzy tokens: soft tokens so cold that the mean is the embedding of the likeliest token, unless two nearly tie.

Near a tie, within some ten temperatures, the gradient grows like 1 / temperature: clip it. Logits have to come in
float32: rounded to bfloat16 they tie often.

Source: Butt et al. 2025, "Soft Tokens, Hard Truths", 2509.19170, section 3; see `soft`.
"""

from __future__ import annotations

from jaxcl.rl.thoughts import Policy, soft


def make(*, temperature: float = 1e-4, gamma: float = 0.33, norm: soft.Norm = "coordinate") -> Policy:
    """Returns the policy; options and errors are those of `soft`."""
    return soft.gaussian("fuzzy", temperature, gamma, norm)
