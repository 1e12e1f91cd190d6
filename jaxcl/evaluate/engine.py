"""Requests -> batches of few shapes -> log-likelihoods and greedy text: what every kind of task is measured with.

Requests are sorted by length and batched in buckets, so that a model is compiled for few shapes. Every text begins
with the tokenizer's `bos`, as documents do in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import generate, losses
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.types import Batch, Model, Output, Params

SHORTEST = 32  # tokens of the smallest bucket
TOKENS = 8192  # of a batch, at the most
ROWS = 64  # of a batch, at the most
Tell = Callable[[int, int], None]  # done, all


class Request(NamedTuple):
    """Tokens of which the last ones are scored."""

    tokens: np.ndarray  # int32 [n], n >= 2; at most max_length + 1 of them
    scored: int  # how many of the last, at least 1 and less than n


class Score(NamedTuple):
    """What a model says of a request."""

    log_probability: float  # nats, the sum over the scored tokens
    greedy: bool  # whether each of them is the most probable one given those before it


class Engine(NamedTuple):
    """The compiled functions of a model. They are the same for all of its checkpoints."""

    words: Tokenizer
    max_length: int  # of a row, and of a prompt with what is generated
    window: int  # tokens of a row of perplexity
    score: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    greedy: Callable[..., jax.Array]  # params, prompts, segments, steps, stop


def make(model: Model, words: Tokenizer, *, max_length: int, window: int) -> Engine:
    """Returns the engine of a model."""

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output = model.apply(params, batch)

        def row(given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            hidden, targets, weights = given
            one = Output(hidden[None], output.head)
            logp, _ = losses.log_probs(one, targets[None])
            hit = one.logits[0].argmax(-1) == targets
            return jnp.sum(jnp.where(weights > 0, logp[0], 0.0)), jnp.all(hit | (weights == 0))

        return jax.lax.map(row, (output.hidden, batch.targets, batch.weights))  # [B]; logits of one row at a time

    greedy = jax.jit(functools.partial(generate.greedy, model), static_argnames="steps")
    return Engine(words, max_length, window, score, greedy)


def log_likelihoods(
    engine: Engine, params: Params, requests: Sequence[Request], tell: Tell | None = None
) -> list[Score]:
    """Returns the scores of `requests`, in their order."""
    found: list[Any] = [None] * len(requests)
    pending = []
    lengths = [len(request.tokens) - 1 for request in requests]
    for members, rows, length in _batches(lengths, engine.max_length):
        batch = _rows([requests[i] for i in members], rows, length)
        pending.append((members, engine.score(params, batch)))
        if len(pending) > 1:  # the device works on one batch while another is fetched
            _fetch(pending.pop(0), found)
        if tell:
            tell(sum(score is not None for score in found), len(found))
    for last in pending:
        _fetch(last, found)
    return found


def generations(
    engine: Engine, params: Params, prompts: Sequence[np.ndarray], steps: int, stop: Sequence[str], tell: Tell | None
) -> list[str]:
    """Returns the greedy continuations of `prompts` (int32 [n] each, n <= max_length - steps + 1), as text.

    They end at eos, or before the first of the `stop` strings. A string that is a single token ends a row at once;
    others are cut off afterwards.
    """
    words = engine.words
    single = [tokens[0] for text in stop if len(tokens := words.encode(text)) == 1]
    ends = np.array([words.eos, *single], np.int32)
    found: list[str] = [""] * len(prompts)
    done = 0
    for members, rows, length in _batches([len(p) for p in prompts], engine.max_length - steps + 1):
        tokens, segments = np.zeros((2, rows, length), np.int32)
        segments[:, -1] = 1  # rows without a prompt need a token, too
        for row, i in enumerate(members):
            tokens[row, length - len(prompts[i]) :] = prompts[i]
            segments[row, length - len(prompts[i]) :] = 1
        made = np.asarray(engine.greedy(params, tokens, segments, steps=steps, stop=ends))
        for row, i in enumerate(members):
            end = np.flatnonzero(made[row] == words.eos)
            found[i] = cut(words.decode(made[row, : end[0] if end.size else steps]), stop)
        done += len(members)
        if tell:
            tell(done, len(prompts))
    return found


def cut(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first of the `stop` strings."""
    return text[: min([at for end in stop if end and (at := text.find(end)) >= 0], default=len(text))]


def begin(words: Tokenizer, text: str) -> np.ndarray:
    """Returns the tokens of a text behind `bos`, int32 [n]."""
    return np.concatenate([[words.bos], words.encode(text)]).astype(np.int32)


def pair(words: Tokenizer, context: str, continuation: str) -> Request:
    """Returns the request that scores `continuation` after `context`.

    As lm-evaluation-harness does it: both are encoded as one text, which is split after as many tokens as the context
    alone has; white space at the end of the context is counted with the continuation, where most tokenizers put it.
    So a token that spans the boundary is scored with the continuation.
    """
    bare = context.rstrip()
    whole, given = begin(words, context + continuation), begin(words, bare)
    return Request(whole, len(whole) - len(given))


def windows(tokens: np.ndarray, length: int) -> Iterator[Request]:
    """Yields requests that score every token but the first once, in rows of at most `length`.

    The first row begins with the text. Every later row goes on with the next `length` tokens after one of context;
    the last one has fewer left and fills its row with what came before, unscored (as in lm-evaluation-harness).
    """
    for start in range(1, len(tokens), length):
        end = min(start + length, len(tokens))
        yield Request(tokens[max(0, end - length - 1) : end], end - start)


def _batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int, int]]:
    """Yields (members, rows, length) of batches: buckets of doubling length, the longest first."""
    buckets: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        bucket = SHORTEST
        while bucket < lengths[i]:
            bucket *= 2
        buckets.setdefault(min(bucket, longest), []).append(i)
    for length, members in buckets.items():
        rows = max(1, min(ROWS, TOKENS // length, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), rows):
            yield members[start : start + rows], rows, length


def _rows(requests: Sequence[Request], rows: int, length: int) -> Batch:
    """Returns requests as a batch [rows, length], padded on the right."""
    inputs, targets, segments = np.zeros((3, rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row, (tokens, scored) in enumerate(requests):
        n = len(tokens) - 1
        inputs[row, :n], targets[row, :n], segments[row, :n] = tokens[:-1], tokens[1:], 1
        weights[row, n - scored : n] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch: Any = Batch(inputs, targets, weights, segments, positions * segments, np.zeros(rows, np.int32))  # type: ignore[arg-type]
    return batch


def _fetch(pending: tuple[list[int], tuple[jax.Array, jax.Array]], found: list[Any]) -> None:
    members, scores = pending
    totals, greedy = jax.device_get(scores)
    for row, i in enumerate(members):
        found[i] = Score(float(totals[row]), bool(greedy[row]))
