"""Rollouts as a source of batches: sample from the present parameters, verify, value, and give the rows to train on.

    prompts = stream rows of problems                          on the devices, placed by the loop
    rolled  = explorer.roll(params, prompts, step)             compiled; returns at once, the devices work on it
    rows, told = explorer.judge(rolled, prompts, numbers)      verified on the host, then placed

Everything but the verification is compiled once, and the verification is a function of what was drawn: the same
parameters and step give the same batch, so a resumed run repeats what a run without a stop would have done.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import losses
from jaxcl import mesh as meshes
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.memory import REPLAYED
from jaxcl.random import key_for
from jaxcl.rl import sample as samples
from jaxcl.rl import shaping, teaching
from jaxcl.rl.advantages import Advantages
from jaxcl.rl.judge import Judge
from jaxcl.rl.objectives import Objective
from jaxcl.rl.sample import Limits, Rollouts
from jaxcl.rl.table import REJECTED, Size
from jaxcl.rl.tasks import Problems
from jaxcl.rl.thoughts import Policy
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output, Params

DEMONSTRATION = "demonstration"  # column of Batch.extra, float32 [B]: 1 for a row to be imitated, 0 for a rollout
Told = dict[str, Any]  # numbers, and `note`: why the first answer that could not be judged could not


class Rewarded(NamedTuple):
    """What the answers are worth."""

    values: np.ndarray  # float32 [N, G]
    right: np.ndarray  # bool [N, G], by the verifier alone
    failed: np.ndarray  # bool [N, G], could not be judged: in no baseline, and of no weight
    events: dict[str, int]  # how many could not be judged, see `pool.EVENTS`
    message: str | None  # why the first of these could not


class Rollout(NamedTuple):
    """`config.rollout`: how completions are drawn and rewarded."""

    group: int = 16  # G, rollouts of each problem
    thoughts: int | None = None  # most thoughts; None = those of the problems
    answer: int | None = None  # most tokens of an answer; None = those of the longest right one
    stop: Sequence[str] = ()  # phrases that end the thoughts
    forced: str = ""  # fed behind a stop phrase, before the answer
    late: str = ""  # fed if the thoughts come to their end without one
    temperature: float = 1.0  # of answers
    slots: int | None = None  # rows computed at a time; None = all
    ahead: bool = False  # sample for the next step while this one is trained: one step off-policy
    refill: int = 0  # rounds in which groups without a signal are drawn anew (DAPO's dynamic sampling)
    filter: int = 0  # rollouts per problem at the beginning of a stage; what none of them solves is left out (RIF)
    demonstrations: bool = False  # append the worked row of every problem, for chord
    overlong: int = 0  # last tokens of the limit over which a penalty grows to 1 (DAPO)
    tags: Sequence[str] = ()  # of text: a share of the reward is for <tag> ... </tag> in this order (Datarus-R1)
    tags_share: Sequence[float] = (0.5, 0.0)  # that share at the first step and after `tags_steps`, by half a cosine
    tags_steps: int = 500  # of a stage
    workers: int = 2  # processes of a verifier that is not cheap
    timeout: float = 5.0  # seconds that it has for an answer
    memory: int = 1024  # MiB that it may use
    samples: int = 16  # n of pass@k in evaluations
    modes: Sequence[Any] = ("hard", "soft", "fuzzy")  # policies of the thoughts in evaluations at boundaries


class Rolled(NamedTuple):
    """What was drawn, and what the host needs of it."""

    rollouts: Rollouts
    kind: jax.Array  # int8 [R, T], on every device
    token: jax.Array  # int32 [R, T], on every device
    greedy: tuple[jax.Array, jax.Array] | None  # kind and token of one greedy row per prompt, if it is the baseline


class Explorer(NamedTuple):
    """Made by `make`."""

    rollout: Rollout
    limits: Limits
    size: Size
    judge_rows: Judge
    objective: Objective
    policy: Policy
    draw: Callable[..., Rolled]  # compiled: (params, prompts, step int32 [])
    teach: Callable[..., Batch]  # compiled: (rollouts, prompts, columns)
    merge: Callable[..., Any]  # compiled: (old, new, from int32 [N]): trees whose leaves are [N G, ...] or [N, ...]
    place: Callable[[Any], Any]  # host rows -> devices
    whole: Callable[[Any], Any]  # host value -> every device

    def roll(self, params: Params, prompts: Batch, step: int, draw: int = 0) -> Rolled:
        """Returns what is drawn for the prompts of a step; `draw` counts those of one step."""
        return self.draw(params, prompts, self.whole(np.array([step, draw], np.int32)))

    def judge(self, rolled: Rolled, prompts: Batch, numbers: np.ndarray, step: int = 0) -> tuple[Batch, Told]:
        """Returns the rows to train on, N x G of them (and N demonstrations), and what happened.

        Args:
          rolled: of `roll`.
          prompts: of the same step.
          numbers: int [N] of the problems; -1 = padding, which does not count.
          step: of the stage, by which the share of tags falls.

        Returns:
          The batch, and reward (mean), solved (share of problems with a right answer), signal (share of groups that
          teach something), thoughts and length (mean numbers), drawn (all tokens), stopped and ended (shares of rows),
          busy (share of slot steps in use), failed (answers that the verifier could not judge).
        """
        rewarded = self.rewards(rolled.kind, rolled.token, numbers, step)
        return self.valued(rolled, prompts, numbers, rewarded, self.baseline(rolled, numbers, step))

    def baseline(self, rolled: Rolled, numbers: np.ndarray, step: int) -> np.ndarray | None:
        """Returns the rewards of the greedy rows, float32 [N], NaN for one that could not be judged; None without."""
        if rolled.greedy is None:
            return None
        found = self.rewards(*rolled.greedy, numbers, step)
        return np.where(found.failed, np.float32(np.nan), found.values)[:, 0]

    def value(self, numbers: np.ndarray, rewarded: Rewarded, greedy: np.ndarray | None) -> Advantages:
        """Returns what the rollouts [N, G] are worth to the objective; nothing without a verdict or a baseline."""
        known = (numbers >= 0) if greedy is None else (numbers >= 0) & ~np.isnan(greedy)
        base = None if greedy is None else np.where(known, greedy, np.float32(0))
        return self.objective.advantages(rewarded.values, base, known[:, None] & ~rewarded.failed)

    def valued(
        self, rolled: Rolled, prompts: Batch, numbers: np.ndarray, rewarded: Rewarded, greedy: np.ndarray | None
    ) -> tuple[Batch, Told]:
        """Returns what `judge` does, given the rewards; `greedy` [N] is the `baseline`."""
        value = self.value(numbers, rewarded, greedy)
        columns = {"advantage": value.values, "share": value.share}
        columns = self.place({name: np.asarray(x, np.float32).reshape(-1) for name, x in columns.items()})
        rows = self.teach(rolled.rollouts, prompts, columns)
        told: Told = self.measures(rolled)
        used = numbers >= 0
        told |= {
            "reward": float(rewarded.values[used].mean()),
            "solved": float(rewarded.right[used].any(axis=1).mean()),
            "signal": float(np.any(value.values[used] != 0, axis=1).mean()),
            "failed": float(sum(rewarded.events.values())),
        }
        told |= {f"failed/{name}": float(count) for name, count in rewarded.events.items() if count}
        return rows, told | ({"note": rewarded.message} if rewarded.message else {})

    def rewards(self, kind: jax.Array, token: jax.Array, numbers: np.ndarray, step: int | None = None) -> Rewarded:
        """Returns the rewards of N x G rows.

        Without a step they are those of the verifier; with one, of the stage, tags and lengths count too.
        """
        host_kind, host_token = meshes.fetch((kind, token))
        each = np.repeat(numbers, len(host_kind) // len(numbers))
        found = self.judge_rows(each, host_kind, host_token)
        rewards, rollout = found.rewards, self.rollout
        if step is not None and rollout.tags:
            (w0, w1), steps = rollout.tags_share, rollout.tags_steps
            texts = self.judge_rows.texts(host_kind, host_token)
            placed = np.array([shaping.tags(text, rollout.tags) for text in texts], np.float32)
            rewards = shaping.curriculum(placed, rewards, step, w0=w0, w1=w1, steps=steps)
        if step is not None and rollout.overlong:
            lengths = np.sum(host_kind != samples.NOTHING, axis=1)
            rewards = rewards + shaping.overlong(lengths, limit=self.limits.total, buffer=rollout.overlong)
        shape = (len(numbers), -1)
        right = self.judge_rows.right(each, found.rewards)
        values, failed = rewards.reshape(shape).astype(np.float32), found.failed.reshape(shape)
        return Rewarded(values, right.reshape(shape), failed, found.events, found.message)

    def measures(self, rolled: Rolled) -> Told:
        """Returns what happened; see `judge`."""
        kind, stopped, ended, steps = meshes.fetch(
            (rolled.kind, rolled.rollouts.stopped, rolled.rollouts.ended, rolled.rollouts.steps)
        )
        live = np.sum(kind != samples.NOTHING)
        width = min(self.rollout.slots or len(kind), len(kind))
        return {
            "thoughts": float(np.sum(kind == samples.THOUGHT, axis=1).mean()),
            "length": float(live / len(kind)),
            "drawn": float(live),
            "stopped": float(np.mean(stopped)),
            "ended": float(np.mean(ended)),
            "busy": float(live / (int(steps) * width)),
        }


def limits_of(rollout: Rollout, problems: Sequence[Problems], words: Tokenizer) -> Limits:
    """Returns the limits of the phases.

    Raises:
      UserError: domains with different numbers of thoughts, or options that leave nothing to be rewarded.
    """
    own = {one.thoughts for one in problems}
    if rollout.thoughts is None and len(own) > 1:
        raise UserError(
            f"config.rollout.thoughts: the sources have {sorted(own)}; say how many thoughts all of them get"
        )
    thoughts = own.pop() if rollout.thoughts is None else rollout.thoughts
    if thoughts < 0 or (thoughts == 0 and rollout.thoughts is None and rollout.answer is None):
        raise UserError(f"config.rollout.thoughts={rollout.thoughts}: say how many, or how long an answer may be")
    answer = rollout.answer
    if answer is None:
        answers = [one.answers for one in problems]
        if not all(isinstance(one, np.ndarray) for one in answers):
            raise UserError("config.rollout.answer: missing; say how many tokens an answer may have")
        answer = max(one.shape[1] for one in answers)  # pyright: ignore[reportAttributeAccessIssue]
    if answer < 1:
        raise UserError(f"config.rollout.answer={answer}: must be at least 1 token, or nothing is rewarded")

    def tokens(text: str, key: str) -> tuple[int, ...]:
        try:
            return tuple(int(t) for t in words.encode(text))
        except KeyError as error:
            raise UserError(f"config.rollout.{key}={text!r}: {error} is no word of these problems") from error

    if not all(phrase.strip() for phrase in rollout.stop):
        raise UserError(f"config.rollout.stop={list(rollout.stop)}: an empty phrase ends nothing; leave it out")
    forms = ("{}",) if problems[0].names else ("{}", " {}")  # text is tokenised by what stands before it
    stop = dict.fromkeys(tokens(form.format(phrase), "stop") for phrase in rollout.stop for form in forms)
    forced, late = tokens(rollout.forced, "forced"), tokens(rollout.late, "late")
    limits = Limits(thoughts, answer, stop=tuple(stop), forced=forced, late=late, end=(words.eos,))
    if rollout.overlong > limits.total:
        raise UserError(
            f"config.rollout.overlong={rollout.overlong}: must be at most the limit of {limits.total} tokens"
        )
    return limits


def check(rollout: Rollout, objective: Objective | None) -> None:
    """Raises UserError for options that the signature cannot rule out; no objective: no stage learns from rollouts."""
    rules = (
        ("group", rollout.group >= 1, "must be at least 1"),
        ("temperature", 0 < rollout.temperature < math.inf, "must be above 0, and finite"),
        ("tags", len(set(rollout.tags)) == len(rollout.tags), "name every tag once"),
        ("slots", rollout.slots is None or rollout.slots >= 1, "must be at least 1, or None for all rows"),
        ("refill", rollout.refill >= 0, "must not be negative"),
        ("filter", rollout.filter >= 0, "must not be negative"),
        ("overlong", rollout.overlong >= 0, "must not be negative"),
        ("tags_share", len(rollout.tags_share) == 2, "give two numbers, at the first step and at the last"),
        ("tags_share", all(0 <= w <= 1 for w in rollout.tags_share), "must lie in [0, 1]"),
        ("tags_steps", rollout.tags_steps >= 1, "must be at least 1"),
        ("samples", rollout.samples >= 1, "must be at least 1"),
        ("filter", rollout.filter % max(rollout.group, 1) == 0, f"must be a multiple of group={rollout.group}"),
        ("refill", not (rollout.refill and rollout.ahead), "needs ahead=False"),
    )
    for key, holds, remedy in rules:
        if not holds:
            raise UserError(f"config.rollout.{key}={getattr(rollout, key)}: {remedy}")
    if objective is None:
        return
    try:
        greedy = np.zeros(1, np.float32) if objective.name == "remax" else None
        objective.advantages(np.zeros((1, rollout.group), np.float32), greedy)
    except UserError as error:
        raise UserError(f"config.rollout.group={rollout.group}: {error}") from error


def make(
    mesh: jax.sharding.Mesh,
    model: Model,
    *,
    policy: Policy,
    objective: Objective,
    rollout: Rollout,
    limits: Limits,
    size: Size,
    judge: Judge,
    seed: int,
) -> Explorer:
    """Returns the explorer of a run. See `Rollout` for the options, `check` for what is wrong with them."""
    copied, cut = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    remax = objective.name == "remax"

    def drawing(count: int, greedy: bool) -> Callable[..., Rollouts]:
        options = {"policy": policy, "limits": limits, "group": count, "slots": rollout.slots}
        options |= {"temperature": rollout.temperature, "greedy": greedy, "greedy_answer": greedy}
        return functools.partial(samples.sample, model, **options)

    def draw(params: Params, prompts: Batch, step: jax.Array) -> Rolled:
        shown = prompts.inputs[:, : size.prompt], prompts.segments[:, : size.prompt]
        key = jax.random.fold_in(key_for(seed, "rollouts", step[0]), step[1])
        rollouts = drawing(rollout.group, False)(params, *shown, key)
        base = drawing(1, True)(params, *shown, key) if remax else None
        return Rolled(rollouts, rollouts.kind, rollouts.token, base and (base.kind, base.token))

    def teach(rollouts: Rollouts, prompts: Batch, columns: Mapping[str, jax.Array]) -> Batch:
        shown = prompts.inputs[:, : size.prompt], prompts.segments[:, : size.prompt]
        rows = teaching.batch(policy, rollouts, *shown)
        each = {name: jnp.repeat(x, rollout.group, axis=0) for name, x in prompts.extra.items() if name == REPLAYED}
        task = jnp.repeat(prompts.task, rollout.group, axis=0)
        rows = dataclasses.replace(rows, task=task, extra=rows.extra | each | dict(columns))
        return demonstrated(rows, prompts) if rollout.demonstrations else rows

    whole = Rolled(cut, copied, copied, (copied, copied) if remax else None)  # pyright: ignore[reportArgumentType]
    whole = whole._replace(rollouts=Rollouts(cut, cut, cut, cut, copied, copied, copied))  # pyright: ignore
    return Explorer(
        rollout,
        limits,
        size,
        judge,
        objective,
        policy,
        draw=jax.jit(meshes.on(mesh, draw), out_shardings=whole),
        teach=jax.jit(meshes.on(mesh, teach), out_shardings=cut),
        merge=jax.jit(meshes.on(mesh, merged)),
        place=functools.partial(meshes.place, mesh),
        whole=lambda value: jax.device_put(value, copied),
    )


def merged(old: Any, new: Any, source: jax.Array) -> Any:
    """Returns a tree with some groups replaced by those of another.

    Args:
      old, new: trees whose leaves are [N, ...] or [N G, ...].
      source: int32 [N], which group of `new` takes the place; -1 = none.
    """
    count = source.shape[0]

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        if not a.ndim:
            return a  # steps of the sampler
        where = source if a.shape[0] == count else _spread(source, a.shape[0] // count)
        fresh = (where >= 0).reshape(-1, *[1] * (a.ndim - 1))
        return jnp.where(fresh, b[jnp.maximum(where, 0)], a)

    return jax.tree.map(leaf, old, new)


def _spread(source: jax.Array, group: int) -> jax.Array:
    """Returns for every row of N groups the row it is taken from, or -1; `source` [N] names groups."""
    rows = source[:, None] * group + jnp.arange(group)[None, :]
    return jnp.where(source[:, None] >= 0, rows, -1).reshape(-1)


def demonstrated(rows: Batch, worked: Batch) -> Batch:
    """Returns rollouts followed by worked rows, in one shape: both are padded on the right.

    A worked row has no value: `advantage`, `share`, `kind` and all else that an objective reads are 0 in it.
    """
    count, length = worked.targets.shape
    width = max(length, rows.targets.shape[1])

    def wide(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

    def both(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([wide(a), wide(b)] if a.ndim > 1 else [a, b])

    blank = {name: jnp.zeros((count, *x.shape[1:]), x.dtype) for name, x in rows.extra.items()}
    extra = {name: both(x, worked.extra[name] if name == REPLAYED else blank[name]) for name, x in rows.extra.items()}
    marks = jnp.concatenate([jnp.zeros(rows.task.shape[0]), jnp.ones(count)])
    names = ("inputs", "targets", "weights", "segments", "positions", "task")
    joined = {name: both(getattr(rows, name), getattr(worked, name)) for name in names}
    return Batch(**joined, extra=extra | {DEMONSTRATION: marks})


def loss_of(
    policy: Policy, objective: Objective, temperature: float, limits: Limits, supervised: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the loss of any rows of a run, (output, batch) -> (sum, weight), and the score of its rollouts and pairs.

    Args:
      policy: of the thoughts.
      objective: of rollouts, which are the rows with an advantage.
      temperature: of the answers.
      limits: of the phases of the rollouts.
      supervised: loss of the others.
    """
    rolled = teaching.log_probs(policy, temperature=temperature, limits=limits)

    def score(output: Output, rows: Batch) -> jax.Array:
        return losses.log_probs(output, rows.targets)[0] if REJECTED in rows.extra else rolled(output, rows)

    def loss(output: Output, rows: Batch) -> Any:
        if "advantage" in rows.extra:
            return objective.surrogate(score(output, rows), rows)
        return supervised(output, rows)

    return loss, score
