"""From what was drawn to rewards: answers of all domains of a run, each checked by its own verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.rl.pool import EVENTS, Pool, Verdicts
from jaxcl.rl.sample import ANSWER, FORCED, NOTHING
from jaxcl.rl.tasks import Problems

Decode = Callable[[Any], str]  # tokens -> text


class Judge:
    """Rewards answers to problems that are numbered through all domains. Not for several threads at once."""

    def __init__(self, problems: Sequence[Problems], pools: Sequence[Pool], decode: Decode | None = None) -> None:
        """Takes the domains, the pool of each, and the tokenizer's `decode` if the verifiers read text."""
        self.problems, self.pools, self.decode = problems, pools, decode
        self.first = np.cumsum([0, *(len(one.prompts) for one in problems)])

    def __call__(self, numbers: np.ndarray, kind: np.ndarray, token: np.ndarray) -> Verdicts:
        """Returns the rewards of rows; process 0 verifies and tells the others, so that all have the same.

        Args:
          numbers: int [R], the problem of each row; -1 = none, rewarded by 0.
          kind, token: int [R, T], of `sample.Rollouts`. The answer is the tokens drawn as such; a text has what was
            forced before it as well.
        """
        many = jax.process_count() > 1
        found = self._verify(numbers, kind, token) if not jax.process_index() else None
        if many:
            counts = np.array([found.events[event] for event in EVENTS] if found else [0] * len(EVENTS), np.int32)
            own = np.stack([found.rewards, found.failed]) if found else np.zeros((2, len(numbers)))
            with jax.transfer_guard("allow"):
                own, counts = multihost_utils.broadcast_one_to_all((own.astype(np.float32), counts))
            (rewards, failed), events = np.asarray(own), dict(zip(EVENTS, np.asarray(counts).tolist(), strict=True))
            found = Verdicts(rewards, failed > 0, events, found.message if found else None)
        assert found is not None
        return found

    def _verify(self, numbers: np.ndarray, kind: np.ndarray, token: np.ndarray) -> Verdicts:
        rewards, failed = np.zeros(len(numbers), np.float32), np.zeros(len(numbers), bool)
        events, message = dict.fromkeys(EVENTS, 0), None
        domain = np.searchsorted(self.first, numbers, side="right") - 1
        for d, (problems, pool) in enumerate(zip(self.problems, self.pools, strict=True)):
            mine = np.flatnonzero((domain == d) & (numbers >= 0))
            if not mine.size:
                continue
            golds = [problems.gold(int(numbers[i] - self.first[d])) for i in mine]
            answers = [self.answer(problems, kind[i], token[i]) for i in mine]
            verdicts = pool.rewards(golds, answers)
            rewards[mine], failed[mine] = verdicts.rewards, verdicts.failed
            events = {event: count + verdicts.events[event] for event, count in events.items()}
            message = message or verdicts.message
        return Verdicts(rewards, failed, events, message)

    def right(self, numbers: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Returns which rewards, float [R], are those of right answers to the problems `numbers`, bool [R]."""
        least = np.array([one.verifier.right for one in self.problems])
        domain = np.searchsorted(self.first, numbers, side="right") - 1
        return (numbers >= 0) & (rewards >= least[np.clip(domain, 0, len(least) - 1)])

    def texts(self, kind: np.ndarray, token: np.ndarray) -> list[str]:
        """Returns what was drawn and forced in each row, as text."""
        assert self.decode is not None
        return [self.decode(row[used]) for row, used in zip(token, kind != NOTHING, strict=True)]

    def answer(self, problems: Problems, kind: np.ndarray, token: np.ndarray) -> Any:
        """Returns the answer of a row: its tokens, or its text."""
        if problems.names:
            return [int(t) for t in token[kind == ANSWER]]
        assert self.decode is not None
        return self.decode(token[(kind == FORCED) | (kind == ANSWER)])
