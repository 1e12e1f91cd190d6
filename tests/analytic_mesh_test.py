"""Analytic runs on a mesh: memory is cut by rows, a step moves rows alone, figures are those of one device."""

import importlib

import jax
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P
from ridge_mesh_test import wires

from jaxcl import main, program, train, tree

QUICK = True
D = 96  # no other array of the run has as many numbers as the matrix
CUT = ("data", "fsdp")
PARTS = ("acil", "fecam")
OPTIONS = {"acil": "acil(gamma=1.0, every=3, how='recursion')"}


def build(part, method=None, **mesh):
    """Returns a part of configs/analytic.py, made small."""
    config = main.plain(importlib.import_module("configs.analytic").get_config(part))
    config["sources"] = {
        name: one | {"count": 48, "held_out": 20, "size": 8} for name, one in config["sources"].items()
    }
    config["model"]["inputs"] = 64
    if "width" in config["adapter"]:
        config["adapter"]["width"] = D
    config["stream"] = {"batch": 16, "stages": [{**one, "steps": 3} for one in config["stream"]["stages"][:2]]}
    config |= {"mesh": mesh, "method": method or OPTIONS.get(part, config["method"])}
    return program.build(**train.split(config)[1])


def finished(made):
    """Trains to the end; returns the losses, what was told last, the accuracies and the state."""
    state, losses = made.create(), []
    for step in range(made.stream.total_steps):
        state, told = made.step(state, made.place(step))
        losses.append(float(told["loss"]))
        if step + 1 in made.stream.boundaries:
            state = made.end_task(state, made.place_task(made.stream.boundaries.index(step + 1)))
    return losses, made.evaluate(state.params)["accuracy"], state


@pytest.mark.parametrize("part", PARTS)
def test_a_run_on_a_mesh_is_that_of_one_device(part):
    four = build(part, data=2, fsdp=2, devices=jax.devices()[:4])
    one = build(part, data=1, devices=jax.devices()[:1])
    (losses, accuracy, state), (wanted, right, alone) = finished(four), finished(one)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    assert accuracy == right
    cut = {}
    for (name, leaf), like in zip(tree.named_leaves(state.memory), jax.tree.leaves(alone.memory), strict=True):
        size = np.abs(like).max(initial=0)
        share = 1e-3 if name == "inner/bound" else 2e-5  # a residual in units of rounding has few digits
        np.testing.assert_allclose(leaf, like, rtol=0, atol=share * size if "low" not in name else 1e-6 * size + 1e-6)
        cut[name.removeprefix("inner/")] = leaf.sharding
    if part in ("acil", "ranpac", "slda"):
        names = [f"moments/{of}/{half}" for of in ("gram", "cross") for half in ("high", "low")]
        names += ["inverse/r", "inverse/w"] if part == "acil" else []
        assert all(cut[name].spec == P(CUT, None) for name in names)
        assert cut["moments/gram/high"].shard_shape((D, D)) == (D // 4, D)
        assert cut["moments/counts/high"].spec == P()


@pytest.mark.parametrize("how", ["solve", "recursion"])
def test_no_matrix_ever_travels(how):
    """Neither in a step nor when weights are solved for, nor when the recursion starts anew."""
    made = build("acil", method=f"acil(gamma=1.0, how={how!r})", data=2, fsdp=2, devices=jax.devices()[:4])
    for program_, rows in ((made.step, made.place(0)), (made.end_task, made.place_task(0))):
        sent = wires(program_.lower(made.abstract, rows).compile(compiler_options=toys.QUICK).as_text())
        assert max(sent) < D * D
        assert program_ is made.end_task or 16 * D in sent  # the features of a batch
        assert program_ is made.step or D * D // 4 in sent  # a panel of the factor
