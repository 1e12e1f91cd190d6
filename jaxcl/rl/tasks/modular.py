"""Sum of digits modulo p: the running sum is the chain, and there is one right chain.

  prompt  <bos> 7 2 4     thoughts  7 9     answer  3     (p = 10)

Split by multisets of digits, so that no permutation of a held-out sequence is trained on. Without a shortcut beyond
parity where p is even; `baselines` says what it is worth.
"""

from __future__ import annotations

import numpy as np

from jaxcl.rl import verify
from jaxcl.rl.tasks import BOS, EOS, PAD, SPECIAL, Problems, guess, multisets, part, sequences, split
from jaxcl.schema import UserError


def make(
    *,
    count: int = 4,
    modulus: int = 10,
    problems: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
) -> Problems:
    """Returns the problems; they have `count - 1` thoughts and an answer of one token.

    Args:
      count: digits of a problem; they go from 0 to p - 1.
      modulus: p.
      problems: how many sequences of digits to draw; None for all p^count.
      held_out: share of the multisets of digits that is held out.
      seed: of the draw and the split.

    Raises:
      UserError: no such digits, or too many.
    """
    if count < 2:
        raise UserError(f"config.task.count={count}: must be at least 2")
    if modulus < 2:
        raise UserError(f"config.task.modulus={modulus}: must be at least 2")
    digits = sequences("modular", 0, modulus - 1, count, problems, seed)
    names = (*SPECIAL, *map(str, range(modulus)))
    running = np.cumsum(digits, axis=1) % modulus
    prompts = np.concatenate([np.full((len(digits), 1), BOS), len(SPECIAL) + digits], axis=1).astype(np.int32)
    everything = Problems(
        description={"name": "modular", "count": count, "modulus": modulus, "problems": problems, "seed": seed}
        | {"held_out": held_out},
        vocab=len(names),
        names=names,
        pad=PAD,
        bos=BOS,
        eos=EOS,
        prompts=prompts,
        segments=np.ones_like(prompts),
        answers=(len(SPECIAL) + running[:, -1:]).astype(np.int32),
        verifier=verify.make("tokens"),
        thoughts=count - 1,
        baselines={},
        traces=(len(SPECIAL) + running[:, :-1]).astype(np.int32),
        licence="generated",
    )
    train, held = split(multisets(digits), held_out, seed, field="task.held_out")

    def measured(rows: np.ndarray) -> Problems:
        answers, parity = running[rows, -1], digits[rows].sum(axis=1) % 2
        return part(everything, rows)._replace(baselines={"majority": guess(answers), "parity": guess(answers, parity)})

    return measured(train)._replace(held_out=measured(held))
