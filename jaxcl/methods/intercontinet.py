r"""InterContiNet: boxes of weights that only ever shrink; each task moves the centre inside, then contracts the box.

    first (1 - contraction) I steps    shift <- optimiser on CE(z)               z: logits at the centre
    last  contraction I steps          scale <- optimiser on CE(worst)           while robust < threshold * accuracy
    task over                          the box becomes the whole world of the next task

Source: Wolczyk et al. 2022 (ICML), sections 3 and 4, and its published code; needs `config.adapter='weight_boxes'`.
Memory: four numbers and two moments for every weight, and the ledger. Compute: one pass in the first phase, a pass of
intervals in both (the branches of one compiled step).

Choices: robust and plain accuracy are running means of the batches (0.9 of the old). The step is one optimiser on shift
and scale; the part that does not move in a phase is held, so that no moment moves it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxcl import grad, tree
from jaxcl.compose import Setting
from jaxcl.methods.hyperinterval import steps_of
from jaxcl.models import boxed as boxes
from jaxcl.models import weight_boxes
from jaxcl.models.boxed import LEDGER
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Method, Metrics, Output, Params, TrainState

KEEP = 0.9  # share of the old in a running mean
SHARES = ("right", "robust")  # of the rows of a batch


def make(
    setting: Setting,
    *,
    steps: int | None = None,
    contraction: float = 0.2,
    threshold: float = 0.9,
    project: bool = True,
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model of boxes.
      steps: I, steps of a task; None = those of the shortest stage.
      contraction: share of them, at the end, in which the box contracts.
      threshold: of the accuracy, up to which the certified accuracy is trained.
      project: whether the ledger is kept; boxes nest with and without it.

    Raises:
      UserError: an option out of range, or a model without such boxes.
    """
    made, length = _checked(setting, contraction, threshold), steps_of(setting, steps, "intercontinet")
    return _method(setting, made, round(length * (1 - contraction)), threshold, project)


def _method(setting: Setting, made: boxes.Boxed, first: int, threshold: float, project: bool) -> Method:
    """Returns the method; `first` steps of a task move the centre."""

    def init(params: Params) -> TrainState:
        moving = {name: params["generator"][name] for name in ("shift", "scale")}
        memory = {"age": jnp.zeros((), jnp.int32), "right": jnp.zeros(()), "robust": jnp.zeros(())}
        return TrainState(jnp.zeros((), jnp.int32), params, setting.tx.init(moving), memory)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        generator, memory = state.params["generator"], state.memory
        ledger = {**state.params[LEDGER], "current": batch.task[0].astype(jnp.float32)}
        contracting = memory["age"] >= first
        moving = {name: generator[name] for name in ("shift", "scale")}

        def losses(part: Params, rows: Batch) -> grad.Losses:
            params = {**state.params, "generator": {**generator, **part}, LEDGER: ledger}
            output = made.model.apply(params, rows)
            total, weight = setting.loss(output, rows)
            bound = boxes.logits(made, params, boxes.box(made, params, rows.task[0]), rows)
            bad, _ = setting.loss(Output(boxes.worst(bound, rows)), rows)
            count = [
                rows.weights * one for one in (output.logits.argmax(-1) == rows.targets, boxes.certain(bound, rows))
            ]
            told = {name: (jax.lax.stop_gradient(jnp.sum(c)), weight) for name, c in zip(SHARES, count, strict=True)}
            return {"loss": (jnp.where(contracting, bad, total), weight), **told}

        values, grads = grad.value_and_grad(losses, moving, batch)
        told = {name: grad.mean(*value) for name, value in values.items()}
        mean = {n: jnp.where(memory["age"] == 0, told[n], KEEP * memory[n] + (1 - KEEP) * told[n]) for n in SHARES}
        updates, opt_state = setting.tx.update(grads, state.opt_state, moving)
        moved: Params = optax.apply_updates(moving, updates)
        go = {"shift": ~contracting, "scale": contracting & (mean["robust"] < threshold * mean["right"])}
        moved = {name: jnp.where(go[name], moved[name], moving[name]) for name in moving}
        metrics = told | {"grad_norm": tree.norm(grads), "weight": values["loss"][1]}
        params = {**state.params, "generator": {**generator, **moved}, LEDGER: ledger}
        return TrainState(state.step + 1, params, opt_state, {"age": memory["age"] + 1, **mean}), metrics

    def end_task(state: TrainState, batch: Batch, key: Key) -> TrainState:
        del key
        task, params = batch.task[0, 0], state.params
        params = boxes.close(made, params, task) if project else boxes.over(params, task)
        params = {**params, "generator": weight_boxes.settled(params["generator"])}
        return TrainState(state.step, params, state.opt_state, {**state.memory, "age": jnp.zeros((), jnp.int32)})

    return Method(init, step, end_task)


def _checked(setting: Setting, contraction: float, threshold: float) -> boxes.Boxed:
    """Returns the model of boxes, or raises UserError."""
    made = setting.boxed
    if made is None or not made.universal or "shift" not in made.model.axes["generator"]:
        raise UserError("config.method='intercontinet': contracts boxes of weights; set config.adapter='weight_boxes'")
    for name, value in (("contraction", contraction), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"config.method intercontinet.{name}={value}: must lie in [0, 1]; it is a share")
    boxes.check_target(made.target, setting.example)
    return made
