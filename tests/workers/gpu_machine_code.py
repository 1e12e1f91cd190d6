"""Compiles kernels for an H200 on a machine without one; their machine code goes to FOLDER.

Arguments: FOLDER, and a width of attention heads (128) or `ridge`.
"""

import os
import re
import sys

os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_SASS_CTRL="1", MOSAIC_GPU_DUMP_TO=sys.argv[1])
os.environ.update(JAX_PLATFORMS="cpu")

import attention_gpu_test
import jax
import ridge_stream_test
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxcl.kernels.ridge import hopper

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""

what = sys.argv[2] if len(sys.argv) > 2 else "128"
topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
place = SingleDeviceSharding(topology.devices[0])
if what == "ridge":
    both, shapes = hopper.downdate, ridge_stream_test.shapes(8192, 200, 1)[:2]
else:
    both, shapes = attention_gpu_test.programs(int(what), 8192, True)
shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
done = jax.jit(both, donate_argnums=0 if what == "ridge" else ()).trace(*shapes).lower().compile()
copies = re.findall(r"= f32\[8192,8192\]\S* copy", done.as_text())
print(done.memory_analysis().alias_size_in_bytes, len(copies))
