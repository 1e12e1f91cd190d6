r"""The anchor of CPO: hold on to the parameters that earlier tasks moved most, and to no others.

    L + strength mean_{j in mask} (theta_j - reference_j)^2
    at the end of a task:   mask <- mask or top share of |theta - reference|, tensor by tensor;   reference <- theta

Source: "RL Forgets!", 2607.04364, and its code. The mean is over the masked entries of all tensors, with one divisor,
so the pull on a single parameter falls as the model grows. Nothing acts before the end of the first task.

Memory: a copy of the parameters and a byte for each of them. The reference is also where a task starts, so one copy
serves the penalty and the mask. Compute: one pass over the parameters a step, 32 at the end of a task.

Choices: the number of entries is rounded and at least 1. Entries as large as the smallest of them count too; those that
did not move never do. Layers and experts that are stacked in one array are tensors of their own, each of fewer than
2^31 entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.compose import Part, Setting
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Memory, Output, Params

STACKED = ("layers", "expert")  # axes along which an array holds several tensors


def make(setting: Setting, *, strength: float = 100.0, share: float = 0.1) -> Part:
    """Returns the penalty.

    Args:
      setting: of the run.
      strength: factor of the mean squared distance of the masked entries.
      share: of the entries of a tensor that each task masks.

    Raises:
      UserError: an option out of range.
    """
    if strength < 0:
        raise UserError(f"config.method cpo.strength={strength}: must not be negative")
    if not 0 < share <= 1:
        raise UserError(f"config.method cpo.share={share}: must lie in (0, 1]; 0.1 masks a tenth of each tensor")

    def init(params: Params) -> Memory:
        mask = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
        return {"reference": jax.tree.map(jnp.copy, params), "mask": mask}

    def loss(memory: Memory, params: Params, output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
        del output, rows

        def leaf(p: jax.Array, r: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(m, jnp.square(p - r), 0.0))

        squares = jax.tree.leaves(jax.tree.map(leaf, params, memory["reference"], memory["mask"]))
        # Counted in integers within an array: a sum of that many ones in float32 would not be exact.
        counts = [jnp.sum(m, dtype=jnp.int32).astype(jnp.float32) for m in jax.tree.leaves(memory["mask"])]
        return strength * jnp.sum(jnp.stack(squares)), jnp.sum(jnp.stack(counts))

    def end_task(memory: Memory, params: Params, batch: Batch, key: Key) -> Memory:
        del batch, key

        def leaf(m: jax.Array, p: jax.Array, r: jax.Array, axes: Sequence[str | None]) -> jax.Array:
            return m | largest(jnp.abs(p - r), share, tuple(i for i, name in enumerate(axes) if name not in STACKED))

        mask = jax.tree.map(leaf, memory["mask"], params, memory["reference"], setting.model.axes)
        return {"reference": jax.tree.map(jnp.copy, params), "mask": mask}

    # A penalty of 0 would still change the order in which the compiler adds up the gradient.
    return Part(init, loss=loss if strength > 0 else None, end_task=end_task)


def largest(x: jax.Array, share: float, within: tuple[int, ...]) -> jax.Array:
    """Returns which entries are the largest `share` of their tensor, bool like `x`; see the module on ties.

    The threshold is found bit by bit, by counting alone, so an array that is cut over devices is never gathered.

    Args:
      x: not negative; float32 decides.
      share: in (0, 1].
      within: the dimensions of one tensor; the others tell tensors apart.
    """
    count = max(1, round(share * math.prod(x.shape[i] for i in within)))
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)  # ordered as the numbers are

    def raise_(i: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | jnp.left_shift(jnp.int32(1), jnp.int32(30) - i.astype(jnp.int32))
        enough = jnp.sum(bits >= trial, axis=within, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(enough, trial, threshold)

    shape = tuple(1 if i in within else size for i, size in enumerate(x.shape))
    threshold = jax.lax.fori_loop(0, 31, raise_, jnp.zeros(shape, jnp.int32))
    return (bits >= threshold) & (bits > 0)
