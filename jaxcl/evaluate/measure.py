"""Tasks -> requests, checked before any compute -> figures. One function per kind prepares, and returns what measures.

The figures of a task are a dict of groups (stages of facts, domains of held-out rows, else `all`) of metrics:

  choice       acc: share of records whose right choice is the most likely; acc_norm: the same per byte of the choice
  generation   exact_match: share of records whose greedy text is the answer, both extracted and normalised
  fact         log_probability: nats of the whole answer, mean over facts; rank_1: share of facts of which every token
               is the most probable one
  perplexity   nats_per_token, bits_per_byte, perplexity (of a token); held_out gives the same
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.evaluate import engine as engines
from jaxcl.evaluate.engine import Engine, Request, Tell
from jaxcl.evaluate.tasks import Record, Task, between
from jaxcl.schema import UserError
from jaxcl.types import Params

QUOTED = 40  # characters of a text in a message
Figures = dict[str, dict[str, float]]  # group -> metric -> value
Measure = Callable[[Params, Tell | None], Figures]


class Options(NamedTuple):
    """What the command line says of every task of generation."""

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    extract: str | None = None


def prepare(task: Task, engine: Engine, options: Options) -> Measure:
    """Returns the function that measures a task.

    Raises:
      UserError: a record that is longer than the model's rows, or an answer without tokens of its own.
    """
    if task.kind == "choice":
        return _choice(task, engine)
    if task.kind == "fact":
        return _fact(task, engine)
    if task.kind == "generation":
        return _generation(task, engine, options)
    return _perplexity(task, engine)


def normalised(text: str) -> str:
    """Returns a text for comparison: without case, repeated white space, final period, $, commas in numbers."""
    plain = " ".join(text.casefold().replace("$", "").split())
    return re.sub(r"(?<=\d),(?=\d)", "", plain).rstrip(".").strip()


def extracted(text: str, expression: str | None) -> str:
    """Returns the last match of a regular expression, its first group if it has one; the text if there is no match."""
    found = list(re.finditer(expression, text)) if expression else []
    return (found[-1].group(1 if found[-1].re.groups else 0) or "") if found else text


def language(nats: float, tokens: float, size: float) -> dict[str, float]:
    """Returns the metrics of a text of `tokens` and `size` bytes."""
    mean = nats / tokens
    return {
        "nats_per_token": mean,
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
    }


def short(text: str) -> str:
    """Returns a text as a message quotes it."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")


def request(record: Record, continuation: str, engine: Engine) -> Request:
    """Returns the request that scores a continuation of a record."""
    made = engines.pair(engine.words, record.prompt + between(record, continuation), continuation)
    if made.scored < 1:
        raise UserError(f"{record.place}: answer {short(continuation)}: adds no token to the prompt; reword it")
    if len(made.tokens) - 1 > engine.max_length:
        raise UserError(
            f"{record.place}: {len(made.tokens) - 1} tokens with the answer {short(continuation)}, but the model's "
            f"max_length is {engine.max_length}; shorten the record or use fewer --shots"
        )
    return made


def _choice(task: Task, engine: Engine) -> Measure:
    requests = [request(record, choice, engine) for record in task.records for choice in record.choices]

    def measure(params: Params, tell: Tell | None) -> Figures:
        scores = iter(engines.log_likelihoods(engine, params, requests, tell))
        right = np.zeros(2)
        for record in task.records:
            values = np.array([next(scores).log_probability for _ in record.choices])
            sizes = np.array([len(choice.encode("utf-8", "surrogatepass")) for choice in record.choices])
            right += [values.argmax() == record.gold, (values / sizes).argmax() == record.gold]
        acc, acc_norm = right / len(task.records)
        return {"all": {"acc": float(acc), "acc_norm": float(acc_norm), "records": len(task.records)}}

    return measure


def _fact(task: Task, engine: Engine) -> Measure:
    requests = [request(record, record.answer, engine) for record in task.records]

    def measure(params: Params, tell: Tell | None) -> Figures:
        scores = engines.log_likelihoods(engine, params, requests, tell)
        figures = {}
        for stage in dict.fromkeys(record.stage for record in task.records):
            own = [score for score, record in zip(scores, task.records, strict=True) if record.stage == stage]
            means = np.mean([(score.log_probability, score.greedy) for score in own], axis=0).tolist()
            figures[stage] = {"log_probability": means[0], "rank_1": means[1], "records": len(own)}
        return figures

    return measure


def _generation(task: Task, engine: Engine, options: Options) -> Measure:
    prompts = [engines.begin(engine.words, record.prompt) for record in task.records]
    longest = engine.max_length - options.max_tokens + 1
    for record, prompt in zip(task.records, prompts, strict=True):
        if len(prompt) > longest:
            raise UserError(
                f"{record.place}: a prompt of {len(prompt)} tokens and --max_tokens={options.max_tokens}, but the "
                f"model's max_length is {engine.max_length}; shorten the record or generate less"
            )

    def measure(params: Params, tell: Tell | None) -> Figures:
        # Strings that end every record may end its generation early; all others are only cut off afterwards.
        stops = set.intersection(*(set(record.stop) for record in task.records))
        everywhere = sorted({*options.stop, *stops})
        texts = engines.generations(engine, params, prompts, options.max_tokens, everywhere, tell)
        right = 0
        for record, text in zip(task.records, texts, strict=True):
            rule = record.extract or options.extract
            said, wanted = (extracted(t, rule) for t in (engines.cut(text, record.stop), record.answer))
            right += normalised(said) == normalised(wanted)
        return {"all": {"exact_match": right / len(task.records), "records": len(task.records)}}

    return measure


def _perplexity(task: Task, engine: Engine) -> Measure:
    tokens = [engines.begin(engine.words, record.prompt) for record in task.records]
    requests = [row for text in tokens for row in engines.windows(text, engine.window)]
    count, size = (
        sum(r.scored for r in requests),
        sum(len(r.prompt.encode("utf-8", "surrogatepass")) for r in task.records),
    )

    def measure(params: Params, tell: Tell | None) -> Figures:
        scores: Sequence[engines.Score] = engines.log_likelihoods(engine, params, requests, tell)
        nats = -sum(score.log_probability for score in scores)
        return {"all": language(nats, count, size) | {"records": len(task.records)}}

    return measure
