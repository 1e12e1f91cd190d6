"""The TPU kernels of attention by the real compiler, which needs libtpu and no TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxcl.kernels.attention import tpu

chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])
shape = lambda s, t: jax.ShapeDtypeStruct(s, t, sharding=chip)
q, segments = shape((1, 512, 2, 128), jnp.bfloat16), shape((1, 512), jnp.int32)
static = {"causal": True, "scale": 0.1, "blocks": tpu.Blocks(256, 256, 256)}

def run(q, k, v, segments, d_mixed):
    mixed, lse = tpu.forward(q, k, v, segments, None, **static)
    return mixed, tpu.backward(q, k, v, segments, None, None, mixed, lse, d_mixed, None, **static)

done = jax.jit(run).trace(q, q, q, segments, q).lower().compile()
calls = done.as_text().count('custom_call_target="tpu_custom_call"')
print(json.dumps([calls, done.memory_analysis().temp_size_in_bytes]))
"""


BOTH = """
import json, jax, jax.numpy as jnp
from jaxcl.aot import topology
from jaxcl.kernels.attention import attention

found = {}
for name in ("v5p:1x1x1", "h200:1"):
    chip = jax.sharding.SingleDeviceSharding(topology.devices(topology.parse(name))[0])
    q = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16, sharding=chip)
    run = jax.jit(lambda q, k, v: attention(q, k, v, implementation="kernel"))
    text = run.trace(q, q, q).lower().compile().as_text()
    found[name] = [text.count('custom_call_target="' + call) for call in ("tpu_custom_call", "mosaic_gpu")]
print(json.dumps(found))
"""


CUT = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxcl import mesh as meshes
from jaxcl.aot import topology
from jaxcl.kernels.attention import attention

mesh = meshes.make(context=4, data=1, devices=topology.devices(topology.parse("v5e:2x2")))
wide, rows = (NamedSharding(mesh, PartitionSpec(meshes.BATCH, *names)) for names in (("context",), ()))
q, k = (jax.ShapeDtypeStruct((1, 2048, heads, 128), jnp.bfloat16, sharding=wide) for heads in (4, 2))
segments = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=rows)

def run(q, k, v, segments):
    return jax.grad(lambda *x: jnp.sum(attention(*x, segments=segments, window=300) ** 2), (0, 1, 2))(q, k, v)

step = jax.jit(meshes.on(mesh, run), out_shardings=(wide,) * 3)
text = step.trace(q, k, k, segments).lower().compile().as_text()
print(json.dumps([text.count(x) for x in ('custom_call_target="tpu_custom_call"', " all-gather(", " reduce-scatter(")]))
"""


def compiled(script):
    """Runs in a process of its own, as the compilers read their settings from the environment when they are loaded."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    root = Path(__file__).parent.parent
    environment = {**os.environ, **settings, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def missing(*modules):
    return any(importlib.util.find_spec(name) is None for name in modules)


@pytest.mark.skipif(missing("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_compiles_for_a_tpu():
    kernels, temporaries = compiled(SCRIPT)
    assert kernels == 3
    assert temporaries < 12 * 512 * 2 * 128 * 4  # a few arrays of the size of q in float32, no scores


@pytest.mark.skipif(missing("libtpu", "jax_cuda13_plugin"), reason="needs both compilers: pip install -e '.[aot]'")
def test_one_process_compiles_the_kernels_of_both_platforms():
    tpu, gpu = compiled(BOTH).values()
    assert tpu[0] == 1
    assert tpu[1] == 0
    assert gpu[0] == 0
    assert gpu[1] >= 1


@pytest.mark.skipif(missing("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_queries_that_are_a_part_of_the_row_compile_for_four_chips():
    """Two pieces of the queries, one kernel forward and two backward for each; keys and values travel once."""
    calls, gathered, scattered = compiled(CUT)
    assert calls == 6
    assert gathered == scattered == 2
