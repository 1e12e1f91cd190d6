"""Reports which arrays are not the same on all processes: every one has its own `w`."""

import jax
import numpy as np
import processes
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl import mesh as meshes
from jaxcl import watch

processes.join()
sharding = NamedSharding(meshes.make(), PartitionSpec())


def everywhere(value: float) -> jax.Array:
    """Returns an array that claims to be a copy of one thing on every device."""
    return jax.make_array_from_process_local_data(sharding, np.full(3, value, np.float32), (3,))


processes.report(watch.differing({"a": everywhere(1.0), "w": everywhere(jax.process_index())}))
