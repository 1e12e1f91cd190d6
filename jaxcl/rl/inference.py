"""Evaluation of held-out problems: ways of thinking x {greedy, sampled}, pass@k, entropy along chains, likelihood.

A mode is a policy of the thoughts, whatever policy the model was trained with: a model that learned with soft thoughts
may be deployed with hard ones. Answers are greedy, as in "Soft Tokens, Hard Truths" (2509.19170), unless nothing else
is drawn. Greedy thoughts of a soft mode are its mean without noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import losses
from jaxcl import mesh as meshes
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.rl import evaluate, teaching
from jaxcl.rl import sample as samples
from jaxcl.rl.explore import Explorer
from jaxcl.rl.judge import Judge
from jaxcl.rl.sample import ANSWER, NOTHING, THOUGHT, Rollouts
from jaxcl.rl.tasks import Problems
from jaxcl.rl.thoughts import Policy
from jaxcl.types import Batch, Model, Params

Scores = dict[str, dict[str, Any]]
CHUNK = 128  # problems at a time


class Chunk(NamedTuple):
    """Held-out problems of one domain, on the devices."""

    numbers: np.ndarray  # int [n], through all domains; -1 = filled up
    prompts: jax.Array  # int32 [n, P]
    segments: jax.Array  # int32 [n, P]
    gold: jax.Array  # int32 [n, A], tokens of the right answers
    used: jax.Array  # bool [n, A]


class Mode(NamedTuple):
    """Compiled functions of one policy."""

    greedy: Callable[..., tuple[Any, ...]]  # (params, prompts, segments, gold, used, step)
    sample: Callable[..., tuple[Any, ...]]  # (params, prompts, segments, step)


class Bench(NamedTuple):
    """Made by `make`."""

    own: str
    modes: dict[str, Mode]
    chunks: dict[str, list[Chunk]]
    judge: Judge
    samples: int
    whole: Callable[[Any], Any]

    def evaluate(self, params: Params) -> Scores:
        """Returns loss, accuracy and inference of every domain in the run's own mode."""
        found = self.measure(params, [self.own])
        loss = {domain: one[self.own]["drift"] for domain, one in found.items()}
        accuracy = {domain: one[self.own]["greedy"] for domain, one in found.items()}
        failed = {domain: one[self.own]["failed"] for domain, one in found.items() if one[self.own]["failed"]}
        scores = {"loss": loss, "bits_per_byte": {}, "accuracy": accuracy, "inference": _inference(found)}
        return scores | ({"failed": failed} if failed else {})  # answers that could not be judged

    def compare(self, params: Params) -> Scores:
        """Returns inference, entropy and drift of every domain in all modes."""
        found = self.measure(params, list(self.modes))

        def column(name: str) -> dict[str, Any]:
            return {domain: {mode: one[name] for mode, one in modes.items()} for domain, modes in found.items()}

        return {"inference": _inference(found), "entropy": column("entropy"), "drift": column("drift")}

    def measure(self, params: Params, modes: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns domain -> mode -> greedy, sample (k -> pass@k), entropy of thoughts, drift."""
        out: dict[str, dict[str, dict[str, Any]]] = {}
        for domain, chunks in self.chunks.items():
            out[domain] = {}
            for name in modes:
                pieces = [self.piece(params, self.modes[name], chunk, i) for i, chunk in enumerate(chunks)]
                out[domain][name] = self.summary(pieces)
        return out

    def piece(self, params: Params, mode: Mode, chunk: Chunk, number: int) -> dict[str, np.ndarray]:
        """Returns what is measured on some problems."""
        step = self.whole(np.int32(number))
        shown = chunk.prompts, chunk.segments
        kind, token, nll = meshes.fetch(mode.greedy(params, *shown, chunk.gold, chunk.used, step))
        drawn, drawn_token, entropies, inside = meshes.fetch(mode.sample(params, *shown, step))
        right = chunk.numbers >= 0
        each = np.repeat(chunk.numbers, self.samples)
        found, best = self.judge(each, drawn, drawn_token), self.judge(chunk.numbers, kind, token)
        solved = self.judge.right(each, found.rewards)
        return {
            "greedy": self.judge.right(chunk.numbers, best.rewards)[right],
            "sample": solved.reshape(len(right), self.samples)[right],
            "failed": np.array([sum(found.events.values()) + sum(best.events.values())]),
            "nll": nll[right],
            "entropy": entropies.reshape(len(right), self.samples, -1)[right],
            "inside": inside.reshape(len(right), self.samples, -1)[right],
        }

    def summary(self, pieces: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Returns the figures of all pieces."""
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        correct = whole["sample"].sum(axis=1)
        ks = [k for k in (1, 4, 16, 64, 256) if k <= self.samples]
        passed = {str(k): float(evaluate.pass_at(k, np.full_like(correct, self.samples), correct).mean()) for k in ks}
        width = whole["entropy"].shape[-1]
        profile = evaluate.entropy_profile(whole["entropy"].reshape(-1, width), whole["inside"].reshape(-1, width))
        return {
            "greedy": float(whole["greedy"].mean()),
            "failed": int(whole["failed"].sum()),
            "sample": passed,
            "drift": float(np.sum(whole["nll"][:, 0]) / np.sum(whole["nll"][:, 1])),
            "entropy": [float(x) for x in profile if np.isfinite(x)],
        }


def _inference(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns domain -> mode -> greedy and sample."""
    return {
        domain: {mode: {"greedy": one["greedy"], "sample": one["sample"]} for mode, one in modes.items()}
        for domain, modes in found.items()
    }


def make(
    mesh: jax.sharding.Mesh,
    model: Model,
    explorer: Explorer,
    policies: Mapping[str, Policy],
    problems: Mapping[str, Problems],
    words: Tokenizer,
    *,
    rows: int,
) -> Bench:
    """Returns the evaluation of a run.

    Args:
      mesh: of the run.
      model: with all parameters.
      explorer: its limits, sizes and verifiers are used.
      policies: of the modes; that of the run is among them.
      problems: domain -> the problems held out.
      words: encodes right answers of text.
      rows: problems of a domain, at the most.
    """
    judge = Judge(list(problems.values()), explorer.judge_rows.pools, explorer.judge_rows.decode)
    sizes = {name: min(rows, len(one.prompts)) for name, one in problems.items()}
    shards = int(np.prod([mesh.shape[axis] for axis in meshes.BATCH]))
    size = -(-min(max(sizes.values()), CHUNK) // shards) * shards
    golds = {name: _golds(one, sizes[name], words) for name, one in problems.items()}
    width = max(len(tokens) for some in golds.values() for tokens in some)
    chunks: dict[str, list[Chunk]] = {}
    for (name, one), first in zip(problems.items(), judge.first, strict=False):
        chunks[name] = [
            _chunk(mesh, one, golds[name], range(start, min(start + size, sizes[name])), size, width, first, explorer)
            for start in range(0, sizes[name], size)
        ]
    copied = meshes.replicated(mesh)
    modes = {name: _mode(mesh, model, policy, explorer, copied) for name, policy in policies.items()}
    return Bench(
        explorer.policy.name, modes, chunks, judge, explorer.rollout.samples, lambda x: jax.device_put(x, copied)
    )


def _golds(problems: Problems, count: int, words: Tokenizer) -> list[list[int]]:
    """Returns the tokens of the right answers."""
    found = [problems.gold(i) for i in range(count)]
    return [[int(t) for t in words.encode(gold)] if isinstance(gold, str) else gold for gold in found]


def _chunk(
    mesh: jax.sharding.Mesh,
    problems: Problems,
    golds: list[list[int]],
    members: range,
    size: int,
    width: int,
    first: int,
    explorer: Explorer,
) -> Chunk:
    """Returns some problems, filled up to `size` with copies of the first that do not count."""
    index = np.array([*members, *[members[0]] * (size - len(members))])
    short = explorer.size.prompt - problems.prompts.shape[1]
    numbers = np.where(np.arange(size) < len(members), first + index, -1)
    gold, used = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
    for row, i in enumerate(index):
        gold[row, : len(golds[i])], used[row, : len(golds[i])] = golds[i], True
    shown = [np.pad(x[index], ((0, 0), (short, 0))) for x in (problems.prompts, problems.segments)]
    return Chunk(numbers, *meshes.place(mesh, (*shown, gold, used)))


def _mode(mesh: jax.sharding.Mesh, model: Model, policy: Policy, explorer: Explorer, copied: Any) -> Mode:
    """Returns the compiled functions of a policy."""
    limits, rollout = explorer.limits, explorer.rollout
    fixed = bool(limits.thoughts) and policy.name != "none"  # else answers are all there is to be drawn

    def drawn(params: Params, prompts: Any, segments: Any, key: Any, greedy: bool) -> Rollouts:
        options = {"policy": policy, "limits": limits, "slots": rollout.slots, "temperature": rollout.temperature}
        options |= {"group": 1 if greedy else rollout.samples, "greedy": greedy, "greedy_answer": greedy or fixed}
        return samples.sample(model, params, prompts, segments, key, **options)

    def greedy(params: Params, prompts: Any, segments: Any, gold: Any, used: Any, step: Any) -> tuple[Any, ...]:
        found = drawn(params, prompts, segments, jax.random.fold_in(jax.random.key(0), step), True)
        rows = teaching.batch(policy, _answered(found, gold, used), prompts, segments)
        output = model.apply(params, _inputs(rows))
        logp, _ = losses.log_probs(output, rows.targets)
        counted = rows.extra["kind"] == ANSWER
        nll = jnp.stack([-jnp.sum(jnp.where(counted, logp, 0), 1), jnp.sum(counted, 1).astype(jnp.float32)], 1)
        return found.kind, found.token, nll

    def sample(params: Params, prompts: Any, segments: Any, step: Any) -> tuple[Any, ...]:
        found = drawn(params, prompts, segments, jax.random.fold_in(jax.random.key(1), step), False)
        rows = teaching.batch(policy, found, prompts, segments)
        output = model.apply(params, _inputs(rows))
        first, last = prompts.shape[1] - 1, prompts.shape[1] - 1 + max(limits.thoughts, 1)
        some = output._replace(hidden=output.hidden[:, first:last])
        inside = (rows.extra["kind"][:, first:last] == THOUGHT).astype(jnp.float32)
        profile = jax.lax.map(
            lambda hidden: evaluate.entropy(output._replace(hidden=hidden[None]).logits)[0], some.hidden
        )
        return found.kind, found.token, profile, inside

    return Mode(*(jax.jit(meshes.on(mesh, function), out_shardings=copied) for function in (greedy, sample)))


def _inputs(rows: Batch) -> Batch:
    """Returns the rows with no columns but those a model reads."""
    names = ("soft", "thought", "mixture", "support", "shares")
    return dataclasses.replace(rows, extra={name: rows.extra[name] for name in names if name in rows.extra})


def _answered(rollouts: Rollouts, gold: jax.Array, used: jax.Array) -> Rollouts:
    """Returns rollouts with the right answers [R, A] in place of their own."""
    steps = rollouts.kind.shape[1]
    width = gold.shape[1]
    room = ((0, 0), (0, width))
    start = jnp.argmax(rollouts.kind == ANSWER, axis=1)  # [R]; every row has an answer
    place = jnp.arange(steps + width)[None, :] - start[:, None]  # [R, T + A]
    inside = (place >= 0) & jnp.take_along_axis(used, jnp.clip(place, 0, width - 1), axis=1) & (place < width)
    token = jnp.take_along_axis(gold, jnp.clip(place, 0, width - 1), axis=1)
    before = place < 0

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, room + ((0, 0),) * (x.ndim - 2))

    kind = jnp.where(before, padded(rollouts.kind), jnp.where(inside, ANSWER, NOTHING)).astype(rollouts.kind.dtype)
    return rollouts._replace(
        kind=kind,
        token=jnp.where(before, padded(rollouts.token), jnp.where(inside, token, 0)),
        log_prob=padded(rollouts.log_prob),
        record=jax.tree.map(padded, rollouts.record),
    )
