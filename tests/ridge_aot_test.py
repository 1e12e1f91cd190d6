"""Updates of ridge sums by the real TPU compiler, which needs libtpu and no TPU: in place; on a mesh rows travel."""

import pytest
from attention_aot_test import compiled, missing

KERNELS = """
import json, jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxcl.kernels import ridge

chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])
D, B = 8192, 128
matrix, rows = (jax.ShapeDtypeStruct((n, D), jnp.float32, sharding=chip) for n in (D, B))
found = {}
cases = {
    "gram_update": (ridge.Pair(matrix, matrix), ridge.Pair(rows, rows)),
    "downdate": (matrix, rows),
    "stream": (matrix, rows, rows),
}
for name, operands in cases.items():
    done = jax.jit(getattr(ridge, name), donate_argnums=0).trace(*operands).lower().compile()
    memory, text = done.memory_analysis(), done.as_text()
    calls = text.count('custom_call_target="tpu_custom_call"')
    copies = text.count(f"f32[{D},{D}]{{1,0:T(8,128)}} copy(")
    found[name] = calls, memory.alias_size_in_bytes, memory.temp_size_in_bytes, copies
print(json.dumps(found))
"""


MESH = """
import json, jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxcl import mesh as meshes
from jaxcl.aot import hlo
from jaxcl.ridge import moments, recursion, solve
from jaxcl.types import TrainState

D, B, C = 16384, 512, 100
mesh = meshes.make(data=2, fsdp=-1, devices=topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
of = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)
memory = {
    "moments": jax.eval_shape(lambda: moments.empty(D, C)),
    "inverse": recursion.Inverse(of(jnp.float32, D, D), of(jnp.float32, D, C)),
}
cuts = meshes.state_shardings(mesh, {}, TrainState(of(jnp.int32), {}, (), memory)).memory
batch = [of(jnp.float32, B, D), of(jnp.int32, B), of(jnp.float32, B)]
batch = meshes.with_shardings(batch, [meshes.batch_sharding(mesh)] * 3)

def learn(memory, x, labels, weights):
    inverse = recursion.update(memory["inverse"], x, labels, weights)
    return {"moments": moments.add(memory["moments"], x, labels, weights), "inverse": inverse}

run = jax.jit(meshes.on(mesh, learn), out_shardings=cuts, donate_argnums=0)
done = run.trace(meshes.with_shardings(memory, cuts), *batch).lower().compile()
sent = max(kind["bytes"] / kind["times"] for kind in hlo.read(done.as_text())["collectives"].values())
found = done.memory_analysis()
sums = meshes.with_shardings(memory["moments"], cuts["moments"])
solved = jax.jit(meshes.on(mesh, lambda m: solve.weights(m, 0.1).weights)).trace(sums).lower().compile()
panels = max(kind["bytes"] / kind["times"] for kind in hlo.read(solved.as_text())["collectives"].values())
spare = solved.memory_analysis().temp_size_in_bytes
print(json.dumps([sent, found.alias_size_in_bytes, found.temp_size_in_bytes, panels, spare]))
"""


@pytest.mark.skipif(missing("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_updates_compile_for_a_tpu_in_place():
    matrix, rows = 4 * 8192 * 8192, 4 * 128 * 8192
    for name, (calls, alias, temporary, copies) in compiled(KERNELS).items():
        assert calls == 1
        assert alias == matrix * (2 if name == "gram_update" else 1)
        assert temporary < 8 * rows
        assert copies == 0


@pytest.mark.skipif(missing("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_on_a_mesh_of_tpus_a_device_has_its_rows_and_rows_travel():
    sent, alias, temporary, panels, spare = compiled(MESH)
    whole, rows = 4 * 16384 * 16384, 4 * 512 * 16384
    assert sent <= rows
    assert 3 * whole / 4 <= alias <= 3.2 * whole / 4
    assert temporary < 6 * rows
    assert panels < whole / 50  # a factor goes by panels, and no matrix travels to be solved
    assert spare < 2 * whole
