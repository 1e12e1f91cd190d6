"""Saves at every step from where it finds itself until killed or done: saves.py DIRECTORY COUNT."""

import sys

import jax
import jax.numpy as jnp
import processes
from absl import app

from jaxcl.checkpoint import Checkpoints
from jaxcl.types import TrainState


def make(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.full((512, 64), step, jnp.float32), "v": jnp.arange(64) * step}, ())


def main(argv: list[str]) -> None:
    with Checkpoints(argv[1], keep=2) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: make(0)))
        first = restored.step if restored else 0
        if restored:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), restored.state, make(first))
            assert all(jax.tree.leaves(same)), f"checkpoint {first} holds another state"
            assert restored.host == {"step": first}
        print(f"saving from {first}", flush=True)
        advance = jax.jit(lambda s: jax.tree.map(lambda a, b: a + b, s, make(1)), donate_argnums=0)
        state = make(first)
        for step in range(first + 1, first + 1 + int(argv[2])):
            state = advance(state)
            checkpoints.save(step, state, {"step": step})
    processes.report(first)


if __name__ == "__main__":
    processes.join()
    app.run(main, sys.argv)
