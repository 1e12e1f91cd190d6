"""What is evaluated: the checkpoints of a run, or a folder in the format of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxcl import domains, manifests, network, program, schema, scores, weights
from jaxcl.data import rows as tables
from jaxcl.data import tokenizer as tokenizers
from jaxcl.evaluate import engine as engines
from jaxcl.evaluate.measure import Figures, Measure, language
from jaxcl.schema import UserError
from jaxcl.types import Params

WINDOW = 1024  # tokens of a row of perplexity, of a model that does not say what rows it was trained on
BATCH = 8  # held-out rows at a time


class Subject(NamedTuple):
    """A model, and its parameters at one or more steps."""

    path: Path
    found: weights.Weights  # without parameters
    params: Callable[[int], Params]
    steps: list[int]
    run: bool  # whether it is a run of jaxcl
    max_length: int  # longest row that the model takes
    window: int  # tokens of a row of perplexity


def load(path: Path, *, steps: str | None = None, window: int | None = None) -> Subject:
    """Returns the subject in a folder; the parameters of its first step are loaded.

    Args:
      path: folder of a run, or of a Hugging Face checkpoint.
      steps: of checkpoints, such as "all" or "100,200"; None = the newest.
      window: tokens of a row of perplexity; None = the rows the run was trained on, or at most 1024.

    Raises:
      UserError: neither a run nor a checkpoint, no such step, or damaged files.
    """
    run = (path / "run.json").exists() or not (path / "config.json").exists()
    if not run and steps is not None:
        raise UserError(f"--steps={steps}: {path} is a Hugging Face folder, which has one set of weights; leave it out")
    chosen = steps_of(path, steps) if run else [0]
    first = weights.load(path, step=chosen[0]) if run else imported(path)
    trained = weights.length_of(path, first.about) if run else WINDOW
    longest = first.network.shape.max_length if first.network.shape else trained
    if window is not None and not 1 <= window <= longest:
        raise UserError(f"--window={window}: must be from 1 to {longest}, the model's max_length")
    held: dict[int, Params] = {chosen[0]: first.params}

    def params(step: int) -> Params:
        return (
            held.pop(step) if step in held else weights.load(path, step=step).params if run else imported(path).params
        )

    return Subject(path, first._replace(params=None), params, chosen, run, longest, window or min(trained, longest))


def steps_of(path: Path, text: str | None) -> list[int]:
    """Returns the steps that `--steps` asks for, in increasing order.

    Raises:
      UserError: one that the run has no checkpoint of; the message lists those it has.
    """
    kept = manifests.completed(epath.Path(path / "checkpoints"))
    if not kept:
        raise UserError(f"{path}: no checkpoint to evaluate; give the folder of a run, or of a Hugging Face checkpoint")
    if text is None:
        return kept[-1:]
    if text == "all":
        return kept
    asked = text.split(",")
    for step in asked:
        if not step.strip().isdecimal() or int(step) not in kept:
            raise UserError(f"--steps={text}: no checkpoint {step!r} in {path}; it has {', '.join(map(str, kept))}")
    return sorted({int(step) for step in asked})


def imported(path: Path) -> weights.Weights:
    """Returns the weights in a Hugging Face folder, as float32 on the first device."""
    options = {"checkpoint": str(path)}
    words = network.tokenizer_of(None, options)
    made = network.make(options, words, 1)
    assert made.load
    abstract = jax.eval_shape(made.model.init, jax.random.key(0))
    params = made.load(jax.random.key(0), abstract)
    return weights.Weights(made, params, words, 0, {"id": path.name, "config": {"model": options}}, {})


def engine_of(subject: Subject) -> engines.Engine:
    """Returns the compiled functions of a subject."""
    found = subject.found
    return engines.make(found.network.model, found.tokenizer, max_length=subject.max_length, window=subject.window)


def held_out(subject: Subject) -> Measure:
    """Returns the function that measures the held-out rows of a run's own domains, as its training loop does.

    Raises:
      UserError: the subject is no run.
    """
    if not subject.run:
        raise UserError(f"--tasks=held_out: {subject.path} is no run and has no domains of its own; name task files")
    config: Mapping[str, Any] = subject.found.about["config"]
    words: tokenizers.Tokenizer = subject.found.tokenizer
    if not config.get("packing"):
        raise UserError(
            f"--tasks=held_out: {subject.path} was trained on problems, whose report has the figures; name task files"
        )
    packed = schema.call(domains.Packing, config["packing"], field="packing")
    corpora = domains.of_text(config["sources"], words, packed)
    limit = schema.call(program.Evaluation, config.get("evaluation") or {}, field="evaluation").rows
    batches = {n: list(tables.batches(c.held_out, size=BATCH, limit=limit)) for n, c in corpora.items()}
    rows = scores.put(batches)
    evaluate = program.evaluator(subject.found.network.model, corpora, rows)
    counts = {name: float(sum(b.weights.sum() for b in given)) for name, given in batches.items()}
    sizes = {name: counts[name] * (corpus.held_out.bytes_per_token or 1.0) for name, corpus in corpora.items()}

    def measure(params: Params, tell: Any) -> Figures:
        nats = evaluate(params)["loss"]
        counted = {name: min(limit, len(corpus.held_out)) for name, corpus in corpora.items()}
        return {
            name: language(loss * counts[name], counts[name], sizes[name]) | {"records": counted[name]}
            for name, loss in nats.items()
        }

    return measure
