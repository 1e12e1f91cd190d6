"""Minimum non-negative sum: give each digit a sign so that the sum is as small as it can be, but not negative.

  prompt  <bos> D7 D2 D4     thoughts  S7 S5     answer  S1     (7 - 2 - 4)

Thought t is a sum of the first t digits with signs. A discrete chain holds one such sum, of the best choice of signs;
the distribution to learn holds all 2^t of them, equal ones counted as often as they come: a search that keeps every
branch. Split by multisets of digits, so that no permutation of a held-out sequence is trained on.

Most answers are 0 or 1, and the parity of the digits' sum tells which: `baselines` says what guessing so is worth.
With three digits of 1..20 it is 25.7 % of all sequences, with four of 1..9 it is 61.2 %.

Source: Gozeten et al. 2025, "Continuous Chain of Thought Enables Parallel Exploration and Reasoning", section 4.
Deviations: three special tokens instead of six; the token of a digit is its own, also from 10 on; the last step, where
the distribution is the answer alone, is not among the thoughts.
"""

from __future__ import annotations

import itertools

import numpy as np

from jaxcl.rl import verify
from jaxcl.rl.tasks import BOS, EOS, PAD, SPECIAL, Problems, Targets, guess, multisets, part, sequences, split
from jaxcl.schema import UserError

MOST_DIGITS = 8  # 2^8 sums per problem


def make(
    *,
    count: int = 3,
    low: int = 1,
    high: int = 20,
    problems: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
) -> Problems:
    """Returns the problems; they have `count - 1` thoughts and an answer of one token.

    Args:
      count: m, digits of a problem.
      low: smallest digit.
      high: largest digit.
      problems: how many sequences of digits to draw; None for all (high - low + 1)^m.
      held_out: share of the multisets of digits that is held out.
      seed: of the draw and the split.

    Raises:
      UserError: no such digits, or too many.
    """
    if not 2 <= count <= MOST_DIGITS:
        raise UserError(f"config.task.count={count}: must be from 2 to {MOST_DIGITS}")
    if not 0 <= low < high:
        raise UserError(f"config.task.low={low}, high={high}: must be 0 <= low < high")
    digits = sequences("mnns", low, high, count, problems, seed)
    reach = count * high
    names = (*SPECIAL, *(f"D{d}" for d in range(low, high + 1)), *(f"S{s}" for s in range(-reach, reach + 1)))
    zero = len(SPECIAL) + high - low + 1 + reach  # token of the sum 0
    answers, partial = best(digits)
    prompts = np.concatenate([np.full((len(digits), 1), BOS), len(SPECIAL) + digits - low], axis=1).astype(np.int32)
    everything = Problems(
        description={"name": "mnns", "count": count, "low": low, "high": high, "problems": problems, "seed": seed}
        | {"held_out": held_out},
        vocab=len(names),
        names=names,
        pad=PAD,
        bos=BOS,
        eos=EOS,
        prompts=prompts,
        segments=np.ones_like(prompts),
        answers=(zero + answers[:, None]).astype(np.int32),
        verifier=verify.make("tokens"),
        thoughts=count - 1,
        baselines={},
        traces=(zero + partial[:, :-1]).astype(np.int32),
        targets=frontier(digits, zero),
        licence="generated",
    )
    train, held = split(multisets(digits), held_out, seed, field="task.held_out")

    def measured(rows: np.ndarray) -> Problems:
        parity = digits[rows].sum(axis=1) % 2
        baselines = {"majority": guess(answers[rows]), "parity": guess(answers[rows], parity)}
        return part(everything, rows)._replace(baselines=baselines)

    return measured(train)._replace(held_out=measured(held))


def signs(count: int) -> np.ndarray:
    """Returns all choices of signs, int64 [2^count, count]; the first is all +."""
    return np.array(list(itertools.product((1, -1), repeat=count)))


def best(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the answers and the sums on the way there.

    Args:
      digits: int64 [N, m].

    Returns:
      int64 [N], the smallest sum that is not negative; int64 [N, m], the sums after each digit of the first choice of
      signs that leads there, in the order of `signs`.
    """
    choices = signs(digits.shape[1])
    sums = digits @ choices.T  # [N, 2^m]
    first = np.where(sums < 0, sums.max() + 1, sums).argmin(axis=1)
    partial = np.cumsum(digits * choices[first], axis=1)
    return partial[:, -1], partial


def frontier(digits: np.ndarray, zero: int) -> Targets:
    """Returns the distributions of the sums after 1..m-1 digits [N, m]; `zero` is the token of the sum 0."""
    n, count = digits.shape
    tokens = np.full((n, count - 1, 2 ** (count - 1)), zero, np.int32)
    shares = np.zeros(tokens.shape, np.float32)
    for t in range(1, count):
        tokens[:, t - 1, : 2**t] = zero + digits[:, :t] @ signs(t).T
        shares[:, t - 1, : 2**t] = 0.5**t
    return Targets(tokens, shares)
