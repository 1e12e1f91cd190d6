"""What updates of ridge sums cost: operations, memory beside the state, and nothing of its size that is new."""

import jax
import jax.numpy as jnp
import pytest
from ridge_test import work

from jaxcl.ridge import moments, recursion

D, B, C = 2048, 64, 10


def of(kind, *shape):
    return jax.ShapeDtypeStruct(shape, kind)


STATES = {
    "update": recursion.Inverse(of(jnp.float32, D, D), of(jnp.float32, D, C)),
    "moments": jax.eval_shape(lambda: moments.empty(D, C)),
}
BATCH = of(jnp.float32, B, D), of(jnp.int32, B), of(jnp.float32, B)
SEVERAL = [of(x.dtype, 5, *x.shape) for x in BATCH]
WHOLE = 4 * D * D  # bytes of a float32 matrix
CASES = {  # what, program, state, rows, operations per batch, temporary bytes
    "update": (recursion.update, STATES["update"], BATCH, 1, 0.1 * WHOLE),
    "stream": (recursion.stream, STATES["update"], SEVERAL, 5, 0.24 * WHOLE),
    "moments": (moments.add, STATES["moments"], BATCH, 1, 0.3 * WHOLE),
}


@pytest.mark.parametrize("count", [1, 4])
def test_a_large_inverse_is_written_in_place(count):
    """XLA may compute a block anew where it is read, from an old matrix kept for that: at this size it would."""
    d, b = 5000, 256
    state = recursion.Inverse(of(jnp.float32, d, d), of(jnp.float32, d, 100))
    batch = [of(kind, count, b, *shape) for kind, *shape in ((jnp.float32, d), (jnp.int32,), (jnp.float32,))]
    function = recursion.stream if count > 1 else lambda state, *rows: recursion.update(state, *(x[0] for x in rows))
    compiled = jax.jit(function, donate_argnums=0).lower(state, *batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.3 * 4 * d * d


@pytest.mark.parametrize("name", CASES)
def test_a_program_keeps_its_budget(name):
    function, state, batch, count, limit = CASES[name]
    traced = jax.jit(function, donate_argnums=0).trace(state, *batch)
    update = 3.125 * D * D * B + 3 * D * B * B + 4 * D * B * C
    least = count * (1.125 * D * D * B if name == "moments" else update)
    assert 0.9 * least <= work(traced.jaxpr.jaxpr) <= 1.1 * least
    compiled = traced.lower().compile()
    memory, own = compiled.memory_analysis(), sum(x.size * 4 for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= own - 16
    assert memory.temp_size_in_bytes <= limit
