"""Adam steps on an FSDP x TP mesh, with a checkpoint on the way: fsdp_tp.py DIRECTORY FIRST SAVE LAST."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes

from jaxcl import mesh as meshes
from jaxcl import optim
from jaxcl.checkpoint import Checkpoints
from jaxcl.types import TrainState

AXES = {"down": ("mlp", "embed"), "up": ("embed", "mlp")}
ROWS = 8

processes.join()
directory, first, save, last = sys.argv[1], *map(int, sys.argv[2:])
tx = optim.make(lr=1e-2, clip=1.0)
asked = []


def init() -> TrainState:
    a, b = jax.random.split(jax.random.key(0))
    params = {"up": 0.2 * jax.random.normal(a, (8, 16)), "down": 0.2 * jax.random.normal(b, (16, 8))}
    memory = {"rows": jnp.zeros((16, 8))}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), memory)


def step(state: TrainState, x: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss(p: dict) -> jax.Array:
        return jnp.mean((jax.nn.gelu(x @ p["up"]) @ p["down"] - x) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    memory = {"rows": state.memory["rows"].at[(state.step * ROWS + jnp.arange(ROWS)) % 16].set(x)}
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, memory), value


def rows(number: int):
    def read(part: slice) -> np.ndarray:
        asked.append((part.start, part.stop))
        return np.random.default_rng(number).normal(size=(ROWS, 8)).astype(np.float32)[part]

    return read


mesh = meshes.make(fsdp=min(2, jax.device_count()), tensor=min(2, jax.device_count()))
abstract = jax.eval_shape(init)
shardings = meshes.state_shardings(mesh, AXES, abstract)
jitted = jax.jit(step, out_shardings=(shardings, meshes.replicated(mesh)), donate_argnums=0)
with Checkpoints(directory, every_steps=100) as checkpoints:
    restored = checkpoints.restore(meshes.with_shardings(abstract, shardings))
    assert (restored.step if restored else 0) == first
    state = restored.state if restored else jax.jit(init, out_shardings=shardings)()
    losses = []
    for number in range(first, last):
        state, value = jitted(state, meshes.place(mesh, rows(number), rows=ROWS))
        losses.append(float(meshes.fetch(value)))
        if number + 1 == save:
            checkpoints.save(save, state, {"written by": jax.process_count()})
everything = jax.jit(lambda s: s, out_shardings=meshes.replicated(mesh))(state)
leaves = [np.asarray(meshes.fetch(leaf)).ravel().tolist() for leaf in jax.tree.leaves(everything)]
host = restored.host if restored else {}
processes.report({"losses": losses, "leaves": leaves, "host": host, "asked": sorted(set(asked))})
