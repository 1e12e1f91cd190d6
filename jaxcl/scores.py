"""Held-out losses: exact token means per domain over fixed batches that stay on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.losses import cross_entropy
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output, Params

Loss = Callable[[Output, Batch], tuple[jax.Array, jax.Array]]  # (sum, weight) of the rows, float32 [] each
Rows = dict[str, list[Batch]]  # domain -> batches [B, ...] on the device


def put(batches: Mapping[str, Sequence[Batch] | Batch], place: Callable[[Batch], Batch] = jax.device_put) -> Rows:
    """Moves held-out batches to the device, once for all evaluations.

    Args:
      batches: domain -> host batches [B, ...], or the same stacked as one batch [K, B, ...] (its `task` is [K, B]).
      place: puts one batch [B, ...] where it belongs, for example sharded over a mesh.

    Raises:
      UserError: a domain without rows that count.
    """
    rows: Rows = {}
    for domain, given in batches.items():
        if not isinstance(given, Batch):
            listed = list(given)
        elif np.ndim(given.task) == 2:
            listed = [jax.tree.map(lambda x, i=i: x[i], given) for i in range(len(given.task))]
        else:
            listed = [given]
        if not any(np.asarray(batch.weights).any() for batch in listed):
            raise UserError(f"evaluation domain {domain!r}: no token of its rows counts; give it more documents")
        rows[domain] = [place(batch) for batch in listed]
    return rows


def make(model: Model, loss: Loss) -> Callable[[Params, Rows], dict[str, float]]:
    """Returns `evaluate(params, rows)`: the loss of each domain per unit of weight (nats per token).

    One jitted function gives (sum, weight) of a batch; it compiles once per batch shape. The sums of all batches
    are added in float64 on the host, so a mean is exact however tokens and padding fall into batches, and equal
    inputs give equal bits. Everything is fetched in one transfer.

    Args:
      model: model to evaluate.
      loss: maps (output, batch) to (sum, weight); any per-row score in this form will do, such as `accuracy`.
    """

    @jax.jit
    def score(params: Params, batch: Batch) -> jax.Array:
        total, weight = loss(model.apply(params, batch), batch)
        return jnp.stack([total.astype(jnp.float32), weight.astype(jnp.float32)])  # [2]

    def evaluate(params: Params, rows: Rows) -> dict[str, float]:
        pending = {domain: [score(params, batch) for batch in batches] for domain, batches in rows.items()}
        scores = jax.device_get(pending)
        sums = {domain: np.sum(np.asarray(pairs, np.float64), axis=0) for domain, pairs in scores.items()}
        return {domain: float(total / weight) for domain, (total, weight) in sums.items()}

    return evaluate


def accuracy(output: Output, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns (weighted number of targets that have the largest logit, weight), for use with `make`."""
    correct = (output.logits.argmax(-1) == batch.targets).astype(jnp.float32)
    return (correct * batch.weights).sum(), batch.weights.sum()


def by_class(
    model: Model, out_shardings: Any = None
) -> Callable[[Params, Rows], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns `evaluate(params, rows)`: for each domain the weight of rows classified right, by class, and of all rows.

    Both are float64 [C], for a classifier with C logits; sums over batches are exact for whole weights.

    Args:
      model: model to evaluate.
      out_shardings: of the sums; several processes need them replicated.
    """

    @functools.partial(jax.jit, out_shardings=out_shardings)
    def score(params: Params, batch: Batch) -> jax.Array:
        logits = model.apply(params, batch).logits
        own = (batch.targets[:, None] == jnp.arange(logits.shape[-1])[None]) * batch.weights[:, None]  # [B, C]
        right = (logits.argmax(-1) == batch.targets)[:, None]
        return jnp.stack([(own * right).sum(0), own.sum(0)], 1)  # [C, 2]

    def evaluate(params: Params, rows: Rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        pending = {domain: [score(params, batch) for batch in batches] for domain, batches in rows.items()}
        tables = {
            domain: np.sum(np.asarray(one, np.float64), axis=0) for domain, one in jax.device_get(pending).items()
        }
        return {domain: (table[:, 0], table[:, 1]) for domain, table in tables.items()}

    return evaluate


def domains(
    network: Model,
    rows: Rows,
    tokens_per_byte: Mapping[str, float] | None,
    everywhere: Any = None,
    made: tuple[Model, Callable[[Params, Batch], Params]] | None = None,
) -> Callable[[Params], dict[str, dict[str, Any]]]:
    """Returns `run(params)`: `loss` and `bits_per_byte`, and of a classifier `accuracy` and `classes`, of each domain.

    Args:
      network: the model.
      rows: held-out rows of each domain.
      tokens_per_byte: of each domain, see `bits_per_byte`; None for a classifier.
      everywhere: sharding of what is fetched; several processes need it replicated.
      made: of a network that makes another one for each task: that other, and (params, batch) -> its parameters. They
        are made once for each domain, not once for each batch.
    """
    model = network if made is None else made[0]
    measure = classified(model, everywhere) if tokens_per_byte is None else texts(model, tokens_per_byte)

    def run(params: Params) -> dict[str, dict[str, Any]]:
        if made is None:
            return measure(params, rows)
        parts = [measure(made[1](params, batches[0]), {name: batches}) for name, batches in rows.items()]
        return {key: {name: one for part in parts for name, one in part[key].items()} for key in parts[0]}

    return run


def texts(network: Model, tokens_per_byte: Mapping[str, float]) -> Callable[[Params, Rows], dict[str, dict[str, Any]]]:
    """Returns the evaluation of a language model."""
    score = make(network, cross_entropy)

    def run(params: Params, rows: Rows) -> dict[str, dict[str, Any]]:
        nats = score(params, rows)
        ratio = {name: tokens_per_byte[name] for name in nats}
        return {"loss": nats, "bits_per_byte": bits_per_byte(nats, ratio)}

    return run


def classified(network: Model, everywhere: Any = None) -> Callable[[Params, Rows], dict[str, dict[str, Any]]]:
    """Returns the evaluation of a classifier: the accuracy of every domain, and of every class of its rows."""
    loss, counted = make(network, cross_entropy), by_class(network, everywhere)

    def run(params: Params, rows: Rows) -> dict[str, dict[str, Any]]:
        found = counted(params, rows)
        accuracy = {name: float(right.sum() / total.sum()) for name, (right, total) in found.items()}
        classes = {
            name: {str(c): float(right[c] / total[c]) for c in np.flatnonzero(total)}
            for name, (right, total) in found.items()
        }
        return {"loss": loss(params, rows), "bits_per_byte": {}, "accuracy": accuracy, "classes": classes}

    return run


def bits_per_byte(losses: Mapping[str, float], tokens_per_byte: Mapping[str, float] | float = 1.0) -> dict[str, float]:
    """Returns nats per token as bits per byte of text: loss * (tokens / bytes) / ln 2.

    Args:
      losses: domain -> nats per token.
      tokens_per_byte: tokens with weight over the bytes that they stand for, of the held-out rows of each domain;
        1 for a byte tokenizer.
    """
    ratio = tokens_per_byte if isinstance(tokens_per_byte, Mapping) else dict.fromkeys(losses, tokens_per_byte)
    return {domain: float(loss * ratio[domain] / np.log(2.0)) for domain, loss in losses.items()}
