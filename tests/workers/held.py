"""Saves a state again and again: held.py FOLDER. Reports its bytes, and those of the process after each save."""

import sys
from functools import partial

import processes

processes.join()
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jaxcl import allocator  # noqa: E402
from jaxcl.checkpoint import Checkpoints  # noqa: E402
from jaxcl.types import TrainState  # noqa: E402


def held() -> int:
    """Returns the bytes of memory that this process has."""
    with open("/proc/self/statm") as pages:
        return 4096 * int(pages.read().split()[1])


@partial(jax.jit, donate_argnums=0)
def step(params):
    return jax.tree.map(lambda x: 1.0001 * x + jnp.tanh(x @ jnp.ones((100, 100))), params)


before = held()
allocator.keep_pages()
params = step({name: jax.random.normal(jax.random.key(i), (100_000, 100)) for i, name in enumerate("abc")})
found = []
with Checkpoints(sys.argv[1], keep=1, background=False) as checkpoints:
    for i in range(8):
        checkpoints.save(i, TrainState(jnp.int32(i), params, ()), {})
        for _ in range(4):
            params = step(params)
        jax.block_until_ready(params)
        found.append(held() - before)
processes.report([sum(x.nbytes for x in params.values()), found])
