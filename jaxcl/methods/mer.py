r"""Meta-experience replay, algorithms 1, 6 and 7: SGD one example at a time over mixed batches, shrunk by Reptile.

    for each incoming example x:                                              K = batch, draws with replacement
      A <- theta
      repeat `steps` times:
        W <- theta;   for z in sequence(x, K draws from M):  theta <- theta - lr grad loss(theta, z)
        theta <- W + within (theta - W)
      theta <- A + across (theta - A);   M <- reservoir(M, x)

    algorithm   place of x in the sequence    within   across
        1       first                         beta     gamma
        6       last                          gamma    1
        7       random, its loss times s      gamma    1         (steps = 1)

Source: Riemer et al., 1810.11910, algorithms 1, 6, 7. For language models use `er` with `reptile` instead.
Memory: `capacity` rows and two copies of the parameters. Compute: B * steps * (K + 1) forward and backward passes of
one row, in sequence; draws that a memory with fewer than K rows cannot give are masked, not skipped.

Choices: the optimiser is SGD at `lr`, by definition; the optimiser of the run is not used and there is no optimiser
state. The incoming batch is a queue of examples. `reservoir="published"` repeats the authors' code, which stores row
n of the stream with probability N / (n + 1) where Vitter's is N / n. Their code for algorithm 7 also skips the update
on the first example of the stream; this one follows the paper.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import grad, tree
from jaxcl import memory as store
from jaxcl.compose import Setting
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Method, Metrics, Params, TrainState


class Plan(NamedTuple):
    """The random choices of one pass."""

    rows: Batch  # K rows drawn from memory
    count: jax.Array  # int32 []: how many of them exist
    place: jax.Array  # int32 [], in 0..count: position of the current example in the sequence


def plan(memory: Memory, batch: int, algorithm: int, key: Key) -> Plan:
    """Draws min(K, filled) rows with replacement and the place of the current example."""
    count = jnp.minimum(store.filled(memory), batch)
    drawn = store.draw(memory, batch, named(key, "rows"))
    chance = jax.random.randint(named(key, "place"), (), 0, count + 1)
    return Plan(drawn, count, {1: jnp.zeros_like(count), 6: count, 7: chance}[algorithm])


def sequence(
    setting: Setting, params: Params, row: Batch, plan: Plan, *, lr: float, s: float
) -> tuple[Params, tuple[jax.Array, grad.Losses]]:
    """Takes one SGD step for each row of the plan, the current `row` among them.

    Returns the parameters and, of the current row, float32 [3]: loss sum, weight and gradient norm; and other terms.
    """
    batch = plan.rows.task.shape[0]

    def losses(params: Params, rows: Batch) -> grad.Losses:
        output = setting.model.apply(params, rows)
        return {"loss": setting.loss(output, rows), **(output.terms or {})}

    def sgd(carry: tuple[Params, jax.Array], i: jax.Array) -> tuple[tuple[Params, jax.Array], grad.Losses]:
        params, told = carry
        now = i == plan.place
        drawn = jax.tree.map(lambda x: x[i - (i > plan.place)][None], plan.rows) if batch else row
        z = tree.where(now, row, drawn)
        values, grads = grad.value_and_grad(losses, params, z)
        rate = jnp.where(i <= plan.count, jnp.where(now, lr * s, lr), 0.0)
        moved = jax.tree.map(lambda p, g: (p - rate * g).astype(p.dtype), params, grads)
        own = jnp.stack([*values["loss"], tree.norm(grads)])
        terms = {name: value for name, value in values.items() if name != "loss"}
        return (moved, jnp.where(now, own, told)), jax.tree.map(lambda x: jnp.where(now, x, 0), terms)

    (params, told), terms = jax.lax.scan(sgd, (params, jnp.zeros(3)), jnp.arange(batch + 1))
    return params, (told, jax.tree.map(jnp.sum, terms))


def make(
    setting: Setting,
    *,
    algorithm: Literal[1, 6, 7] = 1,
    lr: float = 0.03,
    beta: float = 1.0,
    gamma: float = 1.0,
    batch: int = 5,
    steps: int = 1,
    s: float = 1.0,
    capacity: int = 200,
    reservoir: Literal["vitter", "published"] = "vitter",
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run; its optimiser is not used.
      algorithm: of the paper.
      lr: learning rate of the inner SGD.
      beta: share of the displacement kept within a batch; algorithm 1 only.
      gamma: share kept across batches (1) or within a batch (6, 7).
      batch: K, rows replayed beside each example.
      steps: batches per example; algorithms 1 and 6.
      s: factor of the current example's learning rate; algorithm 7 only.
      capacity: N, rows in memory.
      reservoir: exact, or with the off-by-one of the authors' code.

    Raises:
      UserError: an option out of range or of another algorithm.
    """
    _check(algorithm, lr=lr, beta=beta, gamma=gamma, batch=batch, steps=steps, s=s, capacity=capacity)
    within, across = (beta, gamma) if algorithm == 1 else (gamma, 1.0)
    extra = 1 if reservoir == "published" else 0

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, (), store.reservoir(setting.example, capacity))

    def learn(carry: tuple[Params, Memory], item: tuple[Batch, Key]) -> tuple[tuple[Params, Memory], Any]:
        (params, memory), (row, key) = carry, item
        row = jax.tree.map(lambda x: x[None], row)
        keys = jax.random.split(named(key, "plan"), steps)

        def one_pass(params: Params, key: Key) -> tuple[Params, Any]:
            after, told = sequence(setting, params, row, plan(memory, batch, algorithm, key), lr=lr, s=s)
            return tree.lerp(params, after, within), told

        after, told = jax.lax.scan(one_pass, params, keys)
        params = tree.lerp(params, after, across)
        return (params, store.write(memory, row, named(key, "write"), extra)), jax.tree.map(lambda x: x[0], told)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(key, batch.task.shape[0])
        (params, memory), (told, terms) = jax.lax.scan(learn, (state.params, state.memory), (batch, keys))
        total, weight, norm = told[:, 0].sum(), told[:, 1].sum(), told[:, 2].mean()
        metrics = {name: grad.mean(value.sum(), of.sum()) for name, (value, of) in terms.items()}
        metrics |= {"loss": grad.mean(total, weight), "grad_norm": norm, "weight": weight}
        return TrainState(state.step + 1, params, (), memory), metrics

    return Method(init, step, lambda state, batch, key: state)


def _check(algorithm: int, **options: float) -> None:
    """Raises UserError for an option out of range or foreign to the algorithm."""
    where = "config.method mer."
    for name, least in (("batch", 0), ("steps", 1), ("capacity", 1)):
        if options[name] < least:
            raise UserError(f"{where}{name}={options[name]}: must be at least {least}")
    for name in ("beta", "gamma"):
        if not 0 <= options[name] <= 1:
            raise UserError(f"{where}{name}={options[name]}: must lie in [0, 1]; it is the share that is kept")
    for name in ("lr", "s"):
        if options[name] <= 0:
            raise UserError(f"{where}{name}={options[name]}: must be positive")
    foreign = {1: ("s",), 6: ("beta", "s"), 7: ("beta", "steps")}[algorithm]
    for name in foreign:
        if options[name] != 1:
            raise UserError(f"{where}{name}={options[name]}: algorithm {algorithm} has no {name}; leave it out")
