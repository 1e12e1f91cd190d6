"""Rollouts as a source: sample from the present parameters, verify, value, and give the rows to train on.

    chosen = {"policy": thoughts.make("soft"), "objective": objectives.make("rloo"), "limits": Limits(2, 1)}
    source = make(model, problems, group=16, **chosen)
    batch, metrics = source(params, numbers, key)          # numbers of the problems, int [N]
    total, weight = source.loss(model.apply(params, batch), batch)

Everything but the verification is compiled; the verification is a function of what was drawn, so that the same
parameters, numbers and key give the same batch, and a resumed run repeats what a run without a stop would have done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.rl import sample as samples
from jaxcl.rl import teaching
from jaxcl.rl.objectives import Objective
from jaxcl.rl.sample import ANSWER, Limits, Rollouts
from jaxcl.rl.tasks import Problems
from jaxcl.rl.thoughts import Policy
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params

Judge = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]  # right answers, answers -> rewards float32 [n]


class Source(NamedTuple):
    """See the module's docstring; made by `make`."""

    model: Model
    problems: Problems
    objective: Objective
    judge: Judge
    group: int
    roll: Callable[[Params, Any, Any, Key], Rollouts]  # compiled
    greedy: Callable[[Params, Any, Any, Key], Rollouts]  # compiled; one row for each prompt, without noise
    teach: Callable[..., Batch]  # compiled
    loss: Callable[[Output, Batch], tuple[jax.Array, jax.Array]]

    def __call__(self, params: Params, numbers: np.ndarray, key: Key) -> tuple[Batch, dict[str, float]]:
        """Returns the rows to train on, N x G of them, and what happened.

        Args:
          params: of the model; the sampler's are the trainer's.
          numbers: int [N], the problems.
          key: of all draws.

        Returns:
          The batch, and reward (mean), solved (share of problems with a reward above 0), signal (share of groups whose
          rewards differ), thoughts (mean number), stopped and ended (share of rows), busy (share of slot steps in use).
        """
        prompts, segments = self.problems.prompts[numbers], self.problems.segments[numbers]
        rollouts = self.roll(params, prompts, segments, key)
        rewards = self.reward(rollouts, numbers)  # [N, G]
        greedy = None
        if self.objective.name == "remax":
            greedy = self.reward(self.greedy(params, prompts, segments, key), numbers)[:, 0]
        valued = self.objective.advantages(rewards, greedy)
        columns = {"advantage": valued.values, "share": valued.share}
        columns = {name: np.asarray(x, np.float32).reshape(-1) for name, x in columns.items()}
        rows = self.teach(rollouts, prompts, segments, columns)
        return rows, self.measures(rollouts, rewards)

    def reward(self, rollouts: Rollouts, numbers: np.ndarray) -> np.ndarray:
        """Returns the rewards, float32 [N, R / N]."""
        kind, token = np.asarray(rollouts.kind), np.asarray(rollouts.token)
        answers = [[int(t) for t in row[used]] for row, used in zip(token, kind == ANSWER, strict=True)]
        group = len(answers) // len(numbers)
        golds = [self.problems.gold(int(n)) for n in np.repeat(numbers, group)]
        return self.judge(golds, answers).reshape(len(numbers), group)

    def measures(self, rollouts: Rollouts, rewards: np.ndarray) -> dict[str, float]:
        """Returns what happened; see `__call__`."""
        kind = np.asarray(rollouts.kind)
        live = np.sum(kind != samples.NOTHING)
        slots = int(rollouts.steps) * kind.shape[0]
        return {
            "reward": float(rewards.mean()),
            "solved": float((rewards.max(axis=1) > 0).mean()),
            "signal": float((np.ptp(rewards, axis=1) > 0).mean()),
            "thoughts": float(np.sum(kind == samples.THOUGHT, axis=1).mean()),
            "stopped": float(np.mean(rollouts.stopped)),
            "ended": float(np.mean(rollouts.ended)),
            "busy": float(live / slots),
        }


def make(
    model: Model,
    problems: Problems,
    *,
    policy: Policy,
    objective: Objective,
    limits: Limits,
    group: int,
    slots: int | None = None,
    temperature: float = 1.0,
    judge: Judge | None = None,
) -> Source:
    """Returns a source.

    Args:
      model: see `sample.sample`.
      problems: with answers of tokens, unless a `judge` is given.
      policy: of the thoughts.
      objective: values the rollouts and makes their loss.
      limits: of the phases.
      group: G, rollouts for each problem.
      slots: rows that are computed at a time; None = all.
      temperature: of the answers.
      judge: rewards answers, such as `jaxcl.rl.pool.Pool.rewards`; None = the verifier of the problems, in this
        process, which has to be a cheap one.

    Raises:
      UserError: a group of less than 1, or a verifier that needs a judge.
    """
    if group < 1:
        raise UserError(f"config.rollout.group={group}: must be at least 1")
    if limits.thoughts + limits.answer < 1 or limits.answer < 1:
        raise UserError(f"config.rollout.answer={limits.answer}: must be at least 1 token, or nothing is rewarded")
    if judge is None and not problems.verifier.cheap:
        raise UserError(
            f"config.task verifier {problems.verifier.place}: runs untrusted answers; give it a pool of processes"
        )

    def within(golds: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        pairs = zip(golds, answers, strict=True)
        return np.array([problems.verifier.score(gold, answer) for gold, answer in pairs], np.float32)

    def drawn(count: int, greedy: bool) -> Callable[..., Rollouts]:
        options = {"policy": policy, "limits": limits, "group": count, "slots": slots, "temperature": temperature}
        options |= {"greedy": greedy, "greedy_answer": greedy}
        return jax.jit(lambda *arrays: samples.sample(model, *arrays, **options))

    score = teaching.log_probs(policy, temperature=temperature, limits=limits)

    def teach(rollouts: Rollouts, prompts: Any, segments: Any, columns: dict[str, jax.Array]) -> Batch:
        rows = teaching.batch(policy, rollouts, jnp.asarray(prompts), jnp.asarray(segments))
        return dataclasses.replace(rows, extra=rows.extra | columns)

    def loss(output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        return objective.surrogate(score(output, rows), rows)

    compiled = {"roll": drawn(group, False), "greedy": drawn(1, True), "teach": jax.jit(teach)}
    return Source(model, problems, objective, judge or within, group, loss=loss, **compiled)
